//! Constants of the model from a file that this machine sees at the coordinator's path.
//!
//! The file is read and rewritten as the coordinator does it. Whether a constant is the same is for hashes to say: this
//! one is only offered. Not here: asking (`source`).

use crate::transit;
use halfstep_model::{Model, ModelError, fold_batch_norms, normalize};
use halfstep_work::InputTensor;
use std::path::PathBuf;
use std::sync::OnceLock;

/// See the module. The file is read when the first constant is wanted.
pub(super) struct SharedModel {
    path: PathBuf,
    fold_batch_norm: bool,
    model: OnceLock<Option<Model>>,
}

impl SharedModel {
    /// `path`: empty for none.
    pub(super) fn new(path: &str, fold_batch_norm: bool) -> Self {
        Self { path: path.into(), fold_batch_norm, model: OnceLock::new() }
    }

    /// The constant as this machine's file has it, if it has.
    pub(super) fn constant(&self, name: &str) -> Option<InputTensor> {
        let model = self.model.get_or_init(|| self.read()).as_ref()?;
        let tensor = model.tensor(name).ok()?;
        Some(transit::sent(name.to_owned(), &tensor))
    }

    fn read(&self) -> Option<Model> {
        if self.path.as_os_str().is_empty() || !self.path.is_file() {
            return None;
        }
        let read = || -> Result<Model, ModelError> {
            let mut model = Model::read(&self.path)?;
            normalize(&mut model);
            if self.fold_batch_norm {
                fold_batch_norms(&mut model)?;
            }
            Ok(model)
        };
        read().inspect_err(|error| tracing::debug!(%error, "shared model not used")).ok()
    }
}
