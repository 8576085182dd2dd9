//! What became of every lease: for whoever asks why a task takes so long, for logs and for counting.
//!
//! Bounded: beyond `ATTEMPTS_KEPT` the oldest that are over are forgotten. Of no influence on any decision.
//! Not here: how an attempt ends (`dispatch`), how it is told (`account`).

use halfstep_work::{Failure, LeaseId, NodeId, TaskId};
use std::collections::{BTreeMap, VecDeque};
use std::mem::take;

/// Attempts of all tasks that are remembered.
pub(super) const ATTEMPTS_KEPT: usize = 1 << 16;

/// How a lease ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttemptEnd {
    /// Its result counts.
    Done,
    /// Without a result.
    Failed(Failure),
    /// It was of no use any more, with the reason: another was first, its layer or its job is over.
    Revoked(String),
    /// The grant never reached its node.
    NotReceived,
}

impl AttemptEnd {
    /// One word, in logs and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Done => "ok",
            Self::Failed(failure) => failure.class.name(),
            Self::Revoked(_) => "revoked",
            Self::NotReceived => "not_received",
        }
    }

    /// What there is to say besides.
    pub fn message(&self) -> &str {
        match self {
            Self::Done => "",
            Self::Failed(failure) => &failure.message,
            Self::Revoked(why) => why,
            Self::NotReceived => "the connection broke before the grant arrived",
        }
    }
}

/// One lease of one task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The lease.
    pub lease: LeaseId,
    /// Its task.
    pub task: TaskId,
    /// Its holder.
    pub node: NodeId,
    /// The holder's name.
    pub name: String,
    /// 1 for the first try.
    pub number: u32,
    /// When it was given out, or taken up again.
    pub since_ms: u64,
    /// When and how it ended; none while it is current.
    pub end: Option<(u64, AttemptEnd)>,
}

/// See the module.
#[derive(Default)]
pub(super) struct History {
    by_task: BTreeMap<TaskId, Vec<Attempt>>,
    /// Tasks of all attempts, the oldest first.
    order: VecDeque<TaskId>,
    /// Ended since they were last asked for.
    ended: Vec<Attempt>,
}

impl History {
    pub(super) fn begin(&mut self, attempt: Attempt) {
        self.order.push_back(attempt.task);
        self.by_task.entry(attempt.task).or_default().push(attempt);
        // Those under way are as many as there are slots: passed over, they are soon found again.
        for _ in 0..self.order.len().saturating_sub(ATTEMPTS_KEPT) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some(task) = self.order.pop_front() else { return };
        let Some(attempts) = self.by_task.get_mut(&task) else { return };
        match attempts.iter().position(|attempt| attempt.end.is_some()) {
            Some(place) => drop(attempts.remove(place)),
            None => self.order.push_back(task),
        }
        if attempts.is_empty() {
            self.by_task.remove(&task);
        }
    }

    /// Of no effect if the lease is not known or over.
    pub(super) fn end(&mut self, task: TaskId, lease: LeaseId, end: AttemptEnd, now_ms: u64) {
        let attempts = self.by_task.get_mut(&task).into_iter().flatten();
        let current = attempts.rev().find(|attempt| attempt.lease == lease && attempt.end.is_none());
        if let Some(attempt) = current {
            attempt.end = Some((now_ms, end));
            self.ended.push(attempt.clone());
        }
    }

    /// Attempts of a task that are remembered, in order.
    pub(super) fn of(&self, task: TaskId) -> &[Attempt] {
        self.by_task.get(&task).map_or(&[], Vec::as_slice)
    }

    /// Tasks of which attempts are remembered.
    pub(super) fn tasks(&self) -> impl Iterator<Item = (TaskId, &[Attempt])> {
        self.by_task.iter().map(|(task, attempts)| (*task, attempts.as_slice()))
    }

    pub(super) fn take_ended(&mut self) -> Vec<Attempt> {
        take(&mut self.ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(lease: u64, task: usize) -> Attempt {
        let (lease, task, node) = (LeaseId(lease), TaskId(task), NodeId(1));
        Attempt { lease, task, node, name: "a".into(), number: 1, since_ms: 0, end: None }
    }

    #[test]
    fn the_oldest_that_are_over_are_forgotten_and_those_under_way_are_not() {
        let mut history = History::default();
        history.begin(attempt(0, 7));
        for lease in 1..=ATTEMPTS_KEPT as u64 + 10 {
            let task = (lease % 5) as usize;
            history.begin(attempt(lease, task));
            history.end(TaskId(task), LeaseId(lease), AttemptEnd::Done, lease);
        }
        let kept: usize = history.tasks().map(|(_, attempts)| attempts.len()).sum();
        assert!(kept <= ATTEMPTS_KEPT && kept + 5 > ATTEMPTS_KEPT, "{kept}");
        assert_eq!(history.of(TaskId(7)), [attempt(0, 7)], "under way all the time");
        assert!(history.of(TaskId(1)).iter().all(|attempt| attempt.lease.0 > 10));
        assert_eq!(history.take_ended().len(), ATTEMPTS_KEPT + 10);
        assert!(history.take_ended().is_empty());
    }

    #[test]
    fn an_attempt_ends_once() {
        let mut history = History::default();
        history.begin(attempt(1, 0));
        let revoked = AttemptEnd::Revoked("another was first".into());
        history.end(TaskId(0), LeaseId(1), revoked.clone(), 5);
        history.end(TaskId(0), LeaseId(1), AttemptEnd::Done, 6);
        history.end(TaskId(3), LeaseId(9), AttemptEnd::Done, 6);
        assert_eq!(history.of(TaskId(0))[0].end, Some((5, revoked)));
        assert_eq!(history.take_ended().len(), 1);
    }
}
