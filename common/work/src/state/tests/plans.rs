//! Small plans and right answers.

use crate::*;
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme};
use std::sync::Arc;

/// One layer per stage, with two slices and three chunks each; the first range has the stages that are left over.
pub(super) fn plan(stages: usize, ranges: usize, shards: usize) -> Arc<Plan> {
    let units = |count: usize| (0..count).map(|at| at..at + 1).collect::<Vec<_>>();
    let grid = GridSpec {
        bits: 4,
        scheme: Scheme::Symmetric,
        granularity: Granularity::PerTensor,
        range: RangeEstimator::MinMax,
    };
    let layer = |id: u32| LayerPlan {
        id: LayerId(id),
        name: format!("layer{id}"),
        op_type: "Conv".into(),
        rows: 3,
        cols: 2,
        groups: 1,
        grid,
        chunks: units(3),
        statistics_of: None,
        slices: units(2),
        stage: SegmentId(id),
    };
    let first = stages - (ranges - 1);
    let plan = Plan {
        layers: (0..stages as u32).map(layer).collect(),
        kept: vec![],
        stages: (0..stages as u32).map(|id| StagePlan { solve: vec![LayerId(id)] }).collect(),
        shards: units(shards),
        batch: 1,
        propagation: Propagation::Sequential,
        solver: solver(),
        ranges: std::iter::once(0..first).chain((first..stages).map(|at| at..at + 1)).collect(),
    };
    assert_eq!(plan.validate(), Ok(()));
    Arc::new(plan)
}

fn solver() -> SolverSettings {
    SolverSettings {
        objective: Objective::Gram,
        iterations: 1,
        learning_rate: 0.1,
        beta: (20.0, 2.0),
        warm_start: 0.2,
        lambda: 1.0,
        batch: 1,
        damping: 0.0,
        start: StartPoint::Nearest,
        refine_sweeps: 1,
        scale_fits: 0,
        seed: 0,
        positions_per_shard: 1,
        positions_fraction: 1.0,
    }
}

pub(super) fn peaks(segment: SegmentId, shard: ShardId) -> Vec<PeakRecord> {
    let full_precision = shard.0 as f32;
    vec![PeakRecord {
        layer: LayerId(segment.0),
        use_index: 0,
        full_precision,
        quantized: 1.0,
        positions: 10,
    }]
}

pub(super) fn rounding(layer: u32, chunk: u32) -> Arc<Rounding> {
    let encodings = Encodings {
        bits: 4,
        scheme: Scheme::Symmetric,
        granularity: Granularity::PerTensor,
        rows: 1,
        cols: 2,
        scale: vec![1.0],
        zero_point: vec![0],
    };
    let (layer, chunk) = (LayerId(layer), ChunkId(chunk));
    Arc::new(Rounding { layer, chunk, encodings, q: vec![0, 1], report: ChunkReport::default() })
}

pub(super) fn done(task: &Task) -> Done {
    match task {
        Task::Forward { .. } => Done::Forwarded,
        Task::Capture { segment, shard } => Done::Captured { peaks: peaks(*segment, *shard) },
        Task::Accumulate { .. } => Done::Accumulated,
        Task::Reduce { .. } => Done::Reduced,
        Task::Solve { layer, chunk } => Done::Solved(rounding(layer.0, chunk.0)),
    }
}
