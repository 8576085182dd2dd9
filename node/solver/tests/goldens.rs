//! Values that AIMET's own tests assert; the random inputs come from numpy (`golden/make.py`).
//!
//! The golden beta is in `schedule`'s unit tests.

use halfstep_compute::cpu;
use halfstep_solver::{Settings, schedule};

fn numbers(text: &str) -> Vec<f64> {
    text.lines().map(|line| line.parse().expect("make.py writes numbers")).collect()
}

#[test]
fn rounding_loss_is_the_golden_one_and_zero_in_warm_start() {
    let v: Vec<f32> = numbers(include_str!("golden/rand_1x3x12x12.txt")).iter().map(|v| *v as f32).collect();
    let settings = Settings { iterations: 10_000, lambda: 0.01, ..Settings::default() };
    let loss = |t| {
        let (lambda, beta) = schedule::rounding(t, &settings);
        f64::from(lambda) * cpu::rounding_loss(&v, &vec![1.0; v.len()], f64::from(beta))
    };
    assert_eq!(v.len(), 3 * 12 * 12);
    assert!((loss(8000) - 4.266_156_963_161_077).abs() < 1e-5, "{}", loss(8000));
    assert_eq!(loss(10), 0.0);
}

#[test]
fn rounding_variables_start_at_the_golden_value() {
    let w = numbers(include_str!("golden/rand_32x3x12x12_first.txt"))[0];
    let steps = w / 0.001_551_126_479;
    let v = cpu::inverse_rectified_sigmoid(steps - steps.floor());
    assert!((v - 1.1715).abs() < 1e-4, "{v}");
    assert!((cpu::rectified_sigmoid(v) - (steps - steps.floor())).abs() < 1e-12);
}
