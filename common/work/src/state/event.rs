//! What can happen to a job, and what follows from it.

use super::tasks::TaskId;
use crate::{Done, Failure, Inventory, LayerId, LeaseId, NodeId, SegmentId, Task, Verdict};
use serde::{Deserialize, Serialize};

/// One grant of one task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lease {
    /// Fences every message about it.
    pub id: LeaseId,
    /// Holder.
    pub node: NodeId,
    /// 1 for the first try.
    pub attempt: u32,
    /// What to do.
    pub task: Task,
}

/// What can happen to a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// A node takes part, with what it still has of the job. Said of a node that is known, it corrects what is known.
    Joined {
        /// Its registration.
        node: NodeId,
        /// What it has.
        inventory: Inventory,
    },
    /// A node wants to leave: it gets no more grants, what it holds stays valid.
    Draining {
        /// Which.
        node: NodeId,
    },
    /// A node and all it holds are gone.
    Lost {
        /// Which.
        node: NodeId,
        /// What its leases fail with: `NodeLost`, or `HandedBack` if it went in good order.
        failure: Failure,
    },
    /// A task was given out. A task that is under a lease already is given out twice: the first result wins.
    Granted {
        /// The grant.
        lease: Lease,
    },
    /// A lease was completed.
    Completed {
        /// Which.
        lease: LeaseId,
        /// With what.
        done: Done,
    },
    /// A lease failed.
    Failed {
        /// Which.
        lease: LeaseId,
        /// Why.
        failure: Failure,
    },
    /// The job is to stop.
    Stopped {
        /// Why: `Cancelled`, or whatever makes going on pointless.
        failure: Failure,
    },
}

/// What an event led to.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// What to answer to whoever completed a lease; `Accepted` for other events.
    pub verdict: Verdict,
    /// Consequences, in the order in which they came about.
    pub changes: Vec<Change>,
}

/// One consequence of an event, for those who schedule, talk to nodes or inform users.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A task can be given out, once its group is open.
    Ready(TaskId),
    /// A task cannot be given out any more.
    Unready(TaskId),
    /// Some group of tasks became possible.
    Opened,
    /// A stage begins.
    StageOpened(SegmentId),
    /// A stage is over: what is held for it is of no use any more.
    StageOver(SegmentId),
    /// A task is finished, by this node.
    Finished {
        /// Which.
        task: TaskId,
        /// By whom.
        node: NodeId,
    },
    /// A node's lease taken up again after it came back.
    Adopted {
        /// The lease.
        lease: LeaseId,
        /// Its task.
        task: TaskId,
    },
    /// A lease ended without a result.
    Retry {
        /// Its task, ready again or still under another lease.
        task: TaskId,
        /// Who had it.
        node: NodeId,
        /// Why.
        failure: Failure,
    },
    /// A lease is void while its node may still work on it.
    Revoked {
        /// Which.
        lease: LeaseId,
        /// Whose.
        node: NodeId,
        /// One sentence.
        why: &'static str,
    },
    /// A node holds sums that do not count, or of which nothing is to be made any more: it must forget them before it can
    /// accumulate at that stage again.
    DropSums {
        /// Whose.
        node: NodeId,
        /// Of which stage.
        segment: SegmentId,
    },
    /// All chunks of a layer are committed.
    LayerSolved(LayerId),
    /// A layer is given up and keeps its weights.
    LayerFailed(LayerId),
}

/// An event that contradicts the state, which is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventRefused {
    /// Something from or for a node that does not take part.
    #[error("{node}: not a node of this job, or not any more")]
    UnknownNode {
        /// The node.
        node: NodeId,
    },
    /// A grant of a task that cannot be given out.
    #[error("{lease}: its task cannot be given out to {node} now")]
    NotReady {
        /// The lease.
        lease: LeaseId,
        /// Its holder.
        node: NodeId,
    },
    /// A failure under a lease that holds nothing (any more).
    #[error("{lease}: stale, the task is no longer held under it")]
    Stale {
        /// The lease.
        lease: LeaseId,
    },
}
