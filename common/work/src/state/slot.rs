//! One task: where it stands, how often it was tried, and when it has been tried often enough.

use crate::{Failure, FailureClass, LeaseId, NodeId};

/// A task is failed for good after this many attempts that count.
pub const COUNTED_MAX: u32 = 3;
/// And after this many attempts altogether, so that none is tried for ever.
pub const ATTEMPTS_MAX: u32 = 20;

/// And after this many for which the memory did not suffice: in company, alone on its node, alone elsewhere.
pub const SHORT_OF_MEMORY_MAX: u32 = 3;

/// Where a task stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// Its stage has not begun, or the forward run it starts from is not there.
    Waiting,
    /// Can be leased once its group is open.
    Ready,
    /// Given out, at most to one node each; several are rivals for the first result.
    Leased(Vec<LeaseId>),
    /// Finished.
    Done {
        /// Under which lease; none if it was found in an inventory or in the store.
        lease: Option<LeaseId>,
        /// Who holds what it made; none once that node is lost.
        node: Option<NodeId>,
    },
    /// Given up, with its layer or the whole job.
    Failed,
}

/// A task's state and history.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Slot {
    pub(super) state: TaskState,
    pub(super) attempts: u32,
    counted: u32,
    short_of_memory: u32,
}

impl Slot {
    pub(super) fn waiting() -> Self {
        Self { state: TaskState::Waiting, attempts: 0, counted: 0, short_of_memory: 0 }
    }

    /// The holder of what a finished task made, if that is still there.
    pub(super) fn holder(&self) -> Option<NodeId> {
        if let TaskState::Done { node, .. } = self.state { node } else { None }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, TaskState::Done { .. })
    }

    /// Counts a failed attempt. Returns whether there will be another.
    pub(super) fn may_retry(&mut self, class: FailureClass) -> bool {
        self.counted += u32::from(class.counts());
        self.short_of_memory += u32::from(class == FailureClass::OutOfMemory);
        let short = self.short_of_memory >= SHORT_OF_MEMORY_MAX;
        class.retryable() && !short && self.counted < COUNTED_MAX && self.attempts < ATTEMPTS_MAX
    }

    /// The sentence for a task that is given up.
    pub(super) fn verdict(&self, task: &str, failure: &Failure) -> Failure {
        let message = &failure.message;
        let text = if !failure.class.retryable() {
            format!("{task}: {message}")
        } else if failure.class == FailureClass::OutOfMemory {
            format!(
                "{task}: given up, the memory did not suffice {SHORT_OF_MEMORY_MAX} times; last: {message}"
            )
        } else if self.counted >= COUNTED_MAX {
            format!("{task}: given up after {} attempts that count against it; last: {message}", self.counted)
        } else {
            format!("{task}: given up after {} attempts; last: {message}", self.attempts)
        };
        Failure::new(failure.class, text)
    }
}
