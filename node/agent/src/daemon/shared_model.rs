//! Constants of the model from a file that this machine sees at the coordinator's path.
//!
//! The file is read and rewritten as the coordinator does it. Whether a constant is the same is for hashes to say: this
//! one is only offered. Not here: asking (`source`).

use crate::transit;
use halfstep_model::checkpoint::{Checkpoint, is_checkpoint};
use halfstep_model::{Dtype, Model, ModelError, fold_batch_norms, normalize};
use halfstep_work::{InputTensor, ScalarKind};
use std::path::PathBuf;
use std::sync::OnceLock;

enum Shared {
    Onnx(Box<Model>),
    Checkpoint(Box<Checkpoint>),
}

/// A tensor of a checkpoint as it is stored.
fn stored(checkpoint: &Checkpoint, name: &str) -> Option<InputTensor> {
    let (dtype, shape, bytes) = checkpoint.stored(name).ok()?;
    let kind = match dtype {
        Dtype::F32 => ScalarKind::F32,
        Dtype::F16 => ScalarKind::F16,
        Dtype::Bf16 => ScalarKind::Bf16,
        _ => return None,
    };
    Some(InputTensor { name: name.to_owned(), kind, shape, bytes })
}

/// See the module. The file is read when the first constant is wanted.
pub(super) struct SharedModel {
    path: PathBuf,
    fold_batch_norm: bool,
    model: OnceLock<Option<Shared>>,
}

impl SharedModel {
    /// `path`: empty for none.
    pub(super) fn new(path: &str, fold_batch_norm: bool) -> Self {
        Self { path: path.into(), fold_batch_norm, model: OnceLock::new() }
    }

    /// The constant as this machine's file has it, if it has.
    pub(super) fn constant(&self, name: &str) -> Option<InputTensor> {
        match self.model.get_or_init(|| self.read()).as_ref()? {
            Shared::Onnx(model) => Some(transit::sent(name.to_owned(), &model.tensor(name).ok()?)),
            Shared::Checkpoint(checkpoint) => stored(checkpoint, name),
        }
    }

    fn read(&self) -> Option<Shared> {
        if self.path.as_os_str().is_empty() || !self.path.exists() {
            return None;
        }
        let read = || -> Result<Shared, ModelError> {
            if is_checkpoint(&self.path) {
                return Checkpoint::open(&self.path)
                    .map(|checkpoint| Shared::Checkpoint(Box::new(checkpoint)));
            }
            let mut model = Model::read(&self.path)?;
            normalize(&mut model);
            if self.fold_batch_norm {
                fold_batch_norms(&mut model)?;
            }
            Ok(Shared::Onnx(Box::new(model)))
        };
        read().inspect_err(|error| tracing::debug!(%error, "shared model not used")).ok()
    }
}
