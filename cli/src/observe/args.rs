//! Options of every process that stays: where it can be looked at, and how it writes its log.

use std::net::SocketAddr;

use clap::Args;

use super::LogFormat;

/// See the module.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Observation")]
pub(crate) struct ObserveArgs {
    /// Answer health checks (grpc.health.v1) at this address, in plain text, to anybody
    ///
    /// For probes, which have no certificates; nothing else is answered there. Services are `startup` (its state is
    /// open, its port listens), `readiness` (a node is attached to its coordinator, a coordinator schedules; neither is
    /// about to leave), `liveness` (the process answers) and the empty name, which is readiness.
    #[arg(long, value_name = "ADDR")]
    pub(crate) health: Option<SocketAddr>,

    /// Show counts and gauges at http://ADDR/metrics as Prometheus reads them, in plain text, to anybody
    ///
    /// What there is, and what it means: docs/operations.md. No names of jobs, layers or files, no secrets.
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics: Option<SocketAddr>,

    /// Write the log as text or json, one record a line, to stderr
    ///
    /// json is for machines: what people are told ("Listening on ...") becomes a record too, and info is shown unless
    /// HALFSTEP_LOG says otherwise (text: errors). Records about a lease name its job, task, attempt, epoch and node.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,
}
