//! Bringing the outcome of a lease to the coordinator: again and again until there is a verdict.
//!
//! A rounding is uploaded first; what is committed names its hash. A lost answer is asked for by committing again, which
//! is harmless. Only an answer that no repetition can change ends it otherwise.
//! Not here: doing the work (`workers`).

use super::leases::InHand;
use super::run::{Session, Shared};
use super::workers::Outcome;
use crate::failpoints::visit;
use crate::failure;
use bytes::Bytes;
use halfstep_proto::wire::fleet_client::FleetClient;
use halfstep_proto::{BlobHash, Commit, DoneRef, WireError, explain, rounding, wire};
use halfstep_work::{Cost, Failure, FailureClass, JobId, Lease, LeaseId, Node, Verdict};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};

/// Time for one answer: the coordinator waits for its disk.
const ANSWER: Duration = Duration::from_secs(30);
/// After this time the coordinator has heard what was said on the stream.
const HEARD: Duration = Duration::from_millis(500);
/// Uploads of one rounding, besides the first.
const MISSING_MAX: u32 = 3;
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Reports what a worker made of a lease.
pub(super) async fn report(shared: Arc<Shared>, lease: Arc<InHand>, outcome: Outcome) {
    match lease.claim_report() {
        true => deliver(shared, lease, outcome).await,
        // Handed back while the worker was still at it.
        false => settle(&shared, &lease, Verdict::Stale).await,
    }
}

/// Gives back everything that is not reported yet.
pub(super) fn hand_back(shared: &Arc<Shared>, reason: &str) {
    for lease in shared.leases.all() {
        if lease.claim_report() {
            let message = format!("handed back: {reason}");
            let outcome = Err(Failure::new(FailureClass::HandedBack, message));
            tokio::spawn(deliver(Arc::clone(shared), lease, outcome));
        }
    }
}

/// Tells the coordinator that a grant could not be read. Once: a node that attaches again does not name the lease.
pub(super) async fn give_back_unread(
    shared: Arc<Shared>,
    job: JobId,
    (lease, attempt): (u64, u32),
    error: WireError,
) {
    let Some(session) = shared.session.borrow().clone() else { return };
    let failure = Failure::new(FailureClass::Damaged, format!("the grant cannot be read: {error}"));
    tracing::warn!(lease, %failure, "a grant is given back");
    let Session { node, epoch, channel, .. } = session;
    let (lease, outcome, cost) = (LeaseId(lease), Err(failure), Cost::default());
    let commit = Commit { job, node, epoch, lease, attempt, outcome, cost };
    let told = timeout(ANSWER, FleetClient::new(channel).commit(wire::CommitRequest::from(commit))).await;
    if !matches!(told, Ok(Ok(_))) {
        tracing::warn!(%lease, "giving a grant back failed");
    }
}

async fn deliver(shared: Arc<Shared>, lease: Arc<InHand>, outcome: Outcome) {
    let mut report = Report::new(outcome);
    let verdict = report.deliver(&shared, &lease).await;
    // An accepted failure brings nothing into the sums, whatever a worker that was too late left behind.
    let verdict = verdict.filter(|_| report.outcome.is_ok()).unwrap_or(Verdict::Stale);
    visit("node.settle", &lease.grant.lease.task);
    settle(&shared, &lease, verdict).await;
    shared.leases.forget(lease.id());
}

/// Sums are added on a thread where that may take its time, and before anything else is heard of the verdict.
async fn settle(shared: &Arc<Shared>, lease: &InHand, verdict: Verdict) {
    let (node, id) = (Arc::clone(&shared.node), lease.id());
    let settled = tokio::task::spawn_blocking(move || node.settle(id, verdict)).await;
    if let Err(error) = settled {
        tracing::error!(%error, lease = %lease.id(), "verdict not settled");
    }
}

/// An outcome on its way.
struct Report {
    outcome: Result<DoneRef, Failure>,
    cost: Cost,
    /// The rounding, if it is one.
    blob: Option<Bytes>,
    /// The incarnation of the coordinator that has it: the next one removes what nobody had committed.
    uploaded: Option<u64>,
    /// How often the coordinator could not find what had been uploaded.
    missing: u32,
}

/// Why there is no verdict yet.
enum Refusal {
    /// The connection, or the coordinator's machine: later may be better.
    Again(String),
    /// The coordinator does not have the blob, or has it damaged.
    Missing(String),
    /// It will never take this outcome.
    Final(String),
}

impl Report {
    fn new(outcome: Outcome) -> Self {
        let (outcome, cost) = match outcome {
            Ok((done, cost)) => (Ok(done), cost),
            Err(failure) => (Err(failure), Cost::default()),
        };
        let mut blob = None;
        let outcome = outcome.and_then(|done| {
            DoneRef::naming(done, |rounding| {
                let bytes = rounding::encode(rounding).map_err(failure::internal)?;
                Ok(BlobHash::of(blob.insert(bytes)))
            })
        });
        Self { outcome, cost, blob, uploaded: None, missing: 0 }
    }

    /// `None` if the outcome is nobody's any more.
    async fn deliver(&mut self, shared: &Shared, lease: &InHand) -> Option<Verdict> {
        let mut pause = PAUSE;
        while !lease.abandoned() {
            match self.attempt(shared, lease).await {
                Ok(verdict) => return Some(verdict),
                Err(Refusal::Again(why)) => {
                    tracing::debug!(lease = %lease.id(), why, "outcome not delivered yet")
                }
                Err(Refusal::Missing(why)) if self.missing < MISSING_MAX => {
                    tracing::info!(lease = %lease.id(), why, "rounding uploaded again");
                    self.missing += 1;
                    self.uploaded = None;
                }
                Err(Refusal::Missing(why)) => self.give_up(lease, FailureClass::Damaged, why)?,
                Err(Refusal::Final(why)) => self.give_up(lease, FailureClass::Internal, why)?,
            }
            shared.attached_or(pause).await;
            pause = PAUSE_MAX.min(pause * 2);
        }
        None
    }

    /// The coordinator must hear of a lease that will bring nothing; `None` if it does not want to.
    fn give_up(&mut self, lease: &InHand, class: FailureClass, why: String) -> Option<()> {
        tracing::warn!(lease = %lease.id(), why, "outcome refused");
        self.outcome.is_ok().then(|| self.outcome = Err(Failure::new(class, why)))
    }

    /// Uploads what is not uploaded yet, then commits, under the registration of the moment: a coordinator that came
    /// back has taken up the leases it was told of when the job was opened, and knows no others.
    async fn attempt(&mut self, shared: &Shared, lease: &InHand) -> Result<Verdict, Refusal> {
        let again = |why: String| Refusal::Again(why);
        let session = shared.session.borrow().clone().ok_or_else(|| again("not attached".into()))?;
        let told = session.opened.filter(|(job, _)| *job == lease.job);
        let (job, told) = told.ok_or_else(|| again("the job is not open there yet".into()))?;
        let task = &lease.grant.lease.task;
        if let Some(bytes) = self.blob.as_ref().filter(|_| self.uploaded != Some(session.epoch)) {
            visit("node.upload", task);
            let uploaded = shared.lines.coordinator().upload(bytes.clone()).await;
            uploaded.map_err(|error| again(error.message))?;
            self.uploaded = Some(session.epoch);
        }
        let Lease { id, attempt, .. } = lease.grant.lease;
        let (node, epoch, outcome, cost) = (session.node, session.epoch, self.outcome.clone(), self.cost);
        let commit = Commit { job, node, epoch, lease: id, attempt, outcome, cost };
        let mut client = FleetClient::new(session.channel);
        visit("node.commit", task);
        let reply = match timeout(ANSWER, client.commit(wire::CommitRequest::from(commit))).await {
            Ok(Ok(reply)) => reply.into_inner(),
            Ok(Err(status)) => return Err(refusal(&status)),
            Err(_) => return Err(again(format!("no answer within {ANSWER:?}"))),
        };
        visit("node.answered", task);
        match Verdict::try_from(reply) {
            // The stream and this call overtake each other: what it was told of it may not have heard yet.
            Ok(Verdict::Stale) if told.elapsed() < HEARD => Err(again("stale, perhaps too early".into())),
            Ok(verdict) => Ok(verdict),
            Err(error) => Err(Refusal::Final(error.to_string())),
        }
    }
}

fn refusal(status: &Status) -> Refusal {
    let why = explain(status);
    if status.source().is_some() {
        return Refusal::Again(why);
    }
    match status.code() {
        Code::NotFound | Code::DataLoss => Refusal::Missing(why),
        Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::PermissionDenied
        | Code::Unimplemented
        | Code::OutOfRange => Refusal::Final(why),
        _ => Refusal::Again(why),
    }
}

/// Waits a little, or until the node is attached anew.
impl Shared {
    async fn attached_or(&self, pause: Duration) {
        let mut session = self.session.subscribe();
        session.mark_unchanged();
        tokio::select! {
            () = sleep(pause) => {}
            _ = session.changed() => {}
        }
    }
}
