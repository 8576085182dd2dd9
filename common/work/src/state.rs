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
    Done, Failure, LayerId, LeaseId, NodeId, PeakRecord, Plan, Rounding, SegmentId, Task, TaskPhase,
    agree_peaks,
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
        let slot =
            self.slots.get_mut(lease.slot).filter(|s| s.state == TaskState::Ready && s.task == lease.task);
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
            Done::Forwarded | Done::Accumulated | Done::Reduced => {}
        }
        self.close(slot, TaskState::Done);
    }

    fn failed(&mut self, slot: usize, failure: Failure) {
        if failure.class.counts() {
            self.slots[slot].counted += 1;
        }
        let tries_left =
            self.slots[slot].counted < ATTEMPTS_MAX && self.slots[slot].attempts < 2 * ATTEMPTS_MAX;
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
                TaskPhase::Forward => TaskPhase::Capture,
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
        self.slots = tasks
            .into_iter()
            .map(|task| Slot { task, state: TaskState::Ready, attempts: 0, counted: 0 })
            .collect();
    }

    fn tasks_of_phase(&self) -> Vec<Task> {
        let segment = SegmentId(self.stage as u32);
        let solve = &self.plan.stages[self.stage].solve;
        let alive = solve.iter().copied().filter(|layer| !self.failed_layers.contains_key(layer));
        match self.phase {
            TaskPhase::Forward => Vec::new(),
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
            TaskPhase::Reduce => alive
                .flat_map(|layer| self.plan.slice_ids(layer).map(move |slice| Task::Reduce { layer, slice }))
                .collect(),
            TaskPhase::Solve => alive
                .flat_map(|layer| self.plan.chunk_ids(layer).map(move |chunk| Task::Solve { layer, chunk }))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChunkId, ChunkReport, FailureClass, LayerPlan, PartitionNote, Propagation, StagePlan};
    use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme};

    fn grid() -> GridSpec {
        let (scheme, granularity) = (Scheme::Symmetric, Granularity::PerTensor);
        GridSpec { bits: 4, scheme, granularity, range: RangeEstimator::MinMax }
    }

    /// Two stages of one layer each; the first has two chunks.
    fn plan(shards: usize) -> Arc<Plan> {
        let layer = |id: u32, chunks: Vec<std::ops::Range<usize>>| LayerPlan {
            id: LayerId(id),
            name: format!("layer{id}"),
            op_type: "Conv".into(),
            rows: chunks.last().map_or(0, |c| c.end),
            cols: 1,
            groups: 1,
            grid: grid(),
            chunks,
            stage: SegmentId(id),
        };
        let solver = crate::SolverSettings {
            objective: crate::Objective::Gram,
            iterations: 1,
            learning_rate: 0.1,
            beta: (20.0, 2.0),
            warm_start: 0.2,
            lambda: 1.0,
            batch: 1,
            damping: 0.0,
            start: crate::StartPoint::Nearest,
            refine_sweeps: 1,
            seed: 0,
            positions_per_shard: 1,
            positions_fraction: 1.0,
        };
        Arc::new(Plan {
            layers: vec![layer(0, vec![0..2, 2..4]), layer(1, std::iter::once(0..3).collect())],
            kept: vec![],
            stages: (0..2).map(|l| StagePlan { solve: vec![LayerId(l)] }).collect(),
            shards: (0..shards).map(|s| s..s + 1).collect(),
            batch: 1,
            propagation: Propagation::Sequential,
            solver,
            partition: PartitionNote::Batches,
        })
    }

    fn done(task: &Task) -> Done {
        match task {
            Task::Capture { shard, .. } => Done::Captured {
                peaks: vec![PeakRecord {
                    layer: LayerId(0),
                    use_index: 0,
                    full_precision: shard.0 as f32,
                    quantized: 1.0,
                    positions: 10,
                }],
            },
            Task::Accumulate { .. } => Done::Accumulated,
            Task::Reduce { .. } => Done::Reduced,
            Task::Solve { layer, chunk } => Done::Solved(Arc::new(Rounding {
                layer: *layer,
                chunk: *chunk,
                encodings: Encodings {
                    bits: 4,
                    scheme: Scheme::Symmetric,
                    granularity: Granularity::PerTensor,
                    rows: 1,
                    cols: 1,
                    scale: vec![1.0],
                    zero_point: vec![0],
                },
                q: vec![0],
                report: ChunkReport::default(),
            })),
        }
    }

    fn grant(state: &mut JobState, now_ms: u64) -> Option<Lease> {
        let event = state.grant(NodeId(0), now_ms, 10)?;
        let Event::Granted { lease, .. } = &event else { panic!("not a grant: {event:?}") };
        let lease = lease.clone();
        state.apply(event).unwrap();
        Some(lease)
    }

    fn finish(state: &mut JobState, lease: &Lease) {
        state.apply(Event::Completed { lease: lease.id, done: done(&lease.task) }).unwrap();
    }

    #[test]
    fn a_job_goes_through_its_phases_in_order_and_finishes() {
        let mut state = JobState::new(plan(3));
        let mut phases = Vec::new();
        while let Some(lease) = grant(&mut state, 0) {
            phases.push(lease.task.phase());
            if let Task::Accumulate { peaks, segment: SegmentId(0), .. } = &lease.task {
                assert_eq!((peaks[0].full_precision, peaks[0].positions), (2.0, 30), "peaks of all shards");
            }
            finish(&mut state, &lease);
        }
        use TaskPhase::{Accumulate as A, Capture as C, Reduce as R, Solve as S};
        assert_eq!(phases, [C, C, C, A, A, A, R, S, S, C, C, C, A, A, A, R, S]);
        assert!(state.is_finished() && state.fatal().is_none());
        assert_eq!(state.roundings(LayerId(0)).unwrap().len(), 2);
        assert_eq!(state.roundings(LayerId(1)).unwrap()[0].chunk, ChunkId(0));
    }

    #[test]
    fn no_task_of_a_phase_is_ready_before_the_phase_before_is_finished() {
        let mut state = JobState::new(plan(2));
        let first = grant(&mut state, 0).unwrap();
        let second = grant(&mut state, 0).unwrap();
        assert!(grant(&mut state, 0).is_none());
        finish(&mut state, &second);
        assert!(grant(&mut state, 0).is_none());
        finish(&mut state, &first);
        assert_eq!(grant(&mut state, 0).unwrap().task.phase(), TaskPhase::Accumulate);
    }

    #[test]
    fn expired_lease_returns_its_task_and_its_late_result_is_refused() {
        let mut state = JobState::new(plan(1));
        let old = grant(&mut state, 0).unwrap();
        assert!(state.expire(9).is_empty());
        for event in state.expire(10) {
            state.apply(event).unwrap();
        }
        let new = grant(&mut state, 11).unwrap();
        assert_eq!((new.attempt, &new.task), (2, &old.task));
        let late = state.apply(Event::Completed { lease: old.id, done: done(&old.task) });
        assert_eq!(late, Err(LeaseRefused { lease: old.id }));
        finish(&mut state, &new);
        assert_eq!(grant(&mut state, 12).unwrap().task.phase(), TaskPhase::Accumulate);
    }

    #[test]
    fn a_task_that_lost_three_nodes_ends_the_job() {
        let mut state = JobState::new(plan(1));
        for _ in 0..ATTEMPTS_MAX {
            let lease = grant(&mut state, 0).unwrap();
            let failure = Failure::new(FailureClass::NodeLost, "gone");
            state.apply(Event::Failed { lease: lease.id, failure }).unwrap();
        }
        assert_eq!(state.fatal().unwrap().class, FailureClass::NodeLost);
        assert!(grant(&mut state, 0).is_none());
    }

    #[test]
    fn a_layer_with_non_finite_statistics_fails_alone() {
        let mut state = JobState::new(plan(1));
        while let Some(lease) = grant(&mut state, 0) {
            if lease.task == (Task::Reduce { layer: LayerId(0) }) {
                let failure = Failure::new(FailureClass::NonFinite, "layer0: NaN");
                state.apply(Event::Failed { lease: lease.id, failure }).unwrap();
            } else {
                assert!(!matches!(lease.task, Task::Solve { layer: LayerId(0), .. }), "given up, yet solved");
                finish(&mut state, &lease);
            }
        }
        assert!(state.is_finished() && state.fatal().is_none());
        assert!(state.failed_layers().contains_key(&LayerId(0)) && state.roundings(LayerId(0)).is_none());
        assert!(state.roundings(LayerId(1)).is_some());
    }

    #[test]
    fn replaying_the_events_gives_the_same_state() {
        let mut live = JobState::new(plan(2));
        let mut journal = Vec::new();
        while let Some(event) = live.grant(NodeId(3), 5, 10) {
            let Event::Granted { lease, .. } = event.clone() else { panic!("not a grant") };
            live.apply(event.clone()).unwrap();
            let completed = Event::Completed { lease: lease.id, done: done(&lease.task) };
            live.apply(completed.clone()).unwrap();
            journal.extend([event, completed]);
        }
        let mut replayed = JobState::new(plan(2));
        for event in journal {
            replayed.apply(event).unwrap();
        }
        assert_eq!(replayed.progress(), live.progress());
        assert_eq!(replayed.roundings, live.roundings);
    }

    #[test]
    fn a_plan_whose_ids_are_no_indices_is_refused() {
        assert_eq!(plan(2).validate(), Ok(()));
        let mut twice = Plan::clone(&plan(2));
        twice.layers[1].id = LayerId(0);
        assert!(
            twice.validate().unwrap_err().to_string().starts_with("layer `layer1`: id must be its index 1")
        );
        let mut unknown = Plan::clone(&plan(2));
        unknown.stages[0].solve.push(LayerId(7));
        assert!(unknown.validate().unwrap_err().to_string().starts_with("stage 0: solves layer 7"));
    }
}
