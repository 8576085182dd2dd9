//! The statistics of one use of a layer: Gram matrices in exact fixed point, and samples for the samples objective.
//!
//! Each shard's products are summed in f32 in a fixed order, then added to 64-bit integers, so shards may come in any
//! order from anywhere and give the same bits. The exponents follow from peaks that all shards have agreed on.
//! Adding a shard again changes nothing: a retried task cannot count its data twice.
//! Not here: who agrees on peaks (`work`), the integers (`fixed_gram`), damping (`solver`).

use crate::error::ExecError;
use crate::fixed_gram::{FixedGram, Part, exponent};
use crate::unfold::{Unfolder, floats};
use halfstep_compute::{cpu, random};
use halfstep_model::{Layer, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Rows unfolded at a time: near the second-level cache, long enough for products at full speed.
const BLOCK_ELEMENTS: usize = 1 << 18;
const BLOCK_ROWS_MIN: usize = 128;
const BLOCK_ROWS_MAX: usize = 1024;
/// Sums of products beyond this are refused: f32 ends at 3.4e38.
const SUM_MAX: f64 = 1e38;

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

/// Means over positions, f32, `[cols, cols]` per group.
#[derive(Clone, Debug, Default, PartialEq)]
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

/// Statistics of one use of one layer, over the shards this node has seen.
#[derive(Debug)]
pub struct LayerStatistics {
    cols: usize,
    layer_key: u64,
    sampling: Sampling,
    positions: u64,
    same_streams: bool,
    sums: Mutex<Sums>,
}

#[derive(Debug)]
struct Sums {
    groups: Vec<GroupSums>,
    shards: BTreeSet<u32>,
    /// Per group; by shard, so that the order never depends on timing.
    samples: BTreeMap<u32, Vec<SampleRows>>,
}

#[derive(Debug, Clone)]
struct GroupSums {
    h: FixedGram,
    /// Cross and target Gram; absent when both streams are the same.
    cross: Option<(FixedGram, FixedGram)>,
}

/// Positions of `0..total` that enter the statistics: an even spread whose phase differs by shard.
pub fn sampled_positions(total: usize, fraction: f32, shard: u32) -> Vec<usize> {
    if fraction >= 1.0 {
        return (0..total).collect();
    }
    let step = f64::from(fraction.max(f32::MIN_POSITIVE)).recip();
    // The golden ratio spreads phases evenly, so shards do not all sample the same pixels.
    let phase = (f64::from(shard) * 0.618_033_988_749_895).fract() * step;
    (0u64..).map(|i| (phase + i as f64 * step) as usize).take_while(|position| *position < total).collect()
}

/// Largest absolute value; NaN if any entry is NaN.
pub fn peak(values: &[f32]) -> f32 {
    // Integer comparison of magnitudes vectorises and keeps NaN largest.
    let bits = values.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    f32::from_bits(bits)
}

impl LayerStatistics {
    /// Empty statistics of `layer`; `same_streams` when the quantized stream equals the original.
    ///
    /// # Errors
    /// `NonFinite` if a peak is not finite, or so large that sums of squares would not be.
    pub fn new(
        layer: &Layer,
        layer_key: u64,
        agreed: Agreement,
        sampling: Sampling,
        same_streams: bool,
    ) -> Result<Self, ExecError> {
        let Agreement { peak_fp, peak_q, positions } = agreed;
        let gram = |part, a: f32, b: f32| -> Result<FixedGram, ExecError> {
            let bound = positions as f64 * f64::from(a) * f64::from(b);
            let exponent = exponent(positions, a, b).filter(|_| bound <= SUM_MAX);
            // NaN compares greater than everything, which is the one to name.
            let peak = if a.abs().total_cmp(&b.abs()).is_gt() { a } else { b };
            let exponent = exponent.ok_or_else(|| ExecError::NonFinite { name: layer.name.clone(), peak })?;
            Ok(FixedGram::new(layer.cols, part, exponent))
        };
        let h = gram(Part::Lower, peak_q, peak_q)?;
        let cross = match same_streams {
            true => None,
            false => Some((gram(Part::Full, peak_fp, peak_q)?, gram(Part::Lower, peak_fp, peak_fp)?)),
        };
        let groups = vec![GroupSums { h, cross }; layer.groups];
        let sums = Mutex::new(Sums { groups, shards: BTreeSet::new(), samples: BTreeMap::new() });
        Ok(Self { cols: layer.cols, layer_key, sampling, positions, same_streams, sums })
    }

    /// Adds one shard. `q` is `None` when both streams are the same. A shard that is already in is left out.
    ///
    /// # Errors
    /// `Tensor` if an input does not fit the layer; `Internal` if an entry exceeds what was agreed on.
    pub fn accumulate(
        &self,
        layer: &Layer,
        input: &str,
        shard: u32,
        fp: &Tensor,
        q: Option<&Tensor>,
    ) -> Result<(), ExecError> {
        let inputs = Inputs::new(layer, input, fp, q)?;
        if inputs.q.is_none() != self.same_streams {
            return Err(ExecError::Internal(format!(
                "layer `{}`: its streams part in some shards only",
                layer.name
            )));
        }
        let positions = match self.sampling.fraction < 1.0 {
            true => Some(sampled_positions(inputs.unfolder.positions(), self.sampling.fraction, shard)),
            false => None,
        };
        let rows = Rows { total: inputs.unfolder.positions(), chosen: positions.as_deref() };
        let mut scratch = Scratch::new(self.cols, !self.same_streams);
        let mut partial = Partial::new(self.cols, layer.groups, !self.same_streams);
        for group in 0..layer.groups {
            partial.sum_group(&inputs, &rows, group, &mut scratch)?;
        }
        let samples = self.samples(&inputs, &rows, layer.groups, shard)?;
        drop(scratch);
        self.merge(shard, &partial, samples)
    }

    fn merge(&self, shard: u32, partial: &Partial, samples: Vec<SampleRows>) -> Result<(), ExecError> {
        let mut sums = self.lock();
        if !sums.shards.insert(shard) {
            return Ok(());
        }
        let square = self.cols * self.cols;
        for (group, sums) in sums.groups.iter_mut().enumerate() {
            let at = group * square..(group + 1) * square;
            sums.h.add_f32(&partial.h[at.clone()])?;
            if let Some((c, g)) = &mut sums.cross {
                c.add_f32(&partial.c[at.clone()])?;
                g.add_f32(&partial.g[at])?;
            }
        }
        sums.samples.insert(shard, samples);
        Ok(())
    }

    /// Rows for the samples objective: one from each of `quota` equal stretches of the rows, by counter-based
    /// randomness keyed by (seed, layer, shard); all rows if there are no more than that.
    fn samples(
        &self,
        inputs: &Inputs<'_>,
        rows: &Rows<'_>,
        groups: usize,
        shard: u32,
    ) -> Result<Vec<SampleRows>, ExecError> {
        if self.sampling.keep_per_shard == 0 {
            return Ok(vec![SampleRows::default(); groups]);
        }
        // The top bit keeps these draws apart from the solver's, which have the same seed and layer.
        let mut draw = random::Stream::new(self.sampling.seed, self.layer_key | 1 << 63, shard);
        let chosen = stratified(&mut draw, rows.len(), self.sampling.keep_per_shard);
        let chosen: Vec<usize> = chosen.into_iter().map(|row| rows.position(row)).collect();
        let gather = |x: &[f32], group| {
            let mut out = vec![0.0; chosen.len() * self.cols];
            inputs.unfolder.gather(x, group, &chosen, &mut out).map(|()| out)
        };
        (0..groups)
            .map(|group| {
                let x_fp = gather(inputs.fp, group)?;
                let x_q = inputs.q.map_or_else(|| Ok(x_fp.clone()), |q| gather(q, group))?;
                Ok(SampleRows { x_q, x_fp })
            })
            .collect()
    }

    /// Rows summed over all shards, by agreement.
    pub fn positions(&self) -> u64 {
        self.positions
    }

    /// Bytes of the sums.
    pub fn bytes(&self) -> usize {
        let entries = |group: &GroupSums| {
            let cross = group.cross.as_ref().map_or(0, |(c, g)| c.sums().len() + g.sums().len());
            (group.h.sums().len() + cross) * size_of::<i64>()
        };
        self.lock().groups.iter().map(entries).sum()
    }

    fn lock(&self) -> MutexGuard<'_, Sums> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `quota` distinct indices below `total`, ascending, one from each of `quota` equal stretches; all if there are no
/// more than that.
fn stratified(draw: &mut random::Stream, total: usize, quota: usize) -> Vec<usize> {
    if total <= quota {
        return (0..total).collect();
    }
    let edge = |i: usize| (i as u128 * total as u128 / quota as u128) as usize;
    let pick = |i: usize| {
        let width = edge(i + 1) - edge(i);
        edge(i) + draw.index(u32::try_from(width).unwrap_or(u32::MAX)) as usize
    };
    (0..quota).map(pick).collect()
}

/// A shard's input to the layer, on both streams.
struct Inputs<'a> {
    unfolder: Unfolder,
    fp: &'a [f32],
    q: Option<&'a [f32]>,
}

impl<'a> Inputs<'a> {
    fn new(layer: &Layer, name: &str, fp: &'a Tensor, q: Option<&'a Tensor>) -> Result<Self, ExecError> {
        if let Some(q) = q.filter(|q| q.shape != fp.shape) {
            return Err(ExecError::Tensor {
                name: name.to_owned(),
                expected: format!("shape {:?} on both streams", fp.shape),
                actual: format!("{:?} on the quantized", q.shape),
            });
        }
        let unfolder = Unfolder::new(name, &layer.unfold, fp, layer.cols, layer.groups)?;
        let q = q.map(|q| floats(name, q)).transpose()?;
        Ok(Self { unfolder, fp: floats(name, fp)?, q })
    }
}

/// The rows that take part: all, or the chosen positions.
struct Rows<'a> {
    total: usize,
    chosen: Option<&'a [usize]>,
}

impl Rows<'_> {
    fn len(&self) -> usize {
        self.chosen.map_or(self.total, <[usize]>::len)
    }

    fn position(&self, row: usize) -> usize {
        self.chosen.map_or(row, |chosen| chosen[row])
    }
}

/// One shard's sums in f32, groups one after the other.
struct Partial {
    cols: usize,
    h: Vec<f32>,
    c: Vec<f32>,
    g: Vec<f32>,
}

impl Partial {
    fn new(cols: usize, groups: usize, both: bool) -> Self {
        let len = cols * cols * groups;
        let other = || if both { vec![0.0; len] } else { Vec::new() };
        Self { cols, h: vec![0.0; len], c: other(), g: other() }
    }

    fn sum_group(
        &mut self,
        inputs: &Inputs<'_>,
        rows: &Rows<'_>,
        group: usize,
        scratch: &mut Scratch,
    ) -> Result<(), ExecError> {
        let k = self.cols;
        let at = group * k * k..(group + 1) * k * k;
        for start in (0..rows.len()).step_by(scratch.rows) {
            let block = start..rows.len().min(start + scratch.rows);
            let n = block.len();
            let x = unfolded(inputs, inputs.fp, rows, group, block.clone(), &mut scratch.x_fp)?;
            let Some(q) = inputs.q else {
                cpu::gram_lower(x, n, k, &mut self.h[at.clone()]);
                continue;
            };
            let x_q = unfolded(inputs, q, rows, group, block, &mut scratch.x_q)?;
            cpu::gram_lower(x_q, n, k, &mut self.h[at.clone()]);
            cpu::cross_gram(x, x_q, n, k, &mut self.c[at.clone()]);
            cpu::gram_lower(x, n, k, &mut self.g[at.clone()]);
        }
        Ok(())
    }
}

/// A block of rows: borrowed where the tensor already is the matrix.
fn unfolded<'a>(
    inputs: &Inputs<'_>,
    x: &'a [f32],
    rows: &Rows<'_>,
    group: usize,
    block: std::ops::Range<usize>,
    scratch: &'a mut [f32],
) -> Result<&'a [f32], ExecError> {
    match rows.chosen {
        Some(chosen) => inputs.unfolder.gather(x, group, &chosen[block], scratch)?,
        None => match inputs.unfolder.borrow(x, block.clone()) {
            Some(rows) => return Ok(rows),
            None => inputs.unfolder.block(x, group, block, scratch)?,
        },
    }
    Ok(scratch)
}

struct Scratch {
    rows: usize,
    x_fp: Vec<f32>,
    x_q: Vec<f32>,
}

impl Scratch {
    fn new(cols: usize, both: bool) -> Self {
        let rows = (BLOCK_ELEMENTS / cols.max(1)).clamp(BLOCK_ROWS_MIN, BLOCK_ROWS_MAX);
        let x_q = if both { vec![0.0; rows * cols] } else { Vec::new() };
        Self { rows, x_fp: vec![0.0; rows * cols], x_q }
    }
}

/// Means of a layer's uses together (one use, for all but shared weights), one per group.
pub fn means(uses: &[Arc<LayerStatistics>]) -> Vec<GroupMeans> {
    let Some(first) = uses.first() else { return Vec::new() };
    let total = uses.iter().map(|one| one.positions).sum::<u64>().max(1) as f64;
    let groups = first.lock().groups.len();
    (0..groups).map(|group| group_means(uses, group, first.cols, total)).collect()
}

/// Uses are added in their order, in f64: the integers of different uses may have different exponents.
fn group_means(uses: &[Arc<LayerStatistics>], group: usize, cols: usize, total: f64) -> GroupMeans {
    let mean = |pick: &dyn Fn(&GroupSums) -> &FixedGram| {
        let mut sums = vec![0.0; cols * cols];
        for one in uses {
            if let Some(group) = one.lock().groups.get(group) {
                pick(group).add_to(&mut sums);
            }
        }
        sums.iter().map(|sum| (sum / total) as f32).collect::<Vec<f32>>()
    };
    let differs = uses.iter().any(|one| !one.same_streams);
    GroupMeans {
        h: mean(&|group| &group.h),
        c: differs.then(|| mean(&|group| group.cross.as_ref().map_or(&group.h, |(c, _)| c))),
        g: differs.then(|| mean(&|group| group.cross.as_ref().map_or(&group.h, |(_, g)| g))),
        samples: group_samples(uses, group),
    }
}

fn group_samples(uses: &[Arc<LayerStatistics>], group: usize) -> SampleRows {
    let mut all = SampleRows::default();
    for one in uses {
        for rows in one.lock().samples.values().filter_map(|groups| groups.get(group)) {
            all.x_q.extend_from_slice(&rows.x_q);
            all.x_fp.extend_from_slice(&rows.x_fp);
        }
    }
    all
}
