//! Whole-model forward runs, for evaluation and for probing shapes.

use halfstep_exec::{Engine, ExecError, Session};
use halfstep_model::{Model, ModelError, Tensor};
use std::path::Path;

/// Why a model could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The file.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The engine.
    #[error(transparent)]
    Exec(#[from] ExecError),
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

    /// The first output for one batch of inputs.
    ///
    /// # Errors
    /// What the engine says.
    pub fn first_output(&self, inputs: &[(&str, &Tensor)]) -> Result<Tensor, ForwardError> {
        let name = self.outputs.first().map_or("", String::as_str);
        let mut found = self.session.run(inputs, &[name])?;
        found.pop().ok_or_else(|| ExecError::Missing { name: name.into() }.into())
    }
}
