//! The command line: commands and the flags that are not part of a job.
//!
//! Help is written for the person who decides whether to touch an option. Not here: options of a job (`options`).

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::exit::Exit;
use crate::fleet::PodArgs;
use crate::fleet::args::{
    CancelArgs, CertsArgs, CoordinatorArgs, DrainArgs, ExplainArgs, FetchArgs, ForgetArgs, NodeArgs,
    NodesArgs, SecurityArgs, StatusArgs, SubmitArgs, WatchArgs,
};
use crate::observe::LogFormat;
use crate::options::{DataOptions, JobOptions, TextOptions};
use crate::values::{ByteSize, DeviceArg, LinkSpeed};

/// Quantize trained networks to low-bit integers by learning which way each weight rounds (AdaRound)
#[derive(Debug, Parser)]
#[command(name = "halfstep", version, max_term_width = 100, after_help = Exit::table())]
#[command(after_long_help = Exit::table(), arg_required_else_help = true, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EVAL_DATA: &str = "Read samples from this .npz, .npy or folder; array `y`, if there is one, holds class ids [N] or \
                         acceptable classes (bool [N, C]). For language models: .txt, .jsonl, .parquet, or token ids \
                         in .npy or .npz:ARRAY";
const EVAL_SAMPLES: &str =
    "Use the first N samples; of language models N windows spread over the data [default: all]";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Round the weights of an ONNX network and write the results
    ///
    /// Which options to change: `--samples` and `--iterations` at will; `--lambda` and `--damping` with caution;
    /// `--beta-range` and `--warm-start` never. Before: fold batch norms (done here) and equalize across layers.
    /// After: quantization-aware training may follow; bias correction should not, before or after.
    #[command(after_help = Exit::table(), after_long_help = Exit::table())]
    Quantize(QuantizeArgs),
    /// Show what `quantize` would do: stages, bytes, estimated time; spends one sample's run
    Plan(PlanArgs),
    /// List the layers of a network and what would be rounded
    Inspect(InspectArgs),
    /// Measure networks on data: top-1, agreement with the original, noise, perplexity
    ///
    /// ONNX networks by their outputs, folders of language models (config.json, *.safetensors) by the tokens they
    /// predict: perplexity, top-1, divergence from the original.
    Eval(EvalArgs),
    /// Check the files of a finished run against their manifest
    Verify(VerifyArgs),
    /// Show what this machine can solve on, and what is missing to use its GPUs
    Devices(DevicesArgs),
    /// Run the coordinator of a fleet: it plans jobs, leases work and writes results
    #[command(after_help = Exit::table(), after_long_help = Exit::table())]
    Coordinator(CoordinatorArgs),
    /// Work for a coordinator: leave it running on every machine that should help
    Node(NodeArgs),
    /// Be one pod of a Kubernetes Job: index 0 coordinates, all of them work
    ///
    /// Every pod runs this same command. Index 0 takes up the job of the job file and ends with 0 when the results are in
    /// place (also if layers were kept), with 4 if layers failed; a pod that is stopped ends with 75, whatever its index.
    /// docs/kubernetes.md has manifests.
    #[command(after_help = Exit::table(), after_long_help = Exit::table())]
    Pod(PodArgs),
    /// Give a coordinator a network to quantize
    #[command(after_help = Exit::table(), after_long_help = Exit::table())]
    Submit(SubmitArgs),
    /// Show the jobs of a coordinator
    Status(StatusArgs),
    /// Follow a job until it is over
    Watch(WatchArgs),
    /// Stop a job
    Cancel(CancelArgs),
    /// Fetch the results of a finished job
    Fetch(FetchArgs),
    /// Remove a job that is over from its coordinator, results included
    Forget(ForgetArgs),
    /// Show the nodes of a coordinator
    Nodes(NodesArgs),
    /// Say why a job or one of its tasks waits, and what became of its attempts
    Explain(ExplainArgs),
    /// Make a node hand back its work and leave
    Drain(DrainArgs),
    /// Make a certificate authority and certificates for a fleet of your own
    Certs(CertsArgs),
    /// Print a completion script for a shell
    ///
    /// bash: `halfstep completions bash > ~/.local/share/bash-completion/completions/halfstep`. zsh: into a file `_halfstep`
    /// in a folder of $fpath. fish: into `~/.config/fish/completions/halfstep.fish`.
    Completions(CompletionsArgs),
    /// Write a manual page for every command into a folder
    Man(ManArgs),
}

impl Command {
    /// How the process writes its log: a choice of those that stay.
    pub(crate) fn log_format(&self) -> LogFormat {
        match self {
            Self::Coordinator(arguments) => arguments.observe.log_format,
            Self::Node(arguments) => arguments.observe.log_format,
            Self::Pod(arguments) => arguments.observe.log_format,
            _ => LogFormat::Text,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    #[command(flatten)]
    pub(crate) job: JobOptions,

    /// Read options from this job.toml; flags win over it
    ///
    /// Keys are the names of the flags, MODEL is `model`. Paths are relative to the job file. Unknown keys are errors.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Overwrite an output folder that is not empty
    #[arg(long)]
    pub(crate) force: bool,

    /// Show counts and gauges at http://ADDR/metrics while it runs, as Prometheus reads them
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics: Option<SocketAddr>,

    #[command(flatten)]
    pub(crate) show: ShowArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) job: JobOptions,

    /// Read options from this job.toml; flags win over it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Compare the ways to spread the job over this many nodes like this machine
    #[arg(long, value_name = "N", group = "fleet")]
    pub(crate) nodes: Option<usize>,

    /// Compare them over the nodes attached to this coordinator, whose network is measured: HOST:PORT or @FILE
    ///
    /// Needs `--certs` or `--insecure`, as `submit` does. Nothing is submitted.
    #[arg(long, value_name = "HOST:PORT", group = "fleet")]
    pub(crate) coordinator: Option<String>,

    #[command(flatten)]
    pub(crate) security: SecurityArgs,

    /// Take the nodes' network to be this fast [default: measured, or 10Gbit with --nodes]
    #[arg(long, value_name = "SPEED", requires = "fleet")]
    pub(crate) link: Option<LinkSpeed>,

    /// Take each node to have this much memory for activations and statistics [default: enough]
    #[arg(long, value_name = "BYTES", requires = "nodes")]
    pub(crate) node_memory: Option<ByteSize>,

    /// Print JSON instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Read the network from this ONNX file
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,

    /// Show batch norms as separate instead of folded into the layer before
    #[arg(long)]
    pub(crate) no_fold_batch_norm: bool,

    /// Print JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(mut_arg("calibration", |arg| arg.long("data").help(EVAL_DATA)))]
#[command(mut_arg("samples", |arg| arg.help(EVAL_SAMPLES).long_help(EVAL_SAMPLES)))]
pub(crate) struct EvalArgs {
    /// Measure these networks, side by side
    #[arg(value_name = "MODEL", required = true)]
    pub(crate) models: Vec<PathBuf>,

    /// Compare with this full-precision network: agreement of the top class and SQNR in dB
    #[arg(long, value_name = "ORIGINAL")]
    pub(crate) reference: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) data: DataOptions,

    #[command(flatten)]
    pub(crate) text: TextOptions,

    /// Choose windows of text by this seed
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Text")]
    pub(crate) seed: u64,

    /// Run this many samples at once; language models: chosen by their length
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) batch: usize,

    /// Compute on this many threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,

    /// Run language models on auto, cpu, cuda (all devices) or cuda:0,1 (these) [default: auto]
    ///
    /// Products take all bits of f32 on every device; what is printed agrees between devices to about four digits.
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<DeviceArg>,

    /// Look for CUDA's libraries (cuBLAS, NVRTC) in this folder too; repeatable
    #[arg(
        long,
        value_name = "DIR",
        env = "HALFSTEP_CUDA_LIBRARIES",
        value_delimiter = ':',
        hide_env_values = true
    )]
    pub(crate) cuda_libraries: Vec<PathBuf>,

    /// Run networks by this ONNX Runtime library instead of the built-in engine
    #[arg(long, value_name = "LIB", env = "HALFSTEP_ONNXRUNTIME", hide_env_values = true)]
    pub(crate) onnxruntime: Option<PathBuf>,

    /// Print JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Check the files named in this manifest.json
    #[arg(value_name = "MANIFEST")]
    pub(crate) manifest: PathBuf,

    /// Print JSON instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Look for CUDA's libraries (cuBLAS, NVRTC, NCCL) in this folder too; repeatable
    #[arg(
        long,
        value_name = "DIR",
        env = "HALFSTEP_CUDA_LIBRARIES",
        value_delimiter = ':',
        hide_env_values = true
    )]
    pub(crate) cuda_libraries: Vec<PathBuf>,

    /// Print JSON instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// Complete in this shell
    #[arg(value_name = "SHELL")]
    pub(crate) shell: Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write pages into this folder, as halfstep.1, halfstep-quantize.1 and so on
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
}

/// How a run is shown.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct ShowArgs {
    /// Print one JSON object per event to stdout instead of text to stderr
    #[arg(long, conflicts_with = "quiet")]
    pub(crate) json: bool,

    /// Print errors only
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_has_a_first_line_that_begins_with_a_verb_or_noun_and_no_full_stop() {
        for command in Cli::command().get_subcommands() {
            for arg in
                command.get_arguments().filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version"))
            {
                let help =
                    arg.get_help().unwrap_or_else(|| panic!("{} has no help", arg.get_id())).to_string();
                let first = help.lines().next().unwrap_or("");
                assert!(
                    first.starts_with(char::is_uppercase) && !first.ends_with('.'),
                    "{}: {help}",
                    arg.get_id()
                );
            }
        }
    }
}
