//! The narrow interface between a coordinator and a node, and between a node and what it must fetch.
//!
//! In process both are plain calls; over a network the same messages travel by gRPC. Nothing else crosses.

use crate::{ChunkId, Done, Failure, LayerId, Lease, Plan, Rounding, ShardId};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a coordinator may know of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDescription {
    /// Human name.
    pub name: String,
    /// Tasks it works on at once.
    pub slots: usize,
    /// Device kind and instruction set: results are bit-identical within one kind.
    pub device: String,
    /// ONNX engine.
    pub engine: String,
}

/// What a coordinator may ask of a node.
pub trait Node: Send + Sync {
    /// Who it is; constant.
    fn describe(&self) -> NodeDescription;

    /// Takes up a job: from now on leases refer to this plan.
    ///
    /// # Errors
    /// `BadInput` if the model cannot be used, `Internal` if the node's reading of it contradicts the plan.
    fn open(&self, plan: Arc<Plan>, source: Arc<dyn Source>) -> Result<(), Failure>;

    /// Works one lease off. Called from at most `slots` threads at once.
    ///
    /// # Errors
    /// The classified failure of this attempt; nothing of it is kept.
    fn execute(&self, lease: &Lease) -> Result<Done, Failure>;
}

/// Why a node could not get what it asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);

/// Where a node fetches from: the coordinator's side, or any holder of the artefact.
pub trait Source: Send + Sync {
    /// The model's graph without its large constants.
    ///
    /// # Errors
    /// If the artefact cannot be had.
    fn program(&self) -> Result<Bytes, SourceError>;

    /// One constant of the model.
    ///
    /// # Errors
    /// If the model has no such constant or it cannot be read.
    fn constant(&self, name: &str) -> Result<InputTensor, SourceError>;

    /// The calibration samples of one shard, one tensor per model input.
    ///
    /// # Errors
    /// If the shard is unknown or cannot be read.
    fn inputs(&self, shard: ShardId) -> Result<Vec<InputTensor>, SourceError>;

    /// The committed rounding of one chunk; `None` when the layer failed and keeps its weights.
    ///
    /// # Errors
    /// If it is not committed yet.
    fn rounding(&self, layer: LayerId, chunk: ChunkId) -> Result<Option<Arc<Rounding>>, SourceError>;
}

/// Element type of a tensor in transit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScalarKind {
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// 64-bit integer.
    I64,
    /// 32-bit integer.
    I32,
    /// 8-bit integer.
    I8,
    /// 8-bit unsigned integer.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

impl ScalarKind {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }
}

/// A named tensor in transit: raw little-endian elements, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputTensor {
    /// Name in the model.
    pub name: String,
    /// Element type.
    pub kind: ScalarKind,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Elements.
    pub bytes: Bytes,
}
