//! The options of a job: one definition for flags and for `job.toml`.
//!
//! Every field is a flag `--name` and a key `name`. All are optional here; defaults and the checks that need more than
//! one option are in `config`. Not here: flags that only concern one invocation (`args`).

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use halfstep_quant::Scheme;
use halfstep_work::{Objective, Propagation, StartPoint};
use serde::{Deserialize, Serialize};

use crate::values::{
    BetaRange, ByteSize, DeviceArg, GradientsArg, Override, PartitionArg, RangeArg, bits, fraction, named,
    non_negative,
};

/// How scales are shared.
#[expect(clippy::enum_variant_names, reason = "these are the names users type")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum GranularityKind {
    PerTensor,
    PerChannel,
    PerGroup,
}

/// Dimension order of image batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Layout {
    Nchw,
    Nhwc,
}

/// Channels of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Colours {
    Rgb,
    Bgr,
    Gray,
}

/// Layouts of quantized checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum OutputFormat {
    CompressedTensors,
    Gptq,
    GptqV2,
    FakeQuant,
    Gguf,
}

/// Types of activations between stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Carries {
    F32,
    Bf16,
}

/// Versions of AIMET encodings files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum EncodingsVersion {
    #[value(name = "0.6.1")]
    #[serde(rename = "0.6.1")]
    V0_6_1,
    #[value(name = "1.0.0")]
    #[serde(rename = "1.0.0")]
    V1_0_0,
    #[value(name = "2.0.0")]
    #[serde(rename = "2.0.0")]
    V2_0_0,
}

/// Options of `quantize` and `plan`, as typed.
#[derive(Debug, Clone, PartialEq, Default, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct JobOptions {
    /// Read the network from this ONNX file, or this folder of a Hugging Face checkpoint
    #[arg(value_name = "MODEL")]
    pub(crate) model: Option<PathBuf>,

    #[command(flatten)]
    #[serde(skip)]
    pub(crate) data: DataOptions,

    /// Write results into this folder
    #[arg(long, short, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,

    /// Round weights to this many bits: 2 to 8, or 16 [default: 4]
    #[arg(long, value_name = "BITS", value_parser = bits, help_heading = "Grid")]
    pub(crate) bits: Option<u8>,

    /// Choose the integers: symmetric, symmetric-strict (without the lowest one), asymmetric [default: symmetric]
    #[arg(long, value_name = "SCHEME", help_heading = "Grid")]
    pub(crate) scheme: Option<Scheme>,

    /// Share scales this way [default: per-channel]
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Grid")]
    pub(crate) granularity: Option<GranularityKind>,

    /// Share a scale among this many consecutive weights of a row; implies per-group
    #[arg(long, value_name = "WEIGHTS", help_heading = "Grid")]
    pub(crate) group_size: Option<usize>,

    /// Choose the range by min-max, mse, percentile[:PER_CENT], enhanced [default: mse]
    #[arg(long, value_name = "RANGE", help_heading = "Grid")]
    pub(crate) range: Option<RangeArg>,

    /// Leave matching layers as they are: `*` matches anything, `first` and `last` that layer; repeatable
    #[arg(long, value_name = "PATTERN", help_heading = "Grid")]
    #[serde(default)]
    pub(crate) skip: Vec<String>,

    /// Set bits, scheme, granularity or range of matching layers, as in 'conv1:bits=8'; repeatable
    #[arg(long = "override", value_name = "PATTERN:KEY=VALUE,..", help_heading = "Grid")]
    #[serde(rename = "override", default)]
    pub(crate) overrides: Vec<Override>,

    /// Keep batch norms separate instead of folding them into the layer before
    #[arg(long, help_heading = "Grid")]
    #[serde(default)]
    pub(crate) no_fold_batch_norm: bool,

    /// Minimise the error by gram (all samples, no activation) or samples (minibatches, activation) [default: gram]
    ///
    /// `samples` is the method as published, and what to use to compare with other tools. It is much slower.
    #[arg(long, value_name = "OBJECTIVE", value_parser = named::<Objective>, help_heading = "Rounding")]
    pub(crate) objective: Option<Objective>,

    /// Solve layers for inputs of the model quantized so far (sequential) or the original (independent)
    /// [default: sequential]
    #[arg(long, value_name = "HOW", value_parser = named::<Propagation>, help_heading = "Rounding")]
    pub(crate) propagation: Option<Propagation>,

    /// Learn the rounding of each layer for this many iterations [default: 300; language models: 0]
    ///
    /// Change at will: more iterations cost time and never make a layer worse than nearest rounding. 0 leaves the start
    /// and refinement alone. The samples objective needs far more, 10000 as published.
    #[arg(long, value_name = "N", help_heading = "Rounding")]
    pub(crate) iterations: Option<u32>,

    /// Step by this learning rate (Adam) [default: 0.1]
    ///
    /// Rarely worth changing. It suits a few hundred exact steps; the published 0.001 suits 10000 noisy ones.
    #[arg(long, value_name = "RATE", value_parser = non_negative, help_heading = "Rounding")]
    pub(crate) learning_rate: Option<f32>,

    /// Weigh the rounding loss, which drives weights to integers, by this much [default: 3]
    ///
    /// Change with caution: too small leaves weights between integers, to be cut off at the end; too large decides them
    /// before the data could. It is relative to the rounding noise of each row, so one value suits all layers; the
    /// published 0.01 belongs to the plain loss and cannot be compared.
    #[arg(long, value_name = "WEIGHT", value_parser = non_negative, help_heading = "Rounding")]
    pub(crate) lambda: Option<f32>,

    /// Anneal the exponent of the rounding loss from START to END [default: 20,2]
    ///
    /// Leave it: the published values work everywhere we looked.
    #[arg(long, value_name = "START,END", help_heading = "Rounding")]
    pub(crate) beta_range: Option<BetaRange>,

    /// Start without rounding loss for this fraction of the iterations [default: 0.2]
    ///
    /// Leave it: the published value works everywhere we looked.
    #[arg(long, value_name = "FRACTION", value_parser = fraction, help_heading = "Rounding")]
    pub(crate) warm_start: Option<f32>,

    /// Take this many positions per minibatch; samples objective only [default: 32]
    #[arg(long, value_name = "N", help_heading = "Rounding")]
    pub(crate) batch: Option<u32>,

    /// Pull statistics towards the original weights by this fraction of their mean diagonal [default: 0.01; language models: 0.03]
    ///
    /// Guards against overfitting when samples are few. Change with caution: 0.001 to 0.05.
    #[arg(long, value_name = "FRACTION", value_parser = non_negative, help_heading = "Rounding")]
    pub(crate) damping: Option<f32>,

    /// Start from nearest, or from gptq order with error feedback [default: gptq]
    ///
    /// The start is a candidate of its own: each row keeps the best of all candidates.
    #[arg(long, value_name = "START", value_parser = named::<StartPoint>, help_heading = "Rounding")]
    pub(crate) start: Option<StartPoint>,

    /// Refine the result by at most this many sweeps over all weights [default: 30]
    #[arg(long, value_name = "N", help_heading = "Rounding")]
    pub(crate) refine_sweeps: Option<u32>,

    /// Fit scales to the rounding, then refine again, at most this many times [default: 2; language models: 4]
    ///
    /// 0 leaves the grid as the range search chose it.
    /// A row keeps new scales only if they lower its error; grids of 2 bits gain most.
    /// Not with the samples objective or one scale per tensor.
    #[arg(long, value_name = "N", help_heading = "Rounding")]
    pub(crate) scale_fits: Option<u32>,

    /// Use this fraction of the positions of each sample for statistics [default: 1]
    ///
    /// Less is faster for convolutions on large images; the report states it.
    #[arg(long, value_name = "FRACTION", value_parser = fraction, help_heading = "Rounding")]
    pub(crate) positions: Option<f32>,

    /// Draw random numbers from this seed; equal seeds give equal bytes [default: 0]
    #[arg(long, value_name = "N", help_heading = "Rounding")]
    pub(crate) seed: Option<u64>,

    /// Run this many samples through the network at once [default: chosen by their size]
    ///
    /// A property of the job: results depend on it in the last digits, never on the number of threads.
    #[arg(long, value_name = "SAMPLES", help_heading = "Resources")]
    pub(crate) shard_size: Option<usize>,

    /// Spread the job by batches, layers:R, grid:RxS (R ranges of stages, S nodes each) or auto [default: batches]
    ///
    /// A property of the job: results depend on the number of ranges, never on how many nodes there are. `batches` is
    /// exact sequential propagation. With R ranges, each starts anew from the original network's activations and all
    /// are solved at once: for networks whose activations or statistics do not fit, or slow links. `halfstep plan
    /// --nodes N` compares them. `auto` makes that comparison for the nodes that are attached when the job is submitted,
    /// says what it took and writes it down as if it had been typed: layers and grid change results, and so may `auto`
    /// where other nodes are there; batches never does.
    #[arg(long, value_name = "HOW", help_heading = "Resources")]
    pub(crate) partition: Option<PartitionArg>,

    /// Hold activations in memory up to this size, beyond it in files [default: 4GiB]
    ///
    /// The products that statistics are summed from may take as much again; threads that make more of them wait for each
    /// other. Weights and sums of the layers in hand are not counted.
    #[arg(long, value_name = "BYTES", help_heading = "Resources")]
    pub(crate) memory_budget: Option<ByteSize>,

    /// Put files of activations into this folder [default: a temporary one]
    #[arg(long, value_name = "DIR", help_heading = "Resources")]
    pub(crate) spill_dir: Option<PathBuf>,

    /// Compute on this many threads [default: one per core]
    #[arg(long, value_name = "N", help_heading = "Resources")]
    pub(crate) threads: Option<usize>,

    /// Solve and sum statistics on auto, cpu, cuda (all devices) or cuda:0,1 (these) [default: auto]
    ///
    /// `auto` takes every CUDA device that can be used, else the CPU, and says what it took; the manifest records it.
    /// Results are bit-identical within one kind of device, not between kinds. `halfstep devices` shows what there is.
    #[arg(long, value_name = "DEVICE", help_heading = "Resources")]
    pub(crate) device: Option<DeviceArg>,

    /// Multiply gradients and statistics on CUDA devices in tf32 or f32 [default: tf32]
    ///
    /// tf32 reads factors with 11 bits (AdaRound on statistics: in half precision, scaled). A gradient only steers: what is
    /// compared and reported is computed from the statistics in f32 either way. f32 is several times slower.
    #[arg(long, value_name = "DIGITS", help_heading = "Resources")]
    pub(crate) gradients: Option<GradientsArg>,

    /// Look for CUDA's libraries (cuBLAS, NVRTC) in this folder too; repeatable
    #[arg(
        long,
        value_name = "DIR",
        env = "HALFSTEP_CUDA_LIBRARIES",
        value_delimiter = ':',
        hide_env_values = true,
        help_heading = "Resources"
    )]
    #[serde(default)]
    pub(crate) cuda_libraries: Vec<PathBuf>,

    /// Run the network by this ONNX Runtime library instead of the built-in engine
    #[arg(
        long,
        value_name = "LIB",
        env = "HALFSTEP_ONNXRUNTIME",
        hide_env_values = true,
        help_heading = "Resources"
    )]
    pub(crate) onnxruntime: Option<PathBuf>,

    /// Write AIMET encodings files of this version; repeatable [default: 1.0.0]
    #[arg(long, value_enum, value_name = "VERSION", help_heading = "Output")]
    #[serde(default)]
    pub(crate) encodings: Vec<EncodingsVersion>,

    /// Store a language model's weights this way [default: compressed-tensors]
    ///
    /// compressed-tensors and gptq are what vLLM and transformers load; fake-quant keeps plain weights that lie on the
    /// grid; gguf is one file for llama.cpp, in groups of 32 at 4 bits or symmetric at 8. Scales are rounded to the type they are stored in before rounding is learned.
    #[arg(long, value_enum, value_name = "FORMAT", help_heading = "Language models")]
    pub(crate) format: Option<OutputFormat>,

    /// Cut calibration text into samples of this many tokens [default: 512]
    #[arg(long, value_name = "TOKENS", help_heading = "Language models")]
    pub(crate) sequence_length: Option<usize>,

    /// Take the text of .jsonl and .parquet records from this field [default: text]
    #[arg(long, value_name = "NAME", help_heading = "Language models")]
    pub(crate) text_field: Option<String>,

    /// Tokenise calibration text by this tokenizer.json, or that of this folder [default: the model's own]
    #[arg(long, value_name = "PATH", help_heading = "Language models")]
    pub(crate) tokenizer: Option<PathBuf>,

    /// Take every expert's statistics over all tokens, not only those routed to it
    #[arg(long, help_heading = "Language models")]
    #[serde(default)]
    pub(crate) calibrate_all_experts: bool,

    /// Keep activations between stages as f32, or as bf16 in half the memory [default: f32]
    ///
    /// A property of the job: results depend on it in the last digits.
    #[arg(long, value_enum, value_name = "TYPE", help_heading = "Language models")]
    pub(crate) carries: Option<Carries>,

    /// Begin another weights file beyond this size [default: 5GB]
    #[arg(long, value_name = "BYTES", help_heading = "Language models")]
    pub(crate) file_size: Option<ByteSize>,
}

/// Where calibration or evaluation data comes from and how images are prepared.
#[derive(Debug, Clone, PartialEq, Default, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct DataOptions {
    /// Read samples from this .npz, .npz:ARRAY, .npy, or folder of those or of images; text from .txt, .jsonl, .parquet
    #[arg(long, value_name = "PATH", help_heading = "Data")]
    pub(crate) calibration: Option<PathBuf>,

    /// Use the first N samples [default: all]
    ///
    /// Change at will: 500 to 1000 are enough for most networks; more cost time only.
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub(crate) samples: Option<usize>,

    /// Scale images so that the shorter side has this many pixels
    #[arg(long, value_name = "PIXELS", help_heading = "Data")]
    pub(crate) resize: Option<u32>,

    /// Cut a centred square of this many pixels out of images
    #[arg(long, value_name = "PIXELS", help_heading = "Data")]
    pub(crate) crop: Option<u32>,

    /// Divide pixels (0 to 255) by this first [default: 255]
    #[arg(long, value_name = "X", help_heading = "Data")]
    pub(crate) scale: Option<f32>,

    /// Subtract this from scaled pixels: one value, or one per channel [default: 0]
    #[arg(
        long,
        value_name = "X,..",
        value_delimiter = ',',
        allow_negative_numbers = true,
        help_heading = "Data"
    )]
    #[serde(default)]
    pub(crate) mean: Vec<f32>,

    /// Divide pixels by this last: one value, or one per channel [default: 1]
    #[arg(long, value_name = "X,..", value_delimiter = ',', help_heading = "Data")]
    #[serde(default)]
    pub(crate) std: Vec<f32>,

    /// Order the dimensions of images this way [default: nchw]
    #[arg(long, value_enum, value_name = "ORDER", help_heading = "Data")]
    pub(crate) layout: Option<Layout>,

    /// Give images these channels [default: rgb]
    #[arg(long, value_enum, value_name = "COLOURS", help_heading = "Data")]
    pub(crate) channels: Option<Colours>,
}

/// How text becomes windows of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct TextOptions {
    /// Cut text and token ids into windows of this many tokens [default: 512; rows of stored ids stay whole]
    #[arg(long, value_name = "TOKENS", help_heading = "Text")]
    pub(crate) sequence_length: Option<usize>,

    /// Read the text in this field of .jsonl and column of .parquet [default: text]
    #[arg(long, value_name = "NAME", help_heading = "Text")]
    pub(crate) text_field: Option<String>,

    /// Tokenise by this tokenizer.json, or that of this folder [default: the model's own]
    #[arg(long, value_name = "PATH", help_heading = "Text")]
    pub(crate) tokenizer: Option<PathBuf>,
}

impl DataOptions {
    /// `self` where it says something, else `below`.
    pub(crate) fn over(self, below: Self) -> Self {
        Self {
            calibration: self.calibration.or(below.calibration),
            samples: self.samples.or(below.samples),
            resize: self.resize.or(below.resize),
            crop: self.crop.or(below.crop),
            scale: self.scale.or(below.scale),
            mean: or_list(self.mean, below.mean),
            std: or_list(self.std, below.std),
            layout: self.layout.or(below.layout),
            channels: self.channels.or(below.channels),
        }
    }
}

impl JobOptions {
    /// `self` (flags) where it says something, else `below` (the job file).
    pub(crate) fn over(self, below: Self) -> Self {
        Self {
            model: self.model.or(below.model),
            data: self.data.over(below.data),
            output: self.output.or(below.output),
            bits: self.bits.or(below.bits),
            scheme: self.scheme.or(below.scheme),
            granularity: self.granularity.or(below.granularity),
            group_size: self.group_size.or(below.group_size),
            range: self.range.or(below.range),
            skip: or_list(self.skip, below.skip),
            overrides: or_list(self.overrides, below.overrides),
            no_fold_batch_norm: self.no_fold_batch_norm || below.no_fold_batch_norm,
            objective: self.objective.or(below.objective),
            propagation: self.propagation.or(below.propagation),
            iterations: self.iterations.or(below.iterations),
            learning_rate: self.learning_rate.or(below.learning_rate),
            lambda: self.lambda.or(below.lambda),
            beta_range: self.beta_range.or(below.beta_range),
            warm_start: self.warm_start.or(below.warm_start),
            batch: self.batch.or(below.batch),
            damping: self.damping.or(below.damping),
            start: self.start.or(below.start),
            refine_sweeps: self.refine_sweeps.or(below.refine_sweeps),
            scale_fits: self.scale_fits.or(below.scale_fits),
            positions: self.positions.or(below.positions),
            seed: self.seed.or(below.seed),
            shard_size: self.shard_size.or(below.shard_size),
            partition: self.partition.or(below.partition),
            memory_budget: self.memory_budget.or(below.memory_budget),
            spill_dir: self.spill_dir.or(below.spill_dir),
            threads: self.threads.or(below.threads),
            device: self.device.or(below.device),
            gradients: self.gradients.or(below.gradients),
            cuda_libraries: or_list(self.cuda_libraries, below.cuda_libraries),
            onnxruntime: self.onnxruntime.or(below.onnxruntime),
            encodings: or_list(self.encodings, below.encodings),
            format: self.format.or(below.format),
            sequence_length: self.sequence_length.or(below.sequence_length),
            text_field: self.text_field.or(below.text_field),
            tokenizer: self.tokenizer.or(below.tokenizer),
            calibrate_all_experts: self.calibrate_all_experts || below.calibrate_all_experts,
            carries: self.carries.or(below.carries),
            file_size: self.file_size.or(below.file_size),
        }
    }
}

fn or_list<T>(upper: Vec<T>, below: Vec<T>) -> Vec<T> {
    if upper.is_empty() { below } else { upper }
}
