//! Statistics of one layer, shard by shard: products of both streams' rows, checked and added to exact sums, rows of sums read.
//!
//! Rows come from the host's memory, as a node's do. bfloat16 rows are compared with the gradients' product, as no method of
//! a device multiplies others.
//! Not here: the `gram` method of devices (`times`), running the network that makes the rows.

use std::sync::Arc;
use std::time::Instant;

use halfstep_compute::cuda::{Cuda, CudaSums, GramShape, RowDigits, RowStaging, ShardGrams};
use halfstep_compute::random::Stream;
use halfstep_compute::{Cpu, DeviceError, cpu};

use crate::figures::Figures;
use crate::times::Floors;
use crate::{Asked, Timed};

/// `2^exponent` that keep any of these sums far from their bounds.
const FACTORS: [f64; 3] = [1024.0; 3];

/// A device that sums products of rows.
pub(crate) trait Sums: Timed {
    /// What a thread keeps from shard to shard.
    type Scratch: Send;
    /// Sums over shards.
    type Total;
    fn scratch(&self) -> Result<Self::Scratch, DeviceError>;
    fn total(&self, shape: GramShape) -> Result<Self::Total, DeviceError>;
    /// One shard, added to sums if there are any.
    fn shard(
        &self,
        scratch: &mut Self::Scratch,
        rows: &Rows,
        total: Option<&mut Self::Total>,
    ) -> Result<(), DeviceError>;
    /// Seconds of the products alone, of rows that are there; triangles cut into `parts`.
    fn products(&self, scratch: &mut Self::Scratch, rows: &Rows, parts: usize) -> Result<f64, DeviceError>;
    /// The integers of some rows of H, C and G.
    fn read(&self, total: &Self::Total, rows: std::ops::Range<usize>) -> Result<Vec<i64>, DeviceError>;
}

/// Rows of both streams.
pub(crate) struct Rows {
    shape: GramShape,
    digits: RowDigits,
    x: Vec<f32>,
    q: Vec<f32>,
}

impl Rows {
    fn new(cols: usize, rows: usize, digits: RowDigits) -> Self {
        let mut stream = Stream::new(1, cols as u64, rows as u32);
        let mut drawn = || -> Vec<f32> {
            // Drawing all would take longer than what is measured.
            let mask = if digits == RowDigits::Bf16 { 0xffff_0000 } else { u32::MAX };
            let some: Vec<f32> =
                (0..1 << 16).map(|_| f32::from_bits((stream.unit_f32() - 0.5).to_bits() & mask)).collect();
            some.iter().cycle().take(cols * rows).copied().collect()
        };
        let (x, q) = (drawn(), drawn());
        Self { shape: GramShape { cols, groups: 1, cross: true }, digits, x, q }
    }

    fn count(&self) -> usize {
        self.x.len() / self.shape.cols
    }

    /// H and G are triangles: together as much as C.
    fn flops(&self) -> f64 {
        4.0 * self.count() as f64 * (self.shape.cols * self.shape.cols) as f64
    }
}

impl Sums for Cpu {
    type Scratch = Vec<Vec<f32>>;
    type Total = Vec<i64>;

    fn scratch(&self) -> Result<Self::Scratch, DeviceError> {
        Ok(vec![Vec::new(); 3])
    }

    fn total(&self, shape: GramShape) -> Result<Vec<i64>, DeviceError> {
        Ok(vec![0; 3 * shape.cols * shape.cols])
    }

    fn shard(
        &self,
        scratch: &mut Vec<Vec<f32>>,
        rows: &Rows,
        total: Option<&mut Vec<i64>>,
    ) -> Result<(), DeviceError> {
        let k = rows.shape.cols;
        let n = rows.x.len() / k;
        for matrix in scratch.iter_mut() {
            matrix.clear();
            matrix.resize(k * k, 0.0);
        }
        cpu::gram_lower(&rows.q, n, k, &mut scratch[0]);
        cpu::cross_gram(&rows.x, &rows.q, n, k, &mut scratch[1]);
        cpu::gram_lower(&rows.x, n, k, &mut scratch[2]);
        if let Some(total) = total {
            for (sum, value) in total.iter_mut().zip(scratch.iter().flatten()) {
                *sum += (f64::from(*value) * FACTORS[0]).round() as i64;
            }
        }
        Ok(())
    }

    fn products(&self, scratch: &mut Vec<Vec<f32>>, rows: &Rows, _parts: usize) -> Result<f64, DeviceError> {
        best(|| self.shard(scratch, rows, None))
    }

    fn read(&self, total: &Vec<i64>, rows: std::ops::Range<usize>) -> Result<Vec<i64>, DeviceError> {
        Ok(total[rows].to_vec())
    }
}

impl Sums for Cuda {
    type Scratch = RowStaging;
    type Total = CudaSums;

    fn scratch(&self) -> Result<RowStaging, DeviceError> {
        self.staging()
    }

    fn total(&self, shape: GramShape) -> Result<CudaSums, DeviceError> {
        CudaSums::new(Arc::new(self.lane()?), shape)
    }

    fn shard(
        &self,
        scratch: &mut RowStaging,
        rows: &Rows,
        total: Option<&mut CudaSums>,
    ) -> Result<(), DeviceError> {
        let mut grams = ShardGrams::new(self, scratch, rows.shape, rows.digits, rows.count())?;
        grams.add(&rows.x, Some(&rows.q))?;
        grams.end_group()?;
        let (products, _) = grams.finish(&FACTORS)?;
        total.map_or(Ok(()), |total| total.add(&products, &FACTORS))
    }

    fn products(&self, scratch: &mut RowStaging, rows: &Rows, parts: usize) -> Result<f64, DeviceError> {
        const CALLS: u32 = 5;
        let mut grams =
            ShardGrams::new(self, scratch, rows.shape, rows.digits, rows.count())?.cut_into(parts);
        grams.add(&rows.x, Some(&rows.q))?;
        let seconds = best(|| {
            (0..CALLS).try_for_each(|_| grams.multiply_again(rows.count()))?;
            self.wait()
        })?;
        Ok(seconds / f64::from(CALLS))
    }

    fn read(&self, total: &CudaSums, rows: std::ops::Range<usize>) -> Result<Vec<i64>, DeviceError> {
        let mut all = Vec::new();
        total.rows(rows, &mut |part| all.extend_from_slice(part))?;
        Ok(all)
    }
}

/// The best of a few, in seconds.
fn best(mut call: impl FnMut() -> Result<(), DeviceError>) -> Result<f64, DeviceError> {
    call()?;
    let mut best = f64::INFINITY;
    let all = Instant::now();
    for _ in 0..10 {
        let begun = Instant::now();
        call()?;
        best = best.min(begun.elapsed().as_secs_f64());
        if all.elapsed().as_secs_f64() > 1.0 {
            break;
        }
    }
    Ok(best)
}

pub(crate) fn all<D: Sums>(
    device: &D,
    asked: &Asked,
    floors: Floors,
    figures: &mut Figures,
) -> Result<(), DeviceError> {
    let (tokens, widths, cuts): (usize, &[usize], &[usize]) = match asked.quick {
        true => (48, &[64], &[1, 4]),
        false => (2048, &[1024, 4096, 8192, 14336, 28672], &[1, 4, 8]),
    };
    for &cols in widths {
        for digits in [RowDigits::Bf16, RowDigits::Tf32, RowDigits::F32] {
            // The widest in all bits would be most of the time of all.
            if digits == RowDigits::F32 && cols > 8192 {
                continue;
            }
            one(device, &Rows::new(cols, tokens, digits), cuts, floors, figures)?;
        }
    }
    let cols = if asked.quick { 64 } else { 4096 };
    side_by_side(device, &Rows::new(cols, tokens, RowDigits::Bf16), figures)
}

fn one<D: Sums>(
    device: &D,
    rows: &Rows,
    cuts: &[usize],
    floors: Floors,
    figures: &mut Figures,
) -> Result<(), DeviceError> {
    let (cols, flops) = (rows.shape.cols, rows.flops());
    let (digits, floor, of) = match rows.digits {
        RowDigits::Bf16 => ("bf16", floors.rough, "gradients'"),
        RowDigits::Tf32 => ("tf32", floors.rough, "gradients'"),
        RowDigits::F32 => ("f32", floors.full, "all bits'"),
    };
    let name = format!("statistics of {cols}, {digits}");
    let mut scratch = device.scratch()?;
    for &parts in cuts {
        let seconds = device.products(&mut scratch, rows, parts)?;
        let rate = flops / seconds;
        let remark = format!(
            "{:.1} TFLOP/s that count, {:.0} % of the large product's, {of} digits",
            rate / 1e12,
            100.0 * rate / floor
        );
        figures.say(&format!("{name}: products, {parts} strips"), seconds * 1e3, "ms", &remark);
    }
    let mut total = device.total(rows.shape)?;
    for (what, sums) in [("a shard's products", false), ("a shard", true)] {
        let seconds = best(|| device.shard(&mut scratch, rows, sums.then_some(&mut total)))?;
        let remark =
            format!("{:.0} tokens/s, {:.1} TFLOP/s", rows.count() as f64 / seconds, flops / seconds / 1e12);
        figures.say(&format!("{name}: {what}"), seconds * 1e3, "ms", &remark);
    }
    let part = cols.div_ceil(8);
    let seconds = best(|| device.read(&total, cols - part..cols).map(drop))?;
    // The last eighth of the triangles' rows is nearly whole.
    let remark = format!("about {:.1} GB/s", 8.0 * 3.0 * (part * cols) as f64 / seconds / 1e9);
    figures.say(&format!("{name}: an eighth of the rows read"), seconds * 1e3, "ms", &remark);
    Ok(())
}

/// Shards of one layer on several lanes at once, added to sums by whoever has finished: what a node's threads do together.
fn side_by_side<D: Sums>(device: &D, rows: &Rows, figures: &mut Figures) -> Result<(), DeviceError> {
    let cols = rows.shape.cols;
    for lanes in [1, 4, 16] {
        let mut all = (0..lanes)
            .map(|_| {
                let lane = device.another()?;
                let scratch = lane.scratch()?;
                Ok((lane, scratch))
            })
            .collect::<Result<Vec<(D, D::Scratch)>, DeviceError>>()?;
        let shards = 8;
        let mut round = || {
            let begun = Instant::now();
            std::thread::scope(|scope| {
                let threads: Vec<_> = all
                    .iter_mut()
                    .map(|(lane, scratch)| {
                        scope.spawn(move || (0..shards).try_for_each(|_| lane.shard(scratch, rows, None)))
                    })
                    .collect();
                threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
            })?;
            Ok::<_, DeviceError>(begun.elapsed().as_secs_f64())
        };
        let seconds = round()?.min(round()?) / f64::from(shards * lanes);
        let (tokens, rate) = (rows.count() as f64 / seconds, rows.flops() / seconds / 1e12);
        let remark = format!("{tokens:.0} tokens/s, {rate:.1} TFLOP/s");
        let name = format!("products of {cols}, bf16, on {lanes} lanes, a shard");
        figures.say(&name, seconds * 1e3, "ms", &remark);
    }
    Ok(())
}
