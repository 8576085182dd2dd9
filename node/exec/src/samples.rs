//! Samples for the samples objective: rows of unfolded layer inputs, a fixed quota per layer and shard.
//!
//! Which positions are taken depends on (seed, layer, use, shard) alone: the shard's positions are divided into as many
//! equal stretches as the quota has rows, and one position is drawn from each by counter-based randomness. Rows are
//! ordered by (use, shard, position), whoever adds them first.
//! Not here: minibatches (`solver`).

use crate::error::ExecError;
use crate::statistics::TapBatch;
use crate::unfold::{Unfolder, floats};
use halfstep_compute::random::Stream;
use halfstep_model::Layer;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Rows of one group, both streams.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GroupSamples {
    /// Rows.
    pub n: usize,
    /// `[n, cols]`, inputs of the model quantized so far.
    pub x_q: Vec<f32>,
    /// `[n, cols]`, inputs of the original model.
    pub x_fp: Vec<f32>,
}

/// Everything collected for one layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerSamples {
    /// One entry per group; the positions are the same in all.
    pub groups: Vec<GroupSamples>,
}

/// One use's rows of one shard, groups one after the other.
type Rows = BTreeMap<(u32, u32), Vec<GroupSamples>>;

/// Collects samples of many layers, from many threads.
#[derive(Debug)]
pub struct SampleStore {
    seed: u64,
    quota: usize,
    layers: Mutex<BTreeMap<usize, Rows>>,
}

impl SampleStore {
    /// A store that takes `quota` positions of each layer use in each shard (fewer if the shard has fewer).
    pub fn new(seed: u64, quota: usize) -> Self {
        Self { seed, quota, layers: Mutex::default() }
    }

    /// Takes the quota of one shard. Adding a shard again replaces it by the same rows.
    ///
    /// # Errors
    /// `Shape`, `Tensor` if a batch is not the layer's input.
    pub fn collect(
        &self,
        index: usize,
        layer: &Layer,
        use_index: u32,
        shard: u32,
        batches: &[TapBatch],
    ) -> Result<(), ExecError> {
        let sizes = batches.iter().map(|batch| Ok(batch.unfolder(layer)?.positions()));
        let sizes = sizes.collect::<Result<Vec<usize>, ExecError>>()?;
        let mut stream = draws(self.seed, index, use_index, shard);
        let chosen = split(&stratified(&mut stream, sizes.iter().sum(), self.quota), &sizes);
        let mut groups = vec![GroupSamples::default(); layer.groups];
        for (batch, positions) in batches.iter().zip(&chosen) {
            let unfolder = batch.unfolder(layer)?;
            for (group, samples) in groups.iter_mut().enumerate() {
                gather(&unfolder, &batch.quantized, layer, group, positions, &mut samples.x_q)?;
                gather(&unfolder, &batch.full_precision, layer, group, positions, &mut samples.x_fp)?;
                samples.n += positions.len();
            }
        }
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.entry(index).or_default().insert((use_index, shard), groups);
        Ok(())
    }

    /// Hands out what was collected for a layer, and forgets it.
    pub fn close(&self, index: usize) -> LayerSamples {
        let rows = self.layers.lock().unwrap_or_else(PoisonError::into_inner).remove(&index).unwrap_or_default();
        let mut groups: Vec<GroupSamples> = Vec::new();
        for parts in rows.into_values() {
            groups.resize(groups.len().max(parts.len()), GroupSamples::default());
            for (all, part) in groups.iter_mut().zip(parts) {
                all.n += part.n;
                all.x_q.extend(part.x_q);
                all.x_fp.extend(part.x_fp);
            }
        }
        LayerSamples { groups }
    }
}

fn gather(
    unfolder: &Unfolder,
    x: &Arc<halfstep_model::Tensor>,
    layer: &Layer,
    group: usize,
    positions: &[usize],
    rows: &mut Vec<f32>,
) -> Result<(), ExecError> {
    let start = rows.len();
    rows.resize(start + positions.len() * layer.cols, 0.0);
    unfolder.gather(floats(&layer.name, x)?, group, positions, &mut rows[start..])
}

/// The draws of one (layer, use, shard). The top bit keeps them apart from the solver's, which are keyed by layer.
pub(crate) fn draws(seed: u64, layer: usize, use_index: u32, shard: u32) -> Stream {
    Stream::new(seed, 1 << 63 | u64::from(use_index) << 32 | layer as u64, shard)
}

/// `quota` distinct positions below `total`, ascending, one from each of `quota` equal stretches; all if there are
/// no more than that.
pub(crate) fn stratified(stream: &mut Stream, total: usize, quota: usize) -> Vec<usize> {
    if total <= quota {
        return (0..total).collect();
    }
    let edge = |i: usize| (i as u128 * total as u128 / quota as u128) as usize;
    (0..quota)
        .map(|i| {
            let (begin, end) = (edge(i), edge(i + 1));
            begin + stream.index(u32::try_from(end - begin).unwrap_or(u32::MAX)) as usize
        })
        .collect()
}

/// Positions of a shard as positions of its batches.
pub(crate) fn split(positions: &[usize], sizes: &[usize]) -> Vec<Vec<usize>> {
    let mut rest = positions;
    let mut first = 0;
    sizes
        .iter()
        .map(|size| {
            let (here, later) = rest.split_at(rest.partition_point(|p| *p < first + size));
            let local = here.iter().map(|p| p - first).collect();
            (rest, first) = (later, first + size);
            local
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_distinct_ascending_and_spread() {
        for (total, quota) in [(100, 7), (7, 7), (5, 7), (0, 3), (1000, 1), (97, 96)] {
            let mut stream = draws(1, 2, 0, 3);
            let positions = stratified(&mut stream, total, quota);
            assert_eq!(positions.len(), quota.min(total));
            assert!(positions.windows(2).all(|w| w[0] < w[1]) && positions.iter().all(|p| *p < total));
            for (i, p) in positions.iter().enumerate().take(if total > quota { quota } else { 0 }) {
                assert!((i * total / quota..(i + 1) * total / quota).contains(p));
            }
        }
        let pick = |shard| stratified(&mut draws(1, 2, 0, shard), 10_000, 20);
        assert_eq!(pick(3), pick(3));
        assert_ne!(pick(3), pick(4));
    }

    #[test]
    fn split_maps_every_position_to_its_batch() {
        assert_eq!(split(&[0, 4, 5, 11], &[5, 0, 6, 1]), vec![vec![0, 4], vec![], vec![0], vec![0]]);
    }
}
