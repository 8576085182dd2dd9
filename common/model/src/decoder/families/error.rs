//! Why a configuration or its checkpoint cannot be used.

use crate::decoder::DecoderError;

/// One sentence each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FamilyError {
    /// An architecture that is not known.
    #[error("model type `{model_type}` is not known, expected one of {known}")]
    Family {
        /// As configured.
        model_type: String,
        /// All that are.
        known: String,
    },
    /// Weights that are integers already.
    #[error("model: already quantized by `{method}`, expected weights in floating point")]
    Quantized {
        /// As configured.
        method: String,
    },
    /// A field that cannot be used.
    #[error("config field `{field}`: expected {expected}, found {actual}")]
    Field {
        /// Its path.
        field: String,
        /// What is accepted.
        expected: String,
        /// What is there.
        actual: String,
    },
    /// A tensor that cannot be used.
    #[error("tensor `{tensor}`: expected {expected}, found {actual}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// Its shape by the configuration.
        expected: String,
        /// What is there.
        actual: String,
    },
    /// Sizes that do not fit each other.
    #[error(transparent)]
    Decoder(#[from] DecoderError),
}
