//! The narrow interface between a coordinator and a node, between nodes, and between a node and what it must fetch.
//!
//! The same messages travel by gRPC, over a network or over memory. Nothing else crosses.

use crate::{
    ChunkId, Cost, Done, Failure, FailureClass, LayerId, Lease, LeaseId, NodeId, PeakRecord, Plan, RangeId,
    Rounding, SegmentId, ShardId, SliceId,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a coordinator may know of a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeDescription {
    /// Human name.
    pub name: String,
    /// Tasks it works on at once.
    pub slots: usize,
    /// Device kind and instruction set: results are bit-identical within one kind.
    pub device: String,
    /// ONNX engine.
    pub engine: String,
    /// Measured flops per second of one slot, for shares of the work; 0 if unknown.
    pub flops_per_second: f64,
    /// Bytes that carries and statistics may take; 0 if unknown.
    pub memory_bytes: u64,
    /// By what it can add up statistics in a group with nodes that say the same; empty if by nothing.
    pub exchange: String,
}

/// State that lives on a node, is a pure function of plan, inputs and roundings, and dies with the node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Held {
    /// Live tensors of one shard at the end of a segment, on the streams of one range.
    Carry {
        /// Whose quantized stream.
        range: RangeId,
        /// After which segment.
        segment: SegmentId,
        /// Which samples.
        shard: ShardId,
    },
    /// Sums over some shards of all layers solved at a stage. `shards` is ascending and names exactly what is summed.
    Sums {
        /// The stage.
        segment: SegmentId,
        /// The shards.
        shards: Vec<ShardId>,
    },
    /// Means over all shards of one slice of a layer's matrices.
    Means {
        /// The layer.
        layer: LayerId,
        /// The slice.
        slice: SliceId,
    },
}

/// Who holds something, and where it can be fetched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// The holder's registration.
    pub node: NodeId,
    /// `host:port` of its data plane.
    pub address: String,
    /// What.
    pub held: Held,
}

/// A lease, with the places of everything the task needs from other nodes.
///
/// For `Forward`, `Capture`, `Accumulate`: carries of the shard, nearest first; may be empty or stale, then the node
/// replays from the nearest carry it has or from the input. For `Reduce`: all sums, together every shard exactly once.
/// For `Solve`: the means of every slice; with the samples objective also all sums.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Grant {
    /// The lease.
    pub lease: Lease,
    /// Places; the node itself may be among them.
    pub holdings: Vec<Holding>,
}

/// What a node still has of a job when it attaches, so that a restarted coordinator need not ask for it again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// Carries, sums and means held.
    pub held: Vec<Held>,
    /// Peaks of the segments whose carries are held.
    pub captured: Vec<(SegmentId, ShardId, Vec<PeakRecord>)>,
    /// Leases in hand, or done and not yet acknowledged.
    pub leases: Vec<Lease>,
}

/// What became of a completed lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It counts.
    Accepted,
    /// Somebody else's equal result counts; this one is dropped.
    Duplicate,
    /// The lease is no longer held: fenced, counted, dropped.
    Stale,
}

/// What a coordinator may ask of a node. Calls may block; each runs on a thread of its own.
pub trait Node: Send + Sync {
    /// Who it is; constant.
    fn describe(&self) -> NodeDescription;

    /// Takes up a job: from now on leases refer to this plan. Opening the job that is open keeps what is held.
    ///
    /// # Errors
    /// `BadInput` if the model cannot be used, `Internal` if the node's reading of it contradicts the plan.
    fn open(&self, plan: Arc<Plan>, source: Arc<dyn Source>) -> Result<(), Failure>;

    /// Works one lease off. Called from at most `slots` threads at once. `watch` is told of progress inside the task and
    /// may ask it to stop.
    ///
    /// # Errors
    /// The classified failure of this attempt; nothing of it is kept.
    fn execute(&self, grant: &Grant, watch: &dyn Watch) -> Result<(Done, Cost), Failure>;

    /// What became of an executed lease: only accepted products enter sums.
    fn settle(&self, lease: LeaseId, verdict: Verdict);

    /// Something this node holds, as bytes in the agreed layout, for another node.
    ///
    /// # Errors
    /// `PeerLost` if it is not held (any more), or sums cover other shards than asked for.
    fn serve(&self, wanted: &Wanted) -> Result<Bytes, Failure>;

    /// What it still has.
    fn inventory(&self) -> Inventory;

    /// Forgets sums, means and pending products, keeps carries: after this registration was declared lost.
    fn fence(&self);

    /// Forgets the job.
    fn close(&self);
}

/// A task's line to whoever waits for it.
pub trait Watch: Send + Sync {
    /// Something moved: the watchdog's food. Cheap enough for every iteration.
    fn progress(&self);

    /// Whether the task should stop early with `Cancelled`.
    fn cancelled(&self) -> bool;
}

/// A watch that nobody looks at.
pub struct Unwatched;

impl Watch for Unwatched {
    fn progress(&self) {}

    fn cancelled(&self) -> bool {
        false
    }
}

/// A piece of held state that one node asks of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wanted {
    /// A whole carry.
    Carry {
        /// Whose quantized stream.
        range: RangeId,
        /// After which segment.
        segment: SegmentId,
        /// Which samples.
        shard: ShardId,
    },
    /// One slice of a layer's sums, all uses of the layer.
    SumsSlice {
        /// The layer.
        layer: LayerId,
        /// The slice.
        slice: SliceId,
        /// The shards that must be in, exactly.
        shards: Vec<ShardId>,
    },
    /// One slice of a layer's means.
    MeansSlice {
        /// The layer.
        layer: LayerId,
        /// The slice.
        slice: SliceId,
    },
    /// The kept sample rows of a layer, all uses.
    Samples {
        /// The layer.
        layer: LayerId,
        /// The shards that must be in, exactly.
        shards: Vec<ShardId>,
    },
}

/// Why a node could not get what it asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    /// `PeerLost` (ask again or elsewhere), `Damaged`, `BadInput` (the user's file) or `Internal`.
    pub class: FailureClass,
    /// Subject, what is wrong.
    pub message: String,
}

impl SourceError {
    /// Builds one from an error's text.
    pub fn new(class: FailureClass, error: impl std::fmt::Display) -> Self {
        Self { class, message: error.to_string() }
    }
}

/// Where a node fetches from: the coordinator's side, or any holder. Calls block.
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

    /// State held by another node, whole and checked against its hash.
    ///
    /// # Errors
    /// `PeerLost` if the holder does not answer or does not have it; `Damaged` if what came is not what was sent.
    fn held(&self, holder: &Holding, wanted: &Wanted) -> Result<Bytes, SourceError>;
}

/// Element type of a tensor in transit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScalarKind {
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// 16-bit float, IEEE 754.
    F16,
    /// 16-bit float with the exponent of a 32-bit one.
    Bf16,
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
            Self::F16 | Self::Bf16 => 2,
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
