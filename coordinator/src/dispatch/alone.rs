//! Tasks for which the memory did not suffice: tried again with nothing beside them.
//!
//! One that had company on its node is tried again there, one that had none on another node if there is one. Its node is
//! kept free for it from the moment it can be given out until it has ended.
//! Not here: how often it is tried (`work::JobState`).

use super::Dispatch;
use halfstep_work::{NodeId, TaskId};
use std::collections::{BTreeMap, BTreeSet};

/// See the module.
#[derive(Default)]
pub(super) struct Alone {
    /// All such tasks until they are finished, and the node that each is for; none until one is chosen.
    tasks: BTreeMap<TaskId, Option<NodeId>>,
    /// Those that can be given out as soon as their group is open.
    ready: BTreeSet<TaskId>,
}

impl Alone {
    pub(super) fn contains(&self, task: TaskId) -> bool {
        self.tasks.contains_key(&task)
    }

    /// The node that was chosen for it.
    pub(super) fn place(&self, task: TaskId) -> Option<NodeId> {
        self.tasks.get(&task).copied().flatten()
    }

    /// How many can be given out once their groups are open.
    pub(super) fn waiting(&self) -> usize {
        self.ready.len()
    }

    pub(super) fn ready(&mut self, task: TaskId) {
        self.ready.insert(task);
    }

    /// False if it was not.
    pub(super) fn unready(&mut self, task: TaskId) -> bool {
        self.ready.remove(&task)
    }

    pub(super) fn finished(&mut self, task: TaskId) {
        self.tasks.remove(&task);
    }

    /// A node that is chosen later will do.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.tasks.values_mut().filter(|on| **on == Some(node)).for_each(|on| *on = None);
    }
}

impl Dispatch {
    /// A task failed for want of memory; its lease is gone from `running` already.
    pub(super) fn short_of_memory(&mut self, task: TaskId, node: NodeId) {
        let company = self.running.values().any(|running| running.node == node);
        self.alone.tasks.insert(task, company.then_some(node));
        let rivals = self.running.values().filter(|running| running.task == task);
        let rivals: Vec<NodeId> = rivals.map(|running| running.node).collect();
        rivals.into_iter().for_each(|node| self.recount_slots(node));
    }

    /// Whether a node gets nothing because of a task that has to be alone.
    pub(super) fn is_kept_free(&self, node: NodeId) -> bool {
        if self.alone.tasks.is_empty() {
            return false;
        }
        let mut running = self.running.values();
        running.any(|running| running.node == node && self.alone.contains(running.task)) || {
            let mut ready = self.alone.ready.iter();
            ready.any(|task| self.alone.place(*task) == Some(node) && self.is_possible(*task))
        }
    }

    fn is_possible(&self, task: TaskId) -> bool {
        self.state.is_open(self.state.table().split(task).0)
    }

    /// Gives tasks that have to be alone to nodes that have nothing in hand, and keeps nodes free for the others.
    pub(super) fn give_alone(&mut self, now_ms: u64) {
        for task in self.alone.ready.clone() {
            let chosen = self.alone.place(task);
            if !self.is_possible(task) {
                // What it waits for may be its node's to do.
                chosen.into_iter().for_each(|node| self.recount_slots(node));
                continue;
            }
            let chosen = chosen.filter(|node| self.peers.get(node).is_some_and(|peer| peer.can_work()));
            let Some(node) = chosen.or_else(|| self.roomiest(task)) else { continue };
            self.alone.tasks.insert(task, Some(node));
            if self.state.leases_of(node).next().is_none() {
                self.grant(node, task, now_ms);
            }
            self.recount_slots(node);
        }
    }

    /// The node that should have the next try: another than the last, kept free for nobody, with the least in hand.
    fn roomiest(&self, task: TaskId) -> Option<NodeId> {
        let able = self.peers.iter().filter(|(_, peer)| peer.can_work()).map(|(node, _)| *node);
        able.min_by_key(|node| {
            let culprit = self.scheduler.culprit(task) == Some(*node);
            (culprit, self.is_kept_free(*node), self.state.leases_of(*node).count(), *node)
        })
    }
}
