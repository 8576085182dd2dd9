//! Whole-model forward runs, for evaluation and for probing shapes.

use crate::transit;
use halfstep_exec::{Engine, ExecError, Session};
use halfstep_model::{Model, ModelError, Tensor};
use halfstep_work::{Failure, InputTensor};
use std::path::Path;

/// Why a model could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The file.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A checkpoint's configuration.
    #[error(transparent)]
    Family(#[from] halfstep_model::decoder::FamilyError),
    /// The engine.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// An input or output that cannot be used.
    #[error("{0}")]
    Input(String),
}

/// A model loaded whole.
pub struct Forward {
    session: Box<dyn Session>,
    outputs: Vec<String>,
}

impl Forward {
    /// Loads a model file with its external data.
    ///
    /// # Errors
    /// What reading or loading says.
    pub fn load(engine: &dyn Engine, path: &Path) -> Result<Self, ForwardError> {
        let model = Model::read(path)?;
        let nodes: Vec<usize> = (0..model.graph().node.len()).collect();
        let inputs: Vec<String> = model.inputs().into_iter().map(|i| i.name).collect();
        let outputs: Vec<String> = model.outputs().into_iter().map(|o| o.name).collect();
        let bytes = halfstep_model::extract(&model, &nodes, &inputs, &outputs, &Default::default())?;
        Ok(Self { session: engine.load(bytes)?, outputs })
    }

    /// The first output for one batch of inputs, row-major.
    ///
    /// # Errors
    /// What the engine says, or `Input` for a tensor whose bytes do not match its shape.
    pub fn first_output(&self, inputs: &[InputTensor]) -> Result<Vec<f32>, ForwardError> {
        let name = self.outputs.first().map_or("", String::as_str);
        let tensors: Result<Vec<Tensor>, Failure> = inputs.iter().map(transit::tensor).collect();
        let tensors = tensors.map_err(|f| ForwardError::Input(f.message))?;
        let views: Vec<(&str, &Tensor)> = inputs.iter().map(|i| i.name.as_str()).zip(&tensors).collect();
        let found = self.session.run(&views, &[name])?.pop();
        let values = found.as_ref().and_then(Tensor::as_f32).map(<[f32]>::to_vec);
        values.ok_or_else(|| ForwardError::Input(format!("output `{name}`: expected a tensor of f32")))
    }
}
