//! Elementary functions in f32 that a compiler can vectorise: no branches, no tables, no library calls.
//!
//! `FUSED` says whether multiply-add is one rounding (AVX2 and up) or two (baseline). Errors are measured against f64
//! in the tests below and stated on each function. Not here: activations and AdaRound's own functions.

use std::f32::consts::LOG2_E;

/// Adding it rounds an f32 of magnitude below 2^22 to an integer (to nearest, ties to even).
const ROUND: f32 = 12_582_912.0;

/// `a * b + c`, fused or not.
#[inline(always)]
pub(crate) fn fma<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// `x` limited to `[low, high]`; a NaN becomes `low`.
#[inline(always)]
pub(crate) fn limit(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    if x < high { x } else { high }
}

/// `2^x`, `x` limited to [-126, 126]. Relative error at most 2.5e-7.
///
/// Polynomial of degree 6 on [-1/2, 1/2] (Cephes `exp2f`), exponent added to the bits.
#[inline(always)]
pub(crate) fn exp2<const FUSED: bool>(x: f32) -> f32 {
    let x = limit(x, -126.0, 126.0);
    let shifted = x + ROUND;
    let whole = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let part = x - (shifted - ROUND);
    let mut p = 1.535_336_2e-4;
    p = fma::<FUSED>(p, part, 1.339_887_4e-3);
    p = fma::<FUSED>(p, part, 9.618_437e-3);
    p = fma::<FUSED>(p, part, 5.550_332_5e-2);
    p = fma::<FUSED>(p, part, 2.402_264_8e-1);
    p = fma::<FUSED>(p, part, 6.931_472e-1);
    p = fma::<FUSED>(p, part, 1.0);
    f32::from_bits(p.to_bits().wrapping_add(whole << 23))
}

/// `log2(x)` for normal positive `x`. Absolute error at most 3e-7 * max(1, |log2 x|).
///
/// Mantissa in [sqrt(1/2), sqrt(2)), then the polynomial of Cephes `logf`.
#[inline(always)]
pub(crate) fn log2<const FUSED: bool>(x: f32) -> f32 {
    const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
    let bits = x.to_bits();
    let exponent = (bits.wrapping_sub(SQRT_HALF_BITS) as i32) >> 23;
    let mantissa = f32::from_bits(bits.wrapping_sub((exponent << 23) as u32));
    let t = mantissa - 1.0;
    let mut p = 7.037_683_6e-2;
    p = fma::<FUSED>(p, t, -1.151_461e-1);
    p = fma::<FUSED>(p, t, 1.167_699_9e-1);
    p = fma::<FUSED>(p, t, -1.242_014_1e-1);
    p = fma::<FUSED>(p, t, 1.424_932_3e-1);
    p = fma::<FUSED>(p, t, -1.666_805_7e-1);
    p = fma::<FUSED>(p, t, 2.000_071_5e-1);
    p = fma::<FUSED>(p, t, -2.499_999_4e-1);
    p = fma::<FUSED>(p, t, 3.333_333e-1);
    let square = t * t;
    let natural = t + square * fma::<FUSED>(p, t, -0.5);
    fma::<FUSED>(natural, LOG2_E, exponent as f32)
}

/// `x^y` for `x` in [0, 1], `y >= 0`; 0 stands for anything below 2^-126.
///
/// Relative error at most `4e-7 * (1 + |y log2 x|)` plus 2.5e-7.
#[inline(always)]
pub(crate) fn power<const FUSED: bool>(x: f32, y: f32) -> f32 {
    exp2::<FUSED>(y * log2::<FUSED>(if x > f32::MIN_POSITIVE { x } else { f32::MIN_POSITIVE }))
}

/// `e^x`, limited to [2^-126, 2^126]. Relative error at most `1.3e-7 * (2 + |x|)`.
#[inline(always)]
pub(crate) fn exp<const FUSED: bool>(x: f32) -> f32 {
    exp2::<FUSED>(x * LOG2_E)
}

/// `e^x`, `x` limited to [-87, 87]. Relative error at most 2.5e-7: `x` is split into a multiple of ln 2 and a rest whose
/// rounding does not grow with `x`.
#[inline(always)]
pub(crate) fn exp_split<const FUSED: bool>(x: f32) -> f32 {
    // ln 2 in two parts; the first has few enough bits for its multiples up to 126 to be exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = limit(x, -87.0, 87.0);
    let shifted = fma::<FUSED>(x, LOG2_E, ROUND);
    let whole = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let multiple = shifted - ROUND;
    let part = fma::<FUSED>(multiple, -LN_2_LOW, fma::<FUSED>(multiple, -LN_2_HIGH, x));
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = fma::<FUSED>(p, part, coefficient);
    }
    p = fma::<FUSED>(p, part * part, part) + 1.0;
    f32::from_bits(p.to_bits().wrapping_add(whole << 23))
}

/// `tanh(x)`. Relative error at most 1e-6; a NaN stays one.
///
/// A polynomial near 0 (Cephes `tanhf`), elsewhere by the exponential.
#[inline(always)]
pub(crate) fn tanh<const FUSED: bool>(x: f32) -> f32 {
    let square = x * x;
    let mut p = -5.704_988_6e-3;
    for coefficient in [2.063_909e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = fma::<FUSED>(p, square, coefficient);
    }
    let near = fma::<FUSED>(p * square, x, x);
    let far = 1.0 - 2.0 / (exp_split::<FUSED>(2.0 * x.abs()) + 1.0);
    if x.abs() >= 0.625 { far.copysign(x) } else { near }
}

/// `1 / (1 + e^-x)`. Absolute error at most 2e-7.
#[inline(always)]
pub(crate) fn sigmoid<const FUSED: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FUSED>(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(low: f64, high: f64, steps: u32) -> impl Iterator<Item = f32> {
        (0..=steps).map(move |i| (low + (high - low) * f64::from(i) / f64::from(steps)) as f32)
    }

    fn both(check: impl Fn(&str, fn(f32) -> f32), fused: fn(f32) -> f32, plain: fn(f32) -> f32) {
        check("fused", fused);
        check("plain", plain);
    }

    #[test]
    fn exp2_is_within_its_stated_error() {
        let check = |kind: &str, f: fn(f32) -> f32| {
            for x in grid(-126.0, 126.0, 400_000) {
                let want = f64::from(x).exp2();
                let error = (f64::from(f(x)) / want - 1.0).abs();
                assert!(error <= 2.5e-7, "{kind} exp2({x}): relative error {error:e}");
            }
        };
        both(check, exp2::<true>, exp2::<false>);
    }

    #[test]
    fn exp_split_and_tanh_are_within_their_stated_errors() {
        for x in grid(-87.0, 87.0, 400_000) {
            let want = f64::from(x).exp();
            for got in [exp_split::<true>(x), exp_split::<false>(x)] {
                let error = (f64::from(got) / want - 1.0).abs();
                assert!(error <= 2.5e-7, "exp({x}): relative error {error:e}");
            }
        }
        for x in grid(-12.0, 12.0, 400_000).filter(|x| *x != 0.0) {
            let want = f64::from(x).tanh();
            for got in [tanh::<true>(x), tanh::<false>(x)] {
                let error = (f64::from(got) / want - 1.0).abs();
                assert!(error <= 1e-6, "tanh({x}): relative error {error:e}");
            }
        }
        assert!(tanh::<true>(f32::NAN).is_nan() && tanh::<true>(f32::INFINITY) == 1.0);
    }

    #[test]
    fn log2_is_within_its_stated_error() {
        let check = |kind: &str, f: fn(f32) -> f32| {
            for x in grid(1e-6, 2.0, 400_000).chain(grid(-125.0, 3.0, 100_000).map(f32::exp2)) {
                let want = f64::from(x).log2();
                let error = (f64::from(f(x)) - want).abs() / want.abs().max(1.0);
                assert!(error <= 3e-7, "{kind} log2({x}): error {error:e}");
            }
        };
        both(check, log2::<true>, log2::<false>);
    }

    #[test]
    fn power_is_within_its_stated_error() {
        for exponent in [0.0_f32, 1.0, 1.5, 3.7, 12.0, 19.0] {
            for x in grid(1e-4, 1.0, 20_000) {
                let scale = f64::from(exponent) * f64::from(x).log2();
                if scale < -100.0 {
                    continue;
                }
                let want = f64::from(x).powf(f64::from(exponent));
                for got in [power::<true>(x, exponent), power::<false>(x, exponent)] {
                    let error = (f64::from(got) / want - 1.0).abs();
                    assert!(error <= 4e-7 * (1.0 + scale.abs()) + 2.5e-7, "{x}^{exponent}: {error:e}");
                }
            }
            assert!(exponent == 0.0 || power::<true>(0.0, exponent) <= f32::MIN_POSITIVE);
        }
    }

    #[test]
    fn sigmoid_is_within_its_stated_error_and_saturates_without_nan() {
        for x in grid(-60.0, 60.0, 200_000) {
            let want = 1.0 / (1.0 + (-f64::from(x)).exp());
            for got in [sigmoid::<true>(x), sigmoid::<false>(x)] {
                let error = (f64::from(got) - want).abs();
                assert!(error <= 2e-7, "sigmoid({x}): error {error:e}");
            }
        }
        assert!(sigmoid::<true>(f32::INFINITY) == 1.0 && sigmoid::<true>(f32::NEG_INFINITY) < 1e-30);
    }
}
