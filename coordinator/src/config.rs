//! The resolved configuration of a job: checked values, no flags, no files.

use crate::checkpoint::{Format, SHARD_BYTES};
use crate::dataset::DatasetOptions;
use halfstep_model::decoder::CarryPrecision;
use halfstep_quant::{GridSpec, Scheme};
use halfstep_work::{Partition, Propagation, SolverSettings};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A change for the layers whose name matches a pattern; later rules win.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    /// Glob over layer names; `first` and `last` name the first and last layer of the model.
    pub pattern: String,
    /// Leave the layer alone.
    pub skip: bool,
    /// Other bit width.
    pub bits: Option<u8>,
    /// Other scheme.
    pub scheme: Option<Scheme>,
    /// Other sharing of scales.
    pub granularity: Option<halfstep_quant::Granularity>,
    /// Other range estimator.
    pub range: Option<halfstep_quant::RangeEstimator>,
}

/// Version of the encodings file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EncodingsVersion {
    /// 0.6.1
    #[serde(rename = "0.6.1")]
    V0_6_1,
    /// 1.0.0
    #[serde(rename = "1.0.0")]
    V1_0_0,
    /// 2.0.0
    #[serde(rename = "2.0.0")]
    V2_0_0,
}

impl EncodingsVersion {
    /// As written in the file.
    pub fn text(self) -> &'static str {
        match self {
            Self::V0_6_1 => "0.6.1",
            Self::V1_0_0 => "1.0.0",
            Self::V2_0_0 => "2.0.0",
        }
    }
}

/// What only language models have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageConfig {
    /// Output.
    pub format: Format,
    /// Tokens of a calibration sample, where the data does not say.
    pub sequence_length: Option<usize>,
    /// Field of records that holds the text.
    pub text_field: Option<String>,
    /// Tokeniser of calibration text, where it is not the checkpoint's. A path of this machine: it does not travel, the file does.
    #[serde(skip)]
    pub tokenizer: Option<PathBuf>,
    /// Statistics of every expert over all tokens.
    pub all_experts: bool,
    /// Values between segments.
    pub carries: CarryPrecision,
    /// Bytes of one output file.
    pub file_bytes: u64,
}

impl Default for LanguageConfig {
    fn default() -> Self {
        Self {
            format: Format::CompressedTensors,
            sequence_length: None,
            text_field: None,
            tokenizer: None,
            all_experts: false,
            carries: CarryPrecision::default(),
            file_bytes: SHARD_BYTES,
        }
    }
}

/// One job.
#[derive(Clone, Debug)]
pub struct JobConfig {
    /// The ONNX file, or the folder of a checkpoint.
    pub model: PathBuf,
    /// Calibration data.
    pub calibration: PathBuf,
    /// How to read it.
    pub dataset: DatasetOptions,
    /// Folder of the results; must be absent or empty unless `force`.
    pub output: PathBuf,
    /// Replace what is in `output`.
    pub force: bool,
    /// Grid of every layer that no rule changes.
    pub grid: GridSpec,
    /// Changes by name.
    pub rules: Vec<Rule>,
    /// Solver.
    pub solver: SolverSettings,
    /// Propagation.
    pub propagation: Propagation,
    /// How the stages are spread over nodes.
    pub partition: Partition,
    /// Samples per shard; chosen from their size when absent.
    pub shard_size: Option<usize>,
    /// Fold batch norms first.
    pub fold_batch_norm: bool,
    /// Encodings files to write.
    pub encodings: Vec<EncodingsVersion>,
    /// For a checkpoint's folder.
    pub language: LanguageConfig,
}
