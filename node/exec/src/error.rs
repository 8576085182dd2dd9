//! What can go wrong while a model runs, and of which kind it is.
//!
//! Not here: retries (the scheduler's), remedies (the command line's).

use halfstep_model::ModelError;
use std::path::PathBuf;

/// An error from this crate.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The engine refuses the sub-model.
    #[error("{engine} cannot load the segment: {}{problem}", node_subject(node, op_type))]
    Load {
        /// Which engine.
        engine: String,
        /// The node it stumbled over; empty if it did not say.
        node: String,
        /// That node's operator; empty if unknown.
        op_type: String,
        /// The engine's words.
        problem: String,
    },
    /// The engine failed while running.
    #[error("{engine} failed: {}{problem}", node_subject(node, op_type))]
    Run {
        /// Which engine.
        engine: String,
        /// The node; empty if the engine did not say.
        node: String,
        /// That node's operator; empty if unknown.
        op_type: String,
        /// The engine's words.
        problem: String,
    },
    /// A shared library that cannot be used.
    #[error("{}: cannot be used as ONNX Runtime: {problem}", path.display())]
    Library {
        /// The file.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
    /// A tensor of the wrong type or shape for what it is used for.
    #[error("tensor `{tensor}`: expected {expected}, found {actual}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What was needed.
        expected: String,
        /// What it is.
        actual: String,
    },
    /// An integer outside of what the engine can hold.
    #[error("tensor `{tensor}`: element {index} is {value}, outside the 32-bit integers {engine} computes with")]
    IntegerRange {
        /// Its name.
        tensor: String,
        /// Flat index.
        index: usize,
        /// The integer.
        value: i64,
        /// Which engine.
        engine: String,
    },
    /// A live tensor that is not there.
    #[error("carry: tensor `{tensor}` of shard {shard}, part {part}, {stream} stream: expected it to be kept, found nothing")]
    Missing {
        /// Its name.
        tensor: String,
        /// The shard.
        shard: u32,
        /// The batch within the shard.
        part: u32,
        /// The stream's name.
        stream: &'static str,
    },
    /// A carry file whose content is not what was written.
    #[error("{}: carry file of tensor `{tensor}` is damaged: {problem}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The tensor it held.
        tensor: String,
        /// What differs, expected and actual.
        problem: String,
    },
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as an infinitive.
        action: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Inputs that spoil the statistics.
    #[error("layer `{layer}`: its input in the {stream} stream reaches {peak}, expected finite values with finite squares")]
    NonFinite {
        /// The layer.
        layer: String,
        /// The stream's name.
        stream: &'static str,
        /// The largest magnitude, or NaN.
        peak: f32,
    },
    /// A layer or size that does not fit.
    #[error("{subject}: {problem}")]
    Shape {
        /// What.
        subject: String,
        /// Expected and actual.
        problem: String,
    },
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The geometry of a convolution.
    #[error(transparent)]
    Geometry(#[from] halfstep_model::GeometryError),
    /// What a [`crate::Weights`] source answered.
    #[error("constant `{name}`: {problem}")]
    Weights {
        /// The constant or layer.
        name: String,
        /// Why it cannot be had.
        problem: String,
    },
    /// A broken promise between the parts of Halfstep.
    #[error("internal: {0}")]
    Internal(String),
}

/// What kind of failure, for the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The model or the data cannot be used.
    BadInput,
    /// Not finite.
    NonFinite,
    /// No space, no permission, damaged files.
    Storage,
    /// A bug.
    Internal,
}

impl ExecError {
    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NonFinite { .. } => ErrorKind::NonFinite,
            Self::Io { .. } | Self::Corrupt { .. } => ErrorKind::Storage,
            Self::Model(error) if error.is_io() => ErrorKind::Storage,
            Self::Internal(_) | Self::Missing { .. } => ErrorKind::Internal,
            _ => ErrorKind::BadInput,
        }
    }

    pub(crate) fn shape(subject: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Shape { subject: subject.into(), problem: problem.into() }
    }
}

fn node_subject(node: &str, op_type: &str) -> String {
    match (node.is_empty(), op_type.is_empty()) {
        (true, true) => String::new(),
        (true, false) => format!("operator {op_type}: "),
        (false, true) => format!("node `{node}`: "),
        (false, false) => format!("node `{node}` ({op_type}): "),
    }
}
