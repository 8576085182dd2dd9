//! A node arrives, or comes back: what it still has is adopted where that is exact.
//!
//! Carried state is a pure function of the plan and the committed roundings, so it does not matter which incarnation of
//! the coordinator asked for it. Sums are adopted whole or not at all: a node knows what is in them, but cannot take a
//! shard out again.

use super::{Change, Group, JobState, LeaseRecord, TaskId, TaskState};
use crate::{Held, Inventory, LayerId, Lease, LeaseId, NodeId, SegmentId, ShardId, SliceId};
use std::collections::BTreeSet;

impl JobState {
    pub(super) fn joined(&mut self, node: NodeId, inventory: &Inventory) {
        self.nodes.entry(node).or_default();
        self.correct(node, inventory);
        for (segment, shard, peaks) in &inventory.captured {
            if let Some(task) = self.adoptable(Group::Capture(*segment), shard.0) {
                self.revoke_others(task, None, "a node that came back has it");
                self.unready(task);
                self.finish(task, None, node, peaks, None);
            }
        }
        let mut dropped = BTreeSet::new();
        for held in &inventory.held {
            if let Held::Sums { segment, shards } = held
                && !self.adopt_sums(node, *segment, shards)
            {
                dropped.insert(*segment);
            }
        }
        // A node that forgets a stage's sums forgets its means with them.
        dropped.iter().for_each(|segment| self.forget_means_at(node, *segment));
        for held in &inventory.held {
            match held {
                Held::Means { layer, slice } => self.adopt_means(node, *layer, *slice, &dropped),
                Held::Carry { range, segment, shard } => {
                    self.adopt_carry(node, range.index(), *segment, *shard);
                }
                Held::Sums { .. } => {}
            }
        }
        inventory.leases.iter().for_each(|lease| self.adopt_lease(node, lease));
    }

    /// A task at a place that the plan has, which is ready or under way.
    fn adoptable(&self, group: Group, place: u32) -> Option<TaskId> {
        let known = match group {
            Group::Forward(range) => range.index() + 1 < self.lanes.len(),
            Group::Capture(segment) | Group::Accumulate(segment) => {
                self.stages.get(segment.index()).is_some_and(super::Stage::is_open)
            }
            Group::Reduce(layer) => layer.index() < self.layers.len() && self.is_read(layer),
            Group::Solve(layer) => self.layers.get(layer.index()).is_some_and(|entry| !entry.is_over()),
        };
        if !known || place as usize >= self.table.ids(group).len() || self.is_finished() {
            return None;
        }
        let task = self.table.id(group, place);
        matches!(self.slots[task.0].state, TaskState::Ready | TaskState::Leased(_)).then_some(task)
    }

    fn unready(&mut self, task: TaskId) {
        if self.slots[task.0].state == TaskState::Ready {
            self.changes.push(Change::Unready(task));
        }
    }

    fn adopt(&mut self, node: NodeId, task: TaskId) {
        self.revoke_others(task, None, "a node that came back has it");
        self.unready(task);
        self.finish(task, None, node, &[], None);
    }

    /// False if they do not count, and the node was told to forget them.
    fn adopt_sums(&mut self, node: NodeId, segment: SegmentId, shards: &[ShardId]) -> bool {
        if self.nodes.get(&node).is_some_and(|member| member.sums.contains_key(&segment)) {
            return true;
        }
        let group = Group::Accumulate(segment);
        let ascending = shards.windows(2).all(|pair| pair[0] < pair[1]);
        let tasks: Option<Vec<TaskId>> = shards.iter().map(|shard| self.countable(group, shard.0)).collect();
        let Some(tasks) = tasks.filter(|tasks| ascending && !tasks.is_empty()) else {
            self.changes.push(Change::DropSums { node, segment });
            return false;
        };
        tasks.into_iter().for_each(|task| self.adopt(node, task));
        true
    }

    fn forget_means_at(&mut self, node: NodeId, segment: SegmentId) {
        let plan = std::sync::Arc::clone(&self.plan);
        let Some(member) = self.nodes.get_mut(&node) else { return };
        let (gone, kept) =
            member.means.iter().copied().partition(|(layer, _)| plan.layer(*layer).stage == segment);
        let gone: BTreeSet<(LayerId, SliceId)> = gone;
        member.means = kept;
        if !gone.is_empty() {
            gone.into_iter().for_each(|(layer, slice)| self.forget_means(layer, slice));
            self.revive(segment);
        }
    }

    /// Like `adoptable`, and also what was done by somebody who is gone and not needed since.
    fn countable(&self, group: Group, place: u32) -> Option<TaskId> {
        self.adoptable(group, place).or_else(|| {
            let Group::Accumulate(segment) = group else { return None };
            let open = self.stages.get(segment.index()).is_some_and(super::Stage::is_open);
            if !open || place as usize >= self.table.ids(group).len() {
                return None;
            }
            let task = self.table.id(group, place);
            let slot = &self.slots[task.0];
            (slot.is_done() && slot.holder().is_none()).then_some(task)
        })
    }

    fn adopt_means(&mut self, node: NodeId, layer: LayerId, slice: SliceId, dropped: &BTreeSet<SegmentId>) {
        let stage = self.plan.layers.get(layer.index()).map(|layer| layer.stage);
        if stage.is_some_and(|stage| !dropped.contains(&stage))
            && let Some(task) = self.adoptable(Group::Reduce(layer), slice.0)
        {
            self.adopt(node, task);
        }
    }

    /// A carry at the start of a range is what a forward run through the range before makes.
    fn adopt_carry(&mut self, node: NodeId, range: usize, segment: SegmentId, shard: ShardId) {
        let Some(lane) = self.lanes.get(range) else { return };
        if range == 0 || segment.index() + 1 != lane.stages.start {
            return;
        }
        let before = crate::RangeId(range as u32 - 1);
        let waiting = |task: &TaskId| self.slots[task.0].state == TaskState::Waiting;
        let places = self.table.ids(Group::Forward(before)).len();
        let at_hand = ((shard.0 as usize) < places).then(|| self.table.id(Group::Forward(before), shard.0));
        let task = self.adoptable(Group::Forward(before), shard.0).or(at_hand.filter(waiting));
        if let Some(task) = task.filter(|_| !self.is_finished()) {
            self.adopt(node, task);
        }
    }

    fn adopt_lease(&mut self, node: NodeId, lease: &Lease) {
        if self.leases.get(&lease.id).is_some_and(|record| record.node == node) {
            return;
        }
        let answered = self.ended.get(&lease.id).is_some_and(|record| {
            let state = TaskState::Done { lease: Some(lease.id), node: Some(node) };
            record.node == node && self.slots[record.task.0].state == state
        });
        if answered {
            return;
        }
        let task = self.table.find(&lease.task);
        let ready = task.filter(|task| self.slots[task.0].state == TaskState::Ready && !self.is_finished());
        match ready.filter(|_| !self.leases.contains_key(&lease.id)) {
            Some(task) => {
                self.take_up(lease.id, LeaseRecord { task, node, attempt: lease.attempt });
                self.changes.push(Change::Adopted { lease: lease.id, task });
            }
            None => {
                let why = "its task is not to be done any more, or by another node";
                self.changes.push(Change::Revoked { lease: lease.id, node, why });
            }
        }
    }

    /// A known node says again what it has: leases and state that it does not have are taken from it.
    fn correct(&mut self, node: NodeId, inventory: &Inventory) {
        let in_hand: BTreeSet<LeaseId> = inventory.leases.iter().map(|lease| lease.id).collect();
        let Some(member) = self.nodes.get(&node).cloned() else { return };
        for lease in member.leases.difference(&in_hand) {
            self.put_back(*lease);
        }
        for (segment, shards) in &member.sums {
            if !self.has_sums(*segment, shards, inventory, &in_hand) {
                if let Some(entry) = self.nodes.get_mut(&node) {
                    entry.sums.remove(segment);
                }
                shards.iter().for_each(|shard| self.forget_sum(*segment, *shard));
                self.revive(*segment);
            }
        }
        for (layer, slice) in &member.means {
            let held = Held::Means { layer: *layer, slice: *slice };
            let unsettled = self.is_unsettled(self.table.id(Group::Reduce(*layer), slice.0), &in_hand);
            if !unsettled && !inventory.held.contains(&held) {
                if let Some(entry) = self.nodes.get_mut(&node) {
                    entry.means.remove(&(*layer, *slice));
                }
                self.forget_means(*layer, *slice);
                self.revive(self.plan.layer(*layer).stage);
            }
        }
    }

    /// A grant that never arrived: nothing failed.
    fn put_back(&mut self, lease: LeaseId) {
        let Some(record) = self.end(lease) else { return };
        let TaskState::Leased(rivals) = &mut self.slots[record.task.0].state else { return };
        rivals.retain(|other| *other != lease);
        if rivals.is_empty() {
            self.make_ready(record.task);
        }
    }

    /// Accepted, but the node has not heard of it yet.
    fn is_unsettled(&self, task: TaskId, in_hand: &BTreeSet<LeaseId>) -> bool {
        matches!(self.slots[task.0].state, TaskState::Done { lease: Some(lease), .. } if in_hand.contains(&lease))
    }

    /// Whether the node's sums are those that are counted on, apart from shards it has not heard the verdict of.
    fn has_sums(
        &self,
        segment: SegmentId,
        counted: &BTreeSet<ShardId>,
        inventory: &Inventory,
        in_hand: &BTreeSet<LeaseId>,
    ) -> bool {
        let found = inventory.held.iter().find_map(|held| match held {
            Held::Sums { segment: at, shards } if *at == segment => Some(shards.as_slice()),
            _ => None,
        });
        let found: BTreeSet<ShardId> = found.unwrap_or_default().iter().copied().collect();
        let task = |shard: &ShardId| self.table.id(Group::Accumulate(segment), shard.0);
        found.is_subset(counted)
            && counted.difference(&found).all(|shard| self.is_unsettled(task(shard), in_hand))
    }
}
