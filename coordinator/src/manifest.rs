//! `manifest.json`: what went in, what came out, and everything that decides the bytes in between.
//!
//! No times, no thread counts: they do not change a result. `halfstep verify` recomputes the hashes.

use crate::CoordinatorError;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// One file with its hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileRecord {
    /// Relative to the manifest for outputs, as given for inputs.
    pub path: PathBuf,
    /// Length.
    pub bytes: u64,
    /// BLAKE3, hexadecimal.
    pub blake3: String,
}

impl FileRecord {
    /// Hashes a file.
    ///
    /// # Errors
    /// `Storage` if it cannot be read.
    pub fn of(file: &Path, shown: impl Into<PathBuf>) -> Result<Self, CoordinatorError> {
        let fail = |e| CoordinatorError::storage(file, "read", e);
        let mut hasher = blake3::Hasher::new();
        let open = File::open(file).map_err(fail)?;
        hasher.update_reader(open).map_err(fail)?;
        Ok(Self { path: shown.into(), bytes: hasher.count(), blake3: hasher.finalize().to_hex().to_string() })
    }
}

/// See the module.
#[derive(Clone, Debug, Serialize)]
pub struct Manifest {
    /// Format version.
    pub version: u32,
    /// Halfstep's version.
    pub halfstep: String,
    /// Id of the job: a hash of its configuration and its inputs.
    pub job: String,
    /// Device kind and instruction set: results are bit-identical within one.
    pub device: String,
    /// ONNX engine.
    pub engine: String,
    /// Key of all randomness.
    pub seed: u64,
    /// Full configuration.
    pub configuration: BTreeMap<String, serde_json::Value>,
    /// Model and calibration files.
    pub inputs: Vec<FileRecord>,
    /// Every output but this one.
    pub outputs: Vec<FileRecord>,
}
