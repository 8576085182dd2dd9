//! A node is gone: its leases fail, and what it held is made again as far as something still depends on it.

use super::{Change, EventRefused, Group, JobState, TaskId, TaskState};
use crate::{Failure, LayerId, NodeId, SegmentId, ShardId, SliceId};
use std::collections::BTreeSet;

impl JobState {
    pub(super) fn lost(&mut self, node: NodeId, failure: &Failure) -> Result<(), EventRefused> {
        let Some(member) = self.nodes.remove(&node) else { return Err(EventRefused::UnknownNode { node }) };
        let mut touched: BTreeSet<SegmentId> = BTreeSet::new();
        for (layer, slice) in member.means {
            touched.insert(self.plan.layer(layer).stage);
            self.forget_means(layer, slice);
        }
        for (segment, shards) in member.sums {
            touched.insert(segment);
            shards.into_iter().for_each(|shard| self.forget_sum(segment, shard));
        }
        touched.into_iter().for_each(|segment| self.revive(segment));
        for lease in member.leases {
            if let Some(record) = self.leases.get(&lease).copied() {
                self.attempt_failed(lease, record, failure);
            }
        }
        Ok(())
    }

    /// The means of a slice are nowhere any more; they are made again unless all layers are over that need them.
    pub(super) fn forget_means(&mut self, layer: LayerId, slice: SliceId) {
        let task = self.table.id(Group::Reduce(layer), slice.0);
        let entry = &mut self.layers[layer.index()];
        entry.means = entry.means.saturating_sub(1);
        match self.is_read(layer) {
            true => self.make_ready(task),
            false => self.slots[task.0].state = TaskState::Done { lease: None, node: None },
        }
    }

    /// A shard is in nobody's sums any more; whether it is summed again is decided by `revive`.
    pub(super) fn forget_sum(&mut self, segment: SegmentId, shard: ShardId) {
        let task = self.table.id(Group::Accumulate(segment), shard.0);
        let stage = &mut self.stages[segment.index()];
        stage.summed = stage.summed.saturating_sub(1);
        self.slots[task.0].state = TaskState::Done { lease: None, node: None };
    }

    /// Once all means are there nothing is made from the sums: they go, and are made again if means are lost. With the
    /// samples objective sample rows are kept with them, which every chunk needs.
    pub(super) fn release_sums(&mut self, segment: SegmentId) {
        let stage = &self.stages[segment.index()];
        if stage.needs_sums || stage.layers.is_empty() || self.wants_samples() {
            return;
        }
        let released = self.nodes.iter_mut().filter_map(|(node, member)| {
            let shards = member.sums.remove(&segment)?;
            Some((*node, shards))
        });
        for (node, shards) in released.collect::<Vec<_>>() {
            shards.into_iter().for_each(|shard| self.forget_sum(segment, shard));
            self.changes.push(Change::DropSums { node, segment });
        }
    }

    /// Sums that nobody holds are made again if something still has to be made from them.
    pub(super) fn revive(&mut self, segment: SegmentId) {
        self.recount(segment);
        let stage = &self.stages[segment.index()];
        if !stage.is_open() || !stage.needs_sums || stage.summed == self.plan.shards.len() {
            return;
        }
        for task in self.table.ids(Group::Accumulate(segment)) {
            if self.slots[task].is_done() && self.slots[task].holder().is_none() {
                self.make_ready(TaskId(task));
            }
        }
        self.changes.push(Change::Opened);
    }
}
