//! The statistics of one use of a layer: Gram matrices in exact fixed point, and samples for the samples objective.
//!
//! Each shard's products are summed in f32 in a fixed order, then added to 64-bit integers, so shards may come in any
//! order from anywhere and give the same bits. The exponents follow from peaks that all shards have agreed on.
//! A shard's products are a value of their own until they are merged, so that whoever keeps the sums can wait for leave.
//! Merging a shard again changes nothing: a retried task cannot count its data twice.
//! Not here: who agrees on peaks (`work`), the integers (`fixed_gram`), sums on their way to means (`slice`), damping
//! (`solver`).

use crate::error::ExecError;
use crate::fixed_gram::{FixedGram, Part, check_f32, exponent};
use crate::layer_means::LayerMeans;
use crate::slice::{SumSlice, UseSlice};
use crate::unfold::{Unfolder, floats};
use halfstep_compute::{cpu, random};
use halfstep_model::{Layer, Tensor};
use std::collections::BTreeMap;
use std::ops::Range;
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

/// Sample rows of one shard, one entry per group.
pub type ShardSamples = Vec<SampleRows>;

/// Statistics of one use of one layer, over the shards this node has seen.
#[derive(Debug)]
pub struct LayerStatistics {
    cols: usize,
    groups: usize,
    layer_key: u64,
    sampling: Sampling,
    positions: u64,
    exponents: Exponents,
    sums: Mutex<Sums>,
}

/// Powers of two of the fixed points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exponents {
    /// Of H.
    pub h: i32,
    /// Of C and G; absent when both streams are the same.
    pub cross: Option<(i32, i32)>,
}

#[derive(Debug, Default)]
struct Sums {
    /// Made with the first shard.
    groups: Vec<GroupSums>,
    /// Of every shard that is in; by shard, so that the order never depends on timing.
    samples: BTreeMap<u32, ShardSamples>,
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
        let exponent = |a: f32, b: f32| -> Result<i32, ExecError> {
            let bound = positions as f64 * f64::from(a) * f64::from(b);
            // NaN compares greater than everything, which is the one to name.
            let peak = if a.abs().total_cmp(&b.abs()).is_gt() { a } else { b };
            let found = exponent(positions, a, b).filter(|_| bound <= SUM_MAX);
            found.ok_or_else(|| ExecError::NonFinite { name: layer.name.clone(), peak })
        };
        let h = exponent(peak_q, peak_q)?;
        let cross = match same_streams {
            true => None,
            false => Some((exponent(peak_fp, peak_q)?, exponent(peak_fp, peak_fp)?)),
        };
        let exponents = Exponents { h, cross };
        let (cols, groups) = (layer.cols, layer.groups);
        Ok(Self { cols, groups, layer_key, sampling, positions, exponents, sums: Mutex::default() })
    }

    /// Adds one shard. `q` is `None` when both streams are the same. A shard that is already in is left out.
    ///
    /// # Errors
    /// As [`Self::products`].
    pub fn accumulate(
        &self,
        layer: &Layer,
        input: &str,
        shard: u32,
        fp: &Tensor,
        q: Option<&Tensor>,
    ) -> Result<(), ExecError> {
        self.merge(self.products(layer, input, shard, fp, q)?);
        Ok(())
    }

    /// One shard's sums, not added to anything. `q` is `None` when both streams are the same.
    ///
    /// # Errors
    /// `Tensor` if an input does not fit the layer; `Internal` if an entry exceeds what was agreed on.
    pub fn products(
        &self,
        layer: &Layer,
        input: &str,
        shard: u32,
        fp: &Tensor,
        q: Option<&Tensor>,
    ) -> Result<ShardProducts, ExecError> {
        let inputs = Inputs::new(layer, input, fp, q)?;
        let both = self.exponents.cross.is_some();
        if inputs.q.is_some() != both {
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
        let mut scratch = Scratch::new(self.cols, both);
        let mut products = ShardProducts::new(shard, self.cols, layer.groups, both);
        for group in 0..layer.groups {
            products.sum_group(&inputs, &rows, group, &mut scratch)?;
        }
        products.samples = self.samples(&inputs, &rows, layer.groups, shard)?;
        self.check(&products)?;
        Ok(products)
    }

    fn check(&self, products: &ShardProducts) -> Result<(), ExecError> {
        let square = (self.cols * self.cols).max(1);
        let all = |matrices: &[f32], part, exponent| {
            matrices.chunks(square).try_for_each(|one| check_f32(self.cols, part, exponent, one))
        };
        all(&products.h, Part::Lower, self.exponents.h)?;
        if let Some((c, g)) = self.exponents.cross {
            all(&products.c, Part::Full, c)?;
            all(&products.g, Part::Lower, g)?;
        }
        Ok(())
    }

    /// Adds what [`Self::products`] of this very object gave. A shard that is already in is left out.
    pub fn merge(&self, products: ShardProducts) {
        let mut sums = self.lock();
        if sums.samples.contains_key(&products.shard) {
            return;
        }
        if sums.groups.is_empty() {
            sums.groups = self.zeros();
        }
        let square = self.cols * self.cols;
        for (group, sums) in sums.groups.iter_mut().enumerate() {
            let at = group * square..(group + 1) * square;
            sums.h.add_checked(&products.h[at.clone()]);
            if let Some((c, g)) = &mut sums.cross {
                c.add_checked(&products.c[at.clone()]);
                g.add_checked(&products.g[at]);
            }
        }
        sums.samples.insert(products.shard, products.samples);
    }

    fn zeros(&self) -> Vec<GroupSums> {
        let gram = |part, exponent| FixedGram::new(self.cols, part, exponent);
        let Exponents { h, cross } = self.exponents;
        let cross = cross.map(|(c, g)| (gram(Part::Full, c), gram(Part::Lower, g)));
        vec![GroupSums { h: gram(Part::Lower, h), cross }; self.groups]
    }

    /// The sums of some rows: `rows` counts the rows of all groups' matrices, one after the other.
    ///
    /// # Errors
    /// `Internal` if there are no such rows.
    pub fn slice(&self, rows: Range<usize>) -> Result<UseSlice, ExecError> {
        let total = self.cols * self.groups;
        if rows.start > rows.end || rows.end > total {
            return Err(ExecError::Internal(format!("rows {rows:?} of {total} were asked for")));
        }
        let sums = self.lock();
        let zeros = if sums.groups.is_empty() { self.zeros() } else { Vec::new() };
        let groups = if sums.groups.is_empty() { &zeros } else { &sums.groups };
        let mut integers = Vec::new();
        let mut all = |pick: &dyn Fn(&GroupSums) -> Option<&FixedGram>| {
            for row in rows.clone() {
                if let Some(gram) = pick(&groups[row / self.cols]) {
                    integers.extend_from_slice(gram.row(row % self.cols));
                }
            }
        };
        all(&|group| Some(&group.h));
        all(&|group| group.cross.as_ref().map(|(c, _)| c));
        all(&|group| group.cross.as_ref().map(|(_, g)| g));
        Ok(UseSlice { positions: self.positions, exponents: self.exponents, sums: integers })
    }

    /// The kept sample rows of the shards that are in.
    pub fn kept(&self) -> BTreeMap<u32, ShardSamples> {
        self.lock().samples.clone()
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

    /// Bytes of the sums, once there is a shard.
    pub fn bytes(&self) -> usize {
        let lower = Part::Lower.entries_of(0..self.cols, self.cols);
        let cross = if self.exponents.cross.is_some() { lower + self.cols * self.cols } else { 0 };
        (lower + cross) * self.groups * size_of::<i64>()
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

/// One shard's sums in f32, groups one after the other, and its sample rows.
#[derive(Debug)]
pub struct ShardProducts {
    shard: u32,
    cols: usize,
    h: Vec<f32>,
    c: Vec<f32>,
    g: Vec<f32>,
    samples: ShardSamples,
}

impl ShardProducts {
    fn new(shard: u32, cols: usize, groups: usize, both: bool) -> Self {
        let len = cols * cols * groups;
        let other = || if both { vec![0.0; len] } else { Vec::new() };
        Self { shard, cols, h: vec![0.0; len], c: other(), g: other(), samples: Vec::new() }
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

/// Means of a layer's uses together (one use, for all but shared weights), one per group, sample rows included.
///
/// # Errors
/// `Internal` if the uses are not of one form.
pub fn means(uses: &[Arc<LayerStatistics>]) -> Result<Vec<GroupMeans>, ExecError> {
    let Some(first) = uses.first() else { return Ok(Vec::new()) };
    let rows = 0..first.cols * first.groups;
    let slices: Result<Vec<UseSlice>, ExecError> = uses.iter().map(|one| one.slice(rows.clone())).collect();
    let slice = SumSlice { cols: first.cols, rows, uses: slices? }.means()?;
    let mut whole = LayerMeans::new(first.cols, first.groups);
    whole.place(&slice)?;
    whole.complete()?;
    let mut groups = whole.into_groups();
    let kept: Vec<_> = uses.iter().map(|one| one.kept()).collect();
    add_samples(&mut groups, &kept);
    Ok(groups)
}

/// Appends the kept rows of a layer's uses in their order, shards ascending within a use.
pub fn add_samples(groups: &mut [GroupMeans], uses: &[BTreeMap<u32, ShardSamples>]) {
    for shard in uses.iter().flat_map(BTreeMap::values) {
        for (group, rows) in groups.iter_mut().zip(shard) {
            group.samples.x_q.extend_from_slice(&rows.x_q);
            group.samples.x_fp.extend_from_slice(&rows.x_fp);
        }
    }
}
