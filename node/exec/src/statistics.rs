//! The statistics of one use of a layer: Gram matrices in exact fixed point, and samples for the samples objective.
//!
//! Each shard's products are summed in f32 in a fixed order, then added to 64-bit integers, so shards may come in any
//! order from anywhere and give the same bits. The exponent follows from peaks that all shards have agreed on.
//! Not here: who agrees on peaks (`work`), damping (`solver`).

use crate::unfold::Unfolder;
use crate::ExecError;
use halfstep_compute::{cpu, random};
use halfstep_model::{Layer, Tensor};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Rows unfolded at a time: small enough for the second-level cache, large enough for products at full speed.
const BLOCK_ELEMENTS: usize = 1 << 17;

/// Sums of products as `value * 2^-exponent` in 64-bit integers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FixedSum {
    exponent: i32,
    values: Vec<i64>,
}

impl FixedSum {
    /// Sums of at most `count` products of values that never exceed `peak_a` and `peak_b`.
    ///
    /// Every partial sum stays below 2^62, by the triangle inequality; one bit is left for rounding.
    pub fn new(len: usize, count: u64, peak_a: f32, peak_b: f32) -> Self {
        let bound = count.max(1) as f64 * f64::from(peak_a) * f64::from(peak_b);
        // Exponents of f64 suffice: peaks are finite f32, so bound < 2^(64 + 256).
        let magnitude = if bound > 0.0 { bound.log2().ceil() as i32 } else { 0 };
        Self { exponent: (61 - magnitude).clamp(-400, 400), values: vec![0; len] }
    }

    /// Adds one shard's sums.
    pub fn add(&mut self, partial: &[f32]) {
        let factor = f64::from(self.exponent).exp2();
        for (sum, x) in self.values.iter_mut().zip(partial) {
            *sum = sum.wrapping_add((f64::from(*x) * factor).round_ties_even() as i64);
        }
    }

    /// Adds sums of the same layer from elsewhere.
    pub fn merge(&mut self, other: &Self) {
        debug_assert_eq!(self.exponent, other.exponent);
        self.values.iter_mut().zip(&other.values).for_each(|(a, b)| *a = a.wrapping_add(*b));
    }

    /// Adds `self / divisor` to f64 values of the same length.
    fn add_mean_to(&self, divisor: f64, out: &mut [f64]) {
        let factor = f64::from(-self.exponent).exp2() / divisor;
        out.iter_mut().zip(&self.values).for_each(|(o, v)| *o += *v as f64 * factor);
    }
}

/// What the statistics of one use must know before the first shard.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Agreement {
    /// Largest absolute input, original model.
    pub peak_fp: f32,
    /// Largest absolute input, quantized stream.
    pub peak_q: f32,
    /// Rows over all shards.
    pub positions: u64,
}

/// Which rows enter the statistics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Fraction of positions, in (0, 1].
    pub fraction: f32,
    /// Rows per shard to keep for the samples objective; 0 for none.
    pub keep_per_shard: usize,
    /// Key of the choice.
    pub seed: u64,
}

/// Rows kept for the samples objective, per group: `[n, cols]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampleRows {
    /// Quantized stream.
    pub x_q: Vec<f32>,
    /// Original model.
    pub x_fp: Vec<f32>,
}

struct Group {
    h: FixedSum,
    /// Cross and target Gram; absent when both streams are the same.
    cross: Option<(FixedSum, FixedSum)>,
}

/// Statistics of one use of one layer, over the shards this node has seen.
pub struct LayerStatistics {
    cols: usize,
    layer_key: u64,
    sampling: Sampling,
    positions: u64,
    groups: Vec<Mutex<Group>>,
    /// By shard and group, so that their order never depends on timing.
    samples: Mutex<BTreeMap<(u32, usize), SampleRows>>,
}

/// Means over positions, f32, `[cols, cols]` per group.
#[derive(Clone, Debug, Default)]
pub struct GroupMeans {
    /// Mean of x~ x~^T.
    pub h: Vec<f32>,
    /// Mean of x x~^T; `None` when it equals `h`.
    pub c: Option<Vec<f32>>,
    /// Mean of x x^T; `None` when it equals `h`.
    pub g: Option<Vec<f32>>,
    /// Sample rows, shards in order.
    pub samples: SampleRows,
}

/// Positions of `0..total` that enter the statistics: an even spread whose phase differs by shard.
pub fn sampled_positions(total: usize, fraction: f32, shard: u32) -> Vec<usize> {
    if fraction >= 1.0 {
        return (0..total).collect();
    }
    let step = f64::from(fraction.max(f32::MIN_POSITIVE)).recip();
    // The golden ratio spreads phases evenly, so shards do not all sample the same pixels.
    let phase = (f64::from(shard) * 0.618_033_988_749_895).fract() * step;
    let mut positions = Vec::new();
    let mut next = phase;
    while (next as usize) < total {
        positions.push(next as usize);
        next += step;
    }
    positions
}

impl LayerStatistics {
    /// Empty statistics of `layer`; `same_streams` when the quantized stream equals the original.
    ///
    /// # Errors
    /// `NonFinite` if a peak is not finite.
    pub fn new(
        layer: &Layer,
        layer_key: u64,
        agreed: Agreement,
        sampling: Sampling,
        same_streams: bool,
    ) -> Result<Self, ExecError> {
        for peak in [agreed.peak_fp, agreed.peak_q] {
            if !peak.is_finite() {
                return Err(ExecError::NonFinite { name: layer.name.clone(), peak });
            }
        }
        let len = layer.cols * layer.cols;
        let sum = |a, b| FixedSum::new(len, agreed.positions, a, b);
        let group = || Group {
            h: sum(agreed.peak_q, agreed.peak_q),
            cross: (!same_streams)
                .then(|| (sum(agreed.peak_fp, agreed.peak_q), sum(agreed.peak_fp, agreed.peak_fp))),
        };
        Ok(Self {
            cols: layer.cols,
            layer_key,
            sampling,
            positions: agreed.positions,
            groups: (0..layer.groups).map(|_| Mutex::new(group())).collect(),
            samples: Mutex::default(),
        })
    }

    /// Adds one shard. `q` is `None` when both streams are the same.
    ///
    /// # Errors
    /// `Tensor` if an input does not fit the layer.
    pub fn accumulate(
        &self,
        layer: &Layer,
        input: &str,
        shard: u32,
        fp: &Tensor,
        q: Option<&Tensor>,
    ) -> Result<(), ExecError> {
        let fp = Unfolder::new(input, &layer.unfold, fp, layer.cols, layer.groups)?;
        let q = q.map(|q| Unfolder::new(input, &layer.unfold, q, layer.cols, layer.groups)).transpose()?;
        if let Some(q) = q.as_ref().filter(|q| q.positions() != fp.positions()) {
            return Err(ExecError::Tensor {
                name: input.into(),
                expected: format!("{} positions on both streams", fp.positions()),
                actual: q.positions().to_string(),
            });
        }
        let positions = sampled_positions(fp.positions(), self.sampling.fraction, shard);
        let mut scratch = Scratch::new(self.cols, q.is_some());
        for group in 0..self.groups.len() {
            self.sum_group(group, &positions, &fp, q.as_ref(), &mut scratch);
            self.keep_samples(group, shard, &positions, &fp, q.as_ref());
        }
        Ok(())
    }

    fn sum_group(
        &self,
        group: usize,
        positions: &[usize],
        fp: &Unfolder<'_>,
        q: Option<&Unfolder<'_>>,
        s: &mut Scratch,
    ) {
        let k = self.cols;
        s.clear();
        for block in positions.chunks(s.rows) {
            let n = block.len();
            fp.fill(group, block, &mut s.x_fp[..n * k]);
            match q {
                None => cpu::gram_lower(&s.x_fp[..n * k], n, k, &mut s.h),
                Some(q) => {
                    q.fill(group, block, &mut s.x_q[..n * k]);
                    cpu::gram_lower(&s.x_q[..n * k], n, k, &mut s.h);
                    cpu::cross_gram(&s.x_fp[..n * k], &s.x_q[..n * k], n, k, &mut s.c);
                    cpu::gram_lower(&s.x_fp[..n * k], n, k, &mut s.g);
                }
            }
        }
        cpu::mirror_lower(&mut s.h, k);
        let mut sums = self.groups[group].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        sums.h.add(&s.h);
        if let Some((c, g)) = &mut sums.cross {
            cpu::mirror_lower(&mut s.g, k);
            c.add(&s.c);
            g.add(&s.g);
        }
    }

    fn keep_samples(
        &self,
        group: usize,
        shard: u32,
        positions: &[usize],
        fp: &Unfolder<'_>,
        q: Option<&Unfolder<'_>>,
    ) {
        let quota = self.sampling.keep_per_shard;
        if quota == 0 || positions.is_empty() {
            return;
        }
        let mut draw = random::Stream::new(self.sampling.seed, self.layer_key, shard);
        let chosen: Vec<usize> =
            (0..quota).map(|_| positions[draw.index(positions.len() as u32) as usize]).collect();
        let mut rows = SampleRows { x_fp: vec![0.0; quota * self.cols], x_q: Vec::new() };
        fp.fill(group, &chosen, &mut rows.x_fp);
        rows.x_q = match q {
            None => rows.x_fp.clone(),
            Some(q) => {
                let mut x = vec![0.0; quota * self.cols];
                q.fill(group, &chosen, &mut x);
                x
            }
        };
        self.samples.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert((shard, group), rows);
    }

    /// Rows summed over all shards, by agreement.
    pub fn positions(&self) -> u64 {
        self.positions
    }

    /// Bytes of the sums.
    pub fn bytes(&self) -> usize {
        let per_group = if self.groups.first().is_some_and(|g| {
            g.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).cross.is_some()
        }) {
            3
        } else {
            1
        };
        self.groups.len() * per_group * self.cols * self.cols * 8
    }
}

/// Means of a layer's uses together (one use, for all but shared weights), one per group.
pub fn means(uses: &[std::sync::Arc<LayerStatistics>]) -> Vec<GroupMeans> {
    let total: u64 = uses.iter().map(|u| u.positions).sum();
    let Some(first) = uses.first() else { return Vec::new() };
    (0..first.groups.len()).map(|group| group_means(uses, group, total.max(1) as f64)).collect()
}

fn group_means(uses: &[std::sync::Arc<LayerStatistics>], group: usize, total: f64) -> GroupMeans {
    let len = uses[0].cols * uses[0].cols;
    let (mut h, mut c, mut g) = (vec![0f64; len], vec![0f64; len], vec![0f64; len]);
    let mut differs = false;
    let mut samples = SampleRows::default();
    for one in uses {
        let sums = one.groups[group].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        sums.h.add_mean_to(total, &mut h);
        match &sums.cross {
            Some((cross, target)) => {
                differs = true;
                cross.add_mean_to(total, &mut c);
                target.add_mean_to(total, &mut g);
            }
            None => {
                sums.h.add_mean_to(total, &mut c);
                sums.h.add_mean_to(total, &mut g);
            }
        }
        drop(sums);
        let kept = one.samples.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for rows in kept.iter().filter(|((_, at), _)| *at == group).map(|(_, rows)| rows) {
            samples.x_q.extend_from_slice(&rows.x_q);
            samples.x_fp.extend_from_slice(&rows.x_fp);
        }
    }
    let narrow = |v: Vec<f64>| v.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
    GroupMeans {
        h: narrow(h),
        c: differs.then(|| narrow(c)),
        g: differs.then(|| narrow(g)),
        samples,
    }
}

/// Largest absolute value; NaN if any entry is NaN.
pub fn peak(values: &[f32]) -> f32 {
    // Integer comparison of magnitudes vectorises and keeps NaN largest.
    let bits = values.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    f32::from_bits(bits)
}

struct Scratch {
    rows: usize,
    x_fp: Vec<f32>,
    x_q: Vec<f32>,
    h: Vec<f32>,
    c: Vec<f32>,
    g: Vec<f32>,
}

impl Scratch {
    fn new(cols: usize, both: bool) -> Self {
        let rows = (BLOCK_ELEMENTS / cols.max(1)).clamp(64, 4096);
        let square = cols * cols;
        let other = |len| if both { vec![0.0; len] } else { Vec::new() };
        Self {
            rows,
            x_fp: vec![0.0; rows * cols],
            x_q: other(rows * cols),
            h: vec![0.0; square],
            c: other(square),
            g: other(square),
        }
    }

    fn clear(&mut self) {
        [&mut self.h, &mut self.c, &mut self.g].into_iter().for_each(|m| m.fill(0.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_order_and_split_of_shards_gives_the_same_integers() {
        let mut draw = random::Stream::new(7, 0, 0);
        let shards: Vec<Vec<f32>> = (0..9)
            .map(|_| (0..25).map(|_| (draw.index(2_000_001) as f32 - 1e6) / 3.7e5).collect())
            .collect();
        let empty = || FixedSum::new(25, 900, 3.0, 3.0);
        let mut forward = empty();
        shards.iter().for_each(|s| forward.add(s));
        let mut halves = (empty(), empty());
        for (index, shard) in shards.iter().rev().enumerate() {
            if index % 3 == 0 { halves.0.add(shard) } else { halves.1.add(shard) }
        }
        halves.1.merge(&halves.0);
        assert_eq!(forward, halves.1);
    }

    #[test]
    fn sums_are_as_precise_as_f32_and_cannot_overflow_at_the_bound() {
        let (count, peak) = (1u64 << 30, 1e18f32);
        let mut sum = FixedSum::new(1, count, peak, peak);
        // All products at the peak: the largest sum there can be.
        let largest = count as f64 * f64::from(peak) * f64::from(peak);
        sum.add(&[(largest / 2.0) as f32]);
        sum.add(&[(largest / 2.0) as f32]);
        let mut mean = [0.0];
        sum.add_mean_to(1.0, &mut mean);
        assert!((mean[0] / largest - 1.0).abs() < 1e-6, "{mean:?} {largest}");
    }

    #[test]
    fn the_peak_of_a_nan_is_nan() {
        assert_eq!(peak(&[1.0, -3.0, 2.0]), 3.0);
        assert!(peak(&[1.0, f32::NAN, 5.0]).is_nan());
        assert_eq!(peak(&[]), 0.0);
    }

    #[test]
    fn sampled_positions_are_distinct_and_about_as_many_as_asked() {
        for fraction in [1.0, 0.5, 0.3, 0.01] {
            for shard in 0..5 {
                let p = sampled_positions(1000, fraction, shard);
                assert!(p.windows(2).all(|w| w[0] < w[1]));
                assert!((p.len() as f32 - 1000.0 * fraction).abs() <= 1.0, "{fraction}: {}", p.len());
            }
        }
    }
}
