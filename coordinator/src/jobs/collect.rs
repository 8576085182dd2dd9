//! The client's half of intake: what a job consists of, with the hash of every file.
//!
//! Not here: sending it.

use super::names::travelling;
use super::{JobSpec, job_id};
use crate::dataset::tokens::check_tokenizer;
use crate::dataset::{DataFiles, Dataset};
use crate::manifest::FileRecord;
use crate::store::{FileRole, InputFile};
use crate::{CoordinatorError, JobConfig, LanguageModel};
use halfstep_model::checkpoint::{Checkpoint, is_checkpoint};
use halfstep_model::{Model, external_files};
use halfstep_work::JobId;
use std::path::{Path, PathBuf};

/// A job ready to be submitted.
#[derive(Clone, Debug, PartialEq)]
pub struct Collected {
    /// Its id.
    pub id: JobId,
    /// Configuration as JSON.
    pub spec: Vec<u8>,
    /// Files, each with the absolute path it has here.
    pub files: Vec<InputFile>,
}

/// Lists and hashes the inputs of a job.
///
/// # Errors
/// `Model`, `Dataset` or `Storage` for files that cannot be read, `BadInput` for names that cannot travel.
pub fn collect(config: &JobConfig) -> Result<Collected, CoordinatorError> {
    let model_is_folder = is_checkpoint(&config.model);
    // What is wrong with a model is said best by whoever reads it.
    let mut files = match model_is_folder {
        true => checkpoint_files(&LanguageModel::open(&config.model, &config.language)?.checkpoint)?,
        false => {
            Model::read(&config.model)?;
            model_files(&config.model)?
        }
    };
    let data = DataFiles::list(&config.calibration, config.dataset.samples)?;
    if data.files.is_empty() {
        Dataset::open(&config.calibration, &config.dataset)?;
    }
    for file in &data.files {
        files.push(input(FileRole::Calibration, &data.root, file)?);
    }
    if let Some(tokenizer) = &config.language.tokenizer {
        let root = tokenizer.parent().map(Path::to_path_buf).unwrap_or_default();
        check_tokenizer(tokenizer)?;
        files.push(input(FileRole::Tokenizer, &root, tokenizer)?);
    }
    let calibration = if data.is_folder { &data.root } else { &data.files[0] };
    let spec = JobSpec {
        model: shown(&config.model),
        model_is_folder,
        calibration: shown(calibration),
        calibration_is_folder: data.is_folder,
        calibration_key: data.key.clone(),
        dataset: config.dataset.clone(),
        grid: config.grid,
        rules: config.rules.clone(),
        solver: config.solver,
        propagation: config.propagation,
        partition: config.partition,
        shard_size: config.shard_size,
        fold_batch_norm: config.fold_batch_norm,
        encodings: config.encodings.clone(),
        language: config.language.clone(),
    }
    .to_json()?;
    Ok(Collected { id: job_id(&spec, &files), spec, files })
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The model and the files that its tensors lie in.
fn model_files(model: &Path) -> Result<Vec<InputFile>, CoordinatorError> {
    let root = model.parent().map(Path::to_path_buf).unwrap_or_default();
    let mut files = vec![input(FileRole::Model, &root, model)?];
    for name in external_files(model)? {
        let file: PathBuf = root.join(&name);
        // A file that cannot be had is the model's error, and reading the model says which tensor needs it.
        if file.is_file() {
            files.push(input(FileRole::ModelData, &root, &file)?);
        }
    }
    Ok(files)
}

/// Everything that the output needs of a checkpoint.
fn checkpoint_files(checkpoint: &Checkpoint) -> Result<Vec<InputFile>, CoordinatorError> {
    let all = checkpoint.files().iter().map(PathBuf::as_path);
    let companions = checkpoint.companions()?;
    let all = all.chain(companions.iter().map(|(_, path)| path.as_path()));
    all.enumerate()
        .map(|(index, file)| {
            // The configuration comes first and stands for the model.
            let role = if index == 0 { FileRole::Model } else { FileRole::ModelData };
            input(role, checkpoint.folder(), file)
        })
        .collect()
}

fn input(role: FileRole, root: &Path, file: &Path) -> Result<InputFile, CoordinatorError> {
    let name = travelling(root, file).map_err(CoordinatorError::BadInput)?;
    let record = FileRecord::of(file, file)?;
    let hash = blake3::Hash::from_hex(&record.blake3)
        .map_err(|e| CoordinatorError::ReadBack { subject: shown(file), what: e.to_string() })?;
    let path = std::path::absolute(file).map_err(|e| CoordinatorError::storage(file, "find", e))?;
    Ok(InputFile { role, name, size: record.bytes, hash, path: Some(path) })
}
