//! What can go wrong with NCCL, by what a caller can do about it.

use std::time::Duration;

/// Why NCCL or a group cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// The library does not open.
    #[error("NCCL is missing: {reason}")]
    Missing {
        /// What the loader says.
        reason: String,
    },
    /// A function is not in the library.
    #[error("NCCL `{library}`: has no function {symbol}")]
    Symbol {
        /// What was opened.
        library: String,
        /// Which function.
        symbol: &'static str,
    },
    /// The library is of another generation.
    #[error("NCCL `{library}`: is version {found}, expected 2.14 or newer of 2")]
    Version {
        /// What was opened.
        library: String,
        /// Its version.
        found: String,
    },
    /// A call was refused at once.
    #[error("NCCL {call}: {reason}")]
    Refused {
        /// Which function.
        call: &'static str,
        /// NCCL's words, with its number for it.
        reason: String,
    },
    /// The group failed while it was at something: a member, the network or a device.
    #[error("NCCL group: {during} failed: {reason}")]
    Failed {
        /// What it was at.
        during: &'static str,
        /// NCCL's words, with its number for it.
        reason: String,
    },
    /// It took too long.
    #[error("NCCL group: {during} took more than {:.1} s", limit.as_secs_f64())]
    Deadline {
        /// What it was at.
        during: &'static str,
        /// How long it may take.
        limit: Duration,
    },
    /// Whoever waited does not want it any more.
    #[error("NCCL group: {during} was given up")]
    GivenUp {
        /// What it was at.
        during: &'static str,
    },
    /// It failed before.
    #[error("NCCL group: has failed before, expected a new one")]
    Over,
    /// A number that does not fit the group.
    #[error("NCCL group: {subject} is {actual}, expected {expected}")]
    Size {
        /// Of what.
        subject: &'static str,
        /// What is right.
        expected: String,
        /// What was given.
        actual: usize,
    },
    /// The memory to send from.
    #[error("NCCL group: memory: {reason}")]
    Memory {
        /// The device's words.
        reason: String,
    },
}
