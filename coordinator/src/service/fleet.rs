//! The service that nodes speak to: one stream each, and the outcomes of leases.

use super::request::{EngineLine, Line, NewNode, Outbound, Outcome, Pulse, Request as Ask};
use super::shelf::Shelf;
use crate::artefacts::{ArtefactError, Artefacts};
use crate::source::{ROUNDING_BYTES_MAX, read_rounding};
use halfstep_proto::wire::fleet_server::Fleet;
use halfstep_proto::wire::line_measured::Result as Rate;
use halfstep_proto::wire::node_message::Body;
use halfstep_proto::wire::{
    CommitReply, CommitRequest, CoordinatorMessage, LineMeasured, NodeMessage, Opened,
};
use halfstep_proto::{Commit, DoneRef, WireError, check_hello, job_from_wire};
use halfstep_work::{
    Done, Failure, FailureClass, GroupAnswer, Inventory, JobId, LeaseId, NodeId, RangeId, SegmentId, ShardId,
    Verdict,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// A stream whose first message does not come is closed.
const FIRST_MESSAGE: Duration = Duration::from_secs(5);
/// Messages that a node may leave unread.
const UNREAD_MAX: usize = 1024;
/// Characters of a node's reason for having no figure.
const FAILED_MAX: usize = 500;

pub(super) struct FleetService {
    pub(super) engine: EngineLine,
    pub(super) artefacts: Arc<Artefacts>,
    pub(super) shelf: Shelf,
}

#[tonic::async_trait]
impl Fleet for FleetService {
    type AttachStream = ReceiverStream<Result<CoordinatorMessage, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<NodeMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut stream = request.into_inner();
        let first = tokio::time::timeout(FIRST_MESSAGE, stream.message());
        let first =
            first.await.map_err(|_| Status::deadline_exceeded("the first message did not come"))??;
        let new = first_message(first)?;
        let (outbound, messages, ended) = Outbound::new(UNREAD_MAX);
        let line = self.engine.ask(|reply| Ask::Attach { new, outbound, reply }).await?;
        tokio::spawn(listen(self.engine.clone(), line, stream, ended));
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn commit(&self, request: Request<CommitRequest>) -> Result<Response<CommitReply>, Status> {
        let commit = Commit::try_from(request.into_inner())?;
        let (outcome, hash) = match commit.outcome {
            // Not running: the engine says whether that is for now or for ever.
            Ok(DoneRef::Solved(_)) if self.shelf.get(commit.job).is_none() => {
                (Err(Failure::new(FailureClass::HandedBack, "the job is not running")), None)
            }
            Ok(done) => self.resolve(commit.job, done).await.map(|(done, hash)| (Ok(done), hash))?,
            Err(failure) => (Err(failure), None),
        };
        let outcome = Box::new(Outcome {
            job: commit.job,
            node: commit.node,
            epoch: commit.epoch,
            lease: commit.lease,
            attempt: commit.attempt,
            outcome,
            hash,
            cost: commit.cost,
        });
        let verdict: Verdict = self.engine.ask(|reply| Ask::Commit { outcome, reply }).await?;
        Ok(Response::new(verdict.into()))
    }
}

impl FleetService {
    /// Reads an uploaded rounding back: what is acknowledged must be there and be what it says.
    async fn resolve(&self, job: JobId, done: DoneRef) -> Result<(Done, Option<blake3::Hash>), Status> {
        let DoneRef::Solved(name) = done else {
            let done = done.resolve(|_| Err(Status::internal("not a rounding")))?;
            return Ok((done, None));
        };
        let hash = blake3::Hash::from_bytes(name.0);
        let Some(current) = self.shelf.get(job) else {
            return Err(Status::unavailable(format!("job {job} has just ended")));
        };
        let artefacts = Arc::clone(&self.artefacts);
        let read = move || {
            let bytes = artefacts.read(&hash, ROUNDING_BYTES_MAX).map_err(|error| match error {
                ArtefactError::Missing { .. } => Status::not_found(error.to_string()),
                ArtefactError::Damaged { .. } => Status::data_loss(error.to_string()),
                error => Status::unavailable(error.to_string()),
            })?;
            read_rounding(&current.plan, &bytes).map_err(Status::invalid_argument)
        };
        let rounding = tokio::task::spawn_blocking(read).await;
        let rounding = rounding.map_err(|e| Status::internal(format!("reading a rounding: {e}")))??;
        Ok((Done::Solved(Arc::new(rounding)), Some(hash)))
    }
}

fn first_message(message: Option<NodeMessage>) -> Result<NewNode, Status> {
    let Some(Body::Attach(attach)) = message.and_then(|message| message.body) else {
        return Err(Status::invalid_argument("the first message of a node's stream must attach it"));
    };
    check_hello(&attach.hello, "the node")?;
    let description =
        attach.description.ok_or_else(|| Status::invalid_argument("a node must describe itself"))?;
    Ok(NewNode {
        description: description.try_into()?,
        address: attach.address,
        previous: attach.previous_node.map(|node| (NodeId(node), attach.previous_epoch)),
    })
}

/// Passes on what a node says until its stream ends, for whatever reason, or the engine ends the line.
async fn listen(
    engine: EngineLine,
    line: Line,
    mut stream: Streaming<NodeMessage>,
    mut ended: oneshot::Receiver<()>,
) {
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            _ = &mut ended => return,
        };
        let told = match message {
            Ok(Some(NodeMessage { body: Some(body) })) => match understood(line, body) {
                Ok(request) => engine.tell(request).await,
                Err(error) => {
                    tracing::warn!(node = %line.node, %error, "a node's message makes no sense");
                    break;
                }
            },
            Ok(Some(NodeMessage { body: None })) => Ok(()),
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(node = %line.node, %error, "a node's stream broke");
                break;
            }
        };
        if told.is_err() {
            return;
        }
    }
    // Fails when the coordinator stops.
    let _ = engine.tell(Ask::Detached { line }).await;
}

fn understood(line: Line, body: Body) -> Result<Ask, WireError> {
    Ok(match body {
        Body::Attach(_) => return Err(WireError::new("message", "a node attaches once a stream")),
        Body::Opened(opened) => {
            let (job, result) = opened_from_wire(opened)?;
            Ask::Opened { line, job, result }
        }
        Body::Heartbeat(beat) => {
            let leases =
                beat.leases.into_iter().map(|lease| (LeaseId(lease.lease), lease.progress)).collect();
            let pulse = Pulse {
                leases,
                held_bytes: beat.held_bytes,
                bytes_sent: beat.bytes_sent,
                bytes_fetched: beat.bytes_fetched,
            };
            Ask::Pulse { line, pulse }
        }
        Body::Drain(drain) => Ask::Drain { line, reason: drain.reason },
        Body::Measured(measured) => {
            let number = measured.number;
            Ask::Measured { line, number, rate: rate_from_wire(measured) }
        }
        Body::TakenOver(taken) => {
            let carry =
                taken.carry.ok_or_else(|| WireError::new("carry that was taken over", "is missing"))?;
            let carry = (RangeId(carry.range), SegmentId(carry.segment), ShardId(carry.shard));
            Ask::TakenOver { line, job: job_from_wire(&taken.job)?, carry, taken: taken.taken }
        }
        Body::Group(answer) => {
            let (epoch, answer) = <(u64, GroupAnswer)>::try_from(answer)?;
            Ask::Group { line, epoch, answer }
        }
    })
}

/// A figure, or why there is none, cut to what may be passed on.
fn rate_from_wire(measured: LineMeasured) -> Result<u64, String> {
    match measured.result {
        Some(Rate::BytesPerSecond(rate)) => Ok(rate),
        Some(Rate::Failed(why)) => Err(why.chars().filter(|c| !c.is_control()).take(FAILED_MAX).collect()),
        None => Err("the node's answer says nothing".into()),
    }
}

fn opened_from_wire(opened: Opened) -> Result<(JobId, Result<Inventory, Failure>), WireError> {
    let job = job_from_wire(&opened.job)?;
    let result = match (opened.failure, opened.inventory) {
        (Some(failure), _) => Err(Failure::try_from(failure)?),
        (None, inventory) => Ok(inventory.map(Inventory::try_from).transpose()?.unwrap_or_default()),
    };
    Ok((job, result))
}
