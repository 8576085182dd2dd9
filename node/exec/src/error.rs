//! What can go wrong while a model runs.
//!
//! Not here: which failures are retried (`agent` classifies, the scheduler decides), remedies (the command line's, but
//! for the one that only an engine knows).

use halfstep_compute::DeviceError;
use halfstep_model::{GeometryError, ModelError};
use std::path::PathBuf;

/// An error from this crate.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The model, or a part cut out of it.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device that runs the model or sums products.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The geometry of a convolution.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The engine refuses a model or a part of one: often an operator it does not know.
    #[error("{engine} cannot run the model: {}{reason}", subject(node, op_type))]
    Load {
        /// Which engine.
        engine: String,
        /// The node it stumbled over; empty if it did not say.
        node: String,
        /// That node's operator; empty if unknown.
        op_type: String,
        /// The engine's words.
        reason: String,
    },
    /// The engine failed while running.
    #[error("{engine} failed: {}{reason}", subject(node, op_type))]
    Run {
        /// Which engine.
        engine: String,
        /// The node; empty if the engine did not say.
        node: String,
        /// That node's operator; empty if unknown.
        op_type: String,
        /// The engine's words.
        reason: String,
    },
    /// A shared library that cannot be used.
    #[error("{}: cannot be used as ONNX Runtime: {reason}", path.display())]
    Library {
        /// As given by the user.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A tensor that should be there is not.
    #[error("tensor `{name}`: expected it among the tensors of this segment and shard, found nothing")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A tensor of the wrong type or shape for its use.
    #[error("tensor `{name}`: expected {expected}, found {actual}")]
    Tensor {
        /// Its name.
        name: String,
        /// What was needed.
        expected: String,
        /// What it is.
        actual: String,
    },
    /// An integer the engine cannot hold.
    #[error(
        "tensor `{name}`: element {index} is {value}, outside the 32-bit integers that {engine} computes with"
    )]
    IntegerRange {
        /// Its name.
        name: String,
        /// Flat index.
        index: usize,
        /// The integer.
        value: i64,
        /// Which engine.
        engine: String,
    },
    /// Inputs whose products cannot be summed.
    #[error(
        "layer `{name}`: the largest absolute input is {peak}, expected finite inputs with finite sums of squares"
    )]
    NonFinite {
        /// The layer.
        name: String,
        /// What was seen.
        peak: f32,
    },
    /// The spill folder.
    #[error("{}: cannot {action}: {source}", path.display())]
    Storage {
        /// File or folder.
        path: PathBuf,
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A spilled tensor that is not what was written.
    #[error("{}: damaged carry file: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, expected and actual.
        what: String,
    },
    /// Bytes from another node that are not what was asked for.
    #[error("{subject}: {problem}")]
    Format {
        /// What was asked for.
        subject: &'static str,
        /// What is wrong, expected and actual.
        problem: String,
    },
    /// A broken promise between the parts of Halfstep.
    #[error("internal: {0}")]
    Internal(String),
}

fn subject(node: &str, op_type: &str) -> String {
    match (node.is_empty(), op_type.is_empty()) {
        (true, true) => String::new(),
        (true, false) => format!("operator {op_type}: "),
        (false, true) => format!("node `{node}`: "),
        (false, false) => format!("node `{node}` ({op_type}): "),
    }
}
