//! What can be wrong with a model, in words that name the subject, the fault, what was expected and what was found.
//!
//! Not here: remedies (the command line adds hints).

use std::path::PathBuf;

/// An error from this crate. None is retryable: the input is what it is, except [`ModelError::Io`].
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A fault inside a file that was read.
    #[error("{}: {source}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// The fault.
        source: Box<ModelError>,
    },
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried, as an infinitive: "open".
        action: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The bytes are no `ModelProto`.
    #[error("not an ONNX model: {source}")]
    Decode {
        /// What the protobuf decoder says.
        source: prost::DecodeError,
    },
    /// A `ModelProto` without a graph.
    #[error("not an ONNX model: it has no graph")]
    NoGraph,
    /// An opset this crate does not know.
    #[error("opset of the model: expected {min} to {max}, found {}", found.map_or("none".to_owned(), |v| v.to_string()))]
    Opset {
        /// What the model imports, if anything.
        found: Option<i64>,
        /// Oldest understood.
        min: i64,
        /// Newest understood.
        max: i64,
    },
    /// A tensor name with two origins.
    #[error("tensor `{tensor}`: produced twice, by {first} and by {second}")]
    Duplicate {
        /// The name.
        tensor: String,
        /// One origin.
        first: String,
        /// The other.
        second: String,
    },
    /// A name that is read but that nothing produces.
    #[error("{reader} reads tensor `{tensor}`, which is no node's output, no initializer and no graph input")]
    Undefined {
        /// "node `x`" or "the graph's output list".
        reader: String,
        /// The name.
        tensor: String,
    },
    /// The graph is not acyclic.
    #[error("node `{node}`: its inputs depend on its own outputs (the graph has a cycle)")]
    Cycle {
        /// One node on the cycle.
        node: String,
    },
    /// A tensor shape that cannot be.
    #[error("tensor `{tensor}`: dimensions {dims:?} {problem}")]
    Dims {
        /// The tensor.
        tensor: String,
        /// As written in the file.
        dims: Vec<i64>,
        /// Why they cannot be.
        problem: &'static str,
    },
    /// Data that does not fit the shape and type.
    #[error(
        "tensor `{tensor}`: {field} must hold {expected} {unit} for its shape and type, but holds {actual}"
    )]
    DataLength {
        /// The tensor.
        tensor: String,
        /// Where the data is: `raw_data`, `float_data`, ...
        field: &'static str,
        /// "bytes" or "elements".
        unit: &'static str,
        /// By shape and type.
        expected: u64,
        /// Present.
        actual: u64,
    },
    /// An element type that cannot be used for this.
    #[error("tensor `{tensor}`: expected {expected}, found {actual}")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// What was needed.
        expected: &'static str,
        /// The type found.
        actual: String,
    },
    /// A reference to a file beside the model that is refused.
    #[error("tensor `{tensor}`: external data `{location}`: {problem}")]
    External {
        /// The tensor.
        tensor: String,
        /// The reference.
        location: String,
        /// Why it is refused.
        problem: String,
    },
    /// A name that should be an initializer.
    #[error("tensor `{tensor}`: the model has no such initializer")]
    NoInitializer {
        /// The name.
        tensor: String,
    },
    /// A node that breaks its operator's rules.
    #[error("node `{node}` ({op_type}): {problem}")]
    Node {
        /// Name of the node, or of its first output.
        node: String,
        /// Operator.
        op_type: String,
        /// What is wrong, expected and actual.
        problem: String,
    },
    /// A request about a layer that cannot be met.
    #[error("layer `{layer}`: {problem}")]
    Layer {
        /// Name of the layer.
        layer: String,
        /// What is wrong, expected and actual.
        problem: String,
    },
    /// A part of a checkpoint that breaks its format or does not fit the rest.
    #[error("{subject}: {problem}")]
    Malformed {
        /// The part: a header, a tensor, a file.
        subject: String,
        /// What is wrong, expected and actual.
        problem: String,
    },
    /// A request that does not fit the model: an index or a name out of its range.
    #[error("{subject}: {problem}")]
    Request {
        /// What was asked for.
        subject: String,
        /// Why it cannot be had, expected and actual.
        problem: String,
    },
    /// A model whose protobuf part passes the limit of the format even with its weights outside.
    #[error(
        "the model without its weights takes {actual} bytes, more than the {limit} a protobuf file may have"
    )]
    TooLarge {
        /// Bytes of the encoded model without external tensors.
        actual: u64,
        /// Bytes allowed.
        limit: u64,
    },
}

impl ModelError {
    /// Whether trying again without changing the input may help: true for operating-system errors alone.
    pub fn is_io(&self) -> bool {
        match self {
            ModelError::Io { .. } => true,
            ModelError::InFile { source, .. } => source.is_io(),
            _ => false,
        }
    }
}
