//! The fused AdaRound iteration: gradient, rounding loss, Adam and the new soft weights in one pass over memory.
//!
//! In: the data gradient (or the two products whose difference it is), the grid (`lo`, `delta`), the state (`v` and Adam's
//! moments). Out: the state and the soft weights, in place; no allocation. Method: Nagel et al. 2020 (arXiv:2004.10568),
//! eq. 21-25; Adam of Kingma & Ba 2015 with the bias corrections passed in.
//!
//! Each level (AVX-512, AVX2, baseline) runs the same scalar body, vectorised by the compiler; elements do not depend on
//! each other, so splitting an array changes nothing. The exact f64 twin is [`reference_step`].
//!
//! Not here: the schedule of `beta` and `lambda`, the products, convergence (`solver`).
#![expect(unsafe_code, reason = "calls functions compiled for an instruction-set level found at run time")]

use super::isa::{Isa, isa};
use super::math::{fma, limit, power, sigmoid};

/// Upper end of the stretched sigmoid.
pub const ZETA: f64 = 1.1;
/// Lower end of the stretched sigmoid.
pub const GAMMA: f64 = -0.1;

const STRETCH: f32 = (ZETA - GAMMA) as f32;
const LOW: f32 = GAMMA as f32;

/// Constants of one iteration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepArgs {
    /// Adam's learning rate.
    pub learning_rate: f32,
    /// Adam's first decay.
    pub beta1: f32,
    /// Adam's second decay.
    pub beta2: f32,
    /// Adam's epsilon.
    pub eps: f32,
    /// `1 / (1 - beta1^t)`, t from 1; see [`StepArgs::at_iteration`].
    pub bias1: f32,
    /// `1 / (1 - beta2^t)`, t from 1.
    pub bias2: f32,
    /// Weight of the rounding loss; 0 in warm start (then no power is computed).
    pub lambda: f32,
    /// The rounding loss's exponent, at least 1.
    pub beta: f32,
    /// Factor on the data gradient.
    pub grad_scale: f32,
}

impl StepArgs {
    /// The paper's Adam (0.9, 0.999, 1e-8), no rounding loss, gradient taken as it is.
    pub fn adam(learning_rate: f32) -> Self {
        let (beta1, beta2) = (0.9, 0.999);
        let args = Self {
            learning_rate,
            beta1,
            beta2,
            eps: 1e-8,
            bias1: 1.0,
            bias2: 1.0,
            lambda: 0.0,
            beta: 2.0,
            grad_scale: 1.0,
        };
        args.at_iteration(1)
    }

    /// The same with Adam's bias corrections for update number `t`, counted from 1 (0 is taken as 1).
    #[must_use]
    pub fn at_iteration(mut self, t: u32) -> Self {
        let correction = |decay: f32| (1.0 / (1.0 - f64::from(decay).powf(f64::from(t.max(1))))) as f32;
        self.bias1 = correction(self.beta1);
        self.bias2 = correction(self.beta2);
        self
    }
}

/// The data gradient with respect to the soft weights, before `grad_scale`.
#[derive(Debug, Clone, Copy)]
pub enum Gradient<'a> {
    /// `product - target` (gram objective: `W~ H - W C`).
    Difference {
        /// `W~ H`.
        product: &'a [f32],
        /// `W C`.
        target: &'a [f32],
    },
    /// The gradient itself (samples objective).
    Given(&'a [f32]),
}

/// `h(v)` and its derivative.
#[inline(always)]
fn rectified<const FUSED: bool>(v: f32) -> (f32, f32) {
    let sigma = sigmoid::<FUSED>(v);
    let stretched = fma::<FUSED>(sigma, STRETCH, LOW);
    let slope = STRETCH * sigma * (1.0 - sigma);
    let inside = stretched > 0.0 && stretched < 1.0;
    (limit(stretched, 0.0, 1.0), if inside { slope } else { 0.0 })
}

/// `d/dv (1 - |2h - 1|^beta)`, given `h` and `h'`.
#[inline(always)]
fn rounding_slope<const FUSED: bool>(h: f32, slope: f32, beta: f32) -> f32 {
    let centred = fma::<FUSED>(2.0, h, -1.0);
    let magnitude = power::<FUSED>(centred.abs(), beta - 1.0);
    -2.0 * beta * magnitude.copysign(centred) * slope
}

/// Weights done at a time. One weight's arithmetic is a chain of some 300 cycles, so each stage runs over a whole block:
/// short chains leave the processor independent work, and the block's intermediate values stay in the first-level cache.
const BLOCK: usize = 256;

/// Moments smaller than this are taken as 0: a weight that has settled has gradient 0 from then on, and its moments would
/// decay into subnormal numbers, which many processors handle slowly.
const MOMENT_MIN: f32 = 1e-30;

#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.abs() < MOMENT_MIN { 0.0 } else { x }
}

/// The gradient with respect to `v`. `DIFFERENCE`: the data gradient is `gradient - target` (else `target` is not read);
/// `ROUND`: lambda is not 0.
#[inline(always)]
fn gradient_block<const FUSED: bool, const DIFFERENCE: bool, const ROUND: bool>(
    args: &StepArgs,
    gradient: &[f32],
    target: &[f32],
    delta: &[f32],
    v: &[f32],
    g: &mut [f32; BLOCK],
) {
    let n = v.len().min(BLOCK);
    let (gradient, target, delta, v) = (&gradient[..n], &target[..n], &delta[..n], &v[..n]);
    let (mut hs, mut slopes) = ([0.0; BLOCK], [0.0; BLOCK]);
    for i in 0..n {
        let width = delta[i];
        let (h, slope) = rectified::<FUSED>(v[i]);
        let slope = if width == 0.0 { 0.0 } else { slope };
        let data = if DIFFERENCE { gradient[i] - target[i] } else { gradient[i] };
        g[i] = args.grad_scale * data * width * slope;
        hs[i] = h;
        slopes[i] = slope;
    }
    if ROUND {
        for i in 0..n {
            g[i] = fma::<FUSED>(args.lambda, rounding_slope::<FUSED>(hs[i], slopes[i], args.beta), g[i]);
        }
    }
}

/// Adam's update of `v` by the gradient `g`.
#[inline(always)]
fn adam_block<const FUSED: bool>(
    args: &StepArgs,
    g: &[f32; BLOCK],
    v: &mut [f32],
    m1: &mut [f32],
    m2: &mut [f32],
) {
    let n = v.len().min(BLOCK);
    let (v, m1, m2) = (&mut v[..n], &mut m1[..n], &mut m2[..n]);
    let StepArgs { learning_rate, beta1, beta2, eps, bias1, bias2, .. } = *args;
    let rate = learning_rate * bias1;
    for i in 0..n {
        let first = flush(fma::<FUSED>(beta1, m1[i], (1.0 - beta1) * g[i]));
        let second = flush(fma::<FUSED>(beta2, m2[i], (1.0 - beta2) * g[i] * g[i]));
        m1[i] = first;
        m2[i] = second;
        v[i] -= rate * first / ((second * bias2).sqrt() + eps);
    }
}

/// The pass, block by block.
#[inline(always)]
fn pass<const FUSED: bool, const DIFFERENCE: bool, const ROUND: bool>(
    args: &StepArgs,
    gradient: &[f32],
    target: &[f32],
    lo: &[f32],
    delta: &[f32],
    v: &mut [f32],
    m1: &mut [f32],
    m2: &mut [f32],
    soft: &mut [f32],
) {
    let mut g = [0.0; BLOCK];
    for start in (0..v.len()).step_by(BLOCK) {
        let at = start..v.len().min(start + BLOCK);
        let (gradient, target, delta, v) =
            (&gradient[at.clone()], &target[at.clone()], &delta[at.clone()], &mut v[at.clone()]);
        gradient_block::<FUSED, DIFFERENCE, ROUND>(args, gradient, target, delta, v, &mut g);
        adam_block::<FUSED>(args, &g, v, &mut m1[at.clone()], &mut m2[at.clone()]);
        soften_pass::<FUSED>(&lo[at.clone()], delta, v, &mut soft[at]);
    }
}

/// `soft = lo + delta * h(v)`.
#[inline(always)]
fn soften_pass<const FUSED: bool>(lo: &[f32], delta: &[f32], v: &[f32], soft: &mut [f32]) {
    let n = soft.len();
    let (lo, delta, v) = (&lo[..n], &delta[..n], &v[..n]);
    for i in 0..n {
        soft[i] = fma::<FUSED>(delta[i], rectified::<FUSED>(v[i]).0, lo[i]);
    }
}

/// Compiles `pass` for one level, in its four variants.
macro_rules! level {
    ($step:ident, $soften:ident, $fused:literal, #[$attribute:meta]) => {
        #[$attribute]
        fn $step<const DIFFERENCE: bool, const ROUND: bool>(
            args: &StepArgs,
            gradient: &[f32],
            target: &[f32],
            lo: &[f32],
            delta: &[f32],
            v: &mut [f32],
            m1: &mut [f32],
            m2: &mut [f32],
            soft: &mut [f32],
        ) {
            pass::<$fused, DIFFERENCE, ROUND>(args, gradient, target, lo, delta, v, m1, m2, soft);
        }

        #[$attribute]
        fn $soften(lo: &[f32], delta: &[f32], v: &[f32], soft: &mut [f32]) {
            soften_pass::<$fused>(lo, delta, v, soft);
        }
    };
}

#[cfg(target_arch = "x86_64")]
level!(step_avx512, soften_avx512, true, #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx2,fma")]);
#[cfg(target_arch = "x86_64")]
level!(step_avx2, soften_avx2, true, #[target_feature(enable = "avx2,fma")]);
level!(step_baseline, soften_baseline, false, #[inline(never)]);

/// One iteration at a given level; see [`adaround_step`].
///
/// # Panics
/// If the slices differ in length, or this machine lacks `level`.
pub fn adaround_step_at(
    level: Isa,
    args: &StepArgs,
    gradient: Gradient<'_>,
    lo: &[f32],
    delta: &[f32],
    v: &mut [f32],
    m1: &mut [f32],
    m2: &mut [f32],
    soft: &mut [f32],
) {
    match (gradient, args.lambda != 0.0) {
        (Gradient::Difference { product, target }, true) => {
            run::<true, true>(level, args, product, target, lo, delta, v, m1, m2, soft)
        }
        (Gradient::Difference { product, target }, false) => {
            run::<true, false>(level, args, product, target, lo, delta, v, m1, m2, soft)
        }
        (Gradient::Given(g), true) => run::<false, true>(level, args, g, g, lo, delta, v, m1, m2, soft),
        (Gradient::Given(g), false) => run::<false, false>(level, args, g, g, lo, delta, v, m1, m2, soft),
    }
}

#[expect(clippy::too_many_arguments, reason = "a kernel: each argument is one array")]
fn run<const DIFFERENCE: bool, const ROUND: bool>(
    level: Isa,
    args: &StepArgs,
    gradient: &[f32],
    target: &[f32],
    lo: &[f32],
    delta: &[f32],
    v: &mut [f32],
    m1: &mut [f32],
    m2: &mut [f32],
    soft: &mut [f32],
) {
    let n = v.len();
    let lengths = [gradient.len(), target.len(), lo.len(), delta.len(), m1.len(), m2.len(), soft.len()];
    assert!(
        lengths.iter().all(|len| *len == n),
        "adaround step: expected {n} elements in each array, actual {lengths:?}"
    );
    assert!(level <= isa(), "this machine lacks {}", level.name());
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `level <= isa()`, and `isa()` found these features on this machine.
        Isa::Avx512 => unsafe {
            step_avx512::<DIFFERENCE, ROUND>(args, gradient, target, lo, delta, v, m1, m2, soft)
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe {
            step_avx2::<DIFFERENCE, ROUND>(args, gradient, target, lo, delta, v, m1, m2, soft)
        },
        _ => step_baseline::<DIFFERENCE, ROUND>(args, gradient, target, lo, delta, v, m1, m2, soft),
    }
}

/// One AdaRound iteration: Adam on `v`, then `soft = lo + delta * h(v)`. All arrays have the same length.
///
/// The gradient is `grad_scale * g * delta * h'(v) + lambda * d/dv (1 - |2 h(v) - 1|^beta)`, `g` the data gradient;
/// `h' = 0` where `h` is clamped. A weight with `delta` 0 is fixed: its gradient is 0 and `soft = lo`.
///
/// # Panics
/// If the slices differ in length.
pub fn adaround_step(
    args: &StepArgs,
    gradient: Gradient<'_>,
    lo: &[f32],
    delta: &[f32],
    v: &mut [f32],
    m1: &mut [f32],
    m2: &mut [f32],
    soft: &mut [f32],
) {
    adaround_step_at(isa(), args, gradient, lo, delta, v, m1, m2, soft);
}

/// `soft = lo + delta * h(v)`, as the step computes it.
///
/// # Panics
/// If the slices differ in length.
pub fn soften(lo: &[f32], delta: &[f32], v: &[f32], soft: &mut [f32]) {
    let n = soft.len();
    assert!(lo.len() == n && delta.len() == n && v.len() == n, "soften: expected {n} elements in each array");
    match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa()` found these features on this machine.
        Isa::Avx512 => unsafe { soften_avx512(lo, delta, v, soft) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { soften_avx2(lo, delta, v, soft) },
        _ => soften_baseline(lo, delta, v, soft),
    }
}

/// `up = 1` where `h(v) >= 0.5`, i.e. `v >= 0`, else 0; 0 where `delta` is 0.
///
/// # Panics
/// If the slices differ in length.
pub fn harden(v: &[f32], delta: &[f32], up: &mut [f32]) {
    assert!(
        v.len() == up.len() && delta.len() == up.len(),
        "harden: expected {} elements in each array",
        up.len()
    );
    for ((up, v), delta) in up.iter_mut().zip(v).zip(delta) {
        *up = if *v >= 0.0 && *delta != 0.0 { 1.0 } else { 0.0 };
    }
}

/// `sum(1 - |2 h(v) - 1|^beta)` over the weights that are not fixed (`delta != 0`), in f64; without lambda.
pub fn rounding_loss(v: &[f32], delta: &[f32], beta: f64) -> f64 {
    let free = v.iter().zip(delta).filter(|(_, delta)| **delta != 0.0);
    free.map(|(v, _)| 1.0 - (2.0 * rectified_sigmoid(f64::from(*v)) - 1.0).abs().powf(beta)).sum()
}

/// `h(v) = clamp(sigmoid(v) * 1.2 - 0.1, 0, 1)`, exactly (f64).
pub fn rectified_sigmoid(v: f64) -> f64 {
    ((ZETA - GAMMA) / (1.0 + (-v).exp()) + GAMMA).clamp(0.0, 1.0)
}

/// The `v` with `h(v) = fraction`: `-ln(1.2 / (fraction + 0.1) - 1)`; `fraction` is limited to [0, 1].
pub fn inverse_rectified_sigmoid(fraction: f64) -> f64 {
    -((ZETA - GAMMA) / (fraction.clamp(0.0, 1.0) - GAMMA) - 1.0).ln()
}

/// The step for one weight in f64, with the library's functions: the oracle of every level and device.
///
/// `state` is `[v, m1, m2]`; returns the new state and the soft weight.
pub fn reference_step(
    args: &StepArgs,
    data_gradient: f64,
    lo: f64,
    delta: f64,
    state: [f64; 3],
) -> ([f64; 3], f64) {
    let [v, m1, m2] = state;
    let [rate, beta1, beta2, eps, bias1, bias2, lambda, beta, scale] = [
        args.learning_rate,
        args.beta1,
        args.beta2,
        args.eps,
        args.bias1,
        args.bias2,
        args.lambda,
        args.beta,
        args.grad_scale,
    ]
    .map(f64::from);
    let sigma = 1.0 / (1.0 + (-v).exp());
    let h = rectified_sigmoid(v);
    let slope = if delta != 0.0 && h > 0.0 && h < 1.0 { (ZETA - GAMMA) * sigma * (1.0 - sigma) } else { 0.0 };
    let centred = 2.0 * h - 1.0;
    let rounding = if lambda == 0.0 {
        0.0
    } else {
        -2.0 * beta * centred.abs().powf(beta - 1.0) * centred.signum() * slope
    };
    let g = scale * data_gradient * delta * slope + lambda * rounding;
    let (m1, m2) = (beta1 * m1 + (1.0 - beta1) * g, beta2 * m2 + (1.0 - beta2) * g * g);
    let v = v - rate * m1 * bias1 / ((m2 * bias2).sqrt() + eps);
    ([v, m1, m2], lo + delta * rectified_sigmoid(v))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::available;
    use crate::random::Stream;

    /// Largest error of the new state and soft weights against f64, relative to `max(1, |value|)`. The gradients below are
    /// of order 1; Adam's ratio of two small numbers loses most.
    const STEP_ERROR_MAX: f64 = 5e-6;

    struct Problem {
        product: Vec<f32>,
        target: Vec<f32>,
        lo: Vec<f32>,
        delta: Vec<f32>,
        v: Vec<f32>,
        m1: Vec<f32>,
        m2: Vec<f32>,
        soft: Vec<f32>,
    }

    /// Rounding variables from well inside the clamp to well outside; every 11th weight fixed.
    fn problem(len: usize) -> Problem {
        let mut stream = Stream::new(42, len as u64, 0);
        let mut draw =
            |scale: f32| (0..len).map(|_| (stream.unit_f32() * 2.0 - 1.0) * scale).collect::<Vec<_>>();
        let (product, target, lo, v, m1) = (draw(1.0), draw(1.0), draw(2.0), draw(4.0), draw(0.1));
        let m2 = draw(0.1).iter().map(|m| m * m + 1e-3).collect();
        let delta = draw(0.2)
            .iter()
            .enumerate()
            .map(|(i, d)| if i % 11 == 0 { 0.0 } else { d.abs() + 0.01 })
            .collect();
        Problem { product, target, lo, delta, v, m1, m2, soft: vec![f32::NAN; len] }
    }

    fn args(lambda: f32, beta: f32) -> StepArgs {
        StepArgs { lambda, beta, grad_scale: 2.0, ..StepArgs::adam(0.01) }.at_iteration(7)
    }

    fn run_at(level: Isa, args: &StepArgs, p: &mut Problem, difference: bool) {
        let gradient = if difference {
            Gradient::Difference { product: &p.product, target: &p.target }
        } else {
            Gradient::Given(&p.product)
        };
        adaround_step_at(level, args, gradient, &p.lo, &p.delta, &mut p.v, &mut p.m1, &mut p.m2, &mut p.soft);
    }

    #[test]
    fn every_level_and_variant_matches_the_f64_twin() {
        for level in available() {
            for (lambda, beta) in [(0.0, 2.0), (0.01, 20.0), (0.3, 2.0), (0.3, 1.5)] {
                for difference in [true, false] {
                    for len in [1, 15, 16, 255, 257, 1000] {
                        let (before, mut p, args) = (problem(len), problem(len), args(lambda, beta));
                        run_at(level, &args, &mut p, difference);
                        for i in 0..len {
                            let target = if difference { f64::from(before.target[i]) } else { 0.0 };
                            let state = [before.v[i], before.m1[i], before.m2[i]].map(f64::from);
                            let data = f64::from(before.product[i]) - target;
                            let (state, soft) = reference_step(
                                &args,
                                data,
                                before.lo[i].into(),
                                before.delta[i].into(),
                                state,
                            );
                            let got = [p.v[i], p.m1[i], p.m2[i], p.soft[i]].map(f64::from);
                            for (got, want) in got.into_iter().zip([state[0], state[1], state[2], soft]) {
                                let error = (got - want).abs() / want.abs().max(1.0);
                                assert!(
                                    error <= STEP_ERROR_MAX,
                                    "{level:?} lambda {lambda} beta {beta} at {i}: {got}, expected {want}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn gradient_is_the_finite_difference_of_the_loss() {
        const H: f64 = 1e-6;
        let (lo, delta, wanted) = (-0.3, 0.25, -0.21);
        // Without memory, Adam's first moment is the gradient.
        let mut args = args(0.2, 3.3);
        (args.beta1, args.beta2) = (0.0, 0.0);
        let loss = |v: f64| {
            let h = rectified_sigmoid(v);
            let error: f64 = f64::from(lo) + f64::from(delta) * h - wanted;
            let data = 0.5 * f64::from(args.grad_scale) * error * error;
            data + f64::from(args.lambda) * (1.0 - (2.0 * h - 1.0).abs().powf(f64::from(args.beta)))
        };
        for i in -40..=40 {
            let v = i as f32 * 0.1 + 0.01;
            let soft = f64::from(lo) + f64::from(delta) * rectified_sigmoid(v.into());
            let gradient = [(soft - wanted) as f32];
            let (mut vs, mut m1, mut m2, mut out) = ([v], [0.0], [0.0], [0.0]);
            adaround_step(
                &args,
                Gradient::Given(&gradient),
                &[lo],
                &[delta],
                &mut vs,
                &mut m1,
                &mut m2,
                &mut out,
            );
            let want = (loss(f64::from(v) + H) - loss(f64::from(v) - H)) / (2.0 * H);
            assert!((f64::from(m1[0]) - want).abs() < 2e-6, "v {v}: {}, expected {want}", m1[0]);
        }
    }

    #[test]
    fn splitting_the_arrays_changes_no_bit() {
        let (mut whole, mut parts, args) = (problem(1003), problem(1003), args(0.01, 9.0));
        run_at(isa(), &args, &mut whole, true);
        for (start, end) in [(500, 1003), (0, 1), (1, 18), (18, 500)] {
            let gradient = Gradient::Difference {
                product: &parts.product[start..end],
                target: &parts.target[start..end],
            };
            let (v, m1, m2) =
                (&mut parts.v[start..end], &mut parts.m1[start..end], &mut parts.m2[start..end]);
            adaround_step(
                &args,
                gradient,
                &parts.lo[start..end],
                &parts.delta[start..end],
                v,
                m1,
                m2,
                &mut parts.soft[start..end],
            );
        }
        let bits = |p: &Problem| {
            [&p.v, &p.m1, &p.m2, &p.soft].map(|a| a.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
        };
        assert_eq!(bits(&whole), bits(&parts));
    }

    #[test]
    fn fixed_weights_stay_and_settled_moments_become_zero() {
        let args = args(0.5, 5.0);
        let (mut v, mut m1, mut m2, mut soft) = ([0.3, 9.0], [0.0, 1e-20], [0.0, 1e-20], [0.0; 2]);
        for _ in 0..2000 {
            adaround_step(
                &args,
                Gradient::Given(&[3.0, 3.0]),
                &[1.5, 1.0],
                &[0.0, 0.5],
                &mut v,
                &mut m1,
                &mut m2,
                &mut soft,
            );
        }
        assert_eq!(v[0], 0.3);
        assert_eq!(soft, [1.5, 1.5]);
        assert_eq!(m1, [0.0; 2]);
    }

    #[test]
    fn soften_agrees_with_the_step_and_harden_with_the_sign() {
        let mut p = problem(300);
        run_at(isa(), &args(0.0, 2.0), &mut p, true);
        let (mut soft, mut up) = (vec![0.0; 300], vec![0.0; 300]);
        soften(&p.lo, &p.delta, &p.v, &mut soft);
        assert_eq!(soft, p.soft);
        harden(&p.v, &p.delta, &mut up);
        for (i, up) in up.iter().enumerate() {
            let want = p.delta[i] != 0.0 && rectified_sigmoid(p.v[i].into()) >= 0.5;
            assert_eq!(*up, f32::from(u8::from(want)), "v {}", p.v[i]);
        }
    }

    #[test]
    fn inverse_inverts_and_has_aimets_value() {
        for i in 0..=100 {
            let fraction = f64::from(i) / 100.0;
            assert!((rectified_sigmoid(inverse_rectified_sigmoid(fraction)) - fraction).abs() < 1e-12);
        }
        // AIMET's golden: numpy seed 0, first of rand(32, 3, 12, 12), scale 0.001551126479.
        let steps: f64 = 0.548_813_503_927_324_8 / 0.001_551_126_479;
        assert!((inverse_rectified_sigmoid(steps - steps.floor()) - 1.1715).abs() < 1e-4);
    }

    #[test]
    fn rounding_loss_is_0_when_hard_and_1_per_undecided_weight() {
        assert_eq!(rounding_loss(&[20.0, -20.0], &[1.0, 1.0], 4.0), 0.0);
        assert!((rounding_loss(&[0.0, 0.0, 0.0], &[1.0, 0.0, 1.0], 4.0) - 2.0).abs() < 1e-12);
    }

    #[test]
    #[should_panic(expected = "adaround step: expected 2 elements")]
    fn unequal_lengths_are_refused() {
        let (mut v, mut m1, mut m2, mut soft) = ([0.0; 2], [0.0; 2], [0.0; 2], [0.0; 1]);
        adaround_step(
            &args(0.0, 2.0),
            Gradient::Given(&[0.0; 2]),
            &[0.0; 2],
            &[0.0; 2],
            &mut v,
            &mut m1,
            &mut m2,
            &mut soft,
        );
    }
}
