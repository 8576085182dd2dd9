//! Numbers for tasks: every task of a plan is one index, computed, never searched for.
//!
//! Layout: forward runs, captures, accumulations (each by shard), then slices and chunks layer by layer.
//! Not here: what state a task is in (`slot`).

use crate::{ChunkId, LayerId, PeakRecord, Plan, RangeId, SegmentId, ShardId, SliceId, Task, TaskPhase};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A task of the plan, whatever lease it is under and whatever peaks it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskId(pub usize);

/// Tasks that become possible together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Group {
    /// Forward runs through a range, by shard.
    Forward(RangeId),
    /// Captures of a segment, by shard.
    Capture(SegmentId),
    /// Accumulations at a stage, by shard.
    Accumulate(SegmentId),
    /// Slices of a layer.
    Reduce(LayerId),
    /// Chunks of a layer.
    Solve(LayerId),
}

impl Group {
    /// The phase of its tasks.
    pub fn phase(self) -> TaskPhase {
        match self {
            Self::Forward(_) => TaskPhase::Forward,
            Self::Capture(_) => TaskPhase::Capture,
            Self::Accumulate(_) => TaskPhase::Accumulate,
            Self::Reduce(_) => TaskPhase::Reduce,
            Self::Solve(_) => TaskPhase::Solve,
        }
    }

    /// Whether its tasks are one per shard.
    pub fn is_by_shard(self) -> bool {
        matches!(self, Self::Forward(_) | Self::Capture(_) | Self::Accumulate(_))
    }
}

/// Where each group's tasks begin.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskTable {
    shards: usize,
    stages: usize,
    forwards: usize,
    /// First task of each layer's slices, and one past the last.
    slices: Vec<usize>,
    /// The same for chunks.
    chunks: Vec<usize>,
}

impl TaskTable {
    /// Numbers the tasks of a plan.
    pub fn new(plan: &Plan) -> Self {
        let (shards, stages) = (plan.shards.len(), plan.stages.len());
        let forwards = plan.ranges.len().saturating_sub(1);
        let first = shards * (forwards + 2 * stages);
        let slices = starts(first, plan.layers.iter().map(|layer| layer.slices.len()));
        let first = slices.last().copied().unwrap_or(first);
        let chunks = starts(first, plan.layers.iter().map(|layer| layer.chunks.len()));
        Self { shards, stages, forwards, slices, chunks }
    }

    /// How many tasks there are.
    pub fn len(&self) -> usize {
        self.chunks.last().copied().unwrap_or(0)
    }

    /// Whether there is no task at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tasks of a group, as a range of ids.
    pub fn ids(&self, group: Group) -> std::ops::Range<usize> {
        let by_shard = |row: usize| row * self.shards..(row + 1) * self.shards;
        match group {
            Group::Forward(range) => by_shard(range.index()),
            Group::Capture(segment) => by_shard(self.forwards + segment.index()),
            Group::Accumulate(segment) => by_shard(self.forwards + self.stages + segment.index()),
            Group::Reduce(layer) => self.slices[layer.index()]..self.slices[layer.index() + 1],
            Group::Solve(layer) => self.chunks[layer.index()]..self.chunks[layer.index() + 1],
        }
    }

    /// The task at a place of a group: a shard, a slice or a chunk.
    pub fn id(&self, group: Group, place: u32) -> TaskId {
        TaskId(self.ids(group).start + place as usize)
    }

    /// Group and place of a task.
    pub fn split(&self, task: TaskId) -> (Group, u32) {
        let group = self.group(task.0);
        (group, (task.0 - self.ids(group).start) as u32)
    }

    fn group(&self, id: usize) -> Group {
        let layer = |starts: &[usize]| LayerId((starts.partition_point(|start| *start <= id) - 1) as u32);
        if id >= self.chunks[0] {
            return Group::Solve(layer(&self.chunks));
        }
        if id >= self.slices[0] {
            return Group::Reduce(layer(&self.slices));
        }
        let row = id / self.shards;
        if row < self.forwards {
            Group::Forward(RangeId(row as u32))
        } else if row < self.forwards + self.stages {
            Group::Capture(SegmentId((row - self.forwards) as u32))
        } else {
            Group::Accumulate(SegmentId((row - self.forwards - self.stages) as u32))
        }
    }

    /// The number of a task that came from elsewhere; none if the plan has no such task. Peaks are not looked at.
    pub fn find(&self, task: &Task) -> Option<TaskId> {
        let (group, place) = match task {
            Task::Forward { range, shard } => {
                (range.index() < self.forwards).then_some((Group::Forward(*range), shard.0))?
            }
            Task::Capture { segment, shard } => {
                (segment.index() < self.stages).then_some((Group::Capture(*segment), shard.0))?
            }
            Task::Accumulate { segment, shard, .. } => {
                (segment.index() < self.stages).then_some((Group::Accumulate(*segment), shard.0))?
            }
            Task::Reduce { layer, slice } => {
                (layer.index() + 1 < self.slices.len()).then_some((Group::Reduce(*layer), slice.0))?
            }
            Task::Solve { layer, chunk } => {
                (layer.index() + 1 < self.chunks.len()).then_some((Group::Solve(*layer), chunk.0))?
            }
        };
        ((place as usize) < self.ids(group).len()).then(|| self.id(group, place))
    }

    /// The task in full; `peaks` are those agreed for its stage, used by accumulations alone.
    pub fn task(&self, id: TaskId, peaks: &Arc<Vec<PeakRecord>>) -> Task {
        let (group, place) = self.split(id);
        match group {
            Group::Forward(range) => Task::Forward { range, shard: ShardId(place) },
            Group::Capture(segment) => Task::Capture { segment, shard: ShardId(place) },
            Group::Accumulate(segment) => {
                Task::Accumulate { segment, shard: ShardId(place), peaks: Arc::clone(peaks) }
            }
            Group::Reduce(layer) => Task::Reduce { layer, slice: SliceId(place) },
            Group::Solve(layer) => Task::Solve { layer, chunk: ChunkId(place) },
        }
    }
}

fn starts(first: usize, lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut next = first;
    let mut starts = vec![first];
    starts.extend(lengths.map(|length| {
        next += length;
        next
    }));
    starts
}
