//! Statistics on a CUDA device against sums in integers and in f64, where there is one; elsewhere each test says why it was
//! skipped.
//!
//! `HALFSTEP_CUDA_LIBRARIES` names folders of CUDA's libraries, as for the binary. Random data comes from seeds that the
//! shape determines. Not here: the kernels without a device (`cuda_statistics_kernels`), which shards there are (`exec`).

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]
#![expect(clippy::print_stdout, reason = "says why a test was skipped")]

mod device;

use std::sync::Arc;

use device::{cuda, is_fake};
use halfstep_compute::DeviceError;
use halfstep_compute::cuda::{
    Cuda, CudaPlace, CudaProducts, CudaSums, Factors, GramShape, RowDigits, RowStaging, ShardGrams,
};
use halfstep_compute::decoder::{Lane, Place};
use halfstep_compute::random::Stream;

/// Sums of a few thousand products below 1, in blocks of 2048, by any order: relative to the root of their number.
const SUM_TOLERANCE: f64 = 2e-6;

/// One shard's rows, group by group, on both streams; the quantized one is used where the shape has two.
struct Shard {
    shape: GramShape,
    rows: usize,
    x: Vec<Vec<f32>>,
    q: Vec<Vec<f32>>,
}

impl Shard {
    fn new(shape: GramShape, rows: usize, seed: u64, mut value: impl FnMut(&mut Stream) -> f32) -> Self {
        let mut stream = Stream::new(seed, (shape.cols * 8 + shape.groups) as u64, rows as u32);
        let mut all = || -> Vec<Vec<f32>> {
            let group = |_| (0..rows * shape.cols).map(|_| value(&mut stream)).collect();
            (0..shape.groups).map(group).collect()
        };
        let (x, q) = (all(), all());
        Self { shape, rows, x, q }
    }

    /// Small integers: every sum is exact, whatever the order.
    fn integers(shape: GramShape, rows: usize, seed: u64) -> Self {
        Self::new(shape, rows, seed, |stream| stream.index(15) as f32 - 7.0)
    }

    /// Rows are given in pieces of `piece`, cut into `parts` strips.
    fn sum(
        &self,
        lane: &Cuda,
        staging: &mut RowStaging,
        digits: RowDigits,
        (piece, parts): (usize, Option<usize>),
        factors: &Factors,
    ) -> Result<(CudaProducts, f64), DeviceError> {
        let mut grams = ShardGrams::new(lane, staging, self.shape, digits, self.rows)?;
        if let Some(parts) = parts {
            grams = grams.cut_into(parts);
        }
        for (x, q) in self.x.iter().zip(&self.q) {
            let len = (piece * self.shape.cols).max(1);
            for (x, q) in x.chunks(len).zip(q.chunks(len)) {
                grams.add(x, self.shape.cross.then_some(q))?;
            }
            grams.end_group()?;
        }
        grams.finish(factors)
    }

    /// H, C and G of all groups in f64: `[groups, cols, cols]` each.
    fn exact(&self) -> Vec<Vec<f64>> {
        let k = self.shape.cols;
        let product = |a: &[Vec<f32>], b: &[Vec<f32>]| -> Vec<f64> {
            let of_group = |(a, b): (&Vec<f32>, &Vec<f32>)| {
                let mut sums = vec![0.0; k * k];
                for (a, b) in a.chunks(k.max(1)).zip(b.chunks(k.max(1))) {
                    for (sums, a) in sums.chunks_mut(k).zip(a) {
                        sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += f64::from(*a) * f64::from(*b));
                    }
                }
                sums
            };
            a.iter().zip(b).flat_map(of_group).collect()
        };
        match self.shape.cross {
            true => vec![product(&self.q, &self.q), product(&self.x, &self.q), product(&self.x, &self.x)],
            false => vec![product(&self.x, &self.x)],
        }
    }
}

/// What is kept of rows `rows` of `[groups, k, k]`: all of C, the lower triangles of H and G.
fn kept<T: Copy>(matrices: &[Vec<T>], k: usize, rows: std::ops::Range<usize>) -> Vec<T> {
    let row = |number: usize, all: &[T], row: usize| -> Vec<T> {
        let width = if number == 1 { k } else { row % k + 1 };
        all[row * k..row * k + width].to_vec()
    };
    let numbered = matrices.iter().enumerate();
    numbered.flat_map(|(number, all)| rows.clone().flat_map(move |at| row(number, all, at))).collect()
}

fn scaled(matrices: &[Vec<f64>], factors: &Factors) -> Vec<Vec<f64>> {
    let each = matrices.iter().zip(factors);
    each.map(|(all, factor)| all.iter().map(|sum| sum * factor).collect()).collect()
}

fn shape(cols: usize, groups: usize, cross: bool) -> GramShape {
    GramShape { cols, groups, cross }
}

const SHAPES: [(usize, usize); 8] =
    [(1, 1), (3, 2), (31, 1), (33, 3), (128, 1), (257, 1), (400, 2), (2048, 1)];
const FACTORS: Factors = [1024.0, 0.25, 2.0];

fn kept_rows(sums: &CudaSums, rows: std::ops::Range<usize>) -> Result<Vec<i64>, DeviceError> {
    let mut all = Vec::new();
    sums.rows(rows, &mut |part| all.extend_from_slice(part))?;
    Ok(all)
}

#[test]
fn sums_over_shards_are_the_integers_of_the_definition() {
    let Some(lane) = cuda() else { return };
    let (home, mut staging) = (Arc::new(lane.lane().unwrap()), lane.staging().unwrap());
    for (cols, groups) in SHAPES {
        for (cross, digits) in [(true, RowDigits::Bf16), (false, RowDigits::F32), (true, RowDigits::Tf32)] {
            if is_fake(&lane) && cols > 1000 && digits != RowDigits::Bf16 {
                continue;
            }
            let shape = shape(cols, groups, cross);
            let mut sums = CudaSums::new(Arc::clone(&home), shape).unwrap();
            let total = cols * groups;
            assert!(kept_rows(&sums, 0..total).unwrap().iter().all(|sum| *sum == 0));
            let mut expected: Vec<i64> = Vec::new();
            for (seed, rows) in [(1, 40), (2, 0), (3, 2049)] {
                // An f64 sum of this many squares of wide rows would take the test's time.
                let rows = if cols > 256 { rows.min(70) } else { rows };
                let shard = Shard::integers(shape, rows, seed);
                let (products, worst) =
                    shard.sum(&lane, &mut staging, digits, (600, None), &FACTORS).unwrap();
                let scaled = kept(&scaled(&shard.exact(), &FACTORS), cols, 0..total);
                let largest = scaled.iter().fold(0f64, |most, sum| most.max(sum.abs()));
                assert_eq!(worst, largest, "[{rows}, {cols}] x {groups}");
                sums.add(&products, &FACTORS).unwrap();
                expected.resize(scaled.len(), 0);
                expected.iter_mut().zip(scaled).for_each(|(sum, value)| *sum += value.round() as i64);
            }
            let what = format!("{cols} columns, {groups} groups, two streams {cross}, {digits:?}");
            assert!(kept_rows(&sums, 0..total).unwrap() == expected, "{what}");
            // Any part of the rows, over the edges of groups too.
            for rows in [0..1, total / 2..total, total / 3..total.div_ceil(2), total..total] {
                let parts: Vec<i64> = kept_rows(&sums, rows.clone()).unwrap();
                let mut all = expected.as_slice();
                let mut want = Vec::new();
                for lower in if cross { &[true, false, true][..] } else { &[true] } {
                    let entries = |rows: std::ops::Range<usize>| -> usize {
                        rows.map(|row| if *lower { row % cols + 1 } else { cols }).sum()
                    };
                    let (mine, others) = all.split_at(entries(0..total));
                    want.extend_from_slice(&mine[entries(0..rows.start)..entries(0..rows.end)]);
                    all = others;
                }
                assert_eq!(parts, want, "{what}, rows {rows:?}");
            }
            assert!(matches!(kept_rows(&sums, 0..total + 1), Err(DeviceError::Length { .. })));
            assert!(kept_rows(&sums, total..total - 1).is_err());
        }
    }
}

#[test]
fn real_numbers_are_summed_to_the_last_digits_of_f32_and_products_can_be_fetched() {
    let Some(lane) = cuda() else { return };
    let mut staging = lane.staging().unwrap();
    let bf16 = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
    for (cols, rows) in [(100, 3000), (515, 100), (2048, 60)] {
        if is_fake(&lane) && cols > 1000 {
            continue;
        }
        for digits in [RowDigits::Bf16, RowDigits::Tf32, RowDigits::F32] {
            let value = |stream: &mut Stream| {
                let value = stream.unit_f32() * 2.0 - 1.0;
                if digits == RowDigits::F32 { value } else { bf16(value) }
            };
            let shard = Shard::new(shape(cols, 1, true), rows, 5, value);
            let (products, _) = shard.sum(&lane, &mut staging, digits, (rows, None), &[1.0; 3]).unwrap();
            let other = lane.lane().unwrap();
            let found = products.download(&other).unwrap();
            for (number, (found, exact)) in found.iter().zip(shard.exact()).enumerate() {
                for (at, (found, exact)) in found.iter().zip(exact).enumerate() {
                    let (row, column) = (at / cols, at % cols);
                    let error = (f64::from(*found) - exact).abs();
                    let allowed = SUM_TOLERANCE * (rows as f64).sqrt() * (1.0 + exact.abs() / 10.0);
                    assert!(
                        error <= allowed || (number != 1 && column > row),
                        "{digits:?} [{rows}, {cols}], matrix {number} at {row}, {column}: {found}, expected {exact}"
                    );
                }
            }
        }
    }
}

/// The bits of all that is kept.
fn bits(lane: &Cuda, products: &CudaProducts) -> Vec<u32> {
    let shape = products.shape();
    let all = products.download(lane).unwrap();
    kept(&all, shape.cols, 0..shape.cols * shape.groups).into_iter().map(f32::to_bits).collect()
}

#[test]
fn neither_pieces_nor_lanes_nor_neighbours_change_a_bit() {
    let Some(lane) = cuda() else { return };
    for (cols, groups, rows, digits) in [
        (2048, 1, 2500, RowDigits::F32),
        (1024, 1, 5000, RowDigits::Tf32),
        (100, 3, 2100, RowDigits::F32),
        (2048, 1, 2500, RowDigits::Bf16),
    ] {
        if is_fake(&lane) && cols > 1000 {
            continue;
        }
        let value = |stream: &mut Stream| f32::from_bits((stream.unit_f32() - 0.5).to_bits() & 0xffff_0000);
        let shard = Shard::new(shape(cols, groups, true), rows, 9, value);
        let once = |lane: &Cuda, piece: usize| {
            let mut staging = lane.staging().unwrap();
            let found = shard.sum(lane, &mut staging, digits, (piece, None), &[1.0; 3]);
            bits(lane, &found.unwrap().0)
        };
        let expected = once(&lane, rows);
        for piece in [1 + rows / 7, 2047, 64] {
            assert!(once(&lane, piece) == expected, "{digits:?} [{rows}, {cols}] in pieces of {piece}");
        }
        let lanes: Vec<Cuda> = (0..4).map(|_| lane.lane().unwrap()).collect();
        let found: Vec<Vec<u32>> = std::thread::scope(|scope| {
            let threads: Vec<_> = lanes.iter().map(|lane| scope.spawn(|| once(lane, 500))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(found.iter().all(|found| *found == expected), "{digits:?} [{rows}, {cols}] side by side");
    }
}

#[test]
fn every_cut_of_a_triangle_gives_the_same_integers() {
    let Some(lane) = cuda() else { return };
    let mut staging = lane.staging().unwrap();
    for (cols, digits) in
        [(64, RowDigits::F32), (192, RowDigits::Bf16), (1536, RowDigits::Bf16), (2304, RowDigits::Tf32)]
    {
        if is_fake(&lane) && cols > 1000 {
            continue;
        }
        let shard = Shard::integers(shape(cols, 1, true), 200, 3);
        let mut once = |parts| {
            let found = shard.sum(&lane, &mut staging, digits, (200, parts), &[1.0; 3]);
            bits(&lane, &found.unwrap().0)
        };
        let expected = once(Some(1));
        for parts in [None, Some(2), Some(4), Some(8)] {
            assert!(once(parts) == expected, "{cols} columns in {parts:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_the_lane_goes_on() {
    let Some(lane) = cuda() else { return };
    let mut staging = lane.staging().unwrap();
    let two = shape(4, 2, true);
    let refused = |staging: &mut RowStaging, act: &dyn Fn(&mut ShardGrams<'_>) -> Result<(), DeviceError>| {
        let mut grams = ShardGrams::new(&lane, staging, two, RowDigits::Bf16, 2).unwrap();
        act(&mut grams).unwrap_err().to_string()
    };
    let text = refused(&mut staging, &|grams| grams.add(&[1.0; 4], None));
    assert!(text.ends_with("statistics: rows of 1 streams, expected 2"), "{text}");
    let text = refused(&mut staging, &|grams| grams.add(&[1.0; 4], Some(&[1.0; 8])));
    assert!(text.starts_with("statistics rows: buffer too short"), "{text}");
    let text = refused(&mut staging, &|grams| grams.add(&[1.0; 6], Some(&[1.0; 6])));
    assert!(text.starts_with("statistics rows: buffer too short"), "{text}");
    let text = refused(&mut staging, &|grams| grams.add(&[1.0; 12], Some(&[1.0; 12])));
    assert!(text.starts_with("statistics block: buffer too short, expected at least 12"), "{text}");
    let text = refused(&mut staging, &|grams| grams.add(&[1.0, 1.0, 0.1, 1.0], Some(&[1.0; 4])));
    assert!(text.contains("a value is no bfloat16"), "{text}");
    let text = refused(&mut staging, &|grams| (0..3).try_for_each(|_| grams.end_group()));
    assert!(text.starts_with("statistics group: index 2"), "{text}");
    let grams = ShardGrams::new(&lane, &mut staging, two, RowDigits::Bf16, 2).unwrap();
    let error = grams.finish(&[1.0; 3]).unwrap_err();
    assert!(matches!(error, DeviceError::Index { operand: "statistics groups", index: 0, .. }), "{error}");

    let Err(error) = ShardGrams::new(&lane, &mut staging, shape(1 << 20, 4, true), RowDigits::F32, 8) else {
        panic!("12 TiB fit")
    };
    assert!(matches!(error, DeviceError::OutOfMemory { asked, .. } if asked > 1 << 40), "{error}");
    let other = Shard::integers(shape(5, 2, true), 3, 1);
    let (products, _) = other.sum(&lane, &mut staging, RowDigits::F32, (3, None), &[1.0; 3]).unwrap();
    let mut sums = CudaSums::new(Arc::new(lane.lane().unwrap()), two).unwrap();
    assert!(matches!(sums.add(&products, &[1.0; 3]), Err(DeviceError::Length { .. })));
    assert!(
        kept_rows(&sums, 0..8).unwrap().iter().all(|sum| *sum == 0),
        "what was refused is not in the sums"
    );
}

#[test]
fn numbers_that_are_none_or_beyond_the_bound_show_in_the_worst() {
    let Some(lane) = cuda() else { return };
    let mut staging = lane.staging().unwrap();
    for (bad, digits) in
        [(f32::NAN, RowDigits::F32), (f32::INFINITY, RowDigits::Bf16), (1e25, RowDigits::F32)]
    {
        let mut shard = Shard::integers(shape(300, 1, false), 50, 1);
        shard.x[0][7 * 300 + 11] = bad;
        let (_, worst) = shard.sum(&lane, &mut staging, digits, (50, None), &[1.0; 3]).unwrap();
        assert!(!worst.is_finite() || worst > 1e30, "{bad}: {worst}");
    }
}

#[test]
fn rows_that_stayed_on_the_device_give_the_products_of_rows_sent_there() {
    let Some(cuda) = device::cuda() else { return };
    let place = CudaPlace::new([&cuda]).unwrap();
    place.let_stay((1, 2)).unwrap();
    let (lane, elsewhere) = (cuda.lane().unwrap(), cuda.lane().unwrap());
    let (mut staging, mut other) = (lane.staging().unwrap(), elsewhere.staging().unwrap());
    for (cols, cross) in [(1, true), (31, false), (64, true), (33, true)] {
        for rows in [1, 7, 2048, 2049, 5000] {
            let two = shape(cols, 1, cross);
            let shard = Shard::integers(two, rows, 77);
            let stay = |values: &[f32]| {
                let stays = place.with(|_, there| {
                    let array = there.given(values)?;
                    there.stay(&array, values.len())
                });
                stays.unwrap().unwrap()
            };
            let (x, q) = (stay(&shard.x[0]), stay(&shard.q[0]));
            let mut grams = ShardGrams::new(&lane, &mut staging, two, RowDigits::Bf16, rows).unwrap();
            grams.add_staying(&x, cross.then_some(&q)).unwrap();
            grams.end_group().unwrap();
            let got = grams.finish(&FACTORS).unwrap();
            let want = shard.sum(&elsewhere, &mut other, RowDigits::Bf16, (rows, None), &FACTORS).unwrap();
            assert_eq!(got.1, want.1, "{cols} columns, {rows} rows");
            let kept = |products: &CudaProducts| kept(&products.download(&lane).unwrap(), cols, 0..cols);
            assert_eq!(kept(&got.0), kept(&want.0), "{cols} columns, {rows} rows");
        }
    }
    // Not every stream, not bfloat16, not whole rows.
    let one = place.with(|_, there| {
        let array = there.given(&[1.0; 6])?;
        there.stay(&array, 6)
    });
    let one = one.unwrap().unwrap();
    for (two, digits) in [
        (shape(3, 1, true), RowDigits::Bf16),
        (shape(3, 1, false), RowDigits::F32),
        (shape(4, 1, false), RowDigits::Bf16),
    ] {
        let mut grams = ShardGrams::new(&lane, &mut staging, two, digits, 2).unwrap();
        assert!(grams.add_staying(&one, None).is_err(), "{two:?} {digits:?}");
    }
}
