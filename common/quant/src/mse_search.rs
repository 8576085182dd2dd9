//! The range with the smallest squared rounding error (arXiv:2004.10568, section 5), optionally weighted by column.
//!
//! Method: about 80 clip fractions of the min-max range, a finer search around the best one, for asymmetric grids one
//! of each end alone, then least squares: for fixed integers `k` the best scale is `sum w k / sum k^2`, which cannot
//! raise the error and is repeated while it helps. Passes per grid: about 95 (symmetric) or 130 (asymmetric).
//! The loops have no branches and no calls, so that they compile to vector code on any x86-64 or aarch64.
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
    fn new(integers: Integers, cell: Cell<'a>, entry: Entry) -> Self {
        Self { integers, cell, entry, error: error(integers, cell, entry) }
    }

    /// Takes `entry` if it is strictly better; ties keep the earlier one.
    fn offer(&mut self, entry: Entry) -> bool {
        let error = error(self.integers, self.cell, entry);
        let better = error < self.error;
        if better {
            (self.entry, self.error) = (entry, error);
        }
        better
    }

    /// Tries fractions of `lo..=hi`, coarse then fine; returns the ends of the best one.
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

/// Weighted squared error of nearest rounding on `entry`.
pub(crate) fn error(integers: Integers, cell: Cell<'_>, entry: Entry) -> f64 {
    let (lo, hi) = integers.levels(entry.zero_point);
    let [units] = accumulate(cell, entry.scale.recip(), |t, weight| {
        let e = nearest_level(t, lo, hi) - t;
        [weight * e * e]
    });
    // Summed in units of the scale so that tiny weights do not underflow.
    units * f64::from(entry.scale).powi(2)
}

/// `[sum t k, sum k^2]` of weights `t` in units of the scale and their nearest levels `k`.
fn products(integers: Integers, cell: Cell<'_>, entry: Entry) -> [f64; 2] {
    let (lo, hi) = integers.levels(entry.zero_point);
    accumulate(cell, entry.scale.recip(), |t, weight| {
        let k = nearest_level(t, lo, hi);
        [weight * t * k, weight * k * k]
    })
}

#[inline(always)]
fn nearest_level(t: f32, lo: f32, hi: f32) -> f32 {
    // Comparisons instead of f32::max/min: one instruction each, and there is no NaN here.
    let t = if t > lo { t } else { lo };
    let t = if t < hi { t } else { hi };
    (t + ROUND) - ROUND
}

/// Sums `term(w / scale, importance)` over the cell: f32 lanes within a block, f64 across blocks, in fixed order.
#[inline(always)]
fn accumulate<const N: usize>(
    cell: Cell<'_>,
    reciprocal: f32,
    term: impl Fn(f32, f32) -> [f32; N] + Copy,
) -> [f64; N] {
    let mut total = [0.0; N];
    match cell.importance {
        None => {
            for block in cell.w.chunks(BLOCK) {
                add_block(&mut total, block, |_, w| term(w * reciprocal, 1.0));
            }
        }
        Some(importance) => {
            for line in cell.w.chunks(cell.width) {
                for (block, weights) in line.chunks(BLOCK).zip(importance.chunks(BLOCK)) {
                    let weights = &weights[..block.len()];
                    add_block(&mut total, block, |i, w| term(w * reciprocal, weights[i]));
                }
            }
        }
    }
    total
}

#[inline(always)]
fn add_block<const N: usize>(total: &mut [f64; N], block: &[f32], term: impl Fn(usize, f32) -> [f32; N]) {
    let mut lanes = [[0.0_f32; LANES]; N];
    let whole = block.len() - block.len() % LANES;
    for start in (0..whole).step_by(LANES) {
        let chunk = &block[start..start + LANES];
        for lane in 0..LANES {
            let values = term(start + lane, chunk[lane]);
            for n in 0..N {
                lanes[n][lane] += values[n];
            }
        }
    }
    for (lane, &w) in block[whole..].iter().enumerate() {
        let values = term(whole + lane, w);
        for n in 0..N {
            lanes[n][lane] += values[n];
        }
    }
    for n in 0..N {
        total[n] += lanes[n].iter().map(|&v| f64::from(v)).sum::<f64>();
    }
}
