//! Quality metrics between two equally long vectors, each computed once in the project and in f64.
//!
//! Sums run in index order, so a value depends on the data only.
//! Not here: top-1 and agreement, which compare predictions rather than tensors.

/// Mean of squared differences. NaN for empty vectors or vectors of different lengths.
pub fn mse(a: &[f32], b: &[f32]) -> f64 {
    squared_error(a, b) / a.len() as f64
}

/// Signal to quantization noise ratio in decibel: `10 log10(sum signal^2 / sum (signal - noisy)^2)`.
///
/// Infinity if there is no noise, minus infinity if there is noise on a zero signal, NaN as for [`mse`].
pub fn sqnr_db(signal: &[f32], noisy: &[f32]) -> f64 {
    let noise = squared_error(signal, noisy);
    if signal.is_empty() || noise.is_nan() {
        return f64::NAN;
    }
    if noise == 0.0 {
        return f64::INFINITY;
    }
    10.0 * (dot(signal, signal) / noise).log10()
}

/// Cosine of the angle between two vectors: 1 if both are zero, 0 if one is, NaN as for [`mse`].
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() || a.is_empty() {
        return f64::NAN;
    }
    let (aa, bb) = (dot(a, a), dot(b, b));
    match (aa == 0.0, bb == 0.0) {
        (true, true) => 1.0,
        (false, false) => dot(a, b) / (aa.sqrt() * bb.sqrt()),
        _ => 0.0,
    }
}

fn squared_error(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    a.iter().zip(b).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_by_hand() {
        let (a, b) = ([1.0, 2.0, 2.0], [1.0, 1.0, 4.0]);
        assert!((mse(&a, &b) - 5.0 / 3.0).abs() < 1e-12);
        assert!((sqnr_db(&a, &b) - 10.0 * (9.0_f64 / 5.0).log10()).abs() < 1e-12);
        assert!((cosine(&a, &b) - 11.0 / (3.0 * 18.0_f64.sqrt())).abs() < 1e-12);
    }

    #[test]
    fn ten_times_less_noise_amplitude_is_twenty_decibel() {
        let signal: Vec<f32> = (0..64).map(|i| (i % 7) as f32 - 3.0).collect();
        let with_noise = |n: f32| -> Vec<f32> { signal.iter().map(|s| s + n).collect() };
        let gain = sqnr_db(&signal, &with_noise(0.125)) - sqnr_db(&signal, &with_noise(1.25));
        assert!((gain - 20.0).abs() < 1e-9, "gain {gain}");
    }

    #[test]
    fn edges_are_the_documented_ones() {
        assert!(mse(&[], &[]).is_nan() && mse(&[1.0], &[1.0, 2.0]).is_nan());
        assert!(sqnr_db(&[], &[]).is_nan() && sqnr_db(&[1.0], &[]).is_nan());
        assert_eq!(sqnr_db(&[1.0, 2.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(sqnr_db(&[0.0], &[0.0]), f64::INFINITY);
        assert_eq!(sqnr_db(&[0.0], &[1.0]), f64::NEG_INFINITY);
        assert_eq!(cosine(&[0.0], &[0.0]), 1.0);
        assert_eq!(cosine(&[0.0], &[2.0]), 0.0);
        assert!((cosine(&[1.0, -2.0], &[-1.0, 2.0]) + 1.0).abs() < 1e-12);
    }
}
