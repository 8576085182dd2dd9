//! Bringing the outcome of a lease to the coordinator: again and again until there is a verdict.
//!
//! A rounding is uploaded first; what is committed names its hash. A lost answer is asked for by committing again, which
//! is harmless. Only an answer that no repetition can change ends it otherwise.
//! Not here: doing the work (`workers`).

use super::leases::InHand;
use super::run::Shared;
use super::workers::Outcome;
use crate::failpoints::visit;
use bytes::Bytes;
use halfstep_proto::data::error_of;
use halfstep_proto::wire::fleet_client::FleetClient;
use halfstep_proto::{BlobHash, Commit, DoneRef, rounding, wire};
use halfstep_work::{Cost, Failure, FailureClass, Lease, Node, Verdict};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};

/// Time for one answer: the coordinator waits for its disk.
const ANSWER: Duration = Duration::from_secs(30);
/// After this time the coordinator has heard what was said on the stream.
const HEARD: Duration = Duration::from_millis(500);
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

async fn deliver(shared: Arc<Shared>, lease: Arc<InHand>, outcome: Outcome) {
    let failed = outcome.is_err();
    let verdict = verdict(&shared, &lease, outcome).await;
    // An accepted failure brings nothing into the sums, whatever a worker that was too late left behind.
    let verdict = verdict.filter(|_| !failed).unwrap_or(Verdict::Stale);
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

/// `None` if the outcome is nobody's any more.
async fn verdict(shared: &Shared, lease: &InHand, outcome: Outcome) -> Option<Verdict> {
    let (outcome, cost) = match outcome {
        Ok((done, cost)) => (Ok(done), cost),
        Err(failure) => (Err(failure), Cost::default()),
    };
    let mut blob: Option<Bytes> = None;
    let named = outcome.and_then(|done| {
        DoneRef::naming(done, |rounding| {
            let bytes = rounding::encode(rounding).map_err(|e| Failure::new(FailureClass::Internal, e))?;
            let hash = BlobHash::of(&bytes);
            blob = Some(bytes);
            Ok(hash)
        })
    });
    let mut pause = PAUSE;
    while !lease.abandoned() {
        match attempt(shared, lease, &named, cost, &mut blob).await {
            Ok(verdict) => return Some(verdict),
            Err(Refusal::Final(status)) => {
                tracing::warn!(lease = %lease.id(), "outcome refused: {}", status.message());
                return None;
            }
            Err(Refusal::Again(why)) => {
                tracing::debug!(lease = %lease.id(), why, "outcome not delivered yet")
            }
        }
        shared.attached_or(pause).await;
        pause = PAUSE_MAX.min(pause * 2);
    }
    None
}

enum Refusal {
    Again(String),
    Final(Status),
}

/// Uploads what is not uploaded yet, then commits, under the registration of the moment: a coordinator that came back
/// has taken up the leases it was told of when the job was opened, and knows no others.
async fn attempt(
    shared: &Shared,
    lease: &InHand,
    outcome: &Result<DoneRef, Failure>,
    cost: Cost,
    blob: &mut Option<Bytes>,
) -> Result<Verdict, Refusal> {
    let again = |why: String| Refusal::Again(why);
    let session = shared.session.borrow().clone().ok_or_else(|| again("not attached".into()))?;
    let told = session.opened.filter(|(job, _)| *job == lease.job);
    let (job, told) = told.ok_or_else(|| again("the job is not open there yet".into()))?;
    let task = &lease.grant.lease.task;
    if let Some(bytes) = blob {
        visit("node.upload", task);
        let uploaded = shared.lines.coordinator().upload(bytes.clone()).await;
        uploaded.map_err(|error| again(error.message))?;
        *blob = None;
    }
    let Lease { id, attempt, .. } = lease.grant.lease;
    let (node, epoch, outcome) = (session.node, session.epoch, outcome.clone());
    let commit = Commit { job, node, epoch, lease: id, attempt, outcome, cost };
    let mut client = FleetClient::new(session.channel);
    visit("node.commit", task);
    let reply = match timeout(ANSWER, client.commit(wire::CommitRequest::from(commit))).await {
        Ok(Ok(reply)) => reply.into_inner(),
        Ok(Err(status)) => return Err(refusal(status)),
        Err(_) => return Err(again(format!("no answer within {ANSWER:?}"))),
    };
    visit("node.answered", task);
    match Verdict::try_from(reply) {
        // The stream and this call overtake each other: what it was told of it may not have heard yet.
        Ok(Verdict::Stale) if told.elapsed() < HEARD => Err(again("stale, perhaps too early".into())),
        Ok(verdict) => Ok(verdict),
        Err(error) => Err(Refusal::Final(error.into())),
    }
}

/// What the connection or the coordinator's machine is to blame for may be otherwise next time.
fn refusal(status: Status) -> Refusal {
    let lost = error_of(&status, "coordinator");
    let again = match status.code() {
        Code::InvalidArgument | Code::FailedPrecondition | Code::PermissionDenied | Code::Unimplemented => {
            false
        }
        Code::NotFound | Code::Unauthenticated | Code::OutOfRange => false,
        _ => true,
    };
    let broken = std::error::Error::source(&status).is_some();
    if again || broken { Refusal::Again(lost.message) } else { Refusal::Final(status) }
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
