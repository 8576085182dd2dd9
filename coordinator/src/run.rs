//! Runs a plan on a node: grants leases, commits what comes back, until nothing is left.
//!
//! One thread per slot of the node, all on one `JobState`. A network version replaces the threads by streams and
//! keeps the rest: results are committed to the source first, then the state learns of them.

use crate::{CoordinatorError, JobSource};
use halfstep_work::{
    Done, Event, Failure, FailureClass, JobState, LayerId, Lease, Node, NodeId, Plan, Progress, Rounding,
    Source, Task, TaskPhase,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// In one process nobody can be lost, so a lease never lapses.
const LEASE_MS: u64 = u64::MAX;
/// How often an idle slot looks at the cancel flag.
const IDLE_POLL: Duration = Duration::from_millis(100);

/// What happened, for whoever shows it.
#[derive(Clone, Debug)]
pub enum RunEvent {
    /// A task finished.
    Task {
        /// Its phase.
        phase: TaskPhase,
        /// Seconds of one slot.
        seconds: f64,
        /// Where the job stands now.
        progress: Progress,
    },
    /// All chunks of a layer are decided.
    Solved {
        /// Which.
        layer: LayerId,
        /// Its chunks in order.
        roundings: Vec<Arc<Rounding>>,
        /// Since its first chunk was begun.
        seconds: f64,
    },
    /// A layer is given up and keeps its weights.
    Failed {
        /// Which.
        layer: LayerId,
        /// Why.
        failure: Failure,
    },
}

struct Shared<'a> {
    plan: &'a Plan,
    node: &'a dyn Node,
    source: &'a JobSource,
    observe: &'a (dyn Fn(RunEvent) + Sync),
    cancel: &'a AtomicBool,
    state: Mutex<JobState>,
    broken: Mutex<Option<Failure>>,
    changed: Condvar,
    started: Instant,
}

/// Runs the whole plan on one node.
///
/// # Errors
/// The failure that ended the job; `Cancelled` when `cancel` was raised.
pub fn run(
    plan: &Arc<Plan>,
    node: &dyn Node,
    source: &Arc<JobSource>,
    cancel: &AtomicBool,
    observe: &(dyn Fn(RunEvent) + Sync),
) -> Result<JobState, CoordinatorError> {
    let shared_source: Arc<dyn Source> = Arc::clone(source) as Arc<dyn Source>;
    node.open(Arc::clone(plan), shared_source)?;
    let shared = Shared {
        plan,
        node,
        source,
        observe,
        cancel,
        state: Mutex::new(JobState::new(Arc::clone(plan))),
        broken: Mutex::new(None),
        changed: Condvar::new(),
        started: Instant::now(),
    };
    std::thread::scope(|scope| {
        for _ in 0..node.describe().slots.max(1) {
            scope.spawn(|| shared.work());
        }
    });
    if let Some(failure) = lock(&shared.broken).take() {
        return Err(failure.into());
    }
    let state = shared.state.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    if cancel.load(Ordering::Relaxed) {
        return Err(Failure::new(FailureClass::Cancelled, "interrupted, nothing was written").into());
    }
    match state.fatal() {
        Some(failure) => Err(failure.clone().into()),
        None => Ok(state),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Shared<'_> {
    fn lock(&self) -> MutexGuard<'_, JobState> {
        lock(&self.state)
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn work(&self) {
        while let Some(lease) = self.next_lease() {
            let begun = Instant::now();
            let outcome = self.execute(&lease);
            self.settle(&lease, outcome, begun.elapsed().as_secs_f64());
        }
    }

    /// A panic below is a bug, but it must not leave the other slots waiting for ever.
    fn execute(&self, lease: &Lease) -> Result<Done, Failure> {
        let attempt = std::panic::AssertUnwindSafe(|| self.node.execute(lease));
        std::panic::catch_unwind(attempt).unwrap_or_else(|_| {
            Err(Failure::new(FailureClass::Internal, format!("{:?}: the node panicked", lease.task)))
        })
    }

    fn next_lease(&self) -> Option<Lease> {
        let mut state = self.lock();
        loop {
            if state.is_finished() || self.cancel.load(Ordering::Relaxed) || lock(&self.broken).is_some() {
                self.changed.notify_all();
                return None;
            }
            if let Some(event) = state.grant(NodeId(0), self.now_ms(), LEASE_MS) {
                let Event::Granted { lease, .. } = &event else { return None };
                let lease = lease.clone();
                if let Err(refused) = state.apply(event) {
                    // A proposal that the state refuses would be refused for ever.
                    let mut broken = lock(&self.broken);
                    broken.get_or_insert(Failure::new(
                        FailureClass::Internal,
                        format!("own grant refused: {refused}"),
                    ));
                    self.changed.notify_all();
                    return None;
                }
                return Some(lease);
            }
            state = match self.changed.wait_timeout(state, IDLE_POLL) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    fn settle(&self, lease: &Lease, outcome: Result<Done, Failure>, seconds: f64) {
        if let Ok(Done::Solved(rounding)) = &outcome {
            self.source.commit(Arc::clone(rounding));
        }
        let event = match outcome {
            Ok(done) => Event::Completed { lease: lease.id, done },
            Err(failure) => Event::Failed { lease: lease.id, failure },
        };
        let mut state = self.lock();
        let known_failures = state.failed_layers().len();
        if state.apply(event).is_err() {
            return;
        }
        let news = self.news(&state, lease, known_failures, seconds);
        // Waiting slots must see the commit of a failed layer before they can be granted the next stage.
        for event in &news {
            if let RunEvent::Failed { layer, .. } = event {
                self.source.give_up(*layer);
            }
        }
        drop(state);
        self.changed.notify_all();
        news.into_iter().for_each(self.observe);
    }

    fn news(&self, state: &JobState, lease: &Lease, known_failures: usize, seconds: f64) -> Vec<RunEvent> {
        let mut news =
            vec![RunEvent::Task { phase: lease.task.phase(), seconds, progress: state.progress() }];
        if let Some(layer) = lease.task.layer() {
            if state.failed_layers().len() > known_failures
                && let Some(failure) = state.failed_layers().get(&layer)
            {
                news.push(RunEvent::Failed { layer, failure: failure.clone() });
            } else if matches!(lease.task, Task::Solve { .. })
                && let Some(roundings) = state.roundings(layer)
            {
                let seconds = roundings.iter().map(|r| r.report.seconds).sum();
                debug_assert_eq!(roundings.len(), self.plan.layer(layer).chunks.len());
                news.push(RunEvent::Solved { layer, roundings, seconds });
            }
        }
        news
    }
}
