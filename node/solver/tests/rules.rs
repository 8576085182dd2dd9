//! The stated rules for unusual data, and refusals by name.

#[path = "../src/fixture.rs"]
mod fixture;

use fixture::{Fixture, spec};
use halfstep_compute::Cpu;
use halfstep_quant::Encodings;
use halfstep_solver::{
    Activation, ErrorKind, GramView, RowProblem, SamplesView, Settings, Solution, SolveError, Start,
    Statistics, Step, Workspace, solve, solve_watched,
};

fn problem<'a>(fixture: &'a Fixture, statistics: Statistics<'a>) -> RowProblem<'a> {
    RowProblem {
        w: &fixture.w,
        rows: fixture.rows,
        cols: fixture.cols,
        encodings: &fixture.encodings,
        bias: None,
        output_scale: 1.0,
        activation: Activation::Identity,
        statistics,
        layer_key: 0,
        first_row: 10,
    }
}

fn gram(fixture: &Fixture) -> Statistics<'_> {
    Statistics::Gram(GramView {
        h: &fixture.h,
        c: &fixture.c,
        g_energy: Some(&fixture.g),
        count: fixture.n as f64,
    })
}

fn attempt(problem: &RowProblem<'_>) -> Result<Solution, SolveError> {
    solve(&Cpu, problem, &Settings { iterations: 20, ..Settings::default() }, &mut Workspace::new())
}

#[test]
fn dead_inputs_stay_at_nearest_and_are_counted() {
    let mut fixture = Fixture::new(1, 4, 12, 50, spec(3));
    for dead in [0, 7] {
        fixture.x_q.iter_mut().skip(dead).step_by(12).for_each(|x| *x = 0.0);
    }
    fixture.measure();
    let nearest = fixture.encodings.quantize_nearest(&fixture.w);
    for start in [Start::Nearest, Start::Gptq] {
        for damping in [0.0, 1e-2] {
            let settings = Settings { start, damping, iterations: 50, ..Settings::default() };
            let solution =
                solve(&Cpu, &problem(&fixture, gram(&fixture)), &settings, &mut Workspace::new()).unwrap();
            assert_eq!(solution.report.dead_inputs, 2);
            assert!(solution.report.rounded_away > 0);
            for row in 0..4 {
                for dead in [0, 7] {
                    assert_eq!(
                        solution.q[row * 12 + dead],
                        nearest[row * 12 + dead],
                        "row {row} column {dead}"
                    );
                }
            }
        }
    }
}

#[test]
fn all_inputs_dead_gives_nearest() {
    let mut fixture = Fixture::new(1, 2, 6, 10, spec(3));
    fixture.x_q.fill(0.0);
    fixture.measure();
    let settings = Settings { start: Start::Gptq, iterations: 20, ..Settings::default() };
    let solution = solve(&Cpu, &problem(&fixture, gram(&fixture)), &settings, &mut Workspace::new()).unwrap();
    assert_eq!(solution.q, fixture.encodings.quantize_nearest(&fixture.w));
    assert_eq!((solution.report.dead_inputs, solution.report.rounded_away), (6, 0));
}

#[test]
fn rows_of_zeros_become_zero_points() {
    let mut fixture = Fixture::new(2, 3, 9, 50, spec(4));
    fixture.w[9..18].fill(0.0);
    let solution = attempt(&problem(&fixture, gram(&fixture))).unwrap();
    assert_eq!(solution.report.zero_rows, 1);
    assert_eq!(&solution.q[9..18], &fixture.encodings.zero_point[1..2].repeat(9)[..]);
}

#[test]
fn a_single_weight_is_solved() {
    let fixture = Fixture::new(3, 1, 1, 1, spec(2));
    assert_eq!(attempt(&problem(&fixture, gram(&fixture))).unwrap().q.len(), 1);
}

#[test]
fn bad_numbers_are_refused_by_matrix_and_entry() {
    let good = Fixture::new(4, 2, 5, 20, spec(4));
    let spoil = |values: &[f32], index: usize, value: f32| {
        let mut values = values.to_vec();
        values[index] = value;
        values
    };
    let nan_h = spoil(&good.h, 7, f32::NAN);
    let infinite_c = spoil(&good.c, 24, f32::INFINITY);
    let nan_g = spoil(&good.g, 0, f32::NAN);
    let negative = spoil(&good.h, 12, -1.0);
    let nan_w = spoil(&good.w, 6, f32::NAN);
    let nan_x = spoil(&good.x_q, 11, f32::NAN);
    let view = GramView { h: &good.h, c: &good.c, g_energy: Some(&good.g), count: 20.0 };
    let with = |view| problem(&good, Statistics::Gram(view));
    let samples = |x_q| Statistics::Samples(SamplesView { x_q, x_fp: &good.x_fp, n: 20 });
    let cases = [
        (with(GramView { h: &nan_h, ..view }), "gram H: entry [1, 2] is NaN", ErrorKind::Data),
        (with(GramView { c: &infinite_c, ..view }), "cross gram C: entry [4, 4] is inf", ErrorKind::Data),
        (with(GramView { g_energy: Some(&nan_g), ..view }), "gram G: entry [0, 0] is NaN", ErrorKind::Data),
        (with(GramView { h: &negative, ..view }), "diagonal entry 2 is -1", ErrorKind::Data),
        (with(GramView { count: 0.0, ..view }), "gram statistics: no samples", ErrorKind::Data),
        (
            with(GramView { h: &good.h[1..], ..view }),
            "gram H: expected 25 elements, actual 24",
            ErrorKind::Caller,
        ),
        (RowProblem { w: &nan_w, ..with(view) }, "weights: entry [11, 1] is NaN", ErrorKind::Data),
        (RowProblem { rows: 3, ..with(view) }, "rows of the encodings", ErrorKind::Caller),
        (RowProblem { bias: Some(&[f32::NAN, 0.0]), ..with(view) }, "bias: entry [10, 0]", ErrorKind::Data),
        (RowProblem { output_scale: f32::NAN, ..with(view) }, "output scale", ErrorKind::Data),
        (RowProblem { activation: Activation::Relu, ..with(view) }, "expected samples", ErrorKind::Caller),
        (problem(&good, samples(&nan_x)), "samples x_q: entry [2, 1] is NaN", ErrorKind::Data),
        (
            RowProblem {
                activation: Activation::PRelu { slope: vec![0.1; 5] },
                ..problem(&good, samples(&good.x_q))
            },
            "slopes of PRelu: expected 2 elements, actual 5",
            ErrorKind::Caller,
        ),
    ];
    for (problem, expect, kind) in cases {
        let error = attempt(&problem).unwrap_err();
        assert!(error.to_string().contains(expect), "{error}: expected {expect}");
        assert_eq!(error.kind(), kind, "{error}");
    }
}

#[test]
fn encodings_that_are_not_valid_are_refused() {
    let fixture = Fixture::new(4, 2, 5, 20, spec(4));
    let encodings = Encodings { scale: vec![1.0, f32::NAN], ..fixture.encodings.clone() };
    let error =
        attempt(&RowProblem { encodings: &encodings, ..problem(&fixture, gram(&fixture)) }).unwrap_err();
    assert!(matches!(error, SolveError::Encodings { first_row: 10, .. }), "{error}");
}

#[test]
fn numbers_too_large_for_f32_are_an_error_and_not_a_wrong_answer() {
    let mut fixture = Fixture::new(5, 2, 5, 20, spec(4));
    for matrix in [&mut fixture.h, &mut fixture.c, &mut fixture.g] {
        matrix.iter_mut().for_each(|value| *value *= 3e37);
    }
    fixture.w.iter_mut().for_each(|w| *w *= 1e18);
    fixture.encodings.scale.iter_mut().for_each(|s| *s *= 1e18);
    let error = attempt(&problem(&fixture, gram(&fixture))).unwrap_err();
    assert!(matches!(error, SolveError::Overflow { row: 10, .. }), "{error}");
}

#[test]
fn statistics_of_any_magnitude_give_the_same_rounding() {
    let fixture = Fixture::new(6, 4, 40, 200, spec(4));
    let reference = attempt(&problem(&fixture, gram(&fixture))).unwrap();
    for power in [-40, 40] {
        let factor = 2f32.powi(power);
        let scaled = |values: &[f32]| values.iter().map(|value| value * factor).collect::<Vec<f32>>();
        let (h, c, g) = (scaled(&fixture.h), scaled(&fixture.c), scaled(&fixture.g));
        let view = GramView { h: &h, c: &c, g_energy: Some(&g), count: 200.0 };
        assert_eq!(attempt(&problem(&fixture, Statistics::Gram(view))).unwrap().q, reference.q, "2^{power}");
    }
}

#[test]
fn a_watch_hears_every_iteration_and_changes_nothing() {
    let fixture = Fixture::new(1, 4, 12, 50, spec(3));
    let samples = SamplesView { x_q: &fixture.x_q, x_fp: &fixture.x_fp, n: fixture.n };
    for statistics in [gram(&fixture), Statistics::Samples(samples)] {
        let problem = problem(&fixture, statistics);
        let settings = Settings { iterations: 20, ..Settings::default() };
        let mut heard = Vec::new();
        let watched =
            solve_watched(&Cpu, &problem, &settings, &mut Workspace::new(), &mut |step| heard.push(step))
                .unwrap();
        let refine = heard.iter().position(|step| *step == Step::Refine).unwrap();
        assert_eq!(heard[..2], [Step::Multiply, Step::Learn]);
        assert_eq!(heard[2..refine], [Step::Iterate; 20]);
        let choose = heard.iter().position(|step| *step == Step::Choose).unwrap();
        assert_eq!(heard[choose + 1..], [Step::Guard, Step::Done]);
        let sweeps = &heard[refine + 1..choose];
        assert!(!sweeps.is_empty() && sweeps.iter().all(|step| *step == Step::Iterate), "{sweeps:?}");
        assert_eq!(watched.q, attempt(&problem).unwrap().q);
    }
}
