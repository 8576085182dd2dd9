//! What the commands answer: events while running, then plain rows to render.
//!
//! Not here: getting the answers (`quantize`, `survey`, `eval`), rendering (`render`), parsing (`args`).

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::config::DataConfig;
use crate::options::TextOptions;
use crate::values::{DeviceArg, LinkSpeed};

/// What happens during `quantize`, in order.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Progress {
    /// How the job is spread was left open and is decided now.
    Chosen { partition: String, nodes: usize, why: String, link: LinkRow },
    /// The work is known.
    Planned {
        layers: usize,
        stages: usize,
        shards: usize,
        samples: usize,
        /// Who works on it, as in `2 threads`.
        workers: String,
    },
    /// The first task of a stage is done.
    StageStarted { stage: usize, stages: usize },
    /// Part of a stage's statistics is done.
    ShardCaptured { stage: usize, shard: usize, shards: usize },
    /// A layer is decided.
    LayerSolved {
        name: String,
        /// Counts decided layers, from 1.
        index: usize,
        total: usize,
        bits: u8,
        /// Mean squared output error at nearest rounding and now.
        objective_before: f64,
        objective_after: f64,
        sqnr_db: f64,
        /// Weights not rounded to nearest, of `weights`.
        rounded_away: u64,
        weights: u64,
        /// From the beginning of its first chunk to the end of its last.
        seconds: f64,
    },
    /// A layer stays as it is.
    LayerKept { name: String, reason: String },
    /// A layer could not be solved.
    LayerFailed { name: String, cause: String },
    /// A node takes part.
    NodeJoined { name: String, slots: usize },
    /// A node does not take part any more.
    NodeLost { name: String, why: String },
    /// A node takes no part in this job.
    NodeLeftOut { name: String, why: String },
    /// A task will be done again.
    Retry { task: String, why: String, attempt: u32 },
    /// Nothing can be done for now.
    Waiting { why: String },
    /// There is nothing to do: the results of this very job are in their place.
    InPlace { output: PathBuf },
    /// Files are being written and read back.
    Writing { path: PathBuf },
    /// The end.
    Summary { solved: usize, kept: usize, failed: usize, seconds: f64, output: PathBuf },
}

/// A layer that stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Kept {
    pub(crate) name: String,
    pub(crate) op: String,
    pub(crate) reason: String,
    /// Because of `--skip`: what the user asked for does not change the exit code.
    pub(crate) requested: bool,
}

/// A layer that could not be solved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct FailedLayer {
    pub(crate) name: String,
    pub(crate) cause: String,
}

/// One solved layer in the report table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct ReportRow {
    pub(crate) name: String,
    pub(crate) bits: u8,
    /// Scheme and granularity, e.g. `symmetric per-channel`.
    pub(crate) grid: String,
    pub(crate) objective_before: f64,
    pub(crate) objective_after: f64,
    pub(crate) sqnr_db: f64,
    pub(crate) rounded_away: u64,
    pub(crate) weights: u64,
    pub(crate) seconds: f64,
}

/// Result of `quantize`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct QuantizeOutcome {
    pub(crate) solved: usize,
    pub(crate) kept: Vec<Kept>,
    pub(crate) failed: Vec<FailedLayer>,
    pub(crate) rows: Vec<ReportRow>,
    /// Seconds by phase: read, forward, statistics, solve, refine, export.
    pub(crate) phases: Vec<(String, f64)>,
    /// The most memory that the process which wrote the results ever had; in `quantize` that is all of the job.
    pub(crate) peak_resident_bytes: Option<u64>,
    /// Files written, relative to the output folder.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) notes: Vec<String>,
}

/// One layer that would be rounded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct LayerRow {
    pub(crate) name: String,
    pub(crate) op: String,
    pub(crate) weight: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) groups: usize,
    pub(crate) activation: String,
    /// Nodes that use the weight; more than 1 means it is shared.
    pub(crate) uses: usize,
}

/// Result of `inspect`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct InspectReport {
    /// Each `name dtype [dims]`.
    pub(crate) inputs: Vec<String>,
    pub(crate) outputs: Vec<String>,
    pub(crate) opset: Option<i64>,
    pub(crate) layers: Vec<LayerRow>,
    pub(crate) kept: Vec<Kept>,
}

/// One stage of a plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct StageRow {
    pub(crate) stage: usize,
    pub(crate) layers: Vec<String>,
    /// Operators run to reach the stage from the one before.
    pub(crate) nodes: usize,
    pub(crate) chunks: usize,
    /// Tensors of all samples that wait for later stages, both streams, in memory or files.
    pub(crate) carry_bytes: u64,
    pub(crate) statistics_bytes: u64,
    /// Estimated wall seconds.
    pub(crate) seconds: f64,
}

/// Result of `plan`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct PlanReport {
    pub(crate) samples: usize,
    pub(crate) shards: usize,
    pub(crate) stages: Vec<StageRow>,
    pub(crate) kept: Vec<Kept>,
    pub(crate) peak_bytes: u64,
    /// Bytes that go to files at this memory budget.
    pub(crate) spill_bytes: u64,
    pub(crate) output_bytes: u64,
    /// On a CUDA device, unless the job is for CPUs.
    pub(crate) gpu: Option<GpuRow>,
    /// Estimated wall seconds of everything but writing.
    pub(crate) seconds: f64,
    /// The same by phase: read, forward, statistics, solve and refine.
    pub(crate) phases: Vec<(String, f64)>,
    /// Ways to spread the job over a fleet, if one was asked about.
    pub(crate) fleet: Vec<FleetRow>,
    /// The network between its nodes.
    pub(crate) link: Option<LinkRow>,
}

/// What a job holds on a CUDA device, of statistics and solves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct GpuRow {
    /// The most, in which stage.
    pub(crate) bytes: u64,
    pub(crate) stage: usize,
    pub(crate) threads: usize,
    /// Of the smallest chosen device here.
    pub(crate) memory_bytes: Option<u64>,
    /// The most threads, up to these, with which it fits; 0: none.
    pub(crate) threads_that_fit: usize,
}

/// A network between nodes, and how it is known.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct LinkRow {
    /// That a node receives.
    pub(crate) bytes_per_second: f64,
    /// `given`, `measured` or `assumed`.
    pub(crate) origin: &'static str,
    /// In words.
    pub(crate) why: String,
}

impl LinkRow {
    /// What the user says.
    pub(crate) fn given(link: LinkSpeed) -> Self {
        Self { bytes_per_second: link.0, origin: "given", why: "--link says so".into() }
    }

    /// Nobody knows.
    pub(crate) fn assumed(why: &str) -> Self {
        Self { bytes_per_second: LinkSpeed::ASSUMED.0, origin: "assumed", why: why.into() }
    }
}

impl fmt::Display for LinkRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "link {}, {}: {}", LinkSpeed(self.bytes_per_second), self.origin, self.why)
    }
}

/// One way to spread a job over a fleet.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct FleetRow {
    /// As `--partition` takes it.
    pub(crate) partition: String,
    /// Estimated wall seconds.
    pub(crate) seconds: f64,
    /// Between nodes, all together.
    pub(crate) bytes_moved: u64,
    /// The most one node holds.
    pub(crate) node_bytes: u64,
    pub(crate) fits: bool,
    /// Why this one is recommended; `None` for the others.
    pub(crate) why: Option<String>,
}

/// What `eval` measures.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct EvalRequest {
    pub(crate) models: Vec<PathBuf>,
    pub(crate) reference: Option<PathBuf>,
    pub(crate) data: DataConfig,
    pub(crate) text: TextOptions,
    pub(crate) seed: u64,
    pub(crate) batch: usize,
    pub(crate) threads: Option<usize>,
    /// Of language models.
    pub(crate) device: Option<DeviceArg>,
    pub(crate) cuda_libraries: Vec<PathBuf>,
    pub(crate) onnxruntime: Option<PathBuf>,
}

/// One network measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct EvalRow {
    pub(crate) model: PathBuf,
    pub(crate) samples: usize,
    /// `None` without labels.
    pub(crate) top1: Option<f64>,
    /// Fraction of samples with the reference's top class; `None` without a reference.
    pub(crate) agreement: Option<f64>,
    /// Of the outputs against the reference's; infinite if equal, `None` without a reference.
    pub(crate) sqnr_db: Option<f64>,
    pub(crate) seconds: f64,
}

/// Language models measured on the same windows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PerplexityReport {
    /// How the data became windows.
    pub(crate) notes: Vec<String>,
    pub(crate) rows: Vec<PerplexityRow>,
}

/// One language model measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct PerplexityRow {
    pub(crate) model: PathBuf,
    /// `chunked`: every window stands alone, its first token is not predicted.
    pub(crate) method: &'static str,
    pub(crate) windows: usize,
    /// Tokens of the longest window.
    pub(crate) sequence_length: usize,
    /// Tokens predicted.
    pub(crate) tokens: u64,
    /// `exp` of the mean negative log likelihood.
    pub(crate) perplexity: f64,
    /// Fraction of tokens that were the most likely.
    pub(crate) top1: f64,
    /// Mean Kullback-Leibler divergence from the reference per token, in nats; `None` without one.
    pub(crate) kl: Option<f64>,
    /// Fraction of tokens with the reference's most likely one; `None` without a reference.
    pub(crate) agreement: Option<f64>,
    pub(crate) seconds: f64,
}
