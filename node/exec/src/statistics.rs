//! The statistics of one use of a layer: Gram matrices in exact fixed point, and samples for the samples objective.
//!
//! Each shard's products are summed in f32 in a fixed order, then added to 64-bit integers, so shards may come in any
//! order from anywhere and give the same bits. The exponents follow from peaks that all shards have agreed on.
//! A shard's products are a value of their own until they are merged, so that whoever keeps the sums can wait for leave.
//! Merging a shard again changes nothing: a retried task cannot count its data twice.
//! Not here: who agrees on peaks (`work`), where sums are computed and kept (`products`), the integers (`fixed_gram`), sums on
//! their way to means (`slice`), damping (`solver`).

use crate::carry::Carried;
use crate::error::ExecError;
use crate::fixed_gram::{Part, exponent};
use crate::layer_means::LayerMeans;
use crate::products::{Adding, Form, Kept, Products, Summing};
use crate::slice::{SumSlice, UseSlice};
use crate::unfold::{Unfolder, floats};
use halfstep_compute::cuda::CudaHalves;
use halfstep_compute::random;
use halfstep_model::{Layer, Tensor};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

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
    form: Form,
    layer_key: u64,
    sampling: Sampling,
    positions: u64,
    /// Written for every shard; read by many at once.
    sums: RwLock<Sums>,
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
    kept: Kept,
    /// Of every shard that is in; by shard, so that the order never depends on timing.
    samples: BTreeMap<u32, ShardSamples>,
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
        let form = Form { cols: layer.cols, groups: layer.groups, exponents: Exponents { h, cross } };
        Ok(Self { form, layer_key, sampling, positions, sums: RwLock::default() })
    }

    /// Adds one shard. `q` is `None` when both streams are the same. A shard that is already in is left out.
    ///
    /// # Errors
    /// As [`Self::products`] and [`Self::merge`].
    pub fn accumulate(
        &self,
        layer: &Layer,
        input: &str,
        shard: u32,
        fp: &Tensor,
        q: Option<&Tensor>,
    ) -> Result<(), ExecError> {
        self.check_streams(layer, q.is_some())?;
        self.merge(self.products_of_tensors(Summing::Cpu, layer, input, shard, fp, q)?)
    }

    /// One shard's sums, not added to anything. `q` is `None` when both streams are the same.
    ///
    /// # Errors
    /// `Tensor` if an input does not fit the layer; `Internal` if an entry exceeds what was agreed on; `Device`.
    pub fn products(
        &self,
        summing: Summing<'_>,
        layer: &Layer,
        input: &str,
        shard: u32,
        fp: &Carried,
        q: Option<&Carried>,
    ) -> Result<ShardProducts, ExecError> {
        self.check_streams(layer, q.is_some())?;
        let stays = |carried: &Carried| summing.reads_in_place(carried);
        let in_place = self.takes_all_rows() && stays(fp) && q.is_none_or(stays);
        let fetched = |carried: &Carried| match in_place {
            true => Ok(carried.clone()),
            false => carried.clone().on_host(),
        };
        let (fp, q) = (fetched(fp)?, q.map(fetched).transpose()?);
        if summing.takes_halves()
            && self.takes_all_rows()
            && let Some(rows) = HalfRows::of(layer, input, &fp, q.as_ref())?
        {
            let mut adding = Adding::new(self.form, summing, rows.count)?;
            match rows.at {
                At::Host(fp, q) => adding.add_halves(fp, q)?,
                At::Device(fp, q) => adding.add_staying(fp, q)?,
            }
            adding.end_group()?;
            let samples = vec![SampleRows::default(); layer.groups];
            return Ok(ShardProducts { shard, products: adding.finish()?, samples });
        }
        let (fp, q) = (fp.tensor()?, q.map(Carried::tensor).transpose()?);
        self.products_of_tensors(summing, layer, input, shard, &fp, q.as_deref())
    }

    fn check_streams(&self, layer: &Layer, apart: bool) -> Result<(), ExecError> {
        match apart == self.form.exponents.cross.is_some() {
            true => Ok(()),
            false => {
                let reason = format!("layer `{}`: its streams part in some shards only", layer.name);
                Err(ExecError::Internal(reason))
            }
        }
    }

    /// Whether every row enters the sums and nothing else is asked of it.
    fn takes_all_rows(&self) -> bool {
        self.sampling.fraction >= 1.0 && self.sampling.keep_per_shard == 0
    }

    fn products_of_tensors(
        &self,
        summing: Summing<'_>,
        layer: &Layer,
        input: &str,
        shard: u32,
        fp: &Tensor,
        q: Option<&Tensor>,
    ) -> Result<ShardProducts, ExecError> {
        let inputs = Inputs::new(layer, input, fp, q)?;
        let positions = match self.sampling.fraction < 1.0 {
            true => Some(sampled_positions(inputs.unfolder.positions(), self.sampling.fraction, shard)),
            false => None,
        };
        let rows = Rows { total: inputs.unfolder.positions(), chosen: positions.as_deref() };
        let mut adding = Adding::new(self.form, summing, rows.len())?;
        let mut scratch = Scratch::new(self.form.cols, inputs.q.is_some());
        for group in 0..self.form.groups {
            add_group(&mut adding, &inputs, &rows, group, &mut scratch)?;
        }
        let products = adding.finish()?;
        Ok(ShardProducts { shard, products, samples: self.samples(&inputs, &rows, layer.groups, shard)? })
    }

    /// Adds what [`Self::products`] of this very object, or of another of the same form, gave. A shard that is already in is
    /// left out.
    ///
    /// # Errors
    /// `Device`: then the sums are worth nothing.
    pub fn merge(&self, products: ShardProducts) -> Result<(), ExecError> {
        let mut sums = self.sums.write().unwrap_or_else(PoisonError::into_inner);
        if sums.samples.contains_key(&products.shard) {
            return Ok(());
        }
        sums.kept.add(self.form, &products.products)?;
        sums.samples.insert(products.shard, products.samples);
        Ok(())
    }

    /// The sums of some rows: `rows` counts the rows of all groups' matrices, one after the other.
    ///
    /// # Errors
    /// `Internal` if there are no such rows; `Device`.
    pub fn slice(&self, rows: Range<usize>) -> Result<UseSlice, ExecError> {
        let total = self.form.cols * self.form.groups;
        if rows.start > rows.end || rows.end > total {
            return Err(ExecError::Internal(format!("rows {rows:?} of {total} were asked for")));
        }
        let sums = self.read().kept.rows(self.form, rows)?;
        Ok(UseSlice { positions: self.positions, exponents: self.form.exponents, sums })
    }

    /// The kept sample rows of the shards that are in.
    pub fn kept(&self) -> BTreeMap<u32, ShardSamples> {
        self.read().samples.clone()
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
            let mut out = vec![0.0; chosen.len() * self.form.cols];
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
        let Form { cols, groups, exponents } = self.form;
        let lower = Part::Lower.entries_of(0..cols, cols);
        let cross = if exponents.cross.is_some() { lower + cols * cols } else { 0 };
        (lower + cross) * groups * size_of::<i64>()
    }

    fn read(&self) -> RwLockReadGuard<'_, Sums> {
        self.sums.read().unwrap_or_else(PoisonError::into_inner)
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
        same_shape(name, &fp.shape, q.map(|q| q.shape.as_slice()))?;
        let unfolder = Unfolder::new(name, &layer.unfold, fp, layer.cols, layer.groups)?;
        let q = q.map(|q| floats(name, q)).transpose()?;
        Ok(Self { unfolder, fp: floats(name, fp)?, q })
    }
}

fn same_shape(name: &str, fp: &[usize], q: Option<&[usize]>) -> Result<(), ExecError> {
    match q.filter(|q| *q != fp) {
        None => Ok(()),
        Some(q) => Err(ExecError::Tensor {
            name: name.to_owned(),
            expected: format!("shape {fp:?} on both streams"),
            actual: format!("{q:?} on the quantized"),
        }),
    }
}

/// A shard's rows as they lie in tensors of bfloat16, on both streams.
struct HalfRows<'a> {
    count: usize,
    at: At<'a>,
}

/// Where both streams lie, the original's first.
enum At<'a> {
    Host(&'a [u16], Option<&'a [u16]>),
    Device(&'a CudaHalves, Option<&'a CudaHalves>),
}

impl<'a> At<'a> {
    /// Nothing if they do not lie in one place, or are not bfloat16.
    fn of(fp: &'a Carried, q: Option<&'a Carried>) -> Option<Self> {
        match (fp, q) {
            (Carried::Halves(fp), None) => Some(Self::Host(&fp.values, None)),
            (Carried::Halves(fp), Some(Carried::Halves(q))) => Some(Self::Host(&fp.values, Some(&q.values))),
            (Carried::OnDevice(fp), None) => Some(Self::Device(&fp.values, None)),
            (Carried::OnDevice(fp), Some(Carried::OnDevice(q))) => {
                Some(Self::Device(&fp.values, Some(&q.values)))
            }
            _ => None,
        }
    }
}

impl<'a> HalfRows<'a> {
    /// Nothing if they do not lie so.
    fn of(
        layer: &Layer,
        name: &str,
        fp: &'a Carried,
        q: Option<&'a Carried>,
    ) -> Result<Option<Self>, ExecError> {
        same_shape(name, fp.dims(), q.map(Carried::dims))?;
        let Some(at) = At::of(fp, q) else { return Ok(None) };
        let unfolder = Unfolder::for_dims(name, &layer.unfold, fp.dims(), layer.cols, layer.groups)?;
        let count = unfolder.positions();
        Ok(unfolder.is_plain().then_some(Self { count, at }))
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

/// One shard's products, which belong to no sums yet, and its sample rows.
#[derive(Debug)]
pub struct ShardProducts {
    shard: u32,
    products: Products,
    samples: ShardSamples,
}

fn add_group(
    adding: &mut Adding<'_>,
    inputs: &Inputs<'_>,
    rows: &Rows<'_>,
    group: usize,
    scratch: &mut Scratch,
) -> Result<(), ExecError> {
    for start in (0..rows.len()).step_by(scratch.rows) {
        let block = start..rows.len().min(start + scratch.rows);
        let x = unfolded(inputs, inputs.fp, rows, group, block.clone(), scratch.cols, &mut scratch.x_fp)?;
        let q = inputs
            .q
            .map(|q| unfolded(inputs, q, rows, group, block, scratch.cols, &mut scratch.x_q))
            .transpose()?;
        adding.add(x, q)?;
    }
    adding.end_group()
}

/// A block of rows: borrowed where the tensor already is the matrix.
fn unfolded<'a>(
    inputs: &Inputs<'_>,
    x: &'a [f32],
    rows: &Rows<'_>,
    group: usize,
    block: Range<usize>,
    cols: usize,
    scratch: &'a mut [f32],
) -> Result<&'a [f32], ExecError> {
    let len = block.len() * cols;
    match rows.chosen {
        Some(chosen) => inputs.unfolder.gather(x, group, &chosen[block], scratch)?,
        None => match inputs.unfolder.borrow(x, block.clone()) {
            Some(rows) => return Ok(rows),
            None => inputs.unfolder.block(x, group, block, scratch)?,
        },
    }
    Ok(&scratch[..len])
}

struct Scratch {
    rows: usize,
    cols: usize,
    x_fp: Vec<f32>,
    x_q: Vec<f32>,
}

impl Scratch {
    fn new(cols: usize, both: bool) -> Self {
        let rows = (BLOCK_ELEMENTS / cols.max(1)).clamp(BLOCK_ROWS_MIN, BLOCK_ROWS_MAX);
        let x_q = if both { vec![0.0; rows * cols] } else { Vec::new() };
        Self { rows, cols, x_fp: vec![0.0; rows * cols], x_q }
    }
}

/// Means of a layer's uses together (one use, for all but shared weights), one per group, sample rows included.
///
/// # Errors
/// `Internal` if the uses are not of one form.
pub fn means(uses: &[Arc<LayerStatistics>]) -> Result<Vec<GroupMeans>, ExecError> {
    let Some(first) = uses.first() else { return Ok(Vec::new()) };
    let Form { cols, groups, .. } = first.form;
    let rows = 0..cols * groups;
    let slices: Result<Vec<UseSlice>, ExecError> = uses.iter().map(|one| one.slice(rows.clone())).collect();
    let slice = SumSlice { cols, rows, uses: slices? }.means()?;
    let mut whole = LayerMeans::new(cols, groups);
    whole.place(Arc::new(slice))?;
    whole.complete(1)?;
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
