//! What a node would fetch of a planned job before any of it was run: for probing a plan in process.
//!
//! Not here: jobs that run (`source`).

use crate::Subject;
use crate::dataset::Dataset;
use crate::source::inputs_of;
use bytes::Bytes;
use halfstep_work::{
    ChunkId, FailureClass, Holding, InputTensor, LayerId, Plan, Rounding, ShardId, Source, SourceError,
    Wanted,
};
use std::sync::Arc;

/// See the module.
pub struct PlanSource {
    plan: Arc<Plan>,
    subject: Arc<Subject>,
    dataset: Dataset,
}

impl PlanSource {
    /// `dataset` has one array per model input, already of the input's type.
    pub fn new(plan: Arc<Plan>, subject: Arc<Subject>, dataset: Dataset) -> Self {
        Self { plan, subject, dataset }
    }
}

impl Source for PlanSource {
    fn program(&self) -> Result<Bytes, SourceError> {
        Ok(self.subject.program())
    }

    fn constant(&self, name: &str) -> Result<InputTensor, SourceError> {
        self.subject.constant(name)
    }

    fn inputs(&self, shard: ShardId) -> Result<Vec<InputTensor>, SourceError> {
        inputs_of(&self.plan, &self.dataset, shard)
    }

    fn rounding(&self, layer: LayerId, chunk: ChunkId) -> Result<Option<Arc<Rounding>>, SourceError> {
        Err(SourceError::new(FailureClass::PeerLost, format!("{layer} {chunk}: not committed yet")))
    }

    fn held(&self, holder: &Holding, _: &Wanted) -> Result<Bytes, SourceError> {
        Err(SourceError::new(FailureClass::PeerLost, format!("{}: there are no other nodes", holder.address)))
    }
}
