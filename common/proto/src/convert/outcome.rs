//! What becomes of leases: results, failures, costs, verdicts.
//!
//! A rounding travels as a blob and is named by its hash here ([`DoneRef`]).

use super::task::{peaks_from_wire, peaks_to_wire};
use super::{amount, job_from_wire, job_to_wire, present, shortened};
use crate::{BlobHash, WireError, wire};
use halfstep_work::{
    Cost, Done, Failure, FailureClass, JobId, LeaseId, NodeId, PeakRecord, Rounding, Verdict,
};
use std::sync::Arc;

/// [`Done`], with the rounding by name.
#[derive(Clone, Debug, PartialEq)]
pub enum DoneRef {
    /// The next range's start is held.
    Forwarded,
    /// Peaks of this shard.
    Captured {
        /// One per tapped use.
        peaks: Vec<PeakRecord>,
    },
    /// The shard's products are ready.
    Accumulated,
    /// The slice's means are held.
    Reduced,
    /// The rounding blob (`rounding::encode`) was uploaded under this hash.
    Solved(BlobHash),
}

impl DoneRef {
    /// Names the result; `name` says under which hash a rounding can be fetched.
    ///
    /// # Errors
    /// That of `name`.
    pub fn naming<E>(done: Done, name: impl FnOnce(&Rounding) -> Result<BlobHash, E>) -> Result<Self, E> {
        Ok(match done {
            Done::Forwarded => Self::Forwarded,
            Done::Captured { peaks } => Self::Captured { peaks },
            Done::Accumulated => Self::Accumulated,
            Done::Reduced => Self::Reduced,
            Done::Solved(rounding) => Self::Solved(name(&rounding)?),
        })
    }

    /// The result itself; `fetch` gets a rounding by its hash.
    ///
    /// # Errors
    /// That of `fetch`.
    pub fn resolve<E>(self, fetch: impl FnOnce(BlobHash) -> Result<Arc<Rounding>, E>) -> Result<Done, E> {
        Ok(match self {
            Self::Forwarded => Done::Forwarded,
            Self::Captured { peaks } => Done::Captured { peaks },
            Self::Accumulated => Done::Accumulated,
            Self::Reduced => Done::Reduced,
            Self::Solved(hash) => Done::Solved(fetch(hash)?),
        })
    }
}

impl From<DoneRef> for wire::Done {
    fn from(done: DoneRef) -> Self {
        use wire::done::Kind;
        let kind = match done {
            DoneRef::Forwarded => Kind::Forwarded(wire::Empty {}),
            DoneRef::Captured { peaks } => {
                Kind::Captured(wire::CapturedPeaks { peaks: peaks_to_wire(&peaks) })
            }
            DoneRef::Accumulated => Kind::Accumulated(wire::Empty {}),
            DoneRef::Reduced => Kind::Reduced(wire::Empty {}),
            DoneRef::Solved(hash) => Kind::Solved(hash.to_vec()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::Done> for DoneRef {
    type Error = WireError;

    fn try_from(done: wire::Done) -> Result<Self, WireError> {
        use wire::done::Kind;
        Ok(match present(done.kind, "kind of result")? {
            Kind::Forwarded(_) => Self::Forwarded,
            Kind::Captured(c) => Self::Captured { peaks: peaks_from_wire(c.peaks)? },
            Kind::Accumulated(_) => Self::Accumulated,
            Kind::Reduced(_) => Self::Reduced,
            Kind::Solved(hash) => Self::Solved(BlobHash::try_from(hash.as_slice())?),
        })
    }
}

/// The outcome of one lease.
#[derive(Clone, Debug, PartialEq)]
pub struct Commit {
    /// Job of the lease.
    pub job: JobId,
    /// Registration of the node that held it.
    pub node: NodeId,
    /// Incarnation of the coordinator that granted it.
    pub epoch: u64,
    /// The lease.
    pub lease: LeaseId,
    /// Its attempt.
    pub attempt: u32,
    /// What came of it.
    pub outcome: Result<DoneRef, Failure>,
    /// What it cost.
    pub cost: Cost,
}

impl From<Commit> for wire::CommitRequest {
    fn from(commit: Commit) -> Self {
        use wire::commit_request::Outcome;
        Self {
            job: job_to_wire(commit.job),
            node: commit.node.0,
            epoch: commit.epoch,
            lease: commit.lease.0,
            attempt: commit.attempt,
            outcome: Some(match commit.outcome {
                Ok(done) => Outcome::Done(done.into()),
                Err(failure) => Outcome::Failure(failure.into()),
            }),
            cost: Some(commit.cost.into()),
        }
    }
}

impl TryFrom<wire::CommitRequest> for Commit {
    type Error = WireError;

    fn try_from(commit: wire::CommitRequest) -> Result<Self, WireError> {
        use wire::commit_request::Outcome;
        Ok(Self {
            job: job_from_wire(&commit.job)?,
            node: NodeId(commit.node),
            epoch: commit.epoch,
            lease: LeaseId(commit.lease),
            attempt: commit.attempt,
            outcome: match present(commit.outcome, "outcome of a lease")? {
                Outcome::Done(done) => Ok(done.try_into()?),
                Outcome::Failure(failure) => Err(failure.try_into()?),
            },
            cost: present(commit.cost, "cost of a lease")?.try_into()?,
        })
    }
}

impl From<Cost> for wire::Cost {
    fn from(cost: Cost) -> Self {
        Self { seconds: cost.seconds, refine_seconds: cost.refine_seconds, bytes_fetched: cost.bytes_fetched }
    }
}

impl TryFrom<wire::Cost> for Cost {
    type Error = WireError;

    fn try_from(cost: wire::Cost) -> Result<Self, WireError> {
        Ok(Self {
            seconds: amount("seconds of a task", cost.seconds)?,
            refine_seconds: amount("refinement seconds of a task", cost.refine_seconds)?,
            bytes_fetched: cost.bytes_fetched,
        })
    }
}

impl From<Failure> for wire::Failure {
    fn from(failure: Failure) -> Self {
        Self { class: wire::FailureClass::from(failure.class).into(), message: shortened(failure.message) }
    }
}

/// A message longer than senders make them is cut: the class is what counts.
impl TryFrom<wire::Failure> for Failure {
    type Error = WireError;

    fn try_from(failure: wire::Failure) -> Result<Self, WireError> {
        let class = wire::FailureClass::try_from(failure.class)
            .map_err(|_| unknown("class of a failure", failure.class))?;
        Ok(Self { class: class.try_into()?, message: shortened(failure.message) })
    }
}

fn unknown(subject: &str, number: i32) -> WireError {
    WireError::new(subject, format!("number {number} means nothing to this version"))
}

impl From<FailureClass> for wire::FailureClass {
    fn from(class: FailureClass) -> Self {
        match class {
            FailureClass::BadInput => Self::BadInput,
            FailureClass::NonFinite => Self::NonFinite,
            FailureClass::OutOfMemory => Self::OutOfMemory,
            FailureClass::Storage => Self::Storage,
            FailureClass::NodeLost => Self::NodeLost,
            FailureClass::PeerLost => Self::PeerLost,
            FailureClass::Hung => Self::Hung,
            FailureClass::Damaged => Self::Damaged,
            FailureClass::HandedBack => Self::HandedBack,
            FailureClass::Nondeterminism => Self::Nondeterminism,
            FailureClass::Cancelled => Self::Cancelled,
            FailureClass::Internal => Self::Internal,
        }
    }
}

impl TryFrom<wire::FailureClass> for FailureClass {
    type Error = WireError;

    fn try_from(class: wire::FailureClass) -> Result<Self, WireError> {
        use wire::FailureClass as W;
        Ok(match class {
            W::Unspecified => return Err(WireError::missing("class of a failure")),
            W::BadInput => Self::BadInput,
            W::NonFinite => Self::NonFinite,
            W::OutOfMemory => Self::OutOfMemory,
            W::Storage => Self::Storage,
            W::NodeLost => Self::NodeLost,
            W::PeerLost => Self::PeerLost,
            W::Hung => Self::Hung,
            W::Damaged => Self::Damaged,
            W::HandedBack => Self::HandedBack,
            W::Nondeterminism => Self::Nondeterminism,
            W::Cancelled => Self::Cancelled,
            W::Internal => Self::Internal,
        })
    }
}

impl From<Verdict> for wire::CommitReply {
    fn from(verdict: Verdict) -> Self {
        let verdict = match verdict {
            Verdict::Accepted => wire::Verdict::Accepted,
            Verdict::Duplicate => wire::Verdict::Duplicate,
            Verdict::Stale => wire::Verdict::Stale,
        };
        Self { verdict: verdict.into() }
    }
}

impl TryFrom<wire::CommitReply> for Verdict {
    type Error = WireError;

    fn try_from(reply: wire::CommitReply) -> Result<Self, WireError> {
        match wire::Verdict::try_from(reply.verdict) {
            Ok(wire::Verdict::Accepted) => Ok(Self::Accepted),
            Ok(wire::Verdict::Duplicate) => Ok(Self::Duplicate),
            Ok(wire::Verdict::Stale) => Ok(Self::Stale),
            Ok(wire::Verdict::Unspecified) => Err(WireError::missing("verdict")),
            Err(_) => Err(unknown("verdict", reply.verdict)),
        }
    }
}
