//! What others may know of a job's state.

use super::{Group, JobState, Lease, TaskId, TaskState};
use crate::{
    Failure, LayerId, LeaseId, NodeId, Plan, RangeId, Receipt, SegmentId, ShardId, SliceId, TaskPhase,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Counts for a progress line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The stage.
    pub stage: usize,
    /// All stages.
    pub stages: usize,
    /// The phase.
    pub phase: TaskPhase,
    /// Tasks of this stage and phase that are finished.
    pub done: usize,
    /// Tasks of this stage and phase.
    pub total: usize,
}

/// Things that are only counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Results under leases that held nothing any more: fenced zombies.
    pub stale: u64,
    /// Second results that were equal to the first.
    pub duplicates: u64,
    /// Attempts that failed and were followed by another.
    pub retries: u64,
}

/// How many tasks stand where, of all of a plan's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Their stage has not begun.
    pub waiting: usize,
    /// Can be given out, now or once their group is open.
    pub ready: usize,
    /// Given out.
    pub leased: usize,
    /// Finished.
    pub done: usize,
    /// Given up.
    pub failed: usize,
}

impl JobState {
    /// Counts all tasks: one look at each.
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        for slot in &self.slots {
            *match &slot.state {
                TaskState::Waiting => &mut census.waiting,
                TaskState::Ready => &mut census.ready,
                TaskState::Leased(_) => &mut census.leased,
                TaskState::Done { .. } => &mut census.done,
                TaskState::Failed => &mut census.failed,
            } += 1;
        }
        census
    }

    /// What has to happen before a task's group is open, in words; none if nothing has.
    pub fn waits_for(&self, task: TaskId) -> Option<String> {
        let (group, _) = self.table.split(task);
        if self.is_open(group) || self.fatal.is_some() {
            return None;
        }
        let segment = self.segment_of(group);
        let stage = &self.stages[segment.index()];
        let (at, shards) = (segment.index(), self.plan.shards.len());
        if !stage.is_open() {
            let lane = &self.lanes[self.plan.range_of(segment).index()];
            return Some(match lane.first == lane.stages.end {
                true => format!("its range is over, with stage {at}"),
                false => format!("stage {at} is not open: its range is at stage {}", lane.first),
            });
        }
        let (captured, summed) = (stage.captured, stage.summed);
        Some(match group {
            Group::Forward(_) | Group::Capture(_) => format!("nothing of stage {at} needs it any more"),
            _ if captured < shards => format!("{captured} of {shards} shards are captured at stage {at}"),
            Group::Accumulate(_) => format!("nothing of stage {at} needs it any more"),
            _ if stage.needs_sums && summed < shards => {
                format!("{summed} of {shards} shards are in the statistics of stage {at}")
            }
            Group::Reduce(_) => format!("nothing of stage {at} needs it any more"),
            Group::Solve(layer) => {
                let lender = &self.layers[self.layers[layer.index()].statistics.index()];
                format!("{} of {} slices of its statistics are there", lender.means, lender.slices)
            }
        })
    }

    /// The plan.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// Numbers of tasks.
    pub fn table(&self) -> &super::TaskTable {
        &self.table
    }

    /// All stages over, or the job failed.
    pub fn is_finished(&self) -> bool {
        self.fatal.is_some() || self.lanes.iter().all(|lane| lane.first == lane.stages.end)
    }

    /// Why the whole job failed, if it did.
    pub fn fatal(&self) -> Option<&Failure> {
        self.fatal.as_ref()
    }

    /// Layers that were given up, with the reason.
    pub fn failed_layers(&self) -> &BTreeMap<LayerId, Failure> {
        &self.failed_layers
    }

    /// Receipts of a layer's committed roundings in order, once all its chunks are there.
    pub fn receipts(&self, layer: LayerId) -> Option<Vec<Receipt>> {
        self.layers.get(layer.index())?.receipts.iter().copied().collect()
    }

    /// What was counted.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Where a task stands.
    pub fn task_state(&self, task: TaskId) -> &TaskState {
        &self.slots[task.0].state
    }

    /// How often a task was given out, speculation included.
    pub fn attempts(&self, task: TaskId) -> u32 {
        self.slots[task.0].attempts
    }

    /// Task, holder and attempt of a lease that is current.
    pub fn lease(&self, lease: LeaseId) -> Option<(TaskId, NodeId, u32)> {
        self.leases.get(&lease).map(|record| (record.task, record.node, record.attempt))
    }

    /// Task, holder and attempt of a lease that was current once and is not any more.
    pub fn ended_lease(&self, lease: LeaseId) -> Option<(TaskId, NodeId, u32)> {
        self.ended.get(&lease).map(|record| (record.task, record.node, record.attempt))
    }

    /// A node's current leases.
    pub fn leases_of(&self, node: NodeId) -> impl Iterator<Item = LeaseId> + '_ {
        self.nodes.get(&node).into_iter().flat_map(|member| member.leases.iter().copied())
    }

    /// All current leases.
    pub fn leases(&self) -> impl Iterator<Item = LeaseId> + '_ {
        self.leases.keys().copied()
    }

    /// Whether a node takes part.
    pub fn has_node(&self, node: NodeId) -> bool {
        self.nodes.contains_key(&node)
    }

    /// The lease that would be granted for a task.
    pub fn propose(&self, id: LeaseId, node: NodeId, task: TaskId) -> Lease {
        let attempt = self.slots[task.0].attempts + 1;
        Lease { id, node, attempt, task: self.table.task(task, self.peaks_for(task)) }
    }

    fn peaks_for(&self, task: TaskId) -> &Arc<Vec<crate::PeakRecord>> {
        match self.table.split(task).0 {
            Group::Accumulate(segment) => {
                self.stages[segment.index()].agreed.as_ref().unwrap_or(&self.no_peaks)
            }
            _ => &self.no_peaks,
        }
    }

    /// What was agreed on at a stage, as far as it is one layer's; nothing before it is agreed.
    pub fn agreed_peaks(&self, layer: LayerId) -> Vec<crate::PeakRecord> {
        let stage = &self.stages[self.plan.layer(layer).stage.index()];
        let agreed = stage.agreed.iter().flat_map(|peaks| peaks.iter());
        agreed.filter(|peak| peak.layer == layer).copied().collect()
    }

    /// The lane that a group's tasks belong to.
    pub fn range_of(&self, group: Group) -> RangeId {
        match group {
            Group::Forward(range) => range,
            _ => self.plan.range_of(self.segment_of(group)),
        }
    }

    /// The stage that a group's tasks belong to; the last one run through for forward runs.
    pub fn segment_of(&self, group: Group) -> SegmentId {
        match group {
            Group::Forward(range) => SegmentId(self.lanes[range.index()].stages.end.saturating_sub(1) as u32),
            Group::Capture(segment) | Group::Accumulate(segment) => segment,
            Group::Reduce(layer) | Group::Solve(layer) => self.plan.layer(layer).stage,
        }
    }

    /// Whether a lane has stages that are not over.
    pub fn is_range_over(&self, range: RangeId) -> bool {
        self.lanes.get(range.index()).is_none_or(|lane| lane.first == lane.stages.end)
    }

    /// Whether ready tasks of a group can be given out.
    pub fn is_open(&self, group: Group) -> bool {
        if self.fatal.is_some() {
            return false;
        }
        let gates = |segment: SegmentId| self.stages[segment.index()].gates(self.plan.shards.len());
        match group {
            Group::Forward(_) => true,
            Group::Capture(segment) => gates(segment)[0],
            Group::Accumulate(segment) => gates(segment)[1],
            Group::Reduce(layer) => gates(self.plan.layer(layer).stage)[2],
            Group::Solve(layer) => self.can_solve(layer),
        }
    }

    pub(super) fn can_solve(&self, layer: LayerId) -> bool {
        let entry = &self.layers[layer.index()];
        let stage = &self.stages[self.plan.layer(layer).stage.index()];
        let sums = !self.wants_samples() || stage.summed == self.plan.shards.len();
        let means = self.layers[entry.statistics.index()].has_means();
        stage.is_open() && !entry.is_over() && means && sums
    }

    pub(super) fn wants_samples(&self) -> bool {
        self.plan.solver.objective == crate::Objective::Samples
    }

    /// Nodes that hold sums of a stage, in order, with the shards that are in.
    pub fn sums(&self, segment: SegmentId) -> impl Iterator<Item = (NodeId, Vec<ShardId>)> + '_ {
        let held = move |(node, member): (&NodeId, &super::Member)| {
            let shards = member.sums.get(&segment).filter(|shards| !shards.is_empty())?;
            Some((*node, shards.iter().copied().collect()))
        };
        self.nodes.iter().filter_map(held)
    }

    /// Slices of a layer's own statistics that are held, in order, with their holders.
    pub fn means(&self, layer: LayerId) -> impl Iterator<Item = (NodeId, SliceId)> + '_ {
        let slots = self.table.ids(Group::Reduce(layer)).enumerate();
        slots.filter_map(|(slice, task)| Some((self.slots[task].holder()?, SliceId(slice as u32))))
    }

    /// How far the phase of a group has come in its stage.
    pub fn progress(&self, group: Group) -> Progress {
        let segment = self.segment_of(group);
        let shards = self.plan.shards.len();
        let stage = &self.stages[segment.index()];
        let layers = stage.layers.iter().map(|layer| &self.layers[layer.index()]);
        let (done, total) = match group {
            Group::Forward(_) => {
                let done = self.table.ids(group).filter(|task| self.slots[*task].is_done());
                (done.count(), shards)
            }
            Group::Capture(_) => (stage.captured, shards),
            Group::Accumulate(_) => (stage.summed, shards),
            Group::Reduce(_) => layers.fold((0, 0), |sum, l| (sum.0 + l.means, sum.1 + l.slices)),
            Group::Solve(_) => layers.fold((0, 0), |sum, l| (sum.0 + l.solved, sum.1 + l.receipts.len())),
        };
        Progress { stage: segment.index(), stages: self.stages.len(), phase: group.phase(), done, total }
    }

    /// A task in words, for messages.
    pub fn label(&self, task: TaskId) -> String {
        let (group, place) = self.table.split(task);
        match group {
            Group::Forward(range) => format!("forward run of shard {place} through {range}"),
            Group::Capture(segment) => format!("capture of shard {place} at stage {}", segment.0),
            Group::Accumulate(segment) => format!("statistics of shard {place} at stage {}", segment.0),
            Group::Reduce(layer) => self.slice_label(layer, place),
            Group::Solve(layer) => format!("layer `{}`: chunk {place}", self.plan.layer(layer).name),
        }
    }

    /// A slice of the statistics of a layer, be they its own or another's.
    pub(super) fn slice_label(&self, layer: LayerId, slice: u32) -> String {
        format!("layer `{}`: slice {slice} of its statistics", self.plan.layer(layer).name)
    }
}
