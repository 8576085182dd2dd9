//! Free slots are filled.

use super::{Action, Dispatch};
use halfstep_work::{Event, Grant, LeaseId, NodeId, TaskId};

/// A node less than this many times slower than others is given whatever there is.
pub(super) const SLOW: f64 = 1.5;
/// Time of one task, on the average, until a busy slot is free.
const HALF_A_TASK: f64 = 0.5;

impl Dispatch {
    /// Fills the slots of these nodes; of all if something became possible since.
    pub(super) fn settle(&mut self, now_ms: u64, touched: &[NodeId]) {
        touched.iter().for_each(|node| self.recount_slots(*node));
        self.fill(now_ms, touched);
        self.race(now_ms);
    }

    pub(super) fn recount_slots(&mut self, node: NodeId) {
        let free = self.peers.get(&node).is_some_and(|peer| {
            !peer.draining && self.state.leases_of(node).count() + peer.stuck < peer.slots
        }) && !self.is_kept_free(node);
        match free {
            true => drop(self.free.insert(node)),
            false => drop(self.free.remove(&node)),
        }
    }

    /// One task per node and round, first what belongs to it, then what waits for others.
    pub(super) fn fill(&mut self, now_ms: u64, touched: &[NodeId]) {
        touched.iter().for_each(|node| self.recount_slots(*node));
        if now_ms < self.held_until_ms {
            self.look_again = true;
            return;
        }
        self.give_alone(now_ms);
        loop {
            let all = std::mem::take(&mut self.look_again);
            let nodes: Vec<NodeId> = match all {
                true => self.free.iter().copied().collect(),
                false => touched.iter().copied().filter(|node| self.free.contains(node)).collect(),
            };
            for steal in [false, true] {
                let mut round = nodes.clone();
                while !round.is_empty() && !self.scheduler.is_idle() && !self.state.is_finished() {
                    round.retain(|node| self.free.contains(node) && self.give(*node, steal, now_ms));
                }
            }
            if !self.look_again {
                return;
            }
        }
    }

    fn give(&mut self, node: NodeId, steal: bool, now_ms: u64) -> bool {
        match self.scheduler.pick(&self.state, node, steal) {
            Some(task) if self.is_better_left(node, task) => {
                self.held_back = true;
                false
            }
            Some(task) => self.grant(node, task, now_ms),
            None => false,
        }
    }

    /// Whether others will have finished all that waits before this node, which is slower, has finished this task.
    fn is_better_left(&self, node: NodeId, task: TaskId) -> bool {
        let slowness = self.paces.slowness(node);
        if slowness < SLOW || self.scheduler.is_avoided(task) {
            return false;
        }
        let slots = self.peers.get(&node).map_or(0, |peer| peer.slots);
        let others = self.paces.capacity_without(node, slots);
        // Rounding: where there is nobody else, their capacity is next to nothing, not nothing.
        others > 1e-6
            && slowness > HALF_A_TASK + (self.scheduler.waiting_open(&self.state) as f64 / others).ceil()
    }

    /// Leases a task to a node; false if the state refuses.
    pub(super) fn grant(&mut self, node: NodeId, task: TaskId, now_ms: u64) -> bool {
        let id = LeaseId(self.next_lease);
        let lease = self.state.propose(id, node, task);
        let Ok(applied) = self.state.apply(Event::Granted { lease: lease.clone() }) else { return false };
        self.next_lease += 1;
        self.follow(applied.changes, now_ms);
        self.started(id, task, node, now_ms);
        let holdings = self.scheduler.holdings(&self.state, &lease.task, &self.addresses);
        self.actions.push(Action::Grant { node, grant: Grant { lease, holdings } });
        true
    }
}
