//! How fast this machine is at what a job spends its time on, measured in about a fifth of a second.
//!
//! Two solves of made-up problems give what a solve costs beyond its products: a call, and each weight.
//! Not here: what a job needs of it (`probe`), adding up (whoever plans).

use crate::failure;
use crate::probe::fastest;
use halfstep_compute::{Cpu, cpu};
use halfstep_quant::{Granularity, GridSpec, RangeEstimator, Scheme, estimate};
use halfstep_solver::{Activation, GramView, RowProblem, Settings, Statistics, Workspace, solve};
use halfstep_work::{Failure, SolverSettings};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The product that is timed: `[ROWS, SIDE] x [SIDE, SIDE]`, the shape of a row chunk times a Gram matrix.
const ROWS: usize = 128;
const SIDE: usize = 512;
/// How long products are repeated, once on one thread and once on all.
const PRODUCT_TIME: Duration = Duration::from_millis(60);
/// How long a node's own probe takes.
const PROBE_TIME: Duration = Duration::from_millis(20);
/// The solves that are timed: nearly nothing but the call, and weights enough to time.
const CALL: (usize, usize) = (1, 9);
const WEIGHTS: (usize, usize) = (64, 64);
/// Sweeps that refinement needs before nothing flips, rarely more.
const SWEEPS: u32 = 5;
/// A sweep's products, choices and residual in units of an iteration's product.
const SWEEP_PRODUCTS: u32 = 3;

/// A round of fitting scales: half a product for its equations, one for what it reaches, and sweeps, since it begins near its end.
const FIT_PRODUCTS: f64 = 1.5;
const FIT_SWEEPS: u32 = 2;

/// Speeds of this machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Floating point operations per second of matrix products, one thread; a multiply-add is two.
    pub flops_per_second: f64,
    /// What all threads together do, in units of one thread alone: at most the number of threads, less where they
    /// share cores.
    pub parallel: f64,
    /// Seconds of one solve of next to nothing, with the job's settings.
    pub solve_seconds: f64,
    /// Seconds per weight of a solve without its products, with the job's settings.
    pub weight_seconds: f64,
}

impl Rates {
    /// Measures.
    ///
    /// # Errors
    /// What the solver says of settings it refuses.
    pub(crate) fn measure(settings: &SolverSettings, threads: usize) -> Result<Self, Failure> {
        let alone = product_rate();
        let parallel = if threads > 1 { rate_of_all(threads) / alone } else { 1.0 };
        let call = solve_seconds(settings, CALL)?;
        let (rows, cols) = WEIGHTS;
        let products = solve_flops(rows, cols, settings.iterations, settings.refine_sweeps, 0) / alone;
        let rest = solve_seconds(settings, WEIGHTS)? - call - products;
        Ok(Self {
            flops_per_second: alone,
            parallel: parallel.clamp(1.0, threads.max(1) as f64),
            solve_seconds: call,
            weight_seconds: rest.max(0.0) / (rows * cols) as f64,
        })
    }

    /// Seconds of one solve of `[rows, cols]` weights on the gram objective, one thread.
    pub fn gram_solve_seconds(
        &self,
        (rows, cols): (usize, usize),
        iterations: u32,
        refine_sweeps: u32,
        scale_fits: u32,
    ) -> f64 {
        self.solve_seconds
            + self.weight_seconds * (rows * cols) as f64
            + solve_flops(rows, cols, iterations, refine_sweeps, scale_fits) / self.flops_per_second
    }
}

/// Products of one solve: each iteration and each sweep multiplies `[rows, cols]` by `[cols, cols]`.
fn solve_flops(rows: usize, cols: usize, iterations: u32, refine_sweeps: u32, scale_fits: u32) -> f64 {
    let sweeps = |most: u32| f64::from(SWEEP_PRODUCTS * refine_sweeps.min(most));
    let fits = f64::from(scale_fits) * (FIT_PRODUCTS + sweeps(FIT_SWEEPS));
    let products = f64::from(iterations) + sweeps(SWEEPS) + fits;
    2.0 * rows as f64 * (cols as f64).powi(2) * products
}

/// Flops per second of one thread, measured once per process in less than 50 ms.
pub(crate) fn probe_flops() -> f64 {
    static MEASURED: OnceLock<f64> = OnceLock::new();
    *MEASURED.get_or_init(|| rate_within(PROBE_TIME))
}

/// Flops per second of this thread.
fn product_rate() -> f64 {
    rate_within(PRODUCT_TIME)
}

fn rate_within(time: Duration) -> f64 {
    let (a, b) = (vec![0.5f32; ROWS * SIDE], vec![0.25f32; SIDE * SIDE]);
    let mut out = vec![0.0f32; ROWS * SIDE];
    let mut product = || cpu::matmul(ROWS, SIDE, SIDE, 1.0, &a, SIDE, &b, SIDE, 0.0, &mut out, SIDE);
    product();
    let begun = Instant::now();
    let mut runs = 0u32;
    while begun.elapsed() < time {
        product();
        runs += 1;
    }
    f64::from(runs) * 2.0 * (ROWS * SIDE * SIDE) as f64 / begun.elapsed().as_secs_f64()
}

fn rate_of_all(threads: usize) -> f64 {
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(product_rate)).collect();
        all.into_iter().map(|one| one.join().unwrap_or(0.0)).sum()
    })
}

/// Seconds of a solve of made-up weights and inputs.
fn solve_seconds(settings: &SolverSettings, (rows, cols): (usize, usize)) -> Result<f64, Failure> {
    // Any spread of values will do; multiples of the golden ratio need no generator.
    let spread = |i: usize| ((i as f64 * 0.618_033_988_749_895).fract() - 0.5) as f32;
    let w: Vec<f32> = (0..rows * cols).map(spread).collect();
    let h: Vec<f32> = (0..cols * cols)
        .map(|i| if i / cols == i % cols { 1.0 } else { 0.5 * spread(i / cols) * spread(i % cols) })
        .collect();
    let spec = GridSpec {
        bits: 4,
        scheme: Scheme::Symmetric,
        granularity: Granularity::PerChannel,
        range: RangeEstimator::MinMax,
    };
    let encodings = estimate(&spec, &w, rows, cols, None).map_err(|e| failure::quant("made up", &e))?;
    let problem = RowProblem {
        w: &w,
        rows,
        cols,
        encodings: &encodings,
        bias: None,
        output_scale: 1.0,
        activation: Activation::Identity,
        statistics: Statistics::Gram(GramView { h: &h, c: &h, g_energy: None, count: 1.0 }),
        layer_key: 0,
        first_row: 0,
    };
    let settings = Settings {
        iterations: settings.iterations,
        refine_sweeps: settings.refine_sweeps,
        ..Settings::default()
    };
    let mut workspace = Workspace::new();
    let mut timed = || {
        let begun = Instant::now();
        let solved = solve(&Cpu, &problem, &settings, &mut workspace);
        solved.map(|_| begun.elapsed().as_secs_f64()).map_err(|e| failure::solve("made up", &e))
    };
    timed()?;
    fastest(timed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_solve_costs_a_call_its_weights_and_its_products() {
        let rates = Rates { flops_per_second: 1e9, parallel: 2.0, solve_seconds: 0.5, weight_seconds: 1e-3 };
        // 2 * 10 * 20^2 * (85 + 3 * 5) flops; more sweeps than are needed cost nothing.
        let expect = 0.5 + 0.2 + 8e5 / 1e9;
        for sweeps in [5, 30] {
            assert!((rates.gram_solve_seconds((10, 20), 85, sweeps, 0) - expect).abs() < 1e-12);
        }
        assert!(rates.gram_solve_seconds((10, 20), 85, 0, 0) < expect);
        // Two rounds of 1.5 products and 2 sweeps.
        let fitted = rates.gram_solve_seconds((10, 20), 85, 30, 2);
        assert!((fitted - expect - 2.0 * 7.5 * 8e3 / 1e9).abs() < 1e-12, "{fitted}");
    }

    #[test]
    fn twice_the_threads_are_at_most_twice_as_fast() {
        let alone = product_rate();
        assert!(alone.is_finite() && alone > 1e6, "{alone}");
        assert!(rate_of_all(2) > 0.0);
    }
}
