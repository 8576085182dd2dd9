//! The schedule of AdaRound: annealing exponent, warm start.
//!
//! Source: Nagel et al. 2020, eq. 24, and the cosine schedule of AIMET. Not here: the step itself (`compute`).

use crate::Settings;

/// Iterations without rounding loss.
pub fn warm_iterations(iterations: u32, warm_start: f32) -> u32 {
    (f64::from(warm_start) * f64::from(iterations)).round() as u32
}

/// Annealing exponent at iteration `t` (from 0) of `iterations`; the first value throughout warm start.
pub fn beta(t: u32, iterations: u32, range: (f64, f64), warm_start: f64) -> f64 {
    let warm = warm_start * f64::from(iterations);
    let progress = (f64::from(t) - warm) / (f64::from(iterations) - warm).max(f64::MIN_POSITIVE);
    range.1 + 0.5 * (range.0 - range.1) * (1.0 + (std::f64::consts::PI * progress.clamp(0.0, 1.0)).cos())
}

/// Weight and exponent of the rounding loss at iteration `t`: weight 0 in warm start.
pub fn rounding(t: u32, settings: &Settings) -> (f32, f32) {
    let warm = t < warm_iterations(settings.iterations, settings.warm_start);
    let range = (f64::from(settings.beta.0), f64::from(settings.beta.1));
    let exponent = beta(t, settings.iterations, range, f64::from(settings.warm_start)) as f32;
    (if warm { 0.0 } else { settings.lambda }, exponent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beta_gives_the_golden_value() {
        let got = beta(8000, 10_000, (20.0, 2.0), 0.2);
        assert!((got - 4.636_038_969_321_072).abs() < 1e-12, "{got}");
    }

    #[test]
    fn beta_falls_from_first_to_last_value() {
        let all: Vec<f64> = (0..=100).map(|t| beta(t, 100, (20.0, 2.0), 0.2)).collect();
        assert!(all.windows(2).all(|pair| pair[1] <= pair[0]), "{all:?}");
        assert_eq!((all[0], all[20], all[100]), (20.0, 20.0, 2.0));
    }

    #[test]
    fn rounding_loss_is_off_in_warm_start_and_on_after_it() {
        let settings = Settings { iterations: 100, ..Settings::default() };
        assert_eq!(rounding(19, &settings).0, 0.0);
        assert_eq!(rounding(20, &settings).0, settings.lambda);
    }
}
