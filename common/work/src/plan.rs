//! The plan: fixed before anything runs, a property of the job and never of the fleet.
//!
//! Not here: how it is chosen (`coordinator::planner`); weights and geometry, which nodes read from the model.

use crate::{ChunkId, LayerId, Propagation, RangeId, SegmentId, ShardId, SliceId, SolverSettings};
use halfstep_quant::GridSpec;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// One layer to be rounded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Its index.
    pub id: LayerId,
    /// Unique name in the model.
    pub name: String,
    /// Operator type in the model's vocabulary.
    pub op_type: String,
    /// Output channels.
    pub rows: usize,
    /// Inputs per group times kernel positions.
    pub cols: usize,
    /// Convolution groups; 1 for dense layers.
    pub groups: usize,
    /// The grid to round onto.
    pub grid: GridSpec,
    /// Rows of each chunk; in order, without gaps, never crossing a group.
    pub chunks: Vec<Range<usize>>,
    /// An earlier layer of the same stage that reads the same rows, so that its statistics are this layer's too; none
    /// if the layer has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics_of: Option<LayerId>,
    /// Rows of each slice of the layer's own statistics, `groups * cols` rows in all (matrices `[cols, cols]`, groups one
    /// after the other); in order, without gaps. Only an amount of work: sums are exact however they are sliced.
    pub slices: Vec<Range<usize>>,
    /// The stage after which its statistics are complete.
    pub stage: SegmentId,
}

/// A layer with constant weights that stays as it is, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptLayer {
    /// Its name in the model.
    pub name: String,
    /// Operator type.
    pub op_type: String,
    /// Why it is not quantized.
    pub reason: String,
}

/// What happens at the end of one segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagePlan {
    /// Layers whose statistics are complete here and which are solved now.
    pub solve: Vec<LayerId>,
}

/// The whole job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Layers to round.
    pub layers: Vec<LayerPlan>,
    /// Layers left alone.
    pub kept: Vec<KeptLayer>,
    /// One per segment, in order.
    pub stages: Vec<StagePlan>,
    /// Samples of each shard; in order, without gaps.
    pub shards: Vec<Range<usize>>,
    /// Samples per forward run; shards are run in steps of this many.
    pub batch: usize,
    /// Sequential or independent.
    pub propagation: Propagation,
    /// Solver settings for every layer.
    pub solver: SolverSettings,
    /// Stages of each range; in order, without gaps. The quantized stream starts anew from the original model's
    /// activations at the start of each: several ranges can be solved at once, one is exact sequential propagation.
    /// The results depend on this, and on nothing about who computes what.
    pub ranges: Vec<Range<usize>>,
}

/// A plan that cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Ranges that should tile `0..len` do not.
    #[error("{subject}: ranges must tile 0..{len} in order, but range {index} is {start}..{end}")]
    Gap {
        /// Whose ranges.
        subject: String,
        /// What they should cover.
        len: usize,
        /// The first bad one.
        index: usize,
        /// Its start.
        start: usize,
        /// Its end.
        end: usize,
    },
    /// A layer whose id is not its place in the list.
    #[error("layer `{name}`: id must be its index {index}, found {found}")]
    OutOfPlace {
        /// The layer.
        name: String,
        /// Where it stands.
        index: usize,
        /// What it calls itself.
        found: usize,
    },
    /// A stage that names a layer which does not exist.
    #[error("stage {stage}: solves layer {found}, the plan has {layers} layers")]
    Unknown {
        /// The stage.
        stage: usize,
        /// The id it names.
        found: usize,
        /// How many there are.
        layers: usize,
    },
    /// A layer that is said to read the rows of one that does not lend its statistics.
    #[error(
        "layer `{name}`: has the statistics of layer {found}, expected an earlier layer of its stage and width that has its own"
    )]
    Statistics {
        /// The layer.
        name: String,
        /// The id it names.
        found: usize,
    },
    /// A layer that no stage solves, or two do.
    #[error("layer `{name}`: must be solved in exactly one stage, found in {found}")]
    NotOnce {
        /// The layer.
        name: String,
        /// How many stages name it.
        found: usize,
    },
}

impl Plan {
    /// The layer with this id.
    pub fn layer(&self, id: LayerId) -> &LayerPlan {
        &self.layers[id.index()]
    }

    /// All shard ids, in order.
    pub fn shard_ids(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.shards.len() as u32).map(ShardId)
    }

    /// All chunk ids of one layer, in order.
    pub fn chunk_ids(&self, layer: LayerId) -> impl Iterator<Item = ChunkId> + use<> {
        (0..self.layer(layer).chunks.len() as u32).map(ChunkId)
    }

    /// The layer whose statistics are this layer's: itself, or one that reads the same rows.
    pub fn statistics_of(&self, layer: LayerId) -> LayerId {
        self.layer(layer).statistics_of.unwrap_or(layer)
    }

    /// All slice ids of one layer's own statistics, in order.
    pub fn slice_ids(&self, layer: LayerId) -> impl Iterator<Item = SliceId> + use<> {
        (0..self.layer(layer).slices.len() as u32).map(SliceId)
    }

    /// The range a stage belongs to; the last one for stages beyond the plan.
    pub fn range_of(&self, segment: SegmentId) -> RangeId {
        let found = self.ranges.partition_point(|range| range.end <= segment.index());
        RangeId(found.min(self.ranges.len().saturating_sub(1)) as u32)
    }

    /// Whether the quantized stream of `segment` runs with this layer's rounding: decided earlier in the same range.
    pub fn is_decided_in(&self, layer: LayerId, segment: SegmentId) -> bool {
        let start = self.ranges.get(self.range_of(segment).index()).map_or(0, |range| range.start);
        let stage = self.layer(layer).stage.index();
        self.propagation == Propagation::Sequential && (start..segment.index()).contains(&stage)
    }

    /// All samples of the job.
    pub fn samples(&self) -> usize {
        self.shards.last().map_or(0, |range| range.end)
    }

    /// Checks what every user of a plan relies on.
    ///
    /// # Errors
    /// `Gap` if shards or a layer's chunks do not tile; `OutOfPlace` or `Unknown` for ids that are no indices; `NotOnce` if
    /// a layer has no single stage; `Statistics` if it has those of a layer that it cannot have them of.
    pub fn validate(&self) -> Result<(), PlanError> {
        tiles("shards", &self.shards, self.samples())?;
        tiles("ranges of stages", &self.ranges, self.stages.len())?;
        for (stage, entry) in self.stages.iter().enumerate() {
            if let Some(id) = entry.solve.iter().find(|id| id.index() >= self.layers.len()) {
                return Err(PlanError::Unknown { stage, found: id.index(), layers: self.layers.len() });
            }
        }
        for (index, layer) in self.layers.iter().enumerate() {
            if layer.id.index() != index {
                let (name, found) = (layer.name.clone(), layer.id.index());
                return Err(PlanError::OutOfPlace { name, index, found });
            }
            tiles(&format!("chunks of layer `{}`", layer.name), &layer.chunks, layer.rows)?;
            self.check_statistics(layer)?;
            let rows = match layer.statistics_of {
                None => layer.cols.saturating_mul(layer.groups),
                Some(_) => 0,
            };
            tiles(&format!("slices of layer `{}`", layer.name), &layer.slices, rows)?;
            let found =
                self.stages.iter().flat_map(|stage| &stage.solve).filter(|id| **id == layer.id).count();
            if found != 1 {
                return Err(PlanError::NotOnce { name: layer.name.clone(), found });
            }
        }
        Ok(())
    }

    fn check_statistics(&self, layer: &LayerPlan) -> Result<(), PlanError> {
        let Some(lender) = layer.statistics_of else { return Ok(()) };
        let form = |layer: &LayerPlan| (layer.stage, layer.cols, layer.groups);
        let lends = |one: &LayerPlan| one.statistics_of.is_none() && form(one) == form(layer);
        match self.layers.get(lender.index()).filter(|one| lender < layer.id && lends(one)) {
            Some(_) => Ok(()),
            None => {
                let (name, found) = (layer.name.clone(), lender.index());
                Err(PlanError::Statistics { name, found })
            }
        }
    }
}

fn tiles(subject: &str, ranges: &[Range<usize>], len: usize) -> Result<(), PlanError> {
    let mut next = 0;
    for (index, range) in ranges.iter().enumerate() {
        if range.start != next || range.end <= range.start || range.end > len {
            return Err(PlanError::Gap {
                subject: subject.into(),
                len,
                index,
                start: range.start,
                end: range.end,
            });
        }
        next = range.end;
    }
    if next == len {
        return Ok(());
    }
    Err(PlanError::Gap { subject: subject.into(), len, index: ranges.len(), start: next, end: next })
}
