//! The range with the smallest squared rounding error (arXiv:2004.10568, section 5), optionally weighted by column.
//!
//! Method: about 80 clip fractions of the min-max range, a finer search around the best one, for asymmetric grids one
//! of each end alone, then least squares: for fixed integers `k` the best scale is `sum w k / sum k^2`, which cannot
//! raise the error and is repeated while it helps. Passes per grid: about 95 (symmetric) or 130 (asymmetric).
//! The loops have no branches and no calls, so that they compile to vector code, on x86-64 for the level that the machine has.
//! Limit: from 5 bits on, a short row's error is a jagged function of the scale and a denser scan can find up to
//! 1.4 times less; up to 4 bits the search is within 1 % of one (`mse_search_is_close_to_a_dense_scan`).
//! Not here: output error, which needs activations; that is the solver's objective.

use crate::range::{Cell, Entry, Integers, usable};

/// Clip fractions are multiples of 1/COARSE, from FRACTION_MIN/COARSE on: a 2-bit grid of a long row is best at a
/// fifth of its range or less.
const COARSE: u32 = 80;
const FRACTION_MIN: u32 = 4;
/// Steps on either side of the best coarse fraction.
const FINE: i32 = 4;
/// Least-squares rounds at most; the error usually stops falling after two.
const FITS_MAX: usize = 6;
/// Elements per f32 partial sum: small enough for 24 bits, large enough to hide the reduction.
const BLOCK: usize = 1024;
const LANES: usize = 16;
/// Adding and subtracting 1.5 * 2^23 rounds half to even for |t| <= 2^22; levels are within 2^16.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Searches the grid of one cell whose weights span `lo..=hi` (which includes 0 and more). Never worse than min-max.
///
/// Compiled for several levels of vector instructions; each computes the same bits, since nothing is fused or reordered.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2", "x86_64+avx2"))]
pub(crate) fn search(integers: Integers, cell: Cell<'_>, lo: f32, hi: f32) -> Entry {
    let (lo, hi) = (f64::from(lo), f64::from(hi));
    let mut best = Best::new(integers, cell, integers.covering(lo, hi));
    let mut ends = best.shrink(lo, hi, Ends::Both);
    if !integers.scheme.is_symmetric() {
        for moving in [Ends::Low, Ends::High] {
            ends = best.shrink(ends.0, ends.1, moving);
        }
    }
    best.fit();
    best.entry
}

/// Which ends of the range a shrinking search moves.
#[derive(Clone, Copy, PartialEq)]
enum Ends {
    Both,
    Low,
    High,
}

/// The best entry so far.
struct Best<'a> {
    integers: Integers,
    cell: Cell<'a>,
    entry: Entry,
    error: f64,
}

impl<'a> Best<'a> {
    #[inline(always)]
    fn new(integers: Integers, cell: Cell<'a>, entry: Entry) -> Self {
        Self { integers, cell, entry, error: error(integers, cell, entry) }
    }

    /// Takes `entry` if it is strictly better; ties keep the earlier one.
    #[inline(always)]
    fn offer(&mut self, entry: Entry) -> bool {
        let error = error(self.integers, self.cell, entry);
        let better = error < self.error;
        if better {
            (self.entry, self.error) = (entry, error);
        }
        better
    }

    /// Tries fractions of `lo..=hi`, coarse then fine; returns the ends of the best one.
    #[inline(always)]
    fn shrink(&mut self, lo: f64, hi: f64, moving: Ends) -> (f64, f64) {
        let ends = |f: f64| match moving {
            Ends::Both => (lo * f, hi * f),
            Ends::Low => (lo * f, hi),
            Ends::High => (lo, hi * f),
        };
        // One end alone moves little once both were searched together.
        let (first, step) = if moving == Ends::Both { (FRACTION_MIN, 1) } else { (COARSE / 2, 3) };
        let mut fraction = 1.0;
        for f in (first..COARSE).step_by(step).map(|i| f64::from(i) / f64::from(COARSE)) {
            let (lo, hi) = ends(f);
            if self.offer(self.integers.covering(lo, hi)) {
                fraction = f;
            }
        }
        let fine_step = step as f64 / (f64::from(COARSE) * f64::from(FINE + 1));
        let centre = fraction;
        for f in (-FINE..=FINE).filter(|&i| i != 0).map(|i| centre + f64::from(i) * fine_step) {
            let (lo, hi) = ends(f);
            if self.offer(self.integers.covering(lo, hi)) {
                fraction = f;
            }
        }
        ends(fraction)
    }

    /// Alternates between nearest integers and the least-squares scale for them, as long as the error falls.
    #[inline(always)]
    fn fit(&mut self) {
        for _ in 0..FITS_MAX {
            let [tk, kk] = products(self.integers, self.cell, self.entry);
            let scale = usable(f64::from(self.entry.scale) * tk / kk);
            if !(tk > 0.0 && kk > 0.0 && self.offer(Entry { scale, ..self.entry })) {
                return;
            }
        }
    }
}

/// Values side by side, one of each lane.
type Vector = [f32; LANES];

/// What is summed over a cell. No closures: they would be compiled for the lowest level.
trait Terms<const N: usize> {
    /// Of weights `t` in units of the scale, with levels from `lo` to `hi`, and their importance.
    fn of(t: &Vector, importance: &Vector, lo: f32, hi: f32) -> [Vector; N];
}

/// Squared distance to the nearest level.
struct Squares;

impl Terms<1> for Squares {
    #[inline(always)]
    fn of(t: &Vector, importance: &Vector, lo: f32, hi: f32) -> [Vector; 1] {
        let mut squares = [0.0; LANES];
        for lane in 0..LANES {
            let e = nearest_level(t[lane], lo, hi) - t[lane];
            squares[lane] = importance[lane] * e * e;
        }
        [squares]
    }
}

/// `t k` and `k^2` of the nearest levels `k`.
struct Levels;

impl Terms<2> for Levels {
    #[inline(always)]
    fn of(t: &Vector, importance: &Vector, lo: f32, hi: f32) -> [Vector; 2] {
        let mut products = [[0.0; LANES]; 2];
        for lane in 0..LANES {
            let k = nearest_level(t[lane], lo, hi);
            products[0][lane] = importance[lane] * t[lane] * k;
            products[1][lane] = importance[lane] * k * k;
        }
        products
    }
}

/// Weighted squared error of nearest rounding on `entry`.
#[inline(always)]
pub(crate) fn error(integers: Integers, cell: Cell<'_>, entry: Entry) -> f64 {
    let [units] = accumulate::<1, Squares>(cell, entry.scale, integers.levels(entry.zero_point));
    // Summed in units of the scale so that tiny weights do not underflow.
    units * f64::from(entry.scale).powi(2)
}

/// `[sum t k, sum k^2]` of weights `t` in units of the scale and their nearest levels `k`.
#[inline(always)]
fn products(integers: Integers, cell: Cell<'_>, entry: Entry) -> [f64; 2] {
    accumulate::<2, Levels>(cell, entry.scale, integers.levels(entry.zero_point))
}

/// `t` rounded half to even, within integers `lo..=hi` of at most 2^22 in magnitude. `t` is a number.
///
/// Clamped first, which gives the same: then rounding needs no call, and a loop no branch.
#[inline(always)]
pub fn nearest_level(t: f32, lo: f32, hi: f32) -> f32 {
    // Comparisons instead of f32::max/min: one instruction each, and there is no NaN here.
    let t = if t > lo { t } else { lo };
    let t = if t < hi { t } else { hi };
    (t + ROUND) - ROUND
}

/// Sums terms over the cell: f32 lanes within a block, f64 across blocks, in fixed order.
#[inline(always)]
fn accumulate<const N: usize, T: Terms<N>>(cell: Cell<'_>, scale: f32, (lo, hi): (f32, f32)) -> [f64; N] {
    let (reciprocal, mut total) = (scale.recip(), [0.0; N]);
    match cell.importance {
        None => {
            for block in cell.w.chunks(BLOCK) {
                add_block::<N, T>(&mut total, block, &[1.0; BLOCK], (reciprocal, lo, hi));
            }
        }
        Some(importance) => {
            for line in cell.w.chunks(cell.width) {
                for (block, weights) in line.chunks(BLOCK).zip(importance.chunks(BLOCK)) {
                    add_block::<N, T>(&mut total, block, weights, (reciprocal, lo, hi));
                }
            }
        }
    }
    total
}

/// `importance` has at least as many values as the block.
#[inline(always)]
fn add_block<const N: usize, T: Terms<N>>(
    total: &mut [f64; N],
    block: &[f32],
    importance: &[f32],
    (reciprocal, lo, hi): (f32, f32, f32),
) {
    let mut lanes = [[0.0; LANES]; N];
    let (whole, rest) = block.as_chunks::<LANES>();
    let (of_whole, of_rest) = importance.split_at(whole.len() * LANES);
    for (w, importance) in whole.iter().zip(of_whole.as_chunks::<LANES>().0) {
        add::<N, T>(&mut lanes, w, importance, (reciprocal, lo, hi));
    }
    if !rest.is_empty() {
        // What is missing has no importance: it adds 0.
        let mut last = [[0.0; LANES]; 2];
        last[0][..rest.len()].copy_from_slice(rest);
        last[1][..rest.len()].copy_from_slice(&of_rest[..rest.len()]);
        add::<N, T>(&mut lanes, &last[0], &last[1], (reciprocal, lo, hi));
    }
    for n in 0..N {
        total[n] += sum(&lanes[n]);
    }
}

#[inline(always)]
fn add<const N: usize, T: Terms<N>>(
    lanes: &mut [Vector; N],
    w: &Vector,
    importance: &Vector,
    (reciprocal, lo, hi): (f32, f32, f32),
) {
    let mut t = [0.0; LANES];
    for lane in 0..LANES {
        t[lane] = w[lane] * reciprocal;
    }
    let terms = T::of(&t, importance, lo, hi);
    for n in 0..N {
        for lane in 0..LANES {
            lanes[n][lane] += terms[n][lane];
        }
    }
}

/// The lanes' sum in f64, halves onto halves. A call: inlined, its pairs decide how wide the loops before it are compiled.
#[inline(never)]
fn sum(lanes: &Vector) -> f64 {
    let mut wide = [0.0; LANES];
    for lane in 0..LANES {
        wide[lane] = f64::from(lanes[lane]);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            wide[lane] += wide[lane + width];
        }
        width /= 2;
    }
    wide[0]
}
