//! The state of a running job: which tasks are ready, leased, done or failed, and which nodes hold what they made.
//!
//! ```text
//!            +-- retryable failure (the last lease of the task), holder lost while still needed --+
//!            v                                                                                    |
//!   Waiting -> Ready -> Leased [lease, lease ...] -----------------------------------------> Done { holder }
//!   (stage closed)          |
//!                           +----> Failed (not retryable, or too often): the layer or the job is given up
//! ```
//!
//! Method: every range of the plan is a lane whose stages run in order (`lane`); tasks of an open stage are ready, and
//! their groups (`Group`) open and close with the counts of what is captured, summed, reduced and solved. What nodes
//! hold is a pure function of plan and committed roundings: it is adopted when a node brings it (`join`) and done again
//! when the node is lost (`loss`), as far as something still depends on it. State changes only through `apply`, so that
//! events replayed give the live state.
//! Not here: time, choices of who does what (`coordinator::dispatch`, `coordinator::scheduler`), the journal.

mod complete;
mod event;
mod fail;
mod join;
mod lane;
mod loss;
mod slot;
mod stage;
mod tasks;
#[cfg(test)]
mod tests;
mod view;

pub use event::{Applied, Change, Event, EventRefused, Lease};
pub use slot::{ATTEMPTS_MAX, COUNTED_MAX, SHORT_OF_MEMORY_MAX, TaskState};
pub use tasks::{Group, TaskId, TaskTable};
pub use view::{Census, Counters, Progress};

use crate::{
    Failure, LayerId, LeaseId, NodeId, PeakRecord, Plan, Receipt, SegmentId, ShardId, SliceId, Verdict,
};
use lane::{Lane, LayerState, Stage};
use slot::Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What is known of a lease: current or ended.
#[derive(Clone, Copy, Debug, PartialEq)]
struct LeaseRecord {
    task: TaskId,
    node: NodeId,
    attempt: u32,
}

/// A node that takes part.
#[derive(Clone, Debug, Default, PartialEq)]
struct Member {
    draining: bool,
    leases: BTreeSet<LeaseId>,
    /// Shards that are in its sums, by stage.
    sums: BTreeMap<SegmentId, BTreeSet<ShardId>>,
    /// Slices whose means it made.
    means: BTreeSet<(LayerId, SliceId)>,
}

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub struct JobState {
    plan: Arc<Plan>,
    table: TaskTable,
    slots: Vec<Slot>,
    lanes: Vec<Lane>,
    stages: Vec<Stage>,
    layers: Vec<LayerState>,
    nodes: BTreeMap<NodeId, Member>,
    leases: BTreeMap<LeaseId, LeaseRecord>,
    ended: BTreeMap<LeaseId, LeaseRecord>,
    failed_layers: BTreeMap<LayerId, Failure>,
    fatal: Option<Failure>,
    counters: Counters,
    no_peaks: Arc<Vec<PeakRecord>>,
    /// Consequences of the event in hand.
    changes: Vec<Change>,
}

impl JobState {
    /// A job of which nothing has been done. The second value says what can be begun.
    pub fn new(plan: Arc<Plan>) -> (Self, Vec<Change>) {
        Self::resume(plan, Vec::new(), BTreeMap::new())
    }

    /// A job of which these roundings are committed and these layers given up: each range goes on at its first stage
    /// that misses anything. Roundings that the plan does not have are ignored.
    pub fn resume(
        plan: Arc<Plan>,
        committed: Vec<Receipt>,
        given_up: BTreeMap<LayerId, Failure>,
    ) -> (Self, Vec<Change>) {
        let mut state = Self::empty(plan);
        for receipt in committed {
            state.restore(receipt);
        }
        for (layer, failure) in given_up {
            if let Some(entry) = state.layers.get_mut(layer.index()) {
                entry.given_up = true;
                state.failed_layers.insert(layer, failure);
            }
        }
        state.skip_finished_stages();
        state.begin_forwards();
        (0..state.lanes.len()).for_each(|lane| state.advance(lane));
        let changes = std::mem::take(&mut state.changes);
        (state, changes)
    }

    fn empty(plan: Arc<Plan>) -> Self {
        let table = TaskTable::new(&plan);
        let mut readers = vec![Vec::new(); plan.layers.len()];
        plan.layers.iter().for_each(|layer| readers[plan.statistics_of(layer.id).index()].push(layer.id));
        let layers = plan.layers.iter().zip(readers).map(|(layer, readers)| LayerState {
            statistics: plan.statistics_of(layer.id),
            readers,
            means: 0,
            slices: layer.slices.len(),
            receipts: vec![None; layer.chunks.len()],
            solved: 0,
            given_up: false,
        });
        let lane = |range: &std::ops::Range<usize>| Lane {
            stages: range.clone(),
            first: range.start,
            next: range.start,
        };
        Self {
            slots: vec![Slot::waiting(); table.len()],
            lanes: plan.ranges.iter().map(lane).collect(),
            stages: plan.stages.iter().map(|stage| Stage::new(stage.solve.clone())).collect(),
            layers: layers.collect(),
            nodes: BTreeMap::new(),
            leases: BTreeMap::new(),
            ended: BTreeMap::new(),
            failed_layers: BTreeMap::new(),
            fatal: None,
            counters: Counters::default(),
            no_peaks: Arc::default(),
            changes: Vec::new(),
            table,
            plan,
        }
    }

    fn restore(&mut self, receipt: Receipt) {
        let (layer, chunk) = (receipt.layer, receipt.chunk);
        let Some(entry) = self.layers.get_mut(layer.index()) else { return };
        let Some(place) = entry.receipts.get_mut(chunk.index()) else { return };
        if place.replace(receipt).is_none() {
            entry.solved += 1;
        }
        let task = self.table.id(Group::Solve(layer), chunk.0);
        self.slots[task.0].state = TaskState::Done { lease: None, node: None };
    }

    /// Applies one event.
    ///
    /// # Errors
    /// `EventRefused` if it contradicts the state, which is unchanged then.
    pub fn apply(&mut self, event: Event) -> Result<Applied, EventRefused> {
        let mut verdict = Verdict::Accepted;
        match event {
            Event::Joined { node, inventory } => self.joined(node, &inventory),
            Event::Draining { node } => self.member(node)?.draining = true,
            Event::Lost { node, failure } => self.lost(node, &failure)?,
            Event::Granted { lease } => self.granted(&lease)?,
            Event::Completed { lease, done } => verdict = self.completed(lease, done),
            Event::Failed { lease, failure } => self.failed(lease, failure)?,
            Event::Stopped { failure } => self.stop(failure),
        }
        match verdict {
            Verdict::Accepted => {}
            Verdict::Duplicate => self.counters.duplicates += 1,
            Verdict::Stale => self.counters.stale += 1,
        }
        Ok(Applied { verdict, changes: std::mem::take(&mut self.changes) })
    }

    fn member(&mut self, node: NodeId) -> Result<&mut Member, EventRefused> {
        self.nodes.get_mut(&node).ok_or(EventRefused::UnknownNode { node })
    }

    fn granted(&mut self, lease: &Lease) -> Result<(), EventRefused> {
        let (id, node) = (lease.id, lease.node);
        let refused = EventRefused::NotReady { lease: id, node };
        let known = self.nodes.get(&node).ok_or(EventRefused::UnknownNode { node })?;
        let task = self.table.find(&lease.task).ok_or(refused.clone())?;
        let repeated = self.leases.contains_key(&id) || self.ended.contains_key(&id);
        if known.draining || repeated || self.is_finished() || !self.can_grant(task, node) {
            return Err(refused);
        }
        self.take_up(id, LeaseRecord { task, node, attempt: lease.attempt });
        Ok(())
    }

    /// A task of an open group that is ready or runs under others' leases.
    fn can_grant(&self, task: TaskId, node: NodeId) -> bool {
        let free = match &self.slots[task.0].state {
            TaskState::Ready => true,
            TaskState::Leased(leases) => leases.iter().all(|id| self.leases[id].node != node),
            _ => false,
        };
        free && self.is_open(self.table.split(task).0)
    }

    fn take_up(&mut self, lease: LeaseId, record: LeaseRecord) {
        let slot = &mut self.slots[record.task.0];
        match &mut slot.state {
            TaskState::Leased(leases) => leases.push(lease),
            state => {
                *state = TaskState::Leased(vec![lease]);
                self.changes.push(Change::Unready(record.task));
            }
        }
        slot.attempts = slot.attempts.max(record.attempt);
        self.leases.insert(lease, record);
        self.ended.remove(&lease);
        if let Some(member) = self.nodes.get_mut(&record.node) {
            member.leases.insert(lease);
        }
    }

    /// Ends a lease; the task's state is the caller's business.
    fn end(&mut self, lease: LeaseId) -> Option<LeaseRecord> {
        let record = self.leases.remove(&lease)?;
        if let Some(member) = self.nodes.get_mut(&record.node) {
            member.leases.remove(&lease);
        }
        self.ended.insert(lease, record);
        Some(record)
    }

    /// Ends every lease of a task but `keep`; their nodes are told to stop.
    fn revoke_others(&mut self, task: TaskId, keep: Option<LeaseId>, why: &'static str) {
        let TaskState::Leased(leases) = &self.slots[task.0].state else { return };
        for lease in leases.clone() {
            if let Some(record) = self.end(lease)
                && Some(lease) != keep
            {
                self.changes.push(Change::Revoked { lease, node: record.node, why });
            }
        }
    }

    fn make_ready(&mut self, task: TaskId) {
        self.slots[task.0].state = TaskState::Ready;
        self.changes.push(Change::Ready(task));
    }

    /// Takes a task out of circulation: whoever works on it is told to stop.
    fn retire(&mut self, task: TaskId, to: TaskState, why: &'static str) {
        self.revoke_others(task, None, why);
        if self.slots[task.0].state == TaskState::Ready {
            self.changes.push(Change::Unready(task));
        }
        self.slots[task.0].state = to;
    }

    /// Ends the job for good; the first reason stands.
    fn stop(&mut self, failure: Failure) {
        if self.fatal.is_some() {
            return;
        }
        self.fatal = Some(failure);
        for lease in self.leases.keys().copied().collect::<Vec<_>>() {
            if let Some(record) = self.end(lease) {
                self.slots[record.task.0].state = TaskState::Failed;
                let why = "the job has ended";
                self.changes.push(Change::Revoked { lease, node: record.node, why });
            }
        }
    }
}
