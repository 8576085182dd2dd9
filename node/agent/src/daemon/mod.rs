//! The node as a process of a fleet: attached to a coordinator, working leases off, serving what it holds.
//!
//! Everything that waits is async and never computes; everything that computes runs on threads of its own, one per slot,
//! so heartbeats go out whatever the work does.
//! Not here: the work (`local`), certificates and bytes on the wire (`proto`).

mod apart;
mod artefacts;
mod attach;
mod group;
mod handover;
mod jobs;
mod leases;
mod line;
mod options;
mod report;
mod run;
mod shared_model;
mod source;
mod store;
mod telemetry;
mod workers;

pub use options::{DaemonError, DaemonEvent, DaemonOptions, Drain};
pub use run::NodeDaemon;
pub use telemetry::describe as describe_metrics;
