//! Arguments of the commands of a fleet: coordinator, node, submit and what people ask about jobs.
//!
//! Not here: options of a job (`options`), what the commands do (the files beside this one).

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::args::ShowArgs;
use crate::observe::ObserveArgs;
use crate::options::JobOptions;
use crate::values::{ByteSize, DeviceArg, GradientsArg, LinkSpeed};

/// Which certificates, or none.
#[derive(Debug, Clone, Args)]
pub(crate) struct SecurityArgs {
    /// Use the certificates in this folder, as `halfstep certs` makes it
    ///
    /// Read are ca.pem and the certificate and key of this command's role: coordinator, node or client. Both sides
    /// prove who they are; a node's certificate cannot submit jobs.
    #[arg(
        long,
        value_name = "DIR",
        env = "HALFSTEP_CERTS",
        hide_env_values = true,
        conflicts_with = "insecure"
    )]
    pub(crate) certs: Option<PathBuf>,

    /// Talk in plain text; loopback addresses only
    #[arg(long)]
    pub(crate) insecure: bool,
}

/// How to reach a coordinator.
#[derive(Debug, Clone, Args)]
pub(crate) struct ConnectArgs {
    /// Reach the coordinator at this address, or at the one in a file: @FILE
    ///
    /// A file is what `coordinator --publish FILE` writes; nodes follow it when it changes. In a Slurm job the default is
    /// its first host, at port 20000 + SLURM_JOB_ID modulo 20000.
    #[arg(long, value_name = "HOST:PORT", env = "HALFSTEP_COORDINATOR")]
    pub(crate) coordinator: Option<String>,

    #[command(flatten)]
    pub(crate) security: SecurityArgs,
}

/// Life in a Slurm job.
#[derive(Debug, Clone, Args)]
pub(crate) struct SlurmArgs {
    /// Take from Slurm what no flag says, and ask it to be started again after a signal: exit code 75
    ///
    /// A coordinator listens on all interfaces at port 20000 + SLURM_JOB_ID modulo 20000. A node takes its name from
    /// SLURMD_NODENAME, its threads from SLURM_CPUS_PER_TASK and, where CUDA_VISIBLE_DEVICES lists GPUs, solves on the
    /// SLURM_LOCALID-th of them.
    #[arg(long, help_heading = "Slurm")]
    pub(crate) slurm: bool,

    /// Ask for at most this many restarts, by SLURM_RESTART_COUNT; beyond them exit 1 [default: 20]
    #[arg(long, value_name = "N", requires = "slurm", help_heading = "Slurm")]
    pub(crate) requeue_limit: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct CoordinatorArgs {
    /// Listen on this address; port 0 takes any free one, printed at start [default: 127.0.0.1:7421]
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<SocketAddr>,

    /// Write the address that others reach this coordinator at into this file, for `--coordinator @FILE`
    #[arg(long, value_name = "FILE")]
    pub(crate) publish: Option<PathBuf>,

    /// Keep jobs and results in this folder; started again with it, unfinished jobs go on
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: PathBuf,

    /// Keep this many jobs that are over, and forget the oldest beyond [default: all]
    ///
    /// A forgotten job's results are gone from the state folder: fetch them in time, `submit --wait` does.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) keep_jobs: Option<u32>,

    #[command(flatten)]
    pub(crate) security: SecurityArgs,

    #[command(flatten)]
    pub(crate) observe: ObserveArgs,

    #[command(flatten)]
    pub(crate) slurm: SlurmArgs,

    #[command(flatten)]
    pub(crate) times: TimesArgs,
}

/// For tests of failures, which cannot wait for the real ones.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct TimesArgs {
    /// Expect a sign of life from every node this often
    #[arg(long, value_name = "MS", env = "HALFSTEP_HEARTBEAT_MS", default_value_t = 1_000, hide = true)]
    pub(crate) heartbeat_ms: u64,

    /// Take a node for lost after this long without one
    #[arg(long, value_name = "MS", env = "HALFSTEP_LEASE_MS", default_value_t = 10_000, hide = true)]
    pub(crate) lease_ms: u64,

    /// Take a task for hung after this long without progress
    #[arg(long, value_name = "MS", env = "HALFSTEP_HUNG_MS", default_value_t = 600_000, hide = true)]
    pub(crate) hung_ms: u64,

    /// Fail a job after this long without any node
    #[arg(long, value_name = "MS", env = "HALFSTEP_NO_NODES_MS", default_value_t = 86_400_000, hide = true)]
    pub(crate) no_nodes_ms: u64,
}

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    #[command(flatten)]
    pub(crate) connect: ConnectArgs,

    /// Serve other nodes on this address [default: any port; of loopback with --insecure, else of all interfaces]
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<SocketAddr>,

    /// Tell others to reach this node here [default: the address it reaches the coordinator from]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Option<String>,

    /// Go by this name in logs and lists [default: the host's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,

    /// Give up, with exit code 75, when no coordinator was reached for this long [default: never]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) give_up_after: Option<u64>,

    #[command(flatten)]
    pub(crate) work: WorkArgs,

    #[command(flatten)]
    pub(crate) slurm: SlurmArgs,

    #[command(flatten)]
    pub(crate) observe: ObserveArgs,
}

/// What a node works with.
#[derive(Debug, Args)]
pub(crate) struct WorkArgs {
    /// Work on this many tasks at once, each on one thread [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,

    /// Hold activations in memory up to this size, beyond it in files [default: 4GiB]
    #[arg(long, value_name = "BYTES")]
    pub(crate) memory_budget: Option<ByteSize>,

    /// Put files of activations into this folder [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    pub(crate) spill_dir: Option<PathBuf>,

    /// Solve and sum statistics on auto, cpu, cuda (all devices) or cuda:0,1 (these) [default: auto]
    ///
    /// `auto` takes every CUDA device that can be used, else the CPU, and says what it took; the manifest records it.
    /// Results are bit-identical within one kind of device, not between kinds. `halfstep devices` shows what there is.
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<DeviceArg>,

    /// Multiply gradients and statistics on CUDA devices in tf32 or f32 [default: tf32]
    ///
    /// tf32 reads factors with 11 bits (AdaRound on statistics: in half precision, scaled). A gradient only steers: what is
    /// compared and reported is computed from the statistics in f32 either way. f32 is several times slower.
    #[arg(long, value_name = "DIGITS")]
    pub(crate) gradients: Option<GradientsArg>,

    /// Look for CUDA's libraries (cuBLAS, NVRTC, NCCL) in this folder too; repeatable
    #[arg(
        long,
        value_name = "DIR",
        env = "HALFSTEP_CUDA_LIBRARIES",
        value_delimiter = ':',
        hide_env_values = true
    )]
    pub(crate) cuda_libraries: Vec<PathBuf>,

    /// Add up statistics with other nodes by NCCL, between CUDA devices [default: by gRPC]
    ///
    /// For nodes whose devices reach each other by NVLink or a fast network. Those that say it and work on one job are a group; whoever is in
    /// none, or in one that fails, fetches from the others as without it, with the same result. What NCCL sends is neither
    /// encrypted nor authenticated, whatever the certificates: never use it in a network that you do not trust.
    #[arg(long)]
    pub(crate) nccl: bool,

    /// Run networks by this ONNX Runtime library instead of the built-in engine
    #[arg(long, value_name = "LIB", env = "HALFSTEP_ONNXRUNTIME", hide_env_values = true)]
    pub(crate) onnxruntime: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct SubmitArgs {
    #[command(flatten)]
    pub(crate) job: JobOptions,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,

    /// Read options from this job.toml; flags win over it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Follow the job and fetch its results into --output
    #[arg(long)]
    pub(crate) wait: bool,

    /// Take the nodes' network to be this fast, for --partition auto [default: measured]
    #[arg(long, value_name = "SPEED")]
    pub(crate) link: Option<LinkSpeed>,

    /// Overwrite an output folder that is not empty
    #[arg(long)]
    pub(crate) force: bool,

    #[command(flatten)]
    pub(crate) show: ShowArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Show this job only [default: all]
    #[arg(value_name = "JOB")]
    pub(crate) job: Option<String>,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,

    /// Print JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// Follow this job
    #[arg(value_name = "JOB")]
    pub(crate) job: String,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,

    #[command(flatten)]
    pub(crate) show: ShowArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// Stop this job
    #[arg(value_name = "JOB")]
    pub(crate) job: String,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ForgetArgs {
    /// Forget this job, with the inputs and roundings that no other job uses
    #[arg(value_name = "JOB")]
    pub(crate) job: String,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct FetchArgs {
    /// Fetch the results of this job
    #[arg(value_name = "JOB")]
    pub(crate) job: String,

    /// Write results into this folder
    #[arg(long, short, value_name = "DIR")]
    pub(crate) output: PathBuf,

    /// Overwrite an output folder that is not empty
    #[arg(long)]
    pub(crate) force: bool,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct NodesArgs {
    #[command(flatten)]
    pub(crate) connect: ConnectArgs,

    /// Measure how fast nodes receive from each other, unless that was done within five minutes; up to three seconds
    ///
    /// Up to eight nodes fetch a few MiB, each from the next one, all at the same time. While a job runs they share the
    /// network with it and look slower.
    #[arg(long)]
    pub(crate) measure: bool,

    /// Print JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// Explain this job
    #[arg(value_name = "JOB")]
    pub(crate) job: String,

    /// Explain this task of it: PHASE:OF:PLACE, such as capture:0:3 or solve:LAYER:0 [default: all that is notable]
    ///
    /// Logs name tasks so. Phases are forward (OF a range), capture and accumulate (OF a stage), each of a shard; reduce
    /// and solve (OF a layer, by number or name), of a slice or a chunk.
    #[arg(value_name = "TASK")]
    pub(crate) task: Option<String>,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,

    /// Print JSON instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// Make this node leave, by its number or, if no other has it, its name
    #[arg(value_name = "NODE")]
    pub(crate) node: String,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CertsArgs {
    /// Write certificates and keys into this folder
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,

    /// Name a host or address of the coordinator and the nodes, or hosts: 'n[01-16]'; repeatable [default: localhost, 127.0.0.1]
    #[arg(long = "host", value_name = "NAME")]
    pub(crate) hosts: Vec<String>,

    /// Make them valid for this many days
    #[arg(long, value_name = "N", default_value_t = 90)]
    pub(crate) days: u32,
}
