//! Arguments of `pod`, the same for every pod of a Job.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::peers::PeerNames;
use crate::fleet::args::{SecurityArgs, TimesArgs, WorkArgs};
use crate::observe::ObserveArgs;

#[derive(Debug, Args)]
pub(crate) struct PodArgs {
    /// Be the pod of this index: 0 coordinates, takes up the job and works, the others work for it
    #[arg(long, value_name = "N", env = "JOB_COMPLETION_INDEX")]
    pub(crate) index: u32,

    /// Reach the pod of index N under this name, in which {} stands for N: `halfstep-{}.halfstep`
    #[arg(long, value_name = "NAME")]
    pub(crate) peers: PeerNames,

    /// Work for the coordinator at this address, whatever the index [default: index 0, at the port of --listen]
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["config", "state_dir", "coordinate_only", "force"])]
    pub(crate) coordinator: Option<String>,

    /// Quantize as this job.toml says; it names model, calibration and output
    #[arg(long, value_name = "FILE", required_unless_present = "coordinator")]
    pub(crate) config: Option<PathBuf>,

    /// Keep the job's state in this folder, which must outlive the pod; an earlier job's is forgotten
    #[arg(long, value_name = "DIR", required_unless_present = "coordinator")]
    pub(crate) state_dir: Option<PathBuf>,

    /// Leave the work to the other pods
    #[arg(long)]
    pub(crate) coordinate_only: bool,

    /// Overwrite an output folder that holds other results
    #[arg(long)]
    pub(crate) force: bool,

    /// Coordinate at this address
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:7421")]
    pub(crate) listen: SocketAddr,

    /// Serve the other pods at this address; port 0 takes any free one
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:7422")]
    pub(crate) serve: SocketAddr,

    /// Take index 0 to have failed this often before
    #[arg(long, value_name = "N", env = "HALFSTEP_POD_FAILURES", default_value = "0", value_parser = failures)]
    pub(crate) failures: u32,

    /// Give the job up, exit code 78, when index 0 has failed this often
    ///
    /// When the pods of index 0 are used up, the Job goes on without it and the other pods wait for ever. So this should be
    /// no more than `backoffLimitPerIndex`.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) failures_max: u32,

    #[command(flatten)]
    pub(crate) security: SecurityArgs,

    #[command(flatten)]
    pub(crate) work: WorkArgs,

    /// Print one JSON object per event to stdout instead of text to stderr (index 0)
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) times: TimesArgs,

    // Last: its heading would be that of what follows.
    #[command(flatten)]
    pub(crate) observe: ObserveArgs,
}

/// The annotation that counts failures may be absent, which makes an empty variable.
fn failures(text: &str) -> Result<u32, String> {
    match text {
        "" => Ok(0),
        text => text.parse().map_err(|error| format!("{error}")),
    }
}
