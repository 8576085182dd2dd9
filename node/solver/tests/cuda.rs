//! Whole solves on a CUDA device against the CPU's; on machines without a device the host pretends to be one.
//!
//! Bits differ between kinds of devices; what must agree is how good the result is.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]
#![expect(clippy::print_stdout, reason = "says why a test was skipped")]

#[path = "../../compute/tests/device/mod.rs"]
mod device;
#[path = "../src/fixture.rs"]
mod fixture;

use fixture::{Fixture, spec};
use halfstep_compute::Cpu;
use halfstep_compute::Device;
use halfstep_compute::cuda::{Cuda, Precision};
use halfstep_quant::{Granularity, GridSpec, RangeEstimator, ScaleType, Scheme};
use halfstep_solver::{
    Activation, GramView, Prepared, RowProblem, SamplesView, Settings, Solution, Start, Statistics,
    Workspace, solve, solve_fitted,
};

/// Of two local optima of one problem one is rarely worse by more than this fraction of the objective.
const AGREEMENT: f64 = 0.03;

fn gram(fixture: &Fixture) -> Statistics<'_> {
    let count = fixture.n as f64;
    Statistics::Gram(GramView { h: &fixture.h, c: &fixture.c, g_energy: Some(&fixture.g), count })
}

fn samples(fixture: &Fixture) -> Statistics<'_> {
    Statistics::Samples(SamplesView { x_q: &fixture.x_q, x_fp: &fixture.x_fp, n: fixture.n })
}

fn problem<'a>(fixture: &'a Fixture, statistics: Statistics<'a>, activation: Activation) -> RowProblem<'a> {
    RowProblem {
        w: &fixture.w,
        rows: fixture.rows,
        cols: fixture.cols,
        encodings: &fixture.encodings,
        bias: None,
        output_scale: 1.0,
        activation,
        statistics,
        layer_key: 5,
        first_row: 0,
    }
}

fn check(device: &Cuda, problem: &RowProblem<'_>, settings: &Settings, what: &str) -> Solution {
    let want = solve(&Cpu, problem, settings, &mut Workspace::new()).unwrap().report;
    let got = solve(device, problem, settings, &mut Workspace::new()).unwrap();
    let nearest = (got.report.objective_nearest - want.objective_nearest).abs();
    assert!(nearest <= 1e-4 * want.objective_nearest, "{what}: nearest is {nearest} apart");
    let (cuda, cpu) = (got.report.objective, want.objective);
    println!("{what}: nearest {:.4e}, CPU {cpu:.4e}, CUDA {cuda:.4e}", want.objective_nearest);
    assert!(cuda <= (1.0 + AGREEMENT) * cpu, "{what}: {cuda} on CUDA, {cpu} on the CPU");
    assert!(cuda < got.report.objective_nearest, "{what}: no better than nearest");
    got
}

#[test]
fn gram_solves_are_as_good_as_the_cpus() {
    for precision in [Precision::Tf32, Precision::F32] {
        let Some(device) = device::cuda_of(precision) else { return };
        for (seed, rows, cols) in [(1, 40, 33), (2, 64, 128), (3, 96, 257), (4, 1, 300)] {
            let fixture = Fixture::new(seed, rows, cols, 2 * cols, spec(3));
            for start in [Start::Nearest, Start::Gptq] {
                let settings = Settings { start, ..Settings::default() };
                let what = format!("[{rows}, {cols}], {precision:?}, {start}");
                check(&device, &problem(&fixture, gram(&fixture), Activation::Identity), &settings, &what);
            }
        }
    }
}

#[test]
fn samples_solves_are_as_good_as_the_cpus() {
    let Some(device) = device::cuda_of(Precision::Tf32) else { return };
    let fixture = Fixture::new(7, 48, 96, 256, spec(3));
    for activation in [Activation::Identity, Activation::Relu, Activation::Gelu] {
        let what = format!("samples, {activation:?}");
        check(&device, &problem(&fixture, samples(&fixture), activation), &Settings::default(), &what);
    }
}

#[test]
fn equal_solves_give_equal_bytes_whatever_the_workspace_and_lane_did_before() {
    let Some(device) = device::cuda_of(Precision::Tf32) else { return };
    let fixture = Fixture::new(9, 64, 200, 300, spec(4));
    let other = Fixture::new(10, 80, 210, 300, spec(2));
    let settings = Settings::default();
    let first = solve(
        &device,
        &problem(&fixture, gram(&fixture), Activation::Identity),
        &settings,
        &mut Workspace::new(),
    );
    let lane = device.lane().unwrap();
    let mut workspace = Workspace::new();
    solve(&lane, &problem(&other, gram(&other), Activation::Identity), &settings, &mut workspace).unwrap();
    let again =
        solve(&lane, &problem(&fixture, gram(&fixture), Activation::Identity), &settings, &mut workspace);
    assert_eq!(first.unwrap().q, again.unwrap().q);
}

fn fitted<D: Device>(device: &D, problem: &RowProblem<'_>, settings: &Settings) -> Solution {
    let prepared = Prepared::new(device, &problem.statistics, problem.cols, settings).unwrap();
    let mut workspace = Workspace::new();
    let (encodings, solution) =
        solve_fitted(device, &prepared, problem, settings, ScaleType::F32, &mut workspace, &mut |_| {})
            .unwrap();
    encodings.validate().unwrap();
    solution
}

/// Normal equations on the device, also of a group that is shorter than the others, and the guard of the fits.
#[test]
fn fitted_scales_are_as_good_as_the_cpus() {
    let Some(device) = device::cuda_of(Precision::Tf32) else { return };
    let granularity = Granularity::PerGroup { group_size: 16 };
    let grid = GridSpec { bits: 3, scheme: Scheme::Asymmetric, granularity, range: RangeEstimator::Mse };
    let fixture = Fixture::new(31, 20, 100, 300, grid);
    let problem = problem(&fixture, gram(&fixture), Activation::Identity);
    let settings = Settings { iterations: 0, start: Start::Gptq, scale_fits: 4, ..Settings::default() };
    let [cpu, cuda] = [fitted(&Cpu, &problem, &settings), fitted(&device, &problem, &settings)];
    let (want, got) = (cpu.report.objective, cuda.report.objective);
    println!("fitted: CPU {want:.4e}, CUDA {got:.4e}");
    assert!((got - want).abs() <= AGREEMENT * want, "{got} on CUDA, {want} on the CPU");
    let unfitted = solve(&device, &problem, &settings, &mut Workspace::new()).unwrap().report.objective;
    assert!(got < 0.99 * unfitted, "{got} fitted, {unfitted} before");
}

/// Factor and nearest plane on the device, over several blocks and both with and without a gap between the streams.
#[test]
fn starts_in_gptqs_order_are_as_good_as_the_cpus() {
    let Some(device) = device::cuda_of(Precision::F32) else { return };
    for n in [63, 64, 200, 331] {
        let fixture = Fixture::new(17, 24, n, 2 * n, spec(4));
        let settings = Settings {
            iterations: 0,
            refine_sweeps: 0,
            start: Start::Gptq,
            damping: 0.01,
            ..Settings::default()
        };
        let problem = problem(&fixture, gram(&fixture), Activation::Identity);
        check(&device, &problem, &settings, &format!("start of {n} columns"));
    }
}
