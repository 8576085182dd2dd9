//! Leases in this node's hands: waiting for a worker, worked on, or done and not yet acknowledged.
//!
//! ```text
//!   granted -> Waiting -> Working -> Reporting -> gone (verdict)
//!                 |           |          |
//!                 +-----------+----------+-- abandoned (fenced, revoked, job closed): the outcome is nobody's
//! ```
//! Not here: the work (`workers`), the report (`report`).

use halfstep_work::{Grant, JobId, Lease, LeaseId, Watch};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tracing::{Span, info_span};

/// One lease.
pub(super) struct InHand {
    pub(super) job: JobId,
    pub(super) grant: Grant,
    /// Around all records about it.
    pub(super) span: Span,
    progress: AtomicU64,
    /// Moves while any worker does.
    all_progress: Arc<AtomicU64>,
    queued: AtomicBool,
    working: AtomicBool,
    reporting: AtomicBool,
    abandoned: AtomicBool,
}

impl InHand {
    /// `epoch`: the incarnation of the coordinator that granted it.
    pub(super) fn new(job: JobId, epoch: u64, grant: Grant) -> Self {
        let Lease { id, node, attempt, task } = &grant.lease;
        let span = info_span!("lease", %job, lease = id.0, %task, attempt, epoch, %node);
        let flag = || AtomicBool::new(false);
        let (working, reporting, abandoned) = (flag(), flag(), flag());
        let (progress, all_progress, queued) = (AtomicU64::new(0), Arc::default(), AtomicBool::new(true));
        Self { job, grant, span, progress, all_progress, queued, working, reporting, abandoned }
    }

    pub(super) fn id(&self) -> LeaseId {
        self.grant.lease.id
    }

    /// Its outcome is of no interest any more.
    pub(super) fn abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Claims the report: true for the first who asks. After that the outcome is settled.
    pub(super) fn claim_report(&self) -> bool {
        !self.reporting.swap(true, Ordering::AcqRel)
    }

    /// A counter that stands still only while a worker does. Waiting for an answer is no standstill, nor is waiting for a
    /// worker, unless all workers stand still.
    fn told_progress(&self) -> u64 {
        if self.queued.load(Ordering::Relaxed) {
            return self.all_progress.load(Ordering::Relaxed);
        }
        if !self.working.load(Ordering::Relaxed) {
            self.progress.fetch_add(1, Ordering::Relaxed);
        }
        self.progress.load(Ordering::Relaxed)
    }
}

impl Watch for InHand {
    fn progress(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
        self.all_progress.fetch_add(1, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.abandoned() || self.reporting.load(Ordering::Acquire)
    }
}

/// All of them.
#[derive(Default)]
pub(super) struct Leases {
    inner: Mutex<Inner>,
    changed: Condvar,
    progress: Arc<AtomicU64>,
}

#[derive(Default)]
struct Inner {
    all: BTreeMap<LeaseId, Arc<InHand>>,
    waiting: VecDeque<Arc<InHand>>,
    stopped: bool,
}

impl Leases {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a lease in hand; one that is there already stays as it is.
    pub(super) fn take(&self, lease: InHand) {
        let mut inner = self.lock();
        if inner.all.contains_key(&lease.id()) || inner.stopped {
            return;
        }
        let lease = Arc::new(InHand { all_progress: Arc::clone(&self.progress), ..lease });
        inner.all.insert(lease.id(), Arc::clone(&lease));
        inner.waiting.push_back(lease);
        self.changed.notify_one();
    }

    /// The next lease for a worker, which waits for it; `None` when there will be no more.
    pub(super) fn next(&self) -> Option<Arc<InHand>> {
        let mut inner = self.lock();
        loop {
            if inner.stopped {
                return None;
            }
            if let Some(lease) = inner.waiting.pop_front() {
                if inner.all.contains_key(&lease.id()) {
                    lease.working.store(true, Ordering::Relaxed);
                    lease.queued.store(false, Ordering::Relaxed);
                    lease.progress();
                    return Some(lease);
                }
                continue;
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The worker has turned away from it.
    pub(super) fn rest(&self, lease: &InHand) {
        lease.working.store(false, Ordering::Relaxed);
        lease.progress();
    }

    /// Out of hand, whatever became of it.
    pub(super) fn forget(&self, id: LeaseId) {
        self.lock().all.remove(&id);
    }

    /// Gives up the leases that `which` names, all at once. Their outcomes are nobody's.
    pub(super) fn abandon(&self, which: impl Fn(&InHand) -> bool) {
        self.lock().all.retain(|_, lease| {
            let gone = which(lease);
            lease.abandoned.fetch_or(gone, Ordering::AcqRel);
            !gone
        });
    }

    /// All leases of a job, as an inventory names them.
    pub(super) fn of(&self, job: JobId) -> Vec<Lease> {
        self.lock()
            .all
            .values()
            .filter(|lease| lease.job == job)
            .map(|lease| lease.grant.lease.clone())
            .collect()
    }

    /// Progress counters, for a heartbeat.
    pub(super) fn progress(&self) -> Vec<(LeaseId, u64)> {
        self.lock().all.iter().map(|(id, lease)| (*id, lease.told_progress())).collect()
    }

    /// Everything in hand.
    pub(super) fn all(&self) -> Vec<Arc<InHand>> {
        self.lock().all.values().cloned().collect()
    }

    /// Workers get no more.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_work::{LayerId, NodeId, SliceId, Task};

    fn lease(id: u64) -> InHand {
        let task = Task::Reduce { layer: LayerId(0), slice: SliceId(0) };
        let lease = Lease { id: LeaseId(id), node: NodeId(0), attempt: 1, task };
        InHand::new(JobId([7; 16]), 1, Grant { lease, holdings: Vec::new() })
    }

    #[test]
    fn leases_come_in_order_and_once() {
        let leases = Leases::default();
        [1, 2, 1, 3].into_iter().for_each(|id| leases.take(lease(id)));
        let order: Vec<u64> = (0..3).map(|_| leases.next().unwrap().id().0).collect();
        assert_eq!(order, [1, 2, 3]);
        assert_eq!(leases.of(JobId([7; 16])).len(), 3);
        assert_eq!(leases.of(JobId([8; 16])).len(), 0);
        leases.stop();
        assert!(leases.next().is_none());
    }

    #[test]
    fn abandoned_leases_reach_no_worker_and_stop_those_who_work() {
        let leases = Leases::default();
        [1, 2].into_iter().for_each(|id| leases.take(lease(id)));
        let first = leases.next().unwrap();
        assert!(!first.cancelled());
        leases.abandon(|_| true);
        assert!(first.cancelled() && first.abandoned() && leases.all().is_empty());
        leases.take(lease(3));
        assert_eq!(leases.next().unwrap().id(), LeaseId(3));
    }

    #[test]
    fn a_lease_that_is_reported_does_not_look_hung_and_one_that_stands_still_does() {
        let leases = Leases::default();
        leases.take(lease(1));
        let told = || leases.progress()[0].1;
        let worked_on = leases.next().unwrap();
        assert_eq!(told(), told());
        worked_on.progress();
        leases.rest(&worked_on);
        assert_ne!(told(), told(), "it waits for an answer");
    }

    #[test]
    fn a_lease_that_waits_for_a_worker_looks_hung_only_if_no_worker_moves() {
        let leases = Leases::default();
        [1, 2].into_iter().for_each(|id| leases.take(lease(id)));
        let worked_on = leases.next().unwrap();
        let told = || leases.progress().into_iter().find(|(id, _)| id.0 == 2).unwrap().1;
        let before = told();
        worked_on.progress();
        assert_ne!(told(), before);
        leases.abandon(|lease| lease.id().0 == 1);
        assert_eq!(told(), told(), "the only worker does not turn away from what nobody wants");
        let before = told();
        leases.rest(&worked_on);
        assert_ne!(told(), before);
    }

    #[test]
    fn one_report_only() {
        let one = lease(1);
        assert!(one.claim_report() && !one.claim_report());
        assert!(one.cancelled());
    }
}
