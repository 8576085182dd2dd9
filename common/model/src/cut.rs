//! stub
use crate::{Layer, Model, ModelError};
/// The stages of a job.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cut {
    /// segments
    pub segments: Vec<Segment>,
}
/// A layer input to capture.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tap {
    /// Index of the layer.
    pub layer: usize,
    /// Index into its uses.
    pub use_index: usize,
    /// The tensor.
    pub tensor: String,
}
/// segment
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Segment {
    /// nodes
    pub nodes: Vec<usize>,
    /// i
    pub inputs: Vec<String>,
    /// o
    pub outputs: Vec<String>,
    /// t
    pub taps: Vec<Tap>,
    /// l
    pub live_after: Vec<String>,
    /// l
    pub layers_inside: Vec<usize>,
    /// d
    pub decided: Vec<usize>,
}
/// stub
pub fn cut(_m: &Model, _l: &[Layer], _s: &[bool]) -> Result<Cut, ModelError> {
    Ok(Cut { segments: Vec::new() })
}
