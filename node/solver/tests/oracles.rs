//! Brute force over all roundings, the guard, local optimality, determinism.

#[path = "../src/fixture.rs"]
mod fixture;

use fixture::{Fixture, spec};
use halfstep_compute::Cpu;
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme};
use halfstep_solver::{
    Activation, GramView, RowProblem, SamplesView, Settings, Solution, Start, Statistics, Workspace, solve,
};
use proptest::prelude::*;

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

fn solved(problem: &RowProblem<'_>, settings: &Settings) -> Solution {
    solve(&Cpu, problem, settings, &mut Workspace::new()).expect("the fixture is a valid problem")
}

fn quick() -> Settings {
    Settings { iterations: 100, damping: 0.0, refine_sweeps: 100, ..Settings::default() }
}

/// Floor and ceil of one weight, clipped, from the definition.
fn neighbours(encodings: &Encodings, row: usize, col: usize, w: f32) -> [i32; 2] {
    let below = (w / encodings.scale_at(row, col)).floor() as i32 + encodings.zero_point_at(row, col);
    [below, below + 1].map(|q| q.clamp(encodings.qmin(), encodings.qmax()))
}

fn real(fixture: &Fixture, row: usize, q: &[i32]) -> Vec<f32> {
    let value = |(j, q): (usize, &i32)| {
        (q - fixture.encodings.zero_point_at(row, j)) as f32 * fixture.encodings.scale_at(row, j)
    };
    q.iter().enumerate().map(value).collect()
}

/// The objective of one row's integers by definition.
fn objective(fixture: &Fixture, row: usize, q: &[i32], f: fn(f64) -> f64) -> f64 {
    fixture.objective(row, &real(fixture, row, q), f)
}

fn row_of<'a>(fixture: &Fixture, q: &'a [i32], row: usize) -> &'a [i32] {
    &q[row * fixture.cols..][..fixture.cols]
}

/// The best of all 2^n roundings of one row.
fn brute_force(fixture: &Fixture, row: usize) -> f64 {
    let cols = fixture.cols;
    let pairs: Vec<[i32; 2]> =
        (0..cols).map(|j| neighbours(&fixture.encodings, row, j, fixture.w[row * cols + j])).collect();
    let pick =
        |bits: usize| pairs.iter().enumerate().map(|(j, pair)| pair[bits >> j & 1]).collect::<Vec<i32>>();
    (0..1 << cols).map(|bits| objective(fixture, row, &pick(bits), |y| y)).fold(f64::INFINITY, f64::min)
}

/// Differences smaller than this fraction are below what f32 statistics can tell.
const TOLERANCE: f64 = 1e-4;

fn check_row(fixture: &Fixture, row: usize, q: &[i32]) {
    let mine = objective(fixture, row, q, |y| y);
    let nearest = fixture.encodings.quantize_nearest(&fixture.w);
    let nearest = objective(fixture, row, row_of(fixture, &nearest, row), |y| y);
    assert!(mine <= nearest * (1.0 + TOLERANCE), "row {row}: {mine}, nearest {nearest}");
    for j in 0..fixture.cols {
        let pair = neighbours(&fixture.encodings, row, j, fixture.w[row * fixture.cols + j]);
        assert!(pair.contains(&q[j]), "row {row} column {j}: {} is neither of {pair:?}", q[j]);
        let mut flipped = q.to_vec();
        flipped[j] = pair[usize::from(q[j] == pair[0])];
        let other = objective(fixture, row, &flipped, |y| y);
        assert!(mine <= other + TOLERANCE * nearest, "row {row}: flipping {j} gives {other}, have {mine}");
    }
}

#[test]
fn results_are_local_optima_no_worse_than_nearest_and_often_the_best_of_all_roundings() {
    let (mut rows, mut best) = (0, 0);
    for seed in 0..24 {
        let cols = [1, 2, 3, 5, 7, 8, 9, 10, 11, 11][seed as usize % 10];
        let fixture = Fixture::new(seed, 4, cols, 64, spec(3));
        let start = if seed % 2 == 0 { Start::Nearest } else { Start::Gptq };
        let solution =
            solved(&problem(&fixture, gram(&fixture), Activation::Identity), &Settings { start, ..quick() });
        let mut total = 0.0;
        for row in 0..4 {
            let q = row_of(&fixture, &solution.q, row);
            check_row(&fixture, row, q);
            let (mine, optimum) = (objective(&fixture, row, q, |y| y), brute_force(&fixture, row));
            assert!(mine >= optimum * (1.0 - TOLERANCE), "seed {seed} row {row}: better than the best");
            best += usize::from(mine <= optimum * (1.0 + TOLERANCE));
            rows += 1;
            total += mine;
        }
        let reported = solution.report.objective;
        assert!((reported - total).abs() <= 1e-3 * total, "seed {seed}: reported {reported}, is {total}");
    }
    println!("global optimum in {best} of {rows} rows");
    assert!(best * 10 >= rows * 7, "global optimum in only {best} of {rows} rows");
}

#[test]
fn every_start_and_stage_respects_the_guard() {
    for start in [Start::Nearest, Start::Gptq] {
        for (iterations, refine_sweeps) in [(0, 0), (0, 20), (30, 0), (30, 20)] {
            for damping in [0.0, 0.1] {
                let fixture = Fixture::new(40, 6, 33, 20, spec(2));
                let settings = Settings { start, iterations, refine_sweeps, damping, ..Settings::default() };
                let solution = solved(&problem(&fixture, gram(&fixture), Activation::Identity), &settings);
                let nearest = fixture.encodings.quantize_nearest(&fixture.w);
                for row in 0..6 {
                    let mine = objective(&fixture, row, row_of(&fixture, &solution.q, row), |y| y);
                    let other = objective(&fixture, row, row_of(&fixture, &nearest, row), |y| y);
                    assert!(
                        mine <= other * (1.0 + TOLERANCE),
                        "{settings:?} row {row}: {mine} for nearest {other}"
                    );
                }
                assert!(solution.report.objective <= solution.report.objective_nearest);
                let away = solution.q.iter().zip(&nearest).filter(|(a, b)| a != b).count();
                assert_eq!(solution.report.rounded_away, away);
            }
        }
    }
}

#[test]
fn rows_of_several_blocks_reach_local_optima_too() {
    for cols in [127, 128, 129, 300] {
        let fixture = Fixture::new(42, 2, cols, 400, spec(4));
        let settings = Settings { iterations: 0, ..quick() };
        let solution = solved(&problem(&fixture, gram(&fixture), Activation::Identity), &settings);
        for row in 0..2 {
            check_row(&fixture, row, row_of(&fixture, &solution.q, row));
        }
    }
}

#[test]
fn heavy_damping_gives_nearest() {
    let fixture = Fixture::new(41, 3, 20, 64, spec(4));
    let settings = Settings { damping: 1e4, ..quick() };
    let solution = solved(&problem(&fixture, gram(&fixture), Activation::Identity), &settings);
    assert_eq!(solution.q, fixture.encodings.quantize_nearest(&fixture.w));
}

#[test]
fn adaround_with_refinement_is_on_average_better_than_refinement_alone() {
    let (mut alone, mut both, mut nearest) = (0.0, 0.0, 0.0);
    for seed in 0..6 {
        let fixture = Fixture::new(100 + seed, 8, 150, 600, spec(4));
        let run = |iterations| {
            let settings = Settings { iterations, ..quick() };
            solved(&problem(&fixture, gram(&fixture), Activation::Identity), &settings).report
        };
        alone += run(0).objective;
        both += run(300).objective;
        nearest += run(0).objective_nearest;
    }
    assert!(
        both < 0.98 * alone && alone < 0.8 * nearest,
        "nearest {nearest}, refined {alone}, learned {both}"
    );
}

#[test]
fn runs_and_reused_workspaces_give_the_same_bytes() {
    let small = Fixture::new(50, 2, 5, 40, spec(4));
    let large = Fixture::new(51, 7, 131, 300, spec(4));
    let mut workspace = Workspace::new();
    for (statistics, activation) in
        [(gram as fn(&Fixture) -> Statistics<'_>, Activation::Identity), (samples, Activation::Relu)]
    {
        for start in [Start::Nearest, Start::Gptq] {
            let settings = Settings { start, iterations: 40, ..Settings::default() };
            let problem = |fixture| problem(fixture, statistics(fixture), activation.clone());
            let first = solved(&problem(&large), &settings);
            for fixture in [&small, &large, &small, &large] {
                let again = solve(&Cpu, &problem(fixture), &settings, &mut workspace).unwrap();
                if fixture.cols == large.cols {
                    assert_eq!(again, first);
                }
            }
        }
    }
}

#[test]
fn a_row_comes_out_as_well_alone_as_in_its_chunk() {
    // Not bit-equal: products may round differently with their number of rows, so the promise is equal chunks, equal bytes.
    let fixture = Fixture::new(60, 6, 40, 200, spec(4));
    let settings = Settings { iterations: 50, ..Settings::default() };
    let whole = solved(&problem(&fixture, gram(&fixture), Activation::Identity), &settings);
    for row in 0..6 {
        let encodings = fixture.encodings.slice_rows(row..row + 1);
        let base = problem(&fixture, gram(&fixture), Activation::Identity);
        let w = &fixture.w[row * 40..][..40];
        let alone =
            solved(&RowProblem { w, rows: 1, encodings: &encodings, first_row: row, ..base }, &settings);
        let q = row_of(&fixture, &whole.q, row);
        let (mine, other) = (objective(&fixture, row, q, |y| y), objective(&fixture, row, &alone.q, |y| y));
        assert!((mine - other).abs() <= 0.02 * mine, "row {row}: {mine} in the chunk, {other} alone");
    }
}

#[test]
fn samples_objective_is_reported_and_guarded_after_the_activation() {
    let relu = |y: f64| y.max(0.0);
    for (iterations, refine_sweeps) in [(0, 0), (60, 0), (0, 20), (200, 20)] {
        let fixture = Fixture::new(70, 5, 24, 300, spec(3));
        let settings = Settings { iterations, refine_sweeps, ..Settings::default() };
        let solution = solved(&problem(&fixture, samples(&fixture), Activation::Relu), &settings);
        let nearest = fixture.encodings.quantize_nearest(&fixture.w);
        let (mut mine, mut other) = (0.0, 0.0);
        for row in 0..5 {
            let value = objective(&fixture, row, row_of(&fixture, &solution.q, row), relu);
            let before = objective(&fixture, row, row_of(&fixture, &nearest, row), relu);
            assert!(value <= before * (1.0 + TOLERANCE), "row {row}: {value} for nearest {before}");
            mine += value;
            other += before;
        }
        let report = solution.report;
        assert!((report.objective - mine).abs() <= 1e-3 * mine, "reported {}, is {mine}", report.objective);
        assert!((report.objective_nearest - other).abs() <= 1e-3 * other);
        if refine_sweeps > 0 {
            assert!(mine < 0.9 * other, "{mine} for nearest {other}");
        }
    }
}

#[test]
fn samples_learn_without_refinement_too() {
    let fixture = Fixture::new(71, 6, 24, 400, spec(3));
    let settings = Settings { iterations: 1000, refine_sweeps: 0, ..Settings::default() };
    for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
        let report = solved(&problem(&fixture, samples(&fixture), activation.clone()), &settings).report;
        let ratio = report.objective / report.objective_nearest;
        assert!(ratio < 0.8, "{activation:?}: {ratio} of nearest");
    }
}

#[test]
fn samples_and_gram_agree_when_nothing_is_learned() {
    let fixture = Fixture::new(72, 4, 30, 500, spec(4));
    let settings = Settings { iterations: 0, ..Settings::default() };
    let by_gram = solved(&problem(&fixture, gram(&fixture), Activation::Identity), &settings).report;
    let by_samples = solved(&problem(&fixture, samples(&fixture), Activation::Identity), &settings).report;
    for (a, b) in [
        (by_gram.objective, by_samples.objective),
        (by_gram.objective_nearest, by_samples.objective_nearest),
        (by_gram.signal, by_samples.signal),
    ] {
        assert!((a - b).abs() <= 1e-3 * a, "{by_gram:?} and {by_samples:?}");
    }
}

#[test]
fn output_scale_scales_the_report_and_not_the_rounding() {
    let fixture = Fixture::new(73, 4, 30, 500, spec(4));
    let base = problem(&fixture, gram(&fixture), Activation::Identity);
    let one = solved(&base, &quick());
    let three = solved(&RowProblem { output_scale: 3.0, ..base.clone() }, &quick());
    assert_eq!(one.q, three.q);
    assert!((three.report.objective - 9.0 * one.report.objective).abs() < 1e-6 * three.report.objective);
    let none = solved(&RowProblem { output_scale: 0.0, ..base }, &quick());
    assert_eq!((none.report.objective, none.report.signal), (0.0, 0.0));
}

fn any_spec() -> impl Strategy<Value = GridSpec> {
    let bits = prop_oneof![2u8..=8, Just(16)];
    let scheme =
        prop_oneof![Just(Scheme::Symmetric), Just(Scheme::SymmetricStrict), Just(Scheme::Asymmetric)];
    let granularity = prop_oneof![
        Just(Granularity::PerTensor),
        Just(Granularity::PerChannel),
        (1usize..7).prop_map(|group_size| Granularity::PerGroup { group_size })
    ];
    let range = prop_oneof![
        Just(RangeEstimator::MinMax),
        Just(RangeEstimator::Mse),
        Just(RangeEstimator::Percentile { percentile: 90.0 })
    ];
    (bits, scheme, granularity, range).prop_map(|(bits, scheme, granularity, range)| GridSpec {
        bits,
        scheme,
        granularity,
        range,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_grid_gives_neighbours_and_never_worse_than_nearest(
        spec in any_spec(), seed in 0u64..1000, rows in 1usize..5, cols in 1usize..20, gptq: bool, on_samples: bool,
    ) {
        let fixture = Fixture::new(seed, rows, cols, 30, spec);
        let start = if gptq { Start::Gptq } else { Start::Nearest };
        let settings = Settings { iterations: 20, start, ..Settings::default() };
        let statistics = if on_samples { samples(&fixture) } else { gram(&fixture) };
        let solution = solved(&problem(&fixture, statistics, Activation::Identity), &settings);
        let nearest = fixture.encodings.quantize_nearest(&fixture.w);
        prop_assert!(fixture.encodings.dequantize(&solution.q).is_ok());
        for row in 0..rows {
            let q = row_of(&fixture, &solution.q, row);
            for (j, q) in q.iter().enumerate() {
                prop_assert!(neighbours(&fixture.encodings, row, j, fixture.w[row * cols + j]).contains(q));
            }
            let mine = objective(&fixture, row, q, |y| y);
            let other = objective(&fixture, row, row_of(&fixture, &nearest, row), |y| y);
            // 16 bits: the rounding error itself is near the resolution of f32 moments.
            let resolution = 1e-6 * fixture.objective(row, &vec![0.0; cols], |y| y);
            prop_assert!(mine <= other * (1.0 + TOLERANCE) + resolution, "row {row}: {mine} for nearest {other}");
        }
    }
}
