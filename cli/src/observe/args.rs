//! Options of every process that stays: where it can be looked at.

use std::net::SocketAddr;

use clap::Args;

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
}
