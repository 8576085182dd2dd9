//! What nodes may fetch from this coordinator: the model's graph and constants, calibration shards, roundings.

use crate::dataset::{DType, Dataset, SampleSlice};
use bytes::Bytes;
use halfstep_model::{Data, Model, Tensor, skeleton};
use halfstep_work::{
    ChunkId, InputTensor, LayerId, Plan, Rounding, ScalarKind, ShardId, Source, SourceError,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, RwLock};

/// The in-process source of one job.
pub struct JobSource {
    plan: Arc<Plan>,
    model: Arc<Model>,
    dataset: Dataset,
    committed: RwLock<Committed>,
}

#[derive(Default)]
struct Committed {
    roundings: BTreeMap<(LayerId, ChunkId), Arc<Rounding>>,
    failed: BTreeSet<LayerId>,
}

impl JobSource {
    /// `dataset` has one array per model input, already of the input's type.
    pub fn new(plan: Arc<Plan>, model: Arc<Model>, dataset: Dataset) -> Self {
        Self { plan, model, dataset, committed: RwLock::default() }
    }

    pub(crate) fn commit(&self, rounding: Arc<Rounding>) {
        let mut committed = self.committed.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        committed.roundings.insert((rounding.layer, rounding.chunk), rounding);
    }

    pub(crate) fn give_up(&self, layer: LayerId) {
        self.committed.write().unwrap_or_else(|poisoned| poisoned.into_inner()).failed.insert(layer);
    }
}

impl Source for JobSource {
    fn program(&self) -> Result<Bytes, SourceError> {
        Ok(skeleton(&self.model))
    }

    fn constant(&self, name: &str) -> Result<InputTensor, SourceError> {
        let tensor = self.model.tensor(name).map_err(|e| SourceError(e.to_string()))?;
        Ok(transit(name, tensor))
    }

    fn inputs(&self, shard: ShardId) -> Result<Vec<InputTensor>, SourceError> {
        let range =
            self.plan.shards.get(shard.index()).ok_or_else(|| {
                SourceError(format!("{shard}: the plan has {} shards", self.plan.shards.len()))
            })?;
        let slices = self.dataset.slice(range.clone()).map_err(|e| SourceError(e.to_string()))?;
        Ok(slices.into_iter().map(transit_slice).collect())
    }

    fn rounding(&self, layer: LayerId, chunk: ChunkId) -> Result<Option<Arc<Rounding>>, SourceError> {
        let committed = self.committed.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        if committed.failed.contains(&layer) {
            return Ok(None);
        }
        let found = committed.roundings.get(&(layer, chunk)).cloned();
        found.map(Some).ok_or_else(|| SourceError(format!("{layer} {chunk}: not committed yet")))
    }
}

/// Samples as they travel to whoever computes.
pub fn transit_slice(slice: SampleSlice) -> InputTensor {
    let kind = match slice.dtype {
        DType::F32 => ScalarKind::F32,
        DType::F64 => ScalarKind::F64,
        DType::I64 => ScalarKind::I64,
        DType::I32 => ScalarKind::I32,
        DType::I8 => ScalarKind::I8,
        DType::U8 => ScalarKind::U8,
        DType::Bool => ScalarKind::Bool,
    };
    InputTensor { name: slice.name, kind, shape: slice.shape, bytes: slice.bytes.into() }
}

fn transit(name: &str, tensor: Tensor) -> InputTensor {
    fn raw<const N: usize, T: Copy>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Bytes {
        let mut out = Vec::with_capacity(values.len() * N);
        values.iter().for_each(|v| out.extend_from_slice(&bytes(*v)));
        out.into()
    }
    let (kind, bytes) = match &tensor.data {
        Data::F32(v) => (ScalarKind::F32, raw(v, f32::to_le_bytes)),
        Data::F64(v) => (ScalarKind::F64, raw(v, f64::to_le_bytes)),
        Data::I64(v) => (ScalarKind::I64, raw(v, i64::to_le_bytes)),
        Data::I32(v) => (ScalarKind::I32, raw(v, i32::to_le_bytes)),
        Data::I8(v) => (ScalarKind::I8, raw(v, i8::to_le_bytes)),
        Data::U8(v) => (ScalarKind::U8, raw(v, u8::to_le_bytes)),
        Data::Bool(v) => (ScalarKind::Bool, raw(v, |b| [u8::from(b)])),
    };
    InputTensor { name: name.into(), kind, shape: tensor.shape, bytes }
}
