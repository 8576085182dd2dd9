//! What the engine is asked and told: by services, by threads that work for it.

use super::log::Subscription;
use crate::CoordinatorError;
use crate::jobs::{ActiveJob, Finished, Resumed};
use crate::scheduler::Place;
use crate::store::{InputFile, ResultFile};
use halfstep_proto::wire;
use halfstep_work::{
    Cost, Done, Failure, GroupAnswer, Inventory, JobId, LeaseId, NodeDescription, NodeId, Verdict,
};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

/// The way to one node. Bounded: a node that does not read is cut off. Dropped, it ends the whole line.
pub(super) struct Outbound {
    messages: mpsc::Sender<Result<wire::CoordinatorMessage, Status>>,
    _open: oneshot::Sender<()>,
}

impl Outbound {
    /// With what is to be sent, and what resolves when the line ends.
    pub(super) fn new(
        unread_max: usize,
    ) -> (Self, mpsc::Receiver<Result<wire::CoordinatorMessage, Status>>, oneshot::Receiver<()>) {
        let (messages, outgoing) = mpsc::channel(unread_max);
        let (open, ended) = oneshot::channel();
        (Self { messages, _open: open }, outgoing, ended)
    }

    /// False if the node does not read, or is gone.
    pub(super) fn say(&self, message: wire::CoordinatorMessage) -> bool {
        self.messages.try_send(Ok(message)).is_ok()
    }
}

pub(super) type Reply<T> = oneshot::Sender<Result<T, Status>>;

/// A node's first message.
pub(super) struct NewNode {
    pub(super) description: NodeDescription,
    pub(super) address: String,
    /// Its registration before, under that incarnation.
    pub(super) previous: Option<(NodeId, u64)>,
}

/// One open stream of one node; a node that comes back has a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) node: NodeId,
    pub(super) number: u64,
}

/// What a node says about itself between tasks.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Pulse {
    pub(super) leases: Vec<(LeaseId, u64)>,
    pub(super) held_bytes: u64,
    pub(super) bytes_sent: u64,
    pub(super) bytes_fetched: u64,
}

/// The outcome of a lease, its artefact durable and read back.
pub(super) struct Outcome {
    pub(super) job: JobId,
    pub(super) node: NodeId,
    pub(super) epoch: u64,
    pub(super) lease: LeaseId,
    pub(super) attempt: u32,
    pub(super) outcome: Result<Done, Failure>,
    /// Of the rounding's artefact.
    pub(super) hash: Option<blake3::Hash>,
    pub(super) cost: Cost,
}

/// A job that somebody submits; its files are known to be here.
pub(super) struct NewJob {
    pub(super) id: JobId,
    pub(super) spec: Vec<u8>,
    pub(super) files: Vec<InputFile>,
}

pub(super) enum Request {
    Attach { new: NewNode, outbound: Outbound, reply: Reply<Line> },
    Opened { line: Line, job: JobId, result: Result<Inventory, Failure> },
    Pulse { line: Line, pulse: Pulse },
    Drain { line: Line, reason: String },
    Group { line: Line, epoch: u64, answer: GroupAnswer },
    Measured { line: Line, number: u64, rate: Result<u64, String> },
    TakenOver { line: Line, job: JobId, carry: Place, taken: bool },
    Detached { line: Line },
    Commit { outcome: Box<Outcome>, reply: Reply<Verdict> },
    Submit { new: NewJob, reply: Reply<bool> },
    List { reply: Reply<Vec<wire::JobStatus>> },
    Status { job: JobId, reply: Reply<wire::JobStatus> },
    Watch { job: JobId, reply: Reply<Subscription> },
    Cancel { job: JobId, reply: Reply<wire::JobStatus> },
    Forget { job: JobId, reply: Reply<u64> },
    Results { job: JobId, reply: Reply<Vec<ResultFile>> },
    Nodes { measure: bool, reply: Reply<wire::NodesReply> },
    Explain { job: JobId, task: String, reply: Reply<wire::ExplainReply> },
    AskToLeave { node: String, reply: Reply<wire::DrainReply> },
    Ping { reply: Reply<()> },
    Prepared { job: JobId, result: Box<Result<(ActiveJob, Resumed), CoordinatorError>>, seconds: f64 },
    Exported { job: JobId, result: Box<Result<Finished, CoordinatorError>> },
    Stop { reply: oneshot::Sender<()> },
}

/// The engine as services see it.
#[derive(Clone)]
pub(super) struct EngineLine {
    requests: mpsc::Sender<Request>,
}

impl EngineLine {
    pub(super) fn new(requests: mpsc::Sender<Request>) -> Self {
        Self { requests }
    }

    /// Says something; waits while the engine is busy.
    pub(super) async fn tell(&self, request: Request) -> Result<(), Status> {
        self.requests.send(request).await.map_err(|_| stopping())
    }

    /// Asks something.
    pub(super) async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        self.tell(request(reply)).await?;
        answer.await.map_err(|_| stopping())?
    }

    /// From a thread that may wait.
    pub(super) fn tell_blocking(&self, request: Request) {
        // Fails when the engine has stopped: nobody is interested any more.
        let _ = self.requests.blocking_send(request);
    }
}

fn stopping() -> Status {
    Status::unavailable("the coordinator is stopping")
}
