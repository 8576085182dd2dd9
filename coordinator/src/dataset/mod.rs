//! Calibration and evaluation data: `.npy`, `.npz`, folders of those, folders of images; text and token ids
//! ([`tokens`]).
//!
//! In: a path as the user typed it. Out: named arrays whose first dimension counts samples, checked to be finite and
//! of equal length, delivered in slices as little-endian bytes in the dtype a model input wants.
//! Not here: cutting samples into shards (`plan`), tensors of an engine (`exec`).

mod array;
mod error;
mod images;
mod inputs;
mod labels;
mod npy;
mod npz;
mod source;
#[cfg(test)]
mod tests;
pub mod tokens;

pub use array::{Array, DType, SampleSlice};
pub use error::DatasetError;
pub use images::{Channels, ImageLayout, ImageOptions};
pub use inputs::ModelInput;
pub use labels::Labels;
pub use source::{DataFiles, Dataset, DatasetOptions};
