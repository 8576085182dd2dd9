//! Matrices in half precision, brought into its range by powers of two: one for every row and every column.
//!
//! Errors `e` of a row and H are multiplied as `(s e Q) (Q^-1 H Q^-1) = s (e H) Q^-1` with Q near the roots of H's diagonal: then
//! neither a column of large inputs nor one of small ones leaves the range, and what is lost is one rounding to 11 bits; errors below
//! 2^-28 of their row's largest, and correlations below 2^-14, keep fewer.
//!
//! Twins of `cu/step.cu`, the same bits. Not here: the products, the step.

use half::f16;

/// Exponent that the largest error of a row is brought to.
const ROW_EXPONENT: i32 = 13;
/// Of an f32.
const EXPONENT_SHIFT: u32 = f32::MANTISSA_DIGITS - 1;
const BIAS: i32 = 127;

/// `2^exponent`, a normal number.
fn power(exponent: i32) -> f32 {
    f32::from_bits(((exponent + BIAS) as u32) << EXPONENT_SHIFT)
}

/// The exponent of a positive normal number.
fn exponent(x: f32) -> Option<i32> {
    (x.is_normal() && x > 0.0).then(|| (x.to_bits() >> EXPONENT_SHIFT) as i32 - BIAS)
}

/// `Q` of a matrix with this diagonal: powers of two next below the roots; 1 where there is none.
pub fn column_scales(diagonal: &[f32]) -> Vec<f32> {
    diagonal.iter().map(|square| exponent(square.sqrt()).map_or(1.0, power)).collect()
}

/// The power of two that brings a row's largest error, whatever is chosen, to `[2^13, 2^14)`; 1 if there is none. Errors lie between
/// `lo` and `lo + delta`; `by_column` is their other factor.
pub fn row_scale(lo: &[f32], delta: &[f32], by_column: &[f32]) -> f32 {
    let reach =
        lo.iter().zip(delta).zip(by_column).map(|((lo, delta), by)| lo.abs().max((lo + delta).abs()) * by);
    // By bits, so that an error that is not a number is the largest.
    let most = f32::from_bits(reach.map(f32::to_bits).max().unwrap_or(0));
    match exponent(most) {
        // Beyond, the scale itself would not be normal.
        Some(exponent) if exponent > 13 - BIAS => power(ROW_EXPONENT - exponent),
        _ => 1.0,
    }
}

/// A row times its scale and those of its columns, in half precision: to nearest, ties to even, at most the largest number.
pub fn scaled_halves(row: &[f32], scale: f32, by_column: &[f32]) -> Vec<u16> {
    let half = |(x, by): (&f32, &f32)| {
        let x = x * scale * by;
        f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())).to_bits()
    };
    row.iter().zip(by_column).map(half).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_powers_of_two_that_bring_what_they_scale_near_one_number() {
        let diagonal = [1e-12, 0.3, 1.0, 4.0, 1e12, 0.0, -1.0, f32::NAN, f32::INFINITY, f32::MAX, 1e-38];
        for (square, scale) in diagonal.iter().zip(column_scales(&diagonal)) {
            assert_eq!(scale.to_bits() & ((1 << EXPONENT_SHIFT) - 1), 0, "{square}: {scale}");
            if square.is_finite() && *square > 0.0 {
                assert!((1.0..4.0).contains(&(square / scale / scale)), "{square}: {scale}");
            } else {
                assert_eq!(scale, 1.0, "{square}");
            }
        }
        for (lo, delta, by) in [(-0.1, 0.3, 1.0), (-3e-20, 1e-21, 0.5), (5e20, 0.0, 64.0), (-1.0, 1.0, 1.0)] {
            let scale = row_scale(&[lo, 0.0], &[delta, 0.0], &[by, by]);
            let most = f32::max(lo.abs(), (lo + delta).abs()) * by * scale;
            assert!((8192.0..16384.0).contains(&most), "{lo} {delta} {by}: {scale}");
        }
        for none in [0.0, f32::NAN, f32::INFINITY, 1e-40] {
            assert_eq!(row_scale(&[none], &[0.0], &[1.0]), 1.0, "{none}");
        }
        assert_eq!(row_scale(&[], &[], &[]), 1.0);
    }

    #[test]
    fn halves_keep_eleven_bits_and_the_range() {
        let row = [1.0, -1.5, 1e9, -1e9, 3e-8, 2f32.powi(-24), f32::NAN];
        let halves = scaled_halves(&row, 1.0, &[1.0; 7]);
        let values: Vec<f32> = halves.iter().map(|half| f16::from_bits(*half).to_f32()).collect();
        assert_eq!(values[..4], [1.0, -1.5, 65504.0, -65504.0]);
        assert_eq!(values[4..6], [5.960_464_5e-8; 2]);
        assert!(values[6].is_nan());
    }
}
