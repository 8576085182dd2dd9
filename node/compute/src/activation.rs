//! Element-wise activations and their derivatives, for the samples objective.
//!
//! Errors against f64 are at most [`ERROR_MAX`] relative to `max(1, |x|)`, function and derivative (tested). At a kink the
//! derivative is the one of the flat side. Like the other kernels, vectorised per instruction-set level.
//!
//! Not here: recognising activations in a model (`model`).
#![expect(unsafe_code, reason = "calls functions compiled for an instruction-set level found at run time")]

use crate::cpu::math::{exp, fma, limit, sigmoid};
use crate::cpu::{Isa, isa};

/// Largest error of a value or derivative, relative to `max(1, |x|)`.
pub const ERROR_MAX: f64 = 1e-6;

/// The element-wise function that follows a layer.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Activation {
    /// `x`.
    #[default]
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, min), max)`.
    Clip {
        /// Lower bound.
        min: f32,
        /// Upper bound.
        max: f32,
    },
    /// `x` if positive, else `slope * x`.
    LeakyRelu {
        /// Slope for negative inputs.
        slope: f32,
    },
    /// `x` if positive, else `slope * x`, with this row's slope.
    PRelu {
        /// Slope of this row.
        slope: f32,
    },
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `tanh(x)`.
    Tanh,
    /// `x * clamp(x / 6 + 0.5, 0, 1)`.
    HardSwish,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)`, exact (erf).
    Gelu,
    /// GELU by the tanh approximation.
    GeluTanh,
}

impl Activation {
    /// `x = f(x)`.
    pub fn apply(self, x: &mut [f32]) {
        dispatch(self, Job::Apply(x));
    }

    /// `y = f(x)`, `derivative = f'(x)`.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn apply_and_derivative(self, x: &[f32], y: &mut [f32], derivative: &mut [f32]) {
        assert!(
            x.len() == y.len() && x.len() == derivative.len(),
            "activation: expected {} elements in each array",
            x.len()
        );
        dispatch(self, Job::Both { x, y, derivative });
    }
}

/// In place `z = (f(z + bias) - target) * f'(z + bias)`: the gradient of half the squared error after the activation.
///
/// # Panics
/// If the slices differ in length.
pub fn residual(activation: Activation, bias: f32, z: &mut [f32], target: &[f32]) {
    assert!(z.len() == target.len(), "residual: target has {} elements, expected {}", target.len(), z.len());
    dispatch(activation, Job::Residual { bias, z, target });
}

/// What to do with an activation's values.
enum Job<'a> {
    Apply(&'a mut [f32]),
    Both { x: &'a [f32], y: &'a mut [f32], derivative: &'a mut [f32] },
    Residual { bias: f32, z: &'a mut [f32], target: &'a [f32] },
}

#[inline(always)]
fn apply_all(x: &mut [f32], f: impl Fn(f32) -> (f32, f32)) {
    for x in x {
        *x = f(*x).0;
    }
}

#[inline(always)]
fn both_all(x: &[f32], y: &mut [f32], derivative: &mut [f32], f: impl Fn(f32) -> (f32, f32)) {
    for ((x, y), derivative) in x.iter().zip(y).zip(derivative) {
        (*y, *derivative) = f(*x);
    }
}

#[inline(always)]
fn residual_all(bias: f32, z: &mut [f32], target: &[f32], f: impl Fn(f32) -> (f32, f32)) {
    for (z, target) in z.iter_mut().zip(target) {
        let (y, slope) = f(*z + bias);
        *z = (y - target) * slope;
    }
}

/// Runs a job with `f`, which gives value and derivative.
#[inline(always)]
fn run(job: Job<'_>, f: impl Fn(f32) -> (f32, f32)) {
    match job {
        Job::Apply(x) => apply_all(x, f),
        Job::Both { x, y, derivative } => both_all(x, y, derivative, f),
        Job::Residual { bias, z, target } => residual_all(bias, z, target, f),
    }
}

#[inline(always)]
fn leaky(x: f32, slope: f32) -> (f32, f32) {
    if x > 0.0 { (x, 1.0) } else { (slope * x, slope) }
}

#[inline(always)]
fn hard_swish(x: f32) -> (f32, f32) {
    let middle = (x * limit(x * (1.0 / 6.0) + 0.5, 0.0, 1.0), x * (1.0 / 3.0) + 0.5);
    let slope = if x < 3.0 { middle.1 } else { 1.0 };
    (middle.0, if x > -3.0 { slope } else { 0.0 })
}

#[inline(always)]
fn tanh<const FUSED: bool>(x: f32) -> f32 {
    fma::<FUSED>(2.0, sigmoid::<FUSED>(2.0 * x), -1.0)
}

/// Distribution and density of the standard normal; `erf` by Abramowitz and Stegun 7.1.26 (error 1.5e-7).
#[inline(always)]
fn normal<const FUSED: bool>(x: f32) -> (f32, f32) {
    const DENSITY_AT_0: f32 = 0.398_942_3;
    let bell = exp::<FUSED>(-0.5 * x * x);
    let t = 1.0 / fma::<FUSED>(0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2, x.abs(), 1.0);
    let mut p = 1.061_405_4;
    for coefficient in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
        p = fma::<FUSED>(p, t, coefficient);
    }
    let tail = 0.5 * p * t * bell;
    (if x > 0.0 { 1.0 - tail } else { tail }, DENSITY_AT_0 * bell)
}

#[inline(always)]
fn gelu_tanh<const FUSED: bool>(x: f32) -> (f32, f32) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    const CUBIC: f32 = 0.044_715;
    let square = x * x;
    let t = tanh::<FUSED>(SQRT_2_OVER_PI * x * fma::<FUSED>(CUBIC, square, 1.0));
    let inner = SQRT_2_OVER_PI * fma::<FUSED>(3.0 * CUBIC, square, 1.0);
    let half = fma::<FUSED>(0.5, t, 0.5);
    // Far out `1 - t^2` is exactly 0 while `x * inner` is large but finite.
    (x * half, fma::<FUSED>(0.5 * x * (1.0 - t * t), inner, half))
}

#[inline(always)]
fn pass<const FUSED: bool>(activation: Activation, job: Job<'_>) {
    match activation {
        Activation::Identity => run(job, |x| (x, 1.0)),
        Activation::Relu => run(job, |x| if x > 0.0 { (x, 1.0) } else { (0.0, 0.0) }),
        Activation::Clip { min, max } => {
            run(job, |x| (limit(x, min, max), if x > min && x < max { 1.0 } else { 0.0 }));
        }
        Activation::LeakyRelu { slope } | Activation::PRelu { slope } => run(job, |x| leaky(x, slope)),
        Activation::Sigmoid => run(job, |x| {
            let y = sigmoid::<FUSED>(x);
            (y, y * (1.0 - y))
        }),
        Activation::Tanh => run(job, |x| {
            let y = tanh::<FUSED>(x);
            (y, 1.0 - y * y)
        }),
        Activation::HardSwish => run(job, hard_swish),
        Activation::Silu => run(job, |x| {
            let y = sigmoid::<FUSED>(x);
            (x * y, y * fma::<FUSED>(x, 1.0 - y, 1.0))
        }),
        Activation::Gelu => run(job, |x| {
            let (below, density) = normal::<FUSED>(x);
            (x * below, fma::<FUSED>(x, density, below))
        }),
        Activation::GeluTanh => run(job, gelu_tanh::<FUSED>),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx2,fma")]
fn pass_avx512(activation: Activation, job: Job<'_>) {
    pass::<true>(activation, job);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn pass_avx2(activation: Activation, job: Job<'_>) {
    pass::<true>(activation, job);
}

fn dispatch(activation: Activation, job: Job<'_>) {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa()` found these features on this machine.
        Isa::Avx512 => unsafe { pass_avx512(activation, job) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { pass_avx2(activation, job) },
        _ => pass::<false>(activation, job),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Activation; 13] = [
        Activation::Identity,
        Activation::Relu,
        Activation::Clip { min: 0.0, max: 6.0 },
        Activation::Clip { min: -1.25, max: 0.5 },
        Activation::LeakyRelu { slope: 0.01 },
        Activation::PRelu { slope: -0.3 },
        Activation::PRelu { slope: 1.5 },
        Activation::Sigmoid,
        Activation::Tanh,
        Activation::HardSwish,
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
    ];

    /// erf by its series of positive terms (Abramowitz and Stegun 7.1.6); beyond 6 it is 1 to f64 precision.
    fn erf(x: f64) -> f64 {
        if x.abs() > 6.0 {
            return x.signum();
        }
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= 2.0 * x * x / f64::from(2 * n + 1);
            sum += term;
        }
        sum * (-x * x).exp() * std::f64::consts::FRAC_2_SQRT_PI
    }

    /// The definition, in f64.
    fn reference(activation: Activation, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match activation {
            Activation::Identity => x,
            Activation::Relu => x.max(0.0),
            Activation::Clip { min, max } => x.clamp(f64::from(min), f64::from(max)),
            Activation::LeakyRelu { slope } | Activation::PRelu { slope } => {
                if x > 0.0 {
                    x
                } else {
                    f64::from(slope) * x
                }
            }
            Activation::Sigmoid => sigmoid(x),
            Activation::Tanh => x.tanh(),
            Activation::HardSwish => x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
            Activation::Silu => x * sigmoid(x),
            Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
            }
        }
    }

    /// Points off the kinks, which lie at multiples of 1/4.
    fn points() -> Vec<f32> {
        (-2500..2500).map(|i| (i as f32 + 0.37) * 0.01).collect()
    }

    #[test]
    fn values_match_their_definitions() {
        for activation in ALL {
            let xs = points();
            let mut got = xs.clone();
            activation.apply(&mut got);
            for (x, got) in xs.iter().zip(&got) {
                let error = (f64::from(*got) - reference(activation, f64::from(*x))).abs()
                    / f64::from(x.abs()).max(1.0);
                assert!(error <= ERROR_MAX, "{activation:?}({x}) = {got}: error {error:e}");
            }
        }
    }

    #[test]
    fn derivatives_match_finite_differences() {
        const H: f64 = 1e-5;
        for activation in ALL {
            let xs = points();
            let (mut y, mut slope) = (vec![0.0; xs.len()], vec![0.0; xs.len()]);
            activation.apply_and_derivative(&xs, &mut y, &mut slope);
            let mut applied = xs.clone();
            activation.apply(&mut applied);
            assert_eq!(applied, y, "{activation:?}");
            for (x, got) in xs.iter().zip(&slope) {
                let x = f64::from(*x);
                let want = (reference(activation, x + H) - reference(activation, x - H)) / (2.0 * H);
                let error = (f64::from(*got) - want).abs() / x.abs().max(1.0);
                assert!(error <= ERROR_MAX, "{activation:?}'({x}) = {got}, expected {want}: error {error:e}");
            }
        }
    }

    #[test]
    fn huge_inputs_give_no_nan() {
        for activation in ALL {
            let xs = [-1e18_f32, -300.0, 0.0, 300.0, 1e18];
            let (mut y, mut slope) = ([0.0; 5], [0.0; 5]);
            activation.apply_and_derivative(&xs, &mut y, &mut slope);
            assert!(y.iter().chain(&slope).all(|v| v.is_finite()), "{activation:?}: {y:?} {slope:?}");
        }
    }

    #[test]
    fn residual_is_error_times_slope_at_the_biased_input() {
        for activation in ALL {
            let xs = points();
            let target: Vec<f32> = xs.iter().map(|x| x * 0.5 - 0.1).collect();
            let biased: Vec<f32> = xs.iter().map(|x| x + 0.13).collect();
            let (mut y, mut slope) = (vec![0.0; xs.len()], vec![0.0; xs.len()]);
            activation.apply_and_derivative(&biased, &mut y, &mut slope);
            let mut z = xs.clone();
            residual(activation, 0.13, &mut z, &target);
            for i in 0..xs.len() {
                assert_eq!(z[i], (y[i] - target[i]) * slope[i], "{activation:?} at {}", xs[i]);
            }
        }
    }

    #[test]
    fn levels_agree_within_the_stated_error() {
        for activation in ALL {
            let xs = points();
            let (mut a, mut b) = (xs.clone(), xs.clone());
            pass::<true>(activation, Job::Apply(&mut a));
            pass::<false>(activation, Job::Apply(&mut b));
            for ((a, b), x) in a.iter().zip(&b).zip(&xs) {
                assert!((a - b).abs() <= 2e-6 * x.abs().max(1.0), "{activation:?}({x}): {a} and {b}");
            }
        }
    }
}
