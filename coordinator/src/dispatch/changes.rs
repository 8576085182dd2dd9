//! Consequences of events: queues, actions, news, and when a failed task may be tried again.

use super::{Action, Attempt, AttemptEnd, Dispatch, News, Running, Spent};
use halfstep_work::{Change, Cost, Failure, FailureClass, LayerId, LeaseId, NodeId, TaskId, TaskPhase};
use std::collections::BTreeMap;

/// First wait before a task is tried again after something that takes time to pass.
const BACKOFF_FIRST_MS: u64 = 100;
/// Longest wait.
const BACKOFF_MAX_MS: u64 = 5_000;

/// How long a task waits after its n-th attempt failed.
pub(super) fn backoff_ms(class: FailureClass, attempts: u32) -> u64 {
    match class {
        FailureClass::OutOfMemory
        | FailureClass::Storage
        | FailureClass::PeerLost
        | FailureClass::Damaged => {
            (BACKOFF_FIRST_MS << attempts.saturating_sub(1).min(16)).min(BACKOFF_MAX_MS)
        }
        _ => 0,
    }
}

/// Whether another node should have the next try.
fn elsewhere(class: FailureClass) -> bool {
    matches!(
        class,
        FailureClass::OutOfMemory
            | FailureClass::Storage
            | FailureClass::PeerLost
            | FailureClass::Damaged
            | FailureClass::Hung
    )
}

impl Dispatch {
    /// Draws the consequences of one event.
    pub(super) fn follow(&mut self, changes: Vec<Change>, now_ms: u64) {
        let mut retries: BTreeMap<TaskId, FailureClass> = BTreeMap::new();
        for change in &changes {
            if let Change::Retry { task, node, failure } = change {
                retries.insert(*task, failure.class);
                if failure.class == FailureClass::OutOfMemory {
                    self.short_of_memory(*task, *node);
                }
            }
        }
        for change in changes {
            match change {
                Change::Ready(task) => self.ready(task, retries.get(&task).copied(), now_ms),
                Change::Unready(task) => self.unready(task),
                Change::Opened => self.look_again = true,
                Change::StageOpened(segment) => self.scheduler.stage_opened(&self.state, segment),
                Change::StageOver(segment) => {
                    self.scheduler.stage_over(&self.state, segment);
                    self.durations.retain(|(stage, _), _| *stage != segment);
                    self.alike.retain(|group, _| self.state.segment_of(*group) != segment);
                    self.look_again = true;
                }
                Change::Finished { task, node } => {
                    self.alone.finished(task);
                    self.scheduler.finished(&self.state, task, node);
                }
                Change::Adopted { lease, task } => self.adopted(lease, task, now_ms),
                Change::Retry { task, node, failure } => self.retry(task, node, &failure),
                Change::Revoked { lease, node, why } => self.revoked(lease, node, why, now_ms),
                Change::DropSums { node, segment } => self.actions.push(Action::DropSums { node, segment }),
                Change::LayerSolved(layer) => self.layer_solved(layer, now_ms),
                Change::LayerFailed(layer) => self.layer_failed(layer),
            }
        }
    }

    fn ready(&mut self, task: TaskId, failed: Option<FailureClass>, now_ms: u64) {
        let wait = failed.map_or(0, |class| backoff_ms(class, self.state.attempts(task)));
        if wait > 0 {
            self.delayed.insert((now_ms + wait, task));
            self.delayed_until.insert(task, now_ms + wait);
        } else {
            self.available(task);
        }
    }

    /// A task can be given out now.
    pub(super) fn available(&mut self, task: TaskId) {
        match self.alone.contains(task) {
            true => self.alone.ready(task),
            false => self.scheduler.ready(&self.state, task),
        }
        self.look_again = true;
    }

    fn unready(&mut self, task: TaskId) {
        match self.delayed_until.remove(&task) {
            Some(until) => drop(self.delayed.remove(&(until, task))),
            None if self.alone.unready(task) => {
                self.alone.place(task).into_iter().for_each(|node| self.recount_slots(node));
            }
            None => self.scheduler.unready(&self.state, task),
        }
    }

    fn adopted(&mut self, lease: LeaseId, task: TaskId, now_ms: u64) {
        if let Some((_, node, _)) = self.state.lease(lease) {
            self.started(lease, task, node, now_ms);
        }
    }

    pub(super) fn started(&mut self, lease: LeaseId, task: TaskId, node: NodeId, now_ms: u64) {
        let running = Running { task, node, since_ms: now_ms, counter: 0, moved_ms: now_ms };
        self.running.insert(lease, running);
        let number = self.state.lease(lease).map_or(0, |(_, _, number)| number);
        let name = self.peers.get(&node).map(|peer| peer.name.clone()).unwrap_or_default();
        self.history.begin(Attempt { lease, task, node, name, number, since_ms: now_ms, end: None });
        self.recount_slots(node);
    }

    fn retry(&mut self, task: TaskId, node: NodeId, failure: &Failure) {
        // Short of memory in company, a task stays where it is.
        if elsewhere(failure.class) && self.alone.place(task) != Some(node) {
            self.scheduler.failed(&self.state, task, node);
        }
        let attempt = self.state.attempts(task) + 1;
        let (task, why) = (self.state.label(task), failure.message.clone());
        self.actions.push(Action::News(News::Retry { task, why, attempt }));
    }

    fn revoked(&mut self, lease: LeaseId, node: NodeId, why: &str, now_ms: u64) {
        self.over(lease, AttemptEnd::Revoked(why.into()), now_ms);
        if self.peers.contains_key(&node) {
            self.actions.push(Action::Revoke { node, lease, why: why.into() });
            self.recount_slots(node);
            // Filled when all changes are followed: until then a node may seem free that is yet to be told to stop.
            self.look_again = true;
        }
    }

    fn layer_solved(&mut self, layer: LayerId, now_ms: u64) {
        let spent = self.spent.remove(&layer).unwrap_or(Spent { seconds: 0.0, since_ms: now_ms });
        let receipts = self.state.receipts(layer).unwrap_or_default();
        let elapsed = now_ms.saturating_sub(spent.since_ms) as f64 / 1e3;
        self.actions.push(Action::News(News::Solved { layer, receipts, seconds: spent.seconds, elapsed }));
    }

    fn layer_failed(&mut self, layer: LayerId) {
        if let Some(failure) = self.state.failed_layers().get(&layer).cloned() {
            self.actions.push(Action::News(News::Failed { layer, failure }));
        }
    }

    /// Takes down what a finished task cost.
    pub(super) fn record(&mut self, running: &Running, cost: &Cost, now_ms: u64) {
        let (group, _) = self.state.table().split(running.task);
        let segment = self.state.segment_of(group);
        let phase = group.phase();
        let spent = now_ms.saturating_sub(running.since_ms);
        self.durations.entry((segment, phase)).or_default().push(spent);
        let alike = self.alike.entry(group).or_default();
        if let Some(ratio) = alike.ratio(spent) {
            self.paces.finished(running.node, ratio, now_ms);
        }
        alike.push(spent);
        if let (TaskPhase::Solve, halfstep_work::Group::Solve(layer)) = (phase, group) {
            let spent = self.spent.entry(layer).or_insert(Spent { seconds: 0.0, since_ms: running.since_ms });
            spent.seconds += cost.seconds;
            spent.since_ms = spent.since_ms.min(running.since_ms);
        }
        let progress = self.state.progress(group);
        self.actions.push(Action::News(News::Task { phase, seconds: cost.seconds, progress }));
    }
}
