//! What is wrong with a message from another process.
//!
//! Messages are foreign: everything in them is checked before it is used, and a fault is an error, never a panic.

use tonic::Status;

/// A message or blob that cannot be what its sender meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{subject}: {problem}")]
pub struct WireError {
    /// Which part of which message.
    pub subject: String,
    /// What is wrong with it, expected and actual.
    pub problem: String,
}

impl WireError {
    /// Names the part and the problem.
    pub fn new(subject: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { subject: subject.into(), problem: problem.into() }
    }

    /// A part that must be there and is not.
    pub(crate) fn missing(subject: &str) -> Self {
        Self::new(subject, "is missing")
    }
}

impl From<WireError> for Status {
    fn from(error: WireError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}
