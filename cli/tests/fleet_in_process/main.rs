//! A real coordinator and real nodes in one process: over a simulated network that fails, and when a node leaves.
//!
//! Here because only this crate may know both sides. Not here: real processes (`faults`).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test may stop, and says what it saw"
)]

mod crew;
mod drain;
mod stream;
