//! Normalisation of runs of numbers: root mean square, and mean with variance.
//!
//! Sums are kept in sixteen lanes and added pairwise: their order depends on the width alone.
//! Not here: which weights a family stores (`exec`).
#![expect(unsafe_code, reason = "calls functions compiled for an instruction-set level found at run time")]

use super::isa::isa;
use super::lanes::LANES;
use super::level::leveled;

/// `out = x / sqrt(mean(x^2) + epsilon) * weight`, for each run of `weight.len()` numbers of `x`.
///
/// # Panics
/// If `weight` is empty, or `x` and `out` are not the same whole number of runs.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    check(x, weight.len(), out);
    rms_at(isa(), x, weight, epsilon, out);
}

/// `out = (x - mean) / sqrt(variance + epsilon) * weight + bias`, for each run of `weight.len()` numbers of `x`.
///
/// # Panics
/// As [`rms_norm`], or if `bias` is not as long as `weight`.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
    check(x, weight.len(), out);
    assert!(bias.len() == weight.len(), "bias: expected {}, actual {}", weight.len(), bias.len());
    layer_at(isa(), x, weight, bias, epsilon, out);
}

fn check(x: &[f32], width: usize, out: &[f32]) {
    assert!(
        width > 0 && x.len() == out.len() && x.len().is_multiple_of(width),
        "norm: {} and {} numbers are not the same count of runs of {width}",
        x.len(),
        out.len()
    );
}

/// Sum of `f(x)`, in lanes.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += f(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f(*x);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn rms<const FUSED: bool>(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let factor = 1.0 / (sum(x, |x| x * x) / width as f32 + epsilon).sqrt();
        for ((x, weight), out) in x.iter().zip(weight).zip(out) {
            *out = *x * factor * weight;
        }
    }
}

#[inline(always)]
fn layer<const FUSED: bool>(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mean = sum(x, |x| x) / width as f32;
        let variance = sum(x, |x| (x - mean) * (x - mean)) / width as f32;
        let factor = 1.0 / (variance + epsilon).sqrt();
        for (((x, weight), bias), out) in x.iter().zip(weight).zip(bias).zip(out) {
            *out = (*x - mean) * factor * weight + bias;
        }
    }
}

leveled!(fn rms_at(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) = rms);
leveled!(fn layer_at(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) = layer);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::available;
    use crate::random::Stream;

    const WIDTHS: [usize; 9] = [1, 2, 13, 15, 16, 17, 64, 127, 576];
    /// Of a number of order 1: a sum in 16 lanes and four roundings.
    const TOLERANCE: f64 = 2e-6;

    fn uniform(seed: u64, len: usize, shift: f32) -> Vec<f32> {
        let mut stream = Stream::new(seed, 0, 0);
        (0..len).map(|_| stream.unit_f32() * 2.0 - 1.0 + shift).collect()
    }

    fn expect(x: &[f32], weight: &[f32], bias: Option<&[f32]>, epsilon: f32) -> Vec<f64> {
        let width = weight.len();
        let run = |x: &[f32]| {
            let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let mean = if bias.is_some() { x.iter().sum::<f64>() / width as f64 } else { 0.0 };
            let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let factor = (square + f64::from(epsilon)).sqrt().recip();
            let one = |i: usize| {
                (x[i] - mean) * factor * f64::from(weight[i]) + bias.map_or(0.0, |bias| f64::from(bias[i]))
            };
            (0..width).map(one).collect::<Vec<_>>()
        };
        x.chunks(width).flat_map(run).collect()
    }

    fn assert_close(got: &[f32], want: &[f64], what: &str) {
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(*got) - want).abs() / want.abs().max(1.0);
            assert!(error <= TOLERANCE, "{what} at {i}: {got}, expected {want}");
        }
    }

    #[test]
    fn norms_match_their_definition_at_every_level_and_awkward_width() {
        for level in available() {
            for width in WIDTHS {
                let x = uniform(1, 3 * width, 0.25);
                let (weight, bias) = (uniform(2, width, 1.0), uniform(3, width, 0.0));
                let mut out = vec![f32::NAN; x.len()];
                rms_at(level, &x, &weight, 1e-5, &mut out);
                assert_close(&out, &expect(&x, &weight, None, 1e-5), &format!("{level:?} rms {width}"));
                layer_at(level, &x, &weight, &bias, 1e-2, &mut out);
                let want = expect(&x, &weight, Some(&bias), 1e-2);
                assert_close(&out, &want, &format!("{level:?} layer {width}"));
            }
        }
    }

    #[test]
    fn no_rows_are_no_work() {
        rms_norm(&[], &[1.0; 4], 1e-6, &mut []);
    }

    #[test]
    #[should_panic(expected = "norm: 7 and 7 numbers")]
    fn half_a_run_is_refused() {
        rms_norm(&[0.0; 7], &[1.0; 4], 1e-6, &mut [0.0; 7]);
    }
}
