//! Failure classes as status codes: the class crosses the wire, not only its text.

use crate::explain;
use halfstep_work::{FailureClass, SourceError};
use std::error::Error;
use tonic::{Code, Status};

/// An error of whoever answers, for the one who asked.
pub fn status_of(error: &SourceError) -> Status {
    let code = match error.class {
        FailureClass::PeerLost | FailureClass::NodeLost | FailureClass::HandedBack => Code::NotFound,
        FailureClass::Damaged => Code::DataLoss,
        FailureClass::BadInput => Code::FailedPrecondition,
        FailureClass::Storage | FailureClass::OutOfMemory => Code::ResourceExhausted,
        FailureClass::Cancelled => Code::Cancelled,
        FailureClass::NonFinite
        | FailureClass::Hung
        | FailureClass::Nondeterminism
        | FailureClass::Internal => Code::Internal,
    };
    Status::new(code, error.message.clone())
}

/// An answer that is an error, for whoever asked. `peer`: who was asked.
pub fn error_of(status: &Status, peer: &str) -> SourceError {
    let class = match status.code() {
        _ if broken(status) => FailureClass::PeerLost,
        Code::NotFound | Code::Unavailable | Code::Cancelled | Code::Aborted | Code::DeadlineExceeded => {
            FailureClass::PeerLost
        }
        Code::DataLoss => FailureClass::Damaged,
        Code::FailedPrecondition => FailureClass::BadInput,
        Code::ResourceExhausted => FailureClass::Storage,
        _ => FailureClass::Internal,
    };
    SourceError::new(class, format!("{peer}: {}", explain(status)))
}

/// Whether the connection failed, not the request: only then does the status have a cause on this side.
pub(super) fn broken(status: &Status) -> bool {
    status.source().is_some() || status.code() == Code::Unavailable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_sources_survive_the_wire() {
        use FailureClass::{BadInput, Damaged, Internal, PeerLost, Storage};
        for class in [PeerLost, Damaged, BadInput, Storage, Internal] {
            let error = error_of(&status_of(&SourceError::new(class, "what")), "node a:1");
            assert_eq!(error, SourceError::new(class, "node a:1: what"));
        }
    }
}
