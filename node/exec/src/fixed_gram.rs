//! Sums of products in fixed point: exact, so that shards may be added in any order and on any topology.
//!
//! A matrix of sums `sum x_i y_j` over at most `count` terms with `|x| <= peak_x`, `|y| <= peak_y` is kept as 64-bit
//! integers times `2^-exponent`; the exponent is the largest with `count * peak_x * peak_y * 2^exponent < 2^62`. One bit
//! is left for the rounding of the f32 sums that are added.
//! Not here: computing the sums (`compute`), agreeing on the peaks (`work`).

use crate::error::ExecError;
use std::ops::Range;

/// Which entries a matrix keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All `k * k`, row-major.
    Full,
    /// The lower triangle of a symmetric matrix, row by row: `k (k + 1) / 2`.
    Lower,
}

impl Part {
    fn entries(self, k: usize) -> usize {
        match self {
            Self::Full => k * k,
            Self::Lower => k * (k + 1) / 2,
        }
    }

    /// How many entries are kept of these rows of matrices `[k, k]` that lie one after the other.
    pub(crate) fn entries_of(self, rows: Range<usize>, k: usize) -> usize {
        let side = k.max(1);
        let kept = |rows: usize| match self {
            Self::Full => rows * k,
            Self::Lower => rows * (rows + 1) / 2,
        };
        let before = |row: usize| row / side * kept(k) + kept(row % side);
        before(rows.end.max(rows.start)) - before(rows.start)
    }

    /// How many entries of row `i` are kept, from column 0.
    pub(crate) fn width(self, row: usize, k: usize) -> usize {
        match self {
            Self::Full => k,
            Self::Lower => row + 1,
        }
    }
}

/// A `[k, k]` matrix of exact sums.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FixedGram {
    k: usize,
    part: Part,
    exponent: i32,
    sums: Vec<i64>,
}

/// The exponent for sums of `count` products of values bounded by the peaks; `None` unless the peaks are finite.
///
/// All-zero data (a peak of 0) has exponent 0.
pub fn exponent(count: u64, peak_x: f32, peak_y: f32) -> Option<i32> {
    if !peak_x.is_finite() || !peak_y.is_finite() {
        return None;
    }
    let bound = count as f64 * f64::from(peak_x.abs()) * f64::from(peak_y.abs());
    if bound == 0.0 {
        return Some(0);
    }
    // bound < 2^(floor(log2 bound) + 1), read off the float itself: `log2` may round up to the next integer.
    Some(61 - floor_log2(bound))
}

/// `floor(log2 x)` of a finite positive number.
fn floor_log2(x: f64) -> i32 {
    // The bound is a product of f32 magnitudes, at least 2^-298: never subnormal.
    ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023
}

/// `2^n`, for `|n|` up to 1022.
pub(crate) fn power_of_two(n: i32) -> f64 {
    f64::from_bits(((1023 + n.clamp(-1022, 1023)) as u64) << 52)
}

impl FixedGram {
    /// Zeros.
    pub fn new(k: usize, part: Part, exponent: i32) -> Self {
        Self { k, part, exponent, sums: vec![0; part.entries(k)] }
    }

    /// Width of the matrix.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The power of two of the fixed point.
    pub fn exponent(&self) -> i32 {
        self.exponent
    }

    /// The integers, in the order of the kept part.
    pub fn sums(&self) -> &[i64] {
        &self.sums
    }

    /// The kept entries of one row.
    pub(crate) fn row(&self, row: usize) -> &[i64] {
        let start = match self.part {
            Part::Full => row * self.k,
            Part::Lower => row * (row + 1) / 2,
        };
        &self.sums[start..start + self.part.width(row, self.k)]
    }

    /// Adds an f32 matrix `[k, k]`, each entry rounded to the fixed point. On an error nothing is added.
    ///
    /// # Errors
    /// `Internal` if the size differs or an entry breaks the bound the exponent was chosen for.
    pub fn add_f32(&mut self, matrix: &[f32]) -> Result<(), ExecError> {
        check_f32(self.k, self.part, self.exponent, matrix)?;
        self.add_checked(matrix);
        Ok(())
    }

    /// The same for a matrix that passed [`check_f32`].
    pub(crate) fn add_checked(&mut self, matrix: &[f32]) {
        // Adding 1.5 * 2^52 would round faster but only to 52 bits; the cast is exact and vectorises.
        let factor = power_of_two(self.exponent);
        let mut start = 0;
        for (row, values) in matrix.chunks_exact(self.k.max(1)).enumerate() {
            let width = self.part.width(row, self.k);
            for (sum, value) in self.sums[start..start + width].iter_mut().zip(values) {
                *sum = sum.wrapping_add(round(f64::from(*value) * factor));
            }
            start += width;
        }
    }

    /// Adds another matrix; exact.
    ///
    /// # Errors
    /// `Internal` if shape or exponent differ.
    pub fn merge(&mut self, other: &Self) -> Result<(), ExecError> {
        let form = |g: &Self| (g.k, g.part, g.exponent);
        if form(self) != form(other) {
            return Err(ExecError::Internal(format!(
                "fixed-point sums differ in form: {:?} and {:?}",
                form(self),
                form(other)
            )));
        }
        for (sum, value) in self.sums.iter_mut().zip(&other.sums) {
            *sum = sum.wrapping_add(*value);
        }
        Ok(())
    }

    /// Adds the sums as reals to `out: [k, k]`; a symmetric matrix fills both triangles.
    ///
    /// # Panics
    /// Never for `out` of `k * k` entries.
    pub fn add_to(&self, out: &mut [f64]) {
        let factor = power_of_two(-self.exponent);
        let mut start = 0;
        for row in 0..self.k {
            let width = self.part.width(row, self.k);
            for column in 0..width {
                let value = self.sums[start + column] as f64 * factor;
                out[row * self.k + column] += value;
                if self.part == Part::Lower && column != row {
                    out[column * self.k + row] += value;
                }
            }
            start += width;
        }
    }

    /// Sums divided by `count`, in f32; both triangles.
    pub fn to_mean_f32(&self, count: f64) -> Vec<f32> {
        let mut sums = vec![0.0; self.k * self.k];
        self.add_to(&mut sums);
        sums.iter().map(|sum| (sum / count) as f32).collect()
    }
}

/// Whether a matrix can be added to sums of this form.
///
/// # Errors
/// `Internal` if the size differs or a kept entry breaks the bound the exponent was chosen for.
pub(crate) fn check_f32(k: usize, part: Part, exponent: i32, matrix: &[f32]) -> Result<(), ExecError> {
    if matrix.len() != k * k {
        return Err(ExecError::Internal(format!(
            "fixed-point sum: expected {} entries, found {}",
            k * k,
            matrix.len()
        )));
    }
    let factor = power_of_two(exponent);
    let mut worst = 0.0f64;
    for (row, values) in matrix.chunks_exact(k.max(1)).enumerate() {
        for value in &values[..part.width(row, k)] {
            let scaled = (f64::from(*value) * factor).abs();
            // `max` drops a NaN; a NaN is not `<= limit` either way round, hence the explicit form.
            worst = if scaled <= worst { worst } else { scaled };
        }
    }
    if worst <= UNITS_MAX { Ok(()) } else { Err(too_large(worst)) }
}

/// The largest magnitude, in units of the fixed point, that may be added: 2^62.
pub(crate) const UNITS_MAX: f64 = (1u64 << 62) as f64;

/// A broken bound.
pub(crate) fn too_large(worst: f64) -> ExecError {
    ExecError::Internal(format!("fixed-point sum: an entry of {worst:e} units, expected at most 2^62"))
}

/// To the nearest integer. The sums' bits below 2^-11 of an f32 entry are zeros anyway, so ties are of no account.
fn round(x: f64) -> i64 {
    // An f32 times a power of two: beyond 2^53 already an integer, below it adding one half and truncating is exact.
    if x.abs() < 9_007_199_254_740_992.0 { (x + 0.5f64.copysign(x)) as i64 } else { x as i64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_exponent_is_the_largest_that_keeps_the_bound() {
        for (count, x, y) in [
            (1u64, 1.0f32, 1.0f32),
            (800_000, 6.0, 5.9),
            (3, 1e-38, 1e-38),
            (1 << 40, 3e38, 3e38),
            (7, 0.3, 1e-44),
        ] {
            let e = exponent(count, x, y).unwrap();
            let bound = |e: i32| count as f64 * f64::from(x) * f64::from(y) * 2f64.powi(e);
            assert!(bound(e) < 2f64.powi(62), "{count} {x} {y}: {e}");
            assert!(bound(e + 1) >= 2f64.powi(62), "{count} {x} {y}: {e} is not the largest");
        }
        assert_eq!(exponent(0, 1.0, 1.0), Some(0));
        assert_eq!(exponent(5, 0.0, 1.0), Some(0));
        assert_eq!(exponent(5, f32::INFINITY, 0.0), None);
        assert_eq!(exponent(5, 1.0, f32::NAN), None);
    }

    #[test]
    fn extreme_sums_neither_overflow_nor_vanish() {
        for peak in [1e-18f32, 1.0, 1e18] {
            let count = 1000;
            let mut gram = FixedGram::new(1, Part::Full, exponent(count, peak, peak).unwrap());
            for _ in 0..count {
                gram.add_f32(&[peak * peak]).unwrap();
            }
            let mean = gram.to_mean_f32(count as f64)[0];
            assert!((mean / (peak * peak) - 1.0).abs() < 1e-6, "{peak}: {mean}");
        }
    }

    #[test]
    fn a_broken_bound_or_a_nan_is_refused() {
        let mut gram = FixedGram::new(1, Part::Full, exponent(1, 1.0, 1.0).unwrap());
        assert!(gram.add_f32(&[4.1]).is_err());
        assert!(gram.add_f32(&[f32::NAN]).is_err());
        assert!(gram.add_f32(&[1.0, 2.0]).is_err());
        assert!(gram.merge(&FixedGram::new(1, Part::Full, 3)).is_err());
        assert!(gram.merge(&FixedGram::new(1, Part::Lower, gram.exponent())).is_err());
    }

    proptest! {
        #[test]
        fn any_split_and_order_of_shards_gives_the_same_integers(
            shards in proptest::collection::vec(proptest::collection::vec(-3.0f32..3.0, 9), 1..12),
            order in any::<prop::sample::Index>(),
            split in any::<prop::sample::Index>(),
            lower in any::<bool>(),
        ) {
            let part = if lower { Part::Lower } else { Part::Full };
            let empty = FixedGram::new(3, part, exponent(shards.len() as u64, 3.0, 1.0).unwrap());
            let sum = |shards: &[Vec<f32>]| {
                let mut gram = empty.clone();
                shards.iter().for_each(|s| gram.add_f32(s).unwrap());
                gram
            };
            let expected = sum(&shards);
            let mut rotated = shards.clone();
            rotated.rotate_left(order.index(shards.len()));
            rotated.reverse();
            let at = split.index(shards.len());
            let mut merged = sum(&rotated[at..]);
            merged.merge(&sum(&rotated[..at])).unwrap();
            prop_assert_eq!(&merged, &expected);

            let means = expected.to_mean_f32(1.0);
            for i in 0..3 {
                for j in 0..3 {
                    let kept = if lower && j > i { 3 * j + i } else { 3 * i + j };
                    let exact: f64 = shards.iter().map(|s| f64::from(s[kept])).sum();
                    prop_assert!((f64::from(means[3 * i + j]) - exact).abs() <= 1e-6 * exact.abs().max(1e-6));
                }
            }
        }
    }
}
