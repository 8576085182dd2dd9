//! What is submitted: everything that decides the bytes of the results, besides the files themselves.
//!
//! JSON, unknown keys refused. Not here: where files lie on this machine (`folder`).

use crate::dataset::DatasetOptions;
use crate::store::InputFile;
use crate::{CoordinatorError, EncodingsVersion, JobConfig, LanguageConfig, Rule};
use halfstep_quant::GridSpec;
use halfstep_work::{JobId, Partition, Propagation, SolverSettings};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A larger configuration is not one.
const SPEC_BYTES_MAX: usize = 1 << 20;

/// A job without its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// The model as the user named it; shown, and written into the manifest.
    pub model: String,
    /// Whether that is the folder of a checkpoint.
    pub model_is_folder: bool,
    /// The calibration file or folder as the user named it, without a key.
    pub calibration: String,
    /// Whether that is a folder.
    pub calibration_is_folder: bool,
    /// Array of an npz file to use.
    pub calibration_key: Option<String>,
    /// How to read the data.
    pub dataset: DatasetOptions,
    /// Grid of every layer that no rule changes.
    pub grid: GridSpec,
    /// Changes by name.
    pub rules: Vec<Rule>,
    /// Solver.
    pub solver: SolverSettings,
    /// Propagation.
    pub propagation: Propagation,
    /// How stages are spread.
    pub partition: Partition,
    /// Samples per shard.
    pub shard_size: Option<usize>,
    /// Fold batch norms first.
    pub fold_batch_norm: bool,
    /// Encodings files to write.
    pub encodings: Vec<EncodingsVersion>,
    /// For language models.
    pub language: LanguageConfig,
}

impl JobSpec {
    /// As it travels and is kept.
    ///
    /// # Errors
    /// `Configuration` if a number is not finite.
    pub fn to_json(&self) -> Result<Vec<u8>, CoordinatorError> {
        serde_json::to_vec(self)
            .map_err(|e| CoordinatorError::Configuration(format!("job: cannot be written: {e}")))
    }

    /// Reads what somebody submitted.
    ///
    /// # Errors
    /// `Configuration` for anything else.
    pub fn from_json(json: &[u8]) -> Result<Self, CoordinatorError> {
        if json.len() > SPEC_BYTES_MAX {
            return Err(CoordinatorError::Configuration(format!(
                "job: configuration has {} bytes, expected at most {SPEC_BYTES_MAX}",
                json.len()
            )));
        }
        serde_json::from_slice(json).map_err(|e| CoordinatorError::Configuration(format!("job: {e}")))
    }

    /// The job on this machine.
    pub(super) fn config(&self, model: PathBuf, calibration: PathBuf, output: PathBuf) -> JobConfig {
        JobConfig {
            model,
            calibration,
            dataset: self.dataset.clone(),
            output,
            force: true,
            grid: self.grid,
            rules: self.rules.clone(),
            solver: self.solver,
            propagation: self.propagation,
            partition: self.partition,
            shard_size: self.shard_size,
            fold_batch_norm: self.fold_batch_norm,
            encodings: self.encodings.clone(),
            language: self.language.clone(),
        }
    }
}

/// The id of a job: the same configuration and the same files are the same job, wherever they lie.
pub fn job_id(spec_json: &[u8], files: &[InputFile]) -> JobId {
    let mut hasher = blake3::Hasher::new_derive_key("halfstep job id 1");
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(spec_json);
    let mut sorted: Vec<&InputFile> = files.iter().collect();
    sorted.sort_by_key(|file| (file.role, file.name.as_str()));
    for file in sorted {
        field(file.role.text().as_bytes());
        field(file.name.as_bytes());
        field(&file.size.to_le_bytes());
        field(file.hash.as_bytes());
    }
    let mut id = [0; 16];
    hasher.finalize_xof().fill(&mut id);
    JobId(id)
}
