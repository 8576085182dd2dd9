//! The state of a running job: which tasks are ready, leased, done or failed.
//!
//! ```text
//!            +--------- expire / retryable failure ---------+
//!            v                                              |
//!   Waiting -> Ready -> Leased { lease, node, attempt, expires } -> Done
//!   (phase not begun)                                       |
//!                                                           +----> Failed (not retryable, or too often)
//! ```
//!
//! Method: stages run in order, and each stage in four phases (capture, accumulate, reduce, solve); a phase's
//! tasks become ready when the phase before is finished. State changes only through `apply`, so that a journal of
//! events replayed gives the live state. Time is a caller's monotonic millisecond count.
//! Not here: the journal, and any thread.

use crate::{
    Done, Failure, LayerId, LeaseId, NodeId, PeakRecord, Plan, Rounding, SegmentId, Task, TaskPhase, agree_peaks,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A task is failed for good after this many counted attempts.
pub(crate) const ATTEMPTS_MAX: u32 = 3;

/// One grant of one task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lease {
    /// Fences every message about it.
    pub id: LeaseId,
    /// Holder.
    pub node: NodeId,
    /// 1 for the first try.
    pub attempt: u32,
    /// Index of the task within its phase.
    pub slot: usize,
    /// What to do.
    pub task: Task,
}

/// Where a task of the current phase stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// Can be leased.
    Ready,
    /// Given out.
    Leased {
        /// The grant.
        lease: LeaseId,
        /// To whom.
        node: NodeId,
        /// When it lapses, in the caller's monotonic milliseconds.
        expires_at_ms: u64,
    },
    /// Finished.
    Done,
    /// Given up.
    Failed,
}

/// What can happen to a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// A task was given out.
    Granted {
        /// The grant.
        lease: Lease,
        /// When it lapses.
        expires_at_ms: u64,
    },
    /// A lease was completed.
    Completed {
        /// Which.
        lease: LeaseId,
        /// With what.
        done: Done,
    },
    /// A lease failed or lapsed.
    Failed {
        /// Which.
        lease: LeaseId,
        /// Why.
        failure: Failure,
    },
}

/// A message about a lease that is not the current one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{lease}: stale, the task is no longer held under it")]
pub struct LeaseRefused {
    /// The stale lease.
    pub lease: LeaseId,
}

/// Counts for a progress line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Current stage.
    pub stage: usize,
    /// All stages.
    pub stages: usize,
    /// Current phase.
    pub phase: TaskPhase,
    /// Tasks of this phase that are finished.
    pub done: usize,
    /// Tasks of this phase.
    pub total: usize,
}

struct Slot {
    task: Task,
    state: TaskState,
    attempts: u32,
    counted: u32,
}

/// See the module.
pub struct JobState {
    plan: Arc<Plan>,
    stage: usize,
    phase: TaskPhase,
    slots: Vec<Slot>,
    unfinished: usize,
    first_ready: usize,
    leases: BTreeMap<LeaseId, usize>,
    next_lease: u64,
    peaks: Vec<PeakRecord>,
    roundings: BTreeMap<LayerId, Vec<Option<Arc<Rounding>>>>,
    failed_layers: BTreeMap<LayerId, Failure>,
    fatal: Option<Failure>,
    finished: bool,
}

impl JobState {
    /// A job of which nothing has been done.
    pub fn new(plan: Arc<Plan>) -> Self {
        let mut state = Self {
            stage: 0,
            phase: TaskPhase::Capture,
            slots: Vec::new(),
            unfinished: 0,
            first_ready: 0,
            leases: BTreeMap::new(),
            next_lease: 1,
            peaks: Vec::new(),
            roundings: BTreeMap::new(),
            failed_layers: BTreeMap::new(),
            fatal: None,
            finished: plan.stages.is_empty(),
            plan,
        };
        if !state.finished {
            state.begin_phase();
            state.skip_empty_phases();
        }
        state
    }

    /// All stages done, or the job failed.
    pub fn is_finished(&self) -> bool {
        self.finished || self.fatal.is_some()
    }

    /// Why the whole job failed, if it did.
    pub fn fatal(&self) -> Option<&Failure> {
        self.fatal.as_ref()
    }

    /// Layers that were given up, with the reason.
    pub fn failed_layers(&self) -> &BTreeMap<LayerId, Failure> {
        &self.failed_layers
    }

    /// Committed roundings of a layer, once all its chunks are there.
    pub fn roundings(&self, layer: LayerId) -> Option<Vec<Arc<Rounding>>> {
        let chunks = self.roundings.get(&layer)?;
        let complete: Option<Vec<_>> = chunks.iter().cloned().collect();
        complete.filter(|all| all.len() == self.plan.layer(layer).chunks.len())
    }

    /// Where the job stands.
    pub fn progress(&self) -> Progress {
        Progress {
            stage: self.stage,
            stages: self.plan.stages.len(),
            phase: self.phase,
            done: self.slots.len() - self.unfinished,
            total: self.slots.len(),
        }
    }

    /// Proposes a grant for a node that has a free slot; the caller makes it durable, then applies it.
    pub fn grant(&self, node: NodeId, now_ms: u64, lease_ms: u64) -> Option<Event> {
        if self.is_finished() {
            return None;
        }
        let offset = self.slots[self.first_ready..].iter().position(|s| s.state == TaskState::Ready)?;
        let slot = self.first_ready + offset;
        let lease = Lease {
            id: LeaseId(self.next_lease),
            node,
            attempt: self.slots[slot].attempts + 1,
            slot,
            task: self.slots[slot].task.clone(),
        };
        Some(Event::Granted { lease, expires_at_ms: now_ms.saturating_add(lease_ms) })
    }

    /// Failures for all leases that have lapsed; to be applied one by one.
    pub fn expire(&self, now_ms: u64) -> Vec<Event> {
        self.leases
            .iter()
            .filter(|(_, slot)| {
                matches!(self.slots[**slot].state, TaskState::Leased { expires_at_ms, .. } if expires_at_ms <= now_ms)
            })
            .map(|(lease, _)| Event::Failed {
                lease: *lease,
                failure: Failure::new(crate::FailureClass::NodeLost, "lease expired"),
            })
            .collect()
    }

    /// Applies one event.
    ///
    /// # Errors
    /// `LeaseRefused` if it concerns a lease that does not hold its task any more; the state is unchanged.
    pub fn apply(&mut self, event: Event) -> Result<(), LeaseRefused> {
        match event {
            Event::Granted { lease, expires_at_ms } => self.granted(&lease, expires_at_ms),
            Event::Completed { lease, done } => {
                let slot = self.release(lease)?;
                self.completed(slot, done);
                Ok(())
            }
            Event::Failed { lease, failure } => {
                let slot = self.release(lease)?;
                self.failed(slot, failure);
                Ok(())
            }
        }
    }

    fn granted(&mut self, lease: &Lease, expires_at_ms: u64) -> Result<(), LeaseRefused> {
        let slot = self.slots.get_mut(lease.slot).filter(|s| s.state == TaskState::Ready && s.task == lease.task);
        let Some(slot) = slot else { return Err(LeaseRefused { lease: lease.id }) };
        slot.state = TaskState::Leased { lease: lease.id, node: lease.node, expires_at_ms };
        slot.attempts += 1;
        self.leases.insert(lease.id, lease.slot);
        self.next_lease = self.next_lease.max(lease.id.0 + 1);
        while self.slots.get(self.first_ready).is_some_and(|s| s.state != TaskState::Ready) {
            self.first_ready += 1;
        }
        Ok(())
    }

    fn release(&mut self, lease: LeaseId) -> Result<usize, LeaseRefused> {
        self.leases.remove(&lease).ok_or(LeaseRefused { lease })
    }

    fn completed(&mut self, slot: usize, done: Done) {
        match done {
            Done::Captured { peaks } => agree_peaks(&mut self.peaks, &peaks),
            Done::Solved(rounding) => {
                let chunks = self.plan.layer(rounding.layer).chunks.len();
                let all = self.roundings.entry(rounding.layer).or_insert_with(|| vec![None; chunks]);
                let index = rounding.chunk.index();
                all[index] = Some(rounding);
            }
            Done::Accumulated | Done::Reduced => {}
        }
        self.close(slot, TaskState::Done);
    }

    fn failed(&mut self, slot: usize, failure: Failure) {
        if failure.class.counts() {
            self.slots[slot].counted += 1;
        }
        let tries_left = self.slots[slot].counted < ATTEMPTS_MAX && self.slots[slot].attempts < 2 * ATTEMPTS_MAX;
        if failure.class.retryable() && tries_left {
            self.slots[slot].state = TaskState::Ready;
            self.first_ready = self.first_ready.min(slot);
            return;
        }
        let layer_only = failure.class == crate::FailureClass::NonFinite || failure.class.retryable();
        match self.slots[slot].task.layer() {
            Some(layer) if layer_only => {
                self.failed_layers.entry(layer).or_insert(failure);
            }
            _ => self.fatal = Some(failure),
        }
        self.close(slot, TaskState::Failed);
    }

    fn close(&mut self, slot: usize, state: TaskState) {
        self.slots[slot].state = state;
        self.unfinished -= 1;
        self.skip_empty_phases();
    }

    fn skip_empty_phases(&mut self) {
        while self.unfinished == 0 && !self.is_finished() {
            self.phase = match self.phase {
                TaskPhase::Capture => TaskPhase::Accumulate,
                TaskPhase::Accumulate => TaskPhase::Reduce,
                TaskPhase::Reduce => TaskPhase::Solve,
                TaskPhase::Solve => {
                    self.stage += 1;
                    self.peaks.clear();
                    TaskPhase::Capture
                }
            };
            if self.stage == self.plan.stages.len() {
                self.finished = true;
                self.slots.clear();
            } else {
                self.begin_phase();
            }
        }
    }

    fn begin_phase(&mut self) {
        let tasks = self.tasks_of_phase();
        self.unfinished = tasks.len();
        self.first_ready = 0;
        self.slots =
            tasks.into_iter().map(|task| Slot { task, state: TaskState::Ready, attempts: 0, counted: 0 }).collect();
    }

    fn tasks_of_phase(&self) -> Vec<Task> {
        let segment = SegmentId(self.stage as u32);
        let solve = &self.plan.stages[self.stage].solve;
        let alive = solve.iter().copied().filter(|layer| !self.failed_layers.contains_key(layer));
        match self.phase {
            TaskPhase::Capture => {
                self.plan.shard_ids().map(|shard| Task::Capture { segment, shard }).collect()
            }
            TaskPhase::Accumulate => {
                let peaks = Arc::new(self.peaks.clone());
                self.plan
                    .shard_ids()
                    .map(|shard| Task::Accumulate { segment, shard, peaks: Arc::clone(&peaks) })
                    .collect()
            }
            TaskPhase::Reduce => alive.map(|layer| Task::Reduce { layer }).collect(),
            TaskPhase::Solve => alive
                .flat_map(|layer| self.plan.chunk_ids(layer).map(move |chunk| Task::Solve { layer, chunk }))
                .collect(),
        }
    }
}
