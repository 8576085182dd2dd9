//! The element-wise activation that directly follows a layer: which one, found by which graph pattern.
//!
//! Method: single operators by name; SiLU, HardSwish and GELU also as the small subgraphs exporters write.
//! A pattern counts only if nothing else reads any tensor inside it, the layer's output included.
//! Not here: evaluating activations (the solver does).

use serde::{Deserialize, Serialize};

/// An element-wise activation. In: the layer's output; out: the same shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// None, or one that cannot be attributed to this layer alone.
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, min), max)`; a missing bound is infinite. Serialized bounds are finite (`±f32::MAX`).
    Clip {
        /// Lower bound.
        min: f32,
        /// Upper bound.
        max: f32,
    },
    /// `x` where `x >= 0`, else `slope * x`.
    LeakyRelu {
        /// Factor below zero.
        slope: f32,
    },
    /// `x` where `x >= 0`, else `slope * x`, the slope per output channel.
    PRelu {
        /// One entry, or one per row of the layer.
        slope: Vec<f32>,
    },
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
    /// `x * min(max(x + 3, 0), 6) / 6`.
    HardSwish,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * (1 + erf(x / sqrt 2)) / 2`.
    Gelu,
    /// `x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`.
    GeluTanh,
}
