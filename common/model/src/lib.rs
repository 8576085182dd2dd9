//! Models: read, list layers, cut stages, rewrite, write. ONNX graphs here, language models in [`decoder`] and [`checkpoint`].
//!
//! A [`Model`] is a checked `ModelProto` whose weights stay views of the mapped files. Everything else here is a
//! function of it: [`normalize`], [`fold_batch_norms`], [`list_layers`], [`cut`], [`extract`], [`qdq`].
//! Not here: running a graph, choosing grids, any knowledge of how weights are rounded.

mod activation;
mod batch_norm;
pub mod checkpoint;
mod cut;
pub mod decoder;
mod error;
mod extract;
mod geometry;
mod index;
mod layers;
mod layout;
mod model;
mod node;
mod normalize;
mod operators;
mod products;
pub mod qdq;
mod read;
mod refused;
mod tensor;
mod types;
mod validate;
mod write;

/// The ONNX messages, generated from the ONNX project's `onnx.proto` (proto2).
#[expect(
    missing_docs,
    clippy::all,
    rustdoc::all,
    reason = "generated code; the documentation is in onnx.proto"
)]
pub mod onnx {
    include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
}

pub use activation::*;
pub use batch_norm::*;
pub use cut::{Cut, Flow, Segment, Step, Tap, cut};
pub use error::ModelError;
pub use extract::{extract, skeleton};
pub use geometry::*;
pub use index::GraphIndex;
pub use layers::*;
pub use layout::*;
pub use model::{Dim, Model, OPSET_MAX, OPSET_MIN, ValueInfo};
pub use normalize::normalize;
pub use onnx::{GraphProto, ModelProto, NodeProto, TensorProto};
pub use operators::outline;
pub use read::external_files;
pub use tensor::{Data, Dtype, Tensor};
