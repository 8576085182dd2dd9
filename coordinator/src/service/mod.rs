//! The coordinator as a process: gRPC services around one engine.
//!
//! ```text
//!   Client, Fleet, Artefacts (one task per call) --- requests ---> engine (one task) <--- threads: plan, export
//!                          |                                          |
//!                          +------------- shelf, artefacts -----------+--- Dispatch (pure), Store (redb)
//! ```
//! Not here: decisions (`dispatch`), bytes on disk (`store`, `artefacts`, `jobs`), the wire (`proto`).

mod client;
mod coordinator;
mod data;
mod engine;
mod fleet;
mod log;
mod options;
mod request;
mod shelf;
mod telemetry;
mod trouble;

pub use coordinator::{Coordinator, Pulse};
pub use options::{CoordinatorOptions, Timing};
pub use telemetry::describe as describe_metrics;
