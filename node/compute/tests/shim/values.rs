//! Random arrays and comparisons for kernel tests.
//!
//! Not here: launching (`super`).

use halfstep_compute::random::Stream;

/// Uniform in `low..high`.
pub fn uniform(stream: &mut Stream, len: usize, low: f32, high: f32) -> Vec<f32> {
    (0..len).map(|_| low + stream.unit_f32() * (high - low)).collect()
}

/// Integers of `low..=high`, whose sums of products are exact.
pub fn integers(stream: &mut Stream, len: usize, low: i32, high: i32) -> Vec<f32> {
    (0..len).map(|_| (low + stream.index((high - low + 1) as u32) as i32) as f32).collect()
}

/// Fails unless each value is within `tolerance * max(1, |expected|)`.
pub fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want).abs() / want.abs().max(1.0);
        assert!(error <= tolerance, "{what} at {at}: {got}, expected {want}, error {error:e}");
    }
}

/// Fails unless every bit agrees (any NaN agrees with any other).
pub fn assert_same(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
        assert!(same, "{what} at {at}: {got:e}, expected {want:e}");
    }
}
