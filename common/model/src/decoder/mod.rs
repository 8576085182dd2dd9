//! Decoder-only language models: what their configuration describes, as operators over named tensors.
//!
//! A [`Decoder`] is small and says everything that execution needs but the weights; it travels to nodes as JSON.
//! Not here: reading weights (`checkpoint`), computing (`exec`).

mod check;
mod families;
mod graph;
mod layers;
mod program;

pub use check::DecoderError;
pub use families::{DescribeOptions, FamilyError, describe};
pub use graph::{
    Attend, Decoder, Embed, Gating, LENGTHS, LOGITS, Linear, Node as DecoderNode, Norm, NormKind, Op,
    Positions, Rotary, Rotation, Route, Select, TOKENS,
};
pub use program::{CarryPrecision, DecoderProgram};
