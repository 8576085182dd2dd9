//! What a job will hold on a CUDA device, stage by stage: from the plan and its probe alone, on any machine.
//!
//! Counted are statistics and solves, which grow with the square of a layer's inputs and with threads. A language model's weights and
//! activations (up to two fifths of the device's memory, less where the rest needs it), arrays that threads keep of earlier stages, and what CUDA itself takes come on top. Threads are counted as if all were
//! on one device.
//! Not here: making room at run time (`room`), bytes of the host (whoever reports the plan).

use crate::devices::{PRODUCTS_SHARE, SUMMED_ON_CPU};
use crate::layer_problem::solver_settings;
use crate::probe::{ProbeReport, TapProbe};
use halfstep_exec::SliceForm;
use halfstep_quant::Granularity;
use halfstep_solver::{Footprint, footprint};
use halfstep_work::{LayerId, LayerPlan, Plan};
use std::collections::BTreeMap;

/// Bytes of one stage on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageMemory {
    /// Sums over all shards.
    pub sums: u64,
    /// Products of one shard, until they are added to the sums.
    pub products: u64,
    /// Statistics that chunks are solved with.
    pub shared: u64,
    /// The largest chunk in work.
    pub chunk: u64,
    shards: usize,
    chunks: usize,
}

impl StageMemory {
    /// With so many threads, on a device of so much memory: products of shards wait for room in a quarter of it.
    pub fn peak(&self, threads: usize, memory: u64) -> u64 {
        let times = |bytes: u64, tasks: usize| bytes.saturating_mul(threads.min(tasks) as u64);
        let room = (memory / PRODUCTS_SHARE as u64).max(self.products);
        let products = times(self.products, self.shards).min(room);
        let solving = self.shared.saturating_add(times(self.chunk, self.chunks));
        self.sums.saturating_add(products.max(solving))
    }
}

/// In the plan's order of stages.
pub fn device_memory(plan: &Plan, probed: &ProbeReport) -> Vec<StageMemory> {
    (0..plan.stages.len()).map(|stage| of_stage(plan, probed, stage)).collect()
}

fn of_stage(plan: &Plan, probed: &ProbeReport, stage: usize) -> StageMemory {
    let on_device = |tap: &&TapProbe| plan.layer(tap.layer).cols >= SUMMED_ON_CPU;
    // Sums stay from each use until the stage that solves the layer.
    let stays = |tap: &&TapProbe| plan.layer(tap.layer).stage.index() >= stage;
    let so_far = probed.segments.iter().take(stage + 1).flat_map(|segment| &segment.taps);
    let sums = so_far.filter(on_device).filter(stays).map(|tap| tap.statistics_bytes).sum();
    let here = probed.segments.get(stage).map_or(&[][..], |segment| &segment.taps);
    let products =
        here.iter().filter(on_device).map(|tap| products(plan.layer(tap.layer), tap.differs)).sum();
    let taps = probed.segments.iter().flat_map(|segment| &segment.taps);
    let differs: BTreeMap<LayerId, bool> = taps.map(|tap| (tap.layer, tap.differs)).collect();
    let (mut shared, mut chunk, mut chunks) = (BTreeMap::new(), 0, 0);
    for layer in plan.stages[stage].solve.iter().map(|id| plan.layer(*id)) {
        let statistics = plan.statistics_of(layer.id);
        let one = of_layer(plan, layer, differs.get(&statistics).is_some_and(|differs| *differs));
        shared.insert(statistics, one.shared.saturating_mul(layer.groups as u64));
        chunk = one.chunk.max(chunk);
        chunks += layer.chunks.len();
    }
    let shared = shared.into_values().fold(0, u64::saturating_add);
    StageMemory { sums, products, shared, chunk, shards: plan.shards.len(), chunks }
}

/// H, C and G in f32, as a device makes them.
fn products(layer: &LayerPlan, differs: bool) -> u64 {
    let form = SliceForm { cols: layer.cols, groups: layer.groups, uses: 1, differs };
    form.square_product_bytes() as u64
}

/// Of the largest problem of the layer's chunks.
fn of_layer(plan: &Plan, layer: &LayerPlan, differs: bool) -> Footprint {
    let per_group = (layer.rows / layer.groups.max(1)).max(1);
    let rows = layer.chunks.iter().map(|rows| rows.len().min(per_group)).max().unwrap_or(0);
    let scales = match layer.grid.granularity {
        Granularity::PerGroup { group_size } => layer.cols.div_ceil(group_size.max(1)),
        Granularity::PerChannel | Granularity::PerTensor => 1,
    };
    footprint(rows, layer.cols, scales, differs, &solver_settings(&plan.solver))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_wait_for_a_quarter_of_the_memory_and_more_threads_than_tasks_take_no_more() {
        let stage = StageMemory { sums: 10, products: 8, shared: 5, chunk: 3, shards: 6, chunks: 4 };
        // One thread: a shard's products, or a chunk with its statistics, beside the sums.
        assert_eq!(stage.peak(1, 1000), 10 + 8);
        assert_eq!(stage.peak(6, 1000), 10 + 48);
        assert_eq!(stage.peak(100, 1000), 10 + 48);
        assert_eq!(stage.peak(6, 80), 10 + 20);
        // There is always room for one.
        assert_eq!(stage.peak(6, 2), 10 + 5 + 12);
        let large = StageMemory { products: u64::MAX, shards: 9, ..stage };
        assert_eq!(large.peak(9, u64::MAX), u64::MAX);
    }
}
