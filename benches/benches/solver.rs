//! Micro benchmark of the solver's kernels, beside the machine's own GEMM rate measured in the same run.
//!
//! Each figure is the best of several repetitions (the machine may be shared); compare ratios rather than times.
//! Run: `cargo bench -p halfstep-benches --bench solver`. Not here: whole jobs.
#![expect(clippy::print_stdout, reason = "a benchmark's result is what it prints")]

use std::hint::black_box;
use std::time::Instant;

use halfstep_compute::random::Stream;
use halfstep_compute::{Gradient, StepArgs, cpu};

/// Repetitions; the best is kept.
const REPETITIONS: u32 = 25;
/// Shortest time of one repetition, in seconds; quick functions are called often enough to reach it.
const REPETITION_SECONDS: f64 = 0.02;

/// Best seconds per call.
fn best(mut call: impl FnMut()) -> f64 {
    call();
    let start = Instant::now();
    call();
    let calls = (REPETITION_SECONDS / start.elapsed().as_secs_f64()).ceil().clamp(1.0, 1e6) as u32;
    let repetition = |_| {
        let start = Instant::now();
        for _ in 0..calls {
            call();
        }
        start.elapsed().as_secs_f64() / f64::from(calls)
    };
    (0..REPETITIONS).map(repetition).fold(f64::INFINITY, f64::min)
}

fn uniform(seed: u64, len: usize) -> Vec<f32> {
    let mut stream = Stream::new(seed, 0, 0);
    (0..len).map(|_| stream.unit_f32() * 2.0 - 1.0).collect()
}

fn product_seconds(m: usize, n: usize, k: usize) -> f64 {
    let (a, b, mut out) = (uniform(1, m * k), uniform(2, k * n), vec![0.0; m * n]);
    best(|| cpu::matmul(m, n, k, 1.0, black_box(&a), k, black_box(&b), n, 0.0, black_box(&mut out), n))
}

fn flops(m: usize, n: usize, k: usize) -> f64 {
    2.0 * (m * n * k) as f64
}

fn gemm_rate() {
    let seconds = product_seconds(1024, 1024, 1024);
    println!(
        "gemm 1024^3: {:.1} GFLOP/s ({}, one thread)",
        flops(1024, 1024, 1024) / seconds / 1e9,
        cpu::isa().name()
    );
}

fn gram(n: usize, k: usize) {
    let x = uniform(3, n * k);
    let mut g = vec![0.0; k * k];
    let half = best(|| cpu::gram_lower(black_box(&x), n, k, black_box(&mut g)));
    let full = best(|| cpu::cross_gram(black_box(&x), black_box(&x), n, k, black_box(&mut g)));
    let rate = |seconds: f64| flops(k, k, n) / seconds / 1e9;
    let bytes = (n * k * 4) as f64 / half / 1e9;
    println!(
        "gram [{n}, {k}]: lower {:.1} GFLOP/s counted as full, full product {:.1}, ratio {:.2}; reads {bytes:.1} GB/s",
        rate(half),
        rate(full),
        full / half
    );
}

fn step(m: usize, k: usize) {
    let product = product_seconds(m, k, k);
    let len = m * k;
    let (prod, target, lo) = (uniform(4, len), uniform(5, len), uniform(6, len));
    let (delta, mut v) = (vec![0.1; len], uniform(7, len));
    let (mut m1, mut m2, mut soft) = (vec![0.0; len], vec![0.0; len], vec![0.0; len]);
    let mut report = |name: &str, lambda: f32| {
        let args = StepArgs { lambda, beta: 7.3, ..StepArgs::adam(1e-3) };
        let gradient = Gradient::Difference { product: &prod, target: &target };
        let pass =
            best(|| cpu::adaround_step(&args, gradient, &lo, &delta, &mut v, &mut m1, &mut m2, &mut soft));
        println!(
            "step [{m}, {k}] {name}: product {:.3} ms, pass {:.3} ms ({:.2} ns per weight), iteration / product {:.3}",
            product * 1e3,
            pass * 1e3,
            pass * 1e9 / len as f64,
            (product + pass) / product
        );
    };
    report("warm start", 0.0);
    report("with rounding loss", 0.01);
}

/// One sweep as the solver does it: blocks in column order, each followed by its product.
fn sweep(
    m: usize,
    k: usize,
    h: &[f32],
    residual: &mut [f32],
    delta: &[f32],
    up: &mut [f32],
    flips: &mut [f32],
) -> u64 {
    let mut flipped = 0;
    for start in (0..k).step_by(cpu::REFINE_BLOCK) {
        let block = start..k.min(start + cpu::REFINE_BLOCK);
        let width = block.len();
        flipped += cpu::refine_block(m, k, block, h, residual, delta, up, flips);
        cpu::matmul(m, k, width, 1.0, flips, width, &h[start * k..], k, 1.0, residual, k);
    }
    flipped
}

fn refine(m: usize, k: usize) {
    let n = 2 * k;
    let x = uniform(8, n * k);
    let mut h = vec![0.0; k * k];
    cpu::gram_lower(&x, n, k, &mut h);
    cpu::mirror_lower(&mut h, k);
    let (start, delta) = (uniform(9, m * k), vec![0.1; m * k]);
    let error = start.iter().map(|e| e * 0.05).collect::<Vec<_>>();
    let mut first = vec![0.0; m * k];
    cpu::matmul(m, k, k, 1.0, &error, k, &h, k, 0.0, &mut first, k);
    let (mut residual, mut up, mut flips) =
        (first.clone(), vec![0.0; m * k], vec![0.0; m * cpu::REFINE_BLOCK]);
    let mut flipped = 0;
    let seconds = best(|| {
        residual.copy_from_slice(&first);
        up.fill(0.0);
        flipped = sweep(m, k, &h, &mut residual, &delta, &mut up, &mut flips);
    });
    let blocks = best(|| {
        for start in (0..k).step_by(cpu::REFINE_BLOCK) {
            up.fill(0.0);
            let block = start..k.min(start + cpu::REFINE_BLOCK);
            black_box(cpu::refine_block(m, k, block, &h, &first, &delta, &mut up, &mut flips));
        }
    });
    let product = product_seconds(m, k, k);
    println!(
        "refine [{m}, {k}]: sweep {:.3} ms (kernel alone {:.3}), {flipped} of {} flipped, sweep / product {:.2}",
        seconds * 1e3,
        blocks * 1e3,
        m * k,
        seconds / product
    );
}

fn main() {
    gemm_rate();
    for (n, k) in [(4096, 512), (4096, 576), (4096, 1280), (8192, 147), (32768, 64), (65536, 25), (65536, 9)]
    {
        gram(n, k);
    }
    for (m, k) in [(256, 576), (512, 1152), (1280, 1280), (512, 512)] {
        step(m, k);
    }
    for (m, k) in [(256, 576), (512, 1152), (1280, 1280)] {
        refine(m, k);
    }
    gemm_rate();
}
