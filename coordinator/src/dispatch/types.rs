//! What goes into and comes out of `Dispatch`.

use halfstep_work::{
    Failure, Grant, Holding, LayerId, LeaseId, NodeId, Progress, Receipt, SegmentId, TaskPhase,
};

/// Times and switches; milliseconds of the caller's monotonic clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How often nodes say that they are there.
    pub heartbeat_ms: u64,
    /// A node that says nothing for this long is lost, with all its leases.
    pub lease_ms: u64,
    /// A lease whose progress counter stands still for this long has a hung device.
    pub hung_ms: u64,
    /// A job that no node works on for this long fails.
    pub no_nodes_ms: u64,
    /// The first lease's id; larger than any of an earlier incarnation.
    pub first_lease_id: u64,
    /// Whether stragglers' tasks are given to a second node.
    pub speculate: bool,
}

/// What to tell a node that joined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JoinReply {
    /// Leases it may go on with; all others it has in hand are void.
    pub adopted: Vec<LeaseId>,
    /// Stages whose sums it must forget before anything else.
    pub drop_sums: Vec<SegmentId>,
}

/// What the caller has to do, in this order: a layer given up must be durable before a later grant leaves.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send a grant.
    Grant {
        /// To whom.
        node: NodeId,
        /// What.
        grant: Grant,
    },
    /// Tell a node that a lease is void.
    Revoke {
        /// Whom.
        node: NodeId,
        /// Which.
        lease: LeaseId,
        /// One sentence.
        why: String,
    },
    /// Tell a node to forget its sums of a stage: they do not count, or nothing is to be made from them any more.
    DropSums {
        /// Whom.
        node: NodeId,
        /// Which stage.
        segment: SegmentId,
    },
    /// Tell a node to fetch these carries from one that leaves, and to keep them.
    TakeOver {
        /// Whom.
        node: NodeId,
        /// Where they are.
        carries: Vec<Holding>,
    },
    /// Tell whoever watches.
    News(News),
}

/// What happened, for whoever shows it.
#[derive(Clone, Debug, PartialEq)]
pub enum News {
    /// A task was finished.
    Task {
        /// Its phase.
        phase: TaskPhase,
        /// Seconds of one slot.
        seconds: f64,
        /// How far its stage and phase have come.
        progress: Progress,
    },
    /// All chunks of a layer are committed.
    Solved {
        /// Which.
        layer: LayerId,
        /// Its chunks in order.
        receipts: Vec<Receipt>,
        /// Seconds of slots, all its chunks solved by this coordinator together.
        seconds: f64,
        /// Seconds from the first of these chunks' beginning, of the attempts that succeeded, to the last one's end.
        elapsed: f64,
    },
    /// A layer is given up and keeps its weights.
    Failed {
        /// Which.
        layer: LayerId,
        /// Why.
        failure: Failure,
    },
    /// A node takes part.
    NodeJoined {
        /// Which.
        node: NodeId,
        /// Its name.
        name: String,
        /// Tasks it works on at once.
        slots: usize,
    },
    /// A node does not take part any more.
    NodeLost {
        /// Which.
        node: NodeId,
        /// Its name.
        name: String,
        /// Why.
        why: String,
    },
    /// A task will be done again.
    Retry {
        /// Which, in words.
        task: String,
        /// Why.
        why: String,
        /// Number of the coming attempt.
        attempt: u32,
    },
    /// Nothing can be done for now.
    Waiting {
        /// Why, and for how long at most.
        why: String,
    },
}

/// Where a job stands as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Something is left to do.
    Running,
    /// Every layer is committed or given up.
    Finished,
    /// The job failed or was cancelled.
    Failed(Failure),
}

/// Things that are only counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Messages under leases that held nothing any more: fenced zombies.
    pub fenced: u64,
    /// Second results that were equal to the first.
    pub duplicates: u64,
    /// Failed attempts that were followed by another.
    pub retries: u64,
    /// Second leases given out because of a straggler.
    pub speculations: u64,
}
