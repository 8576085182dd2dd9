//! The solver's CUDA kernels, run on the host, against their CPU twins.
//!
//! Not here: the same kernels on a GPU (`cuda_device`), the decoder's and the statistics' kernels.

mod shim;

use std::sync::LazyLock;

use halfstep_compute::cpu::step::reference_step;
use halfstep_compute::cpu::{self, Isa, PLANE_BLOCK, REFINE_BLOCK};
use halfstep_compute::random::Stream;
use halfstep_compute::{Activation, Cpu, Device, StepArgs, activation};
use halfstep_quant::{Granularity, GridSpec, MseGrids, RangeEstimator, Scheme, estimate};
use shim::values::{assert_close, assert_same, integers, uniform};
use shim::{Arg, Array, Family, Grid, by_rows, by_warps, flat, fresh, indices, input, poisoned, size, state};

static STEP: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("step"));
static REFINE: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("refine"));
static ROWS: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("rows"));
static PLANE: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("plane"));
static SEARCH: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("search"));
static ACTIVATION: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("activation"));

/// As the CPU's levels against f64 (`cpu/step.rs`).
const STEP_ERROR_MAX: f64 = 5e-6;

struct Weights {
    gradient: Vec<f32>,
    target: Vec<f32>,
    lo: Vec<f32>,
    delta: Vec<f32>,
    v: Vec<f32>,
    m1: Vec<f32>,
    m2: Vec<f32>,
}

fn weights(stream: &mut Stream, len: usize) -> Weights {
    let mut draw = |low, high| uniform(stream, len, low, high);
    let mut weights = Weights {
        gradient: draw(-1.0, 1.0),
        target: draw(-1.0, 1.0),
        lo: draw(-2.0, 2.0),
        delta: draw(0.01, 0.2),
        v: draw(-4.0, 4.0),
        m1: draw(-0.1, 0.1),
        m2: draw(1e-3, 1e-2),
    };
    for i in (0..len).step_by(11) {
        weights.delta[i] = 0.0;
    }
    // Where h(v) meets its clamp the slope jumps: a rounding away from it either side is right.
    let edge = cpu::inverse_rectified_sigmoid(1.0) as f32;
    for v in &mut weights.v {
        if (v.abs() - edge).abs() < 1e-4 {
            *v = 0.5;
        }
    }
    // Far outside, where exponentials overflow, and exactly in the middle, where the power's base is 0.
    for (v, special) in weights.v.iter_mut().skip(1).zip([-200.0, -88.0, 88.0, 200.0, 0.0]) {
        *v = special;
    }
    weights
}

fn expected_step(args: &StepArgs, w: &Weights, difference: bool) -> [Vec<f64>; 4] {
    let mut out = [(); 4].map(|()| Vec::new());
    for i in 0..w.v.len() {
        let target = if difference { w.target[i] } else { 0.0 };
        let data = f64::from(w.gradient[i]) - f64::from(target);
        let before = [w.v[i], w.m1[i], w.m2[i]].map(f64::from);
        let ([v, m1, m2], soft) = reference_step(args, data, w.lo[i].into(), w.delta[i].into(), before);
        for (out, value) in out.iter_mut().zip([v, m1, m2, soft]) {
            out.push(value);
        }
    }
    out
}

fn step_arguments(args: &StepArgs, w: &Weights, difference: bool) -> Vec<Arg> {
    let mut arguments = vec![Arg::U64(w.v.len() as u64), input(&w.gradient)];
    if difference {
        arguments.push(input(&w.target));
    }
    arguments.extend([
        input(&w.lo),
        input(&w.delta),
        state(&w.v),
        state(&w.m1),
        state(&w.m2),
        poisoned(w.v.len()),
    ]);
    let StepArgs { learning_rate, beta1, beta2, eps, bias1, bias2, lambda, beta, grad_scale } = *args;
    let constants = [learning_rate, beta1, beta2, eps, bias1, bias2, lambda, beta, grad_scale];
    arguments.extend(constants.map(Arg::F32));
    arguments
}

#[test]
fn the_fused_step_is_the_reference_step() {
    let Some(family) = &*STEP else { return };
    let mut stream = fresh();
    for (lambda, beta) in [(0.0, 2.0), (0.01, 20.0), (0.3, 2.0), (0.3, 1.5), (0.3, 1.0)] {
        let args = StepArgs { lambda, beta, grad_scale: 2.0, ..StepArgs::adam(0.01) }.at_iteration(7);
        for (kernel, difference) in [("adaround_step_difference", true), ("adaround_step_given", false)] {
            for len in [1, 3, 4, 13, 1023, 1024, 1025] {
                let w = weights(&mut stream, len);
                let outputs = family.outputs(kernel, &flat(len), &step_arguments(&args, &w, difference));
                let want = expected_step(&args, &w, difference);
                for ((got, want), name) in outputs.into_iter().zip(&want).zip(["v", "m1", "m2", "soft"]) {
                    let what = format!("{kernel} lambda {lambda} beta {beta} length {len}: {name}");
                    assert_close(&what, &got.f32(), want, STEP_ERROR_MAX);
                }
            }
        }
    }
}

/// Rows by blocks along y, columns by threads along x: as launched, too few of both, narrow.
fn by_columns(rows: usize, cols: usize) -> Vec<Grid> {
    let grid = |x: usize, y: usize, threads: [u32; 2]| Grid {
        blocks: [x.max(1) as u32, y.max(1) as u32, 1],
        threads: [threads[0], threads[1], 1],
    };
    vec![
        grid(cols.div_ceil(1024), rows, [256, 1]),
        grid(1, rows.div_ceil(3), [64, 1]),
        grid(2, rows.div_ceil(8), [32, 8]),
    ]
}

/// Powers of two between `2^low` and `2^high`.
fn powers(stream: &mut Stream, len: usize, low: i32, high: i32) -> Vec<f32> {
    (0..len).map(|_| 2f32.powi(low + stream.index((high - low) as u32) as i32)).collect()
}

#[test]
fn the_step_in_half_precision_is_the_reference_step() {
    let Some(family) = &*STEP else { return };
    let mut stream = fresh();
    for (rows, cols) in [(1, 1), (3, 5), (2, 4), (9, 12), (4, 515), (3, 1028)] {
        for (lambda, beta) in [(0.0, 2.0), (0.3, 1.5)] {
            let args = StepArgs { lambda, beta, grad_scale: 2.0, ..StepArgs::adam(0.01) }.at_iteration(7);
            let mut w = weights(&mut stream, rows * cols);
            // The last row's scale times a column's is not in f32's range, nor is anything else of it.
            let (mut by_row, by_column) = (powers(&mut stream, rows, 6, 12), powers(&mut stream, cols, 1, 9));
            if rows > 1 {
                by_row[rows - 1] = 2f32.powi(123);
                for i in (rows - 1) * cols..rows * cols {
                    (w.lo[i], w.delta[i]) = (w.lo[i] * 2f32.powi(-118), w.delta[i] * 2f32.powi(-118));
                }
            }
            // A product whose scaled value is the gradient, exactly.
            let product: Vec<f32> =
                (0..rows * cols).map(|i| w.gradient[i] * by_row[i / cols] / by_column[i % cols]).collect();
            let mut arguments = vec![size(rows), size(cols), input(&product), input(&w.target), input(&w.lo)];
            arguments.extend([input(&w.delta), input(&by_row), input(&by_column)]);
            arguments.extend([state(&w.v), state(&w.m1), state(&w.m2)]);
            arguments.push(Arg::Out(Array::U16(vec![u16::MAX; rows * cols])));
            let StepArgs { learning_rate, beta1, beta2, eps, bias1, bias2, lambda, beta, grad_scale } = args;
            let constants = [learning_rate, beta1, beta2, eps, bias1, bias2, lambda, beta, grad_scale];
            arguments.extend(constants.map(Arg::F32));
            let outputs = family.outputs("adaround_step_halves", &by_columns(rows, cols), &arguments);
            let [v, m1, m2, errors]: [Array; 4] = outputs.try_into().unwrap();
            let [want_v, want_m1, want_m2, want_soft] = expected_step(&args, &w, true);
            let what = |name| format!("[{rows}, {cols}] lambda {lambda}: {name}");
            for (got, want, name) in [(v, want_v, "v"), (m1, want_m1, "m1"), (m2, want_m2, "m2")] {
                assert_close(&what(name), &got.f32(), &want, STEP_ERROR_MAX);
            }
            let Array::U16(errors) = errors else { unreachable!("halves were asked for") };
            for (i, (half, want)) in errors.iter().zip(want_soft).enumerate() {
                let by = f64::from(by_row[i / cols]) * f64::from(by_column[i % cols]);
                // What is left of a lower error and its way up may be far smaller than both.
                let given = STEP_ERROR_MAX * by * f64::from(w.lo[i].abs() + w.delta[i]);
                let want = want * by;
                let (got, want) = (f64::from(half::f16::from_bits(*half)), want.clamp(-65504.0, 65504.0));
                let step = (want.abs() / 2048.0).max(2f64.powi(-25));
                assert!((got - want).abs() <= 1.1 * step + given, "{} {i}: {got} for {want}", what("errors"));
            }
        }
    }
}

#[test]
fn matrices_are_brought_into_half_precision_as_on_the_cpu() {
    let Some(family) = &*STEP else { return };
    let mut stream = fresh();
    for (rows, cols) in [(1, 1), (5, 3), (9, 4), (7, 128), (33, 300), (3, 1028)] {
        let mut x = uniform(&mut stream, rows * cols, -1.0, 1.0);
        // Beyond the range, below it, halfway between two, around the smallest normal number, nothing, no number.
        let special = [1e9, -1e9, 65504.0, 65519.0, 65520.0, 1e-9, -3e-8, 1.000_488_3, 6.1e-5, 6.104e-5, 0.0];
        for (x, special) in x.iter_mut().step_by(7).zip(special.into_iter().chain([-0.0, f32::NAN])) {
            *x = special;
        }
        let (by_row, by_column) = (powers(&mut stream, rows, -3, 3), powers(&mut stream, cols, -2, 2));
        let want: Vec<u16> = x
            .chunks_exact(cols)
            .zip(&by_row)
            .flat_map(|(row, by)| cpu::scaled_halves(row, *by, &by_column))
            .collect();
        let out = Arg::Out(Array::U16(vec![u16::MAX; rows * cols]));
        let arguments = [size(rows), size(cols), input(&x), input(&by_row), input(&by_column), out];
        let got = family.outputs("scaled_halves", &by_rows(rows), &arguments).remove(0);
        assert_eq!(got, Array::U16(want), "[{rows}, {cols}]");
    }
}

#[test]
fn rows_get_the_scales_that_the_cpu_gives_them() {
    let Some(family) = &*STEP else { return };
    let mut stream = fresh();
    for (rows, cols) in [(1, 1), (5, 3), (9, 256), (4, 1030)] {
        let size_of_row = powers(&mut stream, rows, -60, 60);
        let of_rows = |values: Vec<f32>| -> Vec<f32> {
            values.iter().enumerate().map(|(i, value)| value * size_of_row[i / cols]).collect()
        };
        let mut lo = of_rows(uniform(&mut stream, rows * cols, -1.0, 0.1));
        let mut delta = of_rows(uniform(&mut stream, rows * cols, 0.0, 2.0));
        let by_column = powers(&mut stream, cols, -8, 8);
        if rows > 4 {
            lo[cols..2 * cols].fill(0.0);
            delta[cols..2 * cols].fill(0.0);
            lo[2 * cols] = f32::NAN;
            lo[3 * cols] = f32::INFINITY;
            (lo[4 * cols], delta[4 * cols]) = (1e-40, 0.0);
        }
        let each = lo.chunks_exact(cols).zip(delta.chunks_exact(cols));
        let want: Vec<f32> = each.map(|(lo, delta)| cpu::row_scale(lo, delta, &by_column)).collect();
        let grids =
            [rows + 1, rows.div_ceil(3)].map(|x| Grid { blocks: [x as u32, 1, 1], threads: [256, 1, 1] });
        let arguments =
            [size(rows), size(cols), input(&lo), input(&delta), input(&by_column), poisoned(rows)];
        let got = family.outputs("row_scales", &grids, &arguments).remove(0);
        assert_same(&format!("[{rows}, {cols}]"), &got.f32(), &want);
    }
}

#[test]
fn settled_moments_become_zero_and_fixed_weights_stay() {
    let Some(family) = &*STEP else { return };
    let args = StepArgs { lambda: 0.5, beta: 5.0, ..StepArgs::adam(0.01) };
    let w = Weights {
        gradient: vec![3.0; 2],
        target: vec![0.0; 2],
        lo: vec![1.5, 1.0],
        delta: vec![0.0, 0.5],
        v: vec![0.3, 9.0],
        m1: vec![0.0, 1e-30],
        m2: vec![0.0, 1e-30],
    };
    let outputs = family.outputs("adaround_step_given", &flat(2), &step_arguments(&args, &w, false));
    let [v, m1, m2, soft]: [Array; 4] = outputs.try_into().unwrap();
    assert_eq!((v.f32()[0], soft.f32()), (0.3, vec![1.5, 1.5]));
    assert_eq!((m1.f32(), m2.f32()), (vec![0.0; 2], vec![0.0; 2]));
}

struct Descent {
    h: Vec<f32>,
    residual: Vec<f32>,
    delta: Vec<f32>,
    up: Vec<f32>,
}

/// `exact`: small integers, so that no sum rounds and every level of the CPU agrees.
fn descent(stream: &mut Stream, rows: usize, cols: usize, exact: bool) -> Descent {
    let samples = cols + 3;
    let x = integers(stream, samples * cols, -3, 3);
    let mut h = vec![0.0; cols * cols];
    cpu::matmul_tn(cols, cols, samples, 1.0, &x, cols, &x, cols, 0.0, &mut h, cols);
    let size = (samples * 9) as i32;
    let mut residual = integers(stream, rows * cols, -size, size);
    let up = integers(stream, rows * cols, 0, 1);
    let mut delta = integers(stream, rows * cols, 0, 5);
    delta.iter_mut().for_each(|d| *d = d.min(1.0));
    if !exact {
        h.iter_mut().for_each(|h| *h *= 0.123);
        residual.iter_mut().for_each(|r| *r *= 0.0371);
        delta.iter_mut().for_each(|d| *d *= 0.3 + stream.unit_f32());
    }
    Descent { h, residual, delta, up }
}

#[test]
fn refinement_flips_exactly_what_the_cpu_flips() {
    let (Some(family), mut stream) = (&*REFINE, fresh()) else { return };
    // Without fused multiply-add the CPU rounds twice.
    let fused = cpu::isa() >= Isa::Avx2;
    for (rows, cols) in [(1, 1), (1, 13), (7, 31), (8, 32), (9, 33), (50, 30), (5, 127), (17, 131), (3, 257)]
    {
        for block in
            [0..cols.min(REFINE_BLOCK), cols / 2..cols.min(cols / 2 + REFINE_BLOCK), cols / 3..cols / 3 + 1]
        {
            for exact in [true, false] {
                if !exact && !fused {
                    continue;
                }
                let Descent { h, residual, delta, up } = descent(&mut stream, rows, cols, exact);
                let width = block.len();
                let (mut want_up, mut want_flips) = (up.clone(), vec![f32::NAN; rows * width]);
                let want = cpu::refine_block(
                    rows,
                    cols,
                    block.clone(),
                    &h,
                    &residual,
                    &delta,
                    &mut want_up,
                    &mut want_flips,
                );
                let arguments = [
                    size(rows),
                    size(cols),
                    size(block.start),
                    size(width),
                    input(&h),
                    input(&residual),
                    input(&delta),
                    state(&up),
                    poisoned(rows * width),
                    Arg::Out(Array::U32(vec![u32::MAX; rows])),
                ];
                let outputs = family.outputs("refine_block", &by_warps(rows), &arguments);
                let [got_up, got_flips, counts]: [Array; 3] = outputs.try_into().unwrap();
                let what = format!("[{rows}, {cols}] {block:?} exact {exact}");
                assert_same(&format!("{what}: up"), &got_up.f32(), &want_up);
                assert_eq!(got_flips.f32(), want_flips, "{what}: flips");
                assert_eq!(total(family, rows, counts), want, "{what}: count");
            }
        }
    }
}

/// A block of threads per row: one block for every row, and fewer.
fn by_spans(rows: usize) -> Vec<Grid> {
    [rows + 1, rows.div_ceil(3)].map(|x| Grid { blocks: [x as u32, 1, 1], threads: [512, 1, 1] }).to_vec()
}

#[test]
fn whole_rows_are_refined_exactly_as_weight_by_weight() {
    let (Some(family), mut stream) = (&*REFINE, fresh()) else { return };
    let kernels = ["refine_rows_4096", "refine_rows_8192", "refine_rows_14336", "refine_rows_29696"];
    let shapes = [(1, 1), (3, 31), (4, 33), (2, 511), (3, 512), (2, 513), (1, 1031)];
    for (number, (rows, cols)) in shapes.into_iter().enumerate() {
        for (exact, sweeps) in [(true, 1), (false, 1), (true, 50), (false, 50)] {
            let kernel = kernels[(number + sweeps) % 4];
            let Descent { h, residual, delta, up } = descent(&mut stream, rows, cols, exact);
            let (mut want_up, mut want_residual) = (up.clone(), residual.clone());
            let sweeps = sweeps as u32;
            let want = cpu::refine_rows(sweeps, rows, cols, &h, &mut want_residual, &delta, &mut want_up);
            let arguments = [
                size(rows),
                size(cols),
                Arg::U32(sweeps),
                input(&h),
                state(&residual),
                input(&delta),
                state(&up),
                Arg::Out(Array::U32(vec![u32::MAX; rows])),
                Arg::Out(Array::U32(vec![u32::MAX; rows])),
            ];
            let outputs = family.outputs(kernel, &by_spans(rows), &arguments);
            let [got_residual, got_up, flips, ran]: [Array; 4] = outputs.try_into().unwrap();
            let what = format!("{kernel} [{rows}, {cols}] exact {exact}, {sweeps} sweeps");
            assert_same(&format!("{what}: up"), &got_up.f32(), &want_up);
            assert_same(&format!("{what}: residual"), &got_residual.f32(), &want_residual);
            let (want_flips, want_ran) = want.into_iter().unzip();
            assert_eq!(flips, Array::U32(want_flips), "{what}: flips");
            assert_eq!(ran, Array::U32(want_ran), "{what}: passes");
        }
    }
}

fn total(family: &Family, rows: usize, counts: Array) -> u64 {
    let one = [Grid { blocks: [1; 3], threads: [256, 1, 1] }];
    let arguments = [size(rows), Arg::In(counts), Arg::Out(Array::U64(vec![u64::MAX]))];
    match family.outputs("sum_counts", &one, &arguments).remove(0) {
        Array::U64(total) => total[0],
        other => unreachable!("{other:?}"),
    }
}

#[test]
fn a_nan_residual_flips_nothing_and_large_counts_do_not_wrap() {
    let Some(family) = &*REFINE else { return };
    let h = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
    let arguments = [
        size(1),
        size(3),
        size(0),
        size(3),
        input(&h),
        input(&[f32::NAN; 3]),
        input(&[1.0; 3]),
        state(&[0.0; 3]),
        poisoned(3),
        Arg::Out(Array::U32(vec![7])),
    ];
    let outputs = family.outputs("refine_block", &by_warps(1), &arguments);
    assert_eq!(outputs, [Array::F32(vec![0.0; 3]), Array::F32(vec![0.0; 3]), Array::U32(vec![0])]);
    for rows in [0, 1, 255, 256, 257, 1000] {
        let counts = Array::U32(vec![u32::MAX - 1; rows]);
        assert_eq!(total(family, rows, counts), rows as u64 * u64::from(u32::MAX - 1));
    }
}

#[test]
fn rows_are_filled_gathered_scaled_copied_and_mirrored_as_on_the_cpu() {
    let (Some(family), mut stream) = (&*ROWS, fresh()) else { return };
    for len in [1, 3, 4, 5, 1021, 1024] {
        let filled =
            family.outputs("fill", &flat(len), &[Arg::U64(len as u64), Arg::F32(-0.5), poisoned(len)]);
        assert_eq!(filled[0], Array::F32(vec![-0.5; len]));
    }
    for (count, width) in [(1, 1), (5, 3), (9, 4), (8, 31), (7, 128), (33, 300)] {
        let rows = 11;
        let source = uniform(&mut stream, rows * width, -1.0, 1.0);
        let chosen: Vec<u32> = (0..count).map(|_| stream.index(rows as u32)).collect();
        let mut want = Cpu.zeros(count * width).unwrap();
        Cpu.gather_rows(&Cpu.upload(&source).unwrap(), width, &chosen, &mut want).unwrap();
        let arguments = [size(count), size(width), input(&source), indices(&chosen), poisoned(count * width)];
        let got = family.outputs("gather_rows", &by_rows(count), &arguments).remove(0);
        assert_same(&format!("gather [{count}, {width}]"), &got.f32(), &want);
    }
    for (rows, width) in [(1, 1), (5, 3), (9, 4), (7, 128), (33, 300)] {
        let source = uniform(&mut stream, rows * width, -1.0, 1.0);
        let by = uniform(&mut stream, rows, -3.0, 3.0);
        let mut want = Cpu.zeros(rows * width).unwrap();
        Cpu.scale_rows(width, &by, &Cpu.upload(&source).unwrap(), &mut want).unwrap();
        let arguments = [size(rows), size(width), input(&source), input(&by), poisoned(rows * width)];
        let got = family.outputs("scale_rows", &by_rows(rows), &arguments).remove(0);
        assert_same(&format!("scale [{rows}, {width}]"), &got.f32(), &want);
        let old = uniform(&mut stream, rows * width, -1.0, 1.0);
        let chosen: Vec<u32> = (0..rows as u32).filter(|row| row % 3 != 1).collect();
        let mut want = Cpu.upload(&old).unwrap();
        Cpu.copy_rows(width, &chosen, &Cpu.upload(&source).unwrap(), &mut want).unwrap();
        let arguments = [size(chosen.len()), size(width), input(&source), indices(&chosen), state(&old)];
        let got = family.outputs("copy_rows", &by_rows(chosen.len()), &arguments).remove(0);
        assert_same(&format!("copy [{rows}, {width}]"), &got.f32(), &want);
    }
    for k in [1, 2, 31, 32, 33, 67, 96, 101] {
        let g = uniform(&mut stream, k * k, -1.0, 1.0);
        let mut want = g.clone();
        cpu::mirror_lower(&mut want, k);
        let tiles = k.div_ceil(32) as u32;
        let grids = [Grid { blocks: [tiles, tiles, 1], threads: [32, 8, 1] }];
        let got = family.outputs("mirror_lower", &grids, &[size(k), state(&g)]).remove(0);
        assert_same(&format!("mirror {k}"), &got.f32(), &want);
    }
}

/// `x' x / samples + 0.1 I` of random `x`: positive definite, `[n, n]`.
fn positive(stream: &mut Stream, n: usize) -> Vec<f32> {
    let samples = n + 7;
    let x = uniform(stream, samples * n, -1.0, 1.0);
    let mut a = vec![0.0; n * n];
    cpu::matmul_tn(n, n, samples, 1.0 / samples as f32, &x, n, &x, n, 0.0, &mut a, n);
    a.iter_mut().step_by(n + 1).for_each(|diagonal| *diagonal += 0.1);
    a
}

const ONE_BLOCK: [Grid; 1] = [Grid { blocks: [1; 3], threads: [PLANE_BLOCK as u32, 1, 1] }];

/// f64 on both sides, brought to f32 once: a GPU's compiler may order nothing differently, but its square root may differ.
const FACTOR_ERROR_MAX: f64 = 1e-6;

#[test]
fn diagonal_blocks_are_factored_and_inverted_as_on_the_cpu() {
    let (Some(family), mut stream) = (&*PLANE, fresh()) else { return };
    for (n, start, width) in [(1, 0, 1), (2, 0, 2), (31, 0, 31), (64, 0, 64), (70, 3, 64), (97, 64, 33)] {
        let a = positive(&mut stream, n);
        let (mut lower, mut inverses) = (vec![f32::NAN; n * n], vec![f32::NAN; n * PLANE_BLOCK]);
        cpu::factor_block(n, start..start + width, 0.25, &a, &mut lower, &mut inverses);
        let arguments = [
            size(n),
            size(start),
            size(width),
            Arg::F32(0.25),
            input(&a),
            poisoned(n * n),
            poisoned(n * PLANE_BLOCK),
        ];
        let outputs = family.outputs("factor_block", &ONE_BLOCK, &arguments);
        for ((got, want), name) in outputs.into_iter().zip([&lower, &inverses]).zip(["lower", "inverse"]) {
            let got = got.f32();
            let what = format!("{name} of {start}..+{width} of {n}");
            // Nothing is written outside of the block's triangle.
            assert!(got.iter().zip(want).all(|(got, want)| got.is_nan() == want.is_nan()), "{what}: extent");
            let written = |values: &[f32]| values.iter().copied().filter(|v| !v.is_nan()).collect::<Vec<_>>();
            let want: Vec<f64> = written(want).iter().map(|v| f64::from(*v)).collect();
            assert_close(&what, &written(&got), &want, FACTOR_ERROR_MAX);
        }
        // By definition: L L' is the block.
        for i in 0..width {
            for j in 0..=i {
                let at = |row: usize, k: usize| f64::from(lower[(start + row) * n + start + k]);
                let sum: f64 = (0..=j).map(|k| at(i, k) * at(j, k)).sum();
                let extra = if i == j { 0.25 } else { 0.0 };
                let want = f64::from(a[(start + i) * n + start + j]) + extra;
                assert!((sum - want).abs() < 1e-5, "[{i}, {j}]: {sum} for {want}");
            }
        }
    }
}

#[test]
fn a_block_that_is_not_positive_definite_gives_nan_in_its_inverse() {
    let Some(family) = &*PLANE else { return };
    for a in [[1.0, 2.0, 2.0, 1.0], [0.0; 4], [f32::NAN; 4], [f32::INFINITY; 4]] {
        let arguments = [
            size(2),
            size(0),
            size(2),
            Arg::F32(0.0),
            input(&a),
            state(&[0.0; 4]),
            state(&[0.0; 2 * PLANE_BLOCK]),
        ];
        let outputs = family.outputs("factor_block", &ONE_BLOCK, &arguments);
        assert!(outputs[1].clone().f32().iter().any(|value| value.is_nan()), "{a:?}");
    }
}

#[test]
fn the_nearest_plane_decides_what_the_cpu_decides() {
    let (Some(family), mut stream) = (&*PLANE, fresh()) else { return };
    for (rows, n, start, width) in
        [(1, 1, 0, 1), (3, 5, 2, 3), (9, 40, 0, 40), (17, 64, 0, 64), (5, 130, 66, 64), (2, 131, 128, 3)]
    {
        let factor = uniform(&mut stream, n * n, 0.5, 1.5);
        let low = uniform(&mut stream, rows * n, -1.0, 0.0);
        let mut delta = uniform(&mut stream, rows * n, 0.5, 1.0);
        delta.iter_mut().step_by(5).for_each(|delta| *delta = 0.0);
        let offset = uniform(&mut stream, rows * n, -2.0, 2.0);
        let [mut up, mut errors] = [(); 2].map(|()| vec![0.25; rows * n]);
        let values = (&low[..], &delta[..], &offset[..]);
        cpu::plane_block(rows, n, start..start + width, &factor, values, &mut up, &mut errors);
        let arguments = [
            size(rows),
            size(n),
            size(start),
            size(width),
            input(&factor),
            input(&low),
            input(&delta),
            input(&offset),
            state(&vec![0.25; rows * n]),
            state(&vec![0.25; rows * n]),
        ];
        let outputs = family.outputs("plane_block", &by_warps(rows), &arguments);
        let what = format!("[{rows}, {n}] {start}..+{width}");
        assert_same(&format!("{what}: up"), &outputs[0].clone().f32(), &up);
        assert_same(&format!("{what}: errors"), &outputs[1].clone().f32(), &errors);
    }
}

#[test]
fn columns_are_gathered_as_on_the_cpu() {
    let (Some(family), mut stream) = (&*PLANE, fresh()) else { return };
    for (rows, width) in [(1, 1), (5, 3), (8, 31), (7, 128), (33, 600)] {
        let source = uniform(&mut stream, rows * width, -1.0, 1.0);
        let order: Vec<u32> = (0..width).map(|_| stream.index(width as u32)).collect();
        let mut want = Cpu.zeros(rows * width).unwrap();
        Cpu.gather_columns(&Cpu.upload(&source).unwrap(), rows, &order, &mut want).unwrap();
        let arguments = [size(rows), size(width), input(&source), indices(&order), poisoned(rows * width)];
        let got = family.outputs("gather_columns", &by_rows(rows), &arguments).remove(0);
        assert_same(&format!("gather [{rows}, {width}]"), &got.f32(), &want);
    }
}

const ACTIVATIONS: [Activation; 13] = [
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

/// Kind, `a` and `b`, as the kernels number them.
fn coded(activation: Activation) -> (u32, f32, f32) {
    match activation {
        Activation::Identity => (0, 0.0, 0.0),
        Activation::Relu => (1, 0.0, 0.0),
        Activation::Clip { min, max } => (2, min, max),
        Activation::LeakyRelu { slope } | Activation::PRelu { slope } => (3, slope, 0.0),
        Activation::Sigmoid => (4, 0.0, 0.0),
        Activation::Tanh => (5, 0.0, 0.0),
        Activation::HardSwish => (6, 0.0, 0.0),
        Activation::Silu => (7, 0.0, 0.0),
        Activation::Gelu => (8, 0.0, 0.0),
        Activation::GeluTanh => (9, 0.0, 0.0),
    }
}

/// Both sides may be off by the CPU's stated error; a product of two such, by the size of the factors (here below 32).
const ACTIVATION_ERROR_MAX: f64 = 2.0 * activation::ERROR_MAX;

/// Numbers off the kinks, which lie at multiples of 1/4.
fn off_kinks(stream: &mut Stream, len: usize) -> Vec<f32> {
    let mut x = uniform(stream, len, -30.0, 30.0);
    for x in &mut x {
        if (*x * 4.0 - (*x * 4.0).round()).abs() < 0.01 {
            *x += 0.1;
        }
    }
    x
}

#[test]
fn every_activation_is_the_cpus() {
    let (Some(family), mut stream) = (&*ACTIVATION, fresh()) else { return };
    for activation in ACTIVATIONS {
        for (rows, width) in [(1, 1), (3, 7), (9, 32), (2, 257), (5, 1024)] {
            let x = off_kinks(&mut stream, rows * width);
            let up = uniform(&mut stream, rows * width, -2.0, 2.0);
            let mut want = x.clone();
            activation.apply(&mut want);
            let want64: Vec<f64> = want.iter().map(|y| f64::from(*y)).collect();
            let (kind, a, b) = coded(activation);
            let head = [size(rows), size(width), Arg::U32(kind), Arg::F32(a), Arg::F32(b)];
            let what = format!("{activation:?} [{rows}, {width}]");
            let arguments = [&head[..], &[input(&x), poisoned(x.len())]].concat();
            let got = family.outputs("activate", &by_rows(rows), &arguments).remove(0).f32();
            assert_close(&what, &got, &want64, ACTIVATION_ERROR_MAX * 1.0);
            // Halves of one matrix: the gate first, then the other factor.
            let both: Vec<f32> =
                x.chunks(width).zip(up.chunks(width)).flat_map(|(x, up)| [x, up].concat()).collect();
            let stride = size(2 * width);
            let tail = [input(&both), stride.clone(), input(&both[width..]), stride, poisoned(x.len())];
            let product: Vec<f64> = want64.iter().zip(&up).map(|(y, up)| y * f64::from(*up)).collect();
            let got = family.outputs("gate", &by_rows(rows), &[&head[..], &tail].concat()).remove(0).f32();
            assert_close(&format!("gate {what}"), &got, &product, 2.0 * ACTIVATION_ERROR_MAX);
        }
    }
}

#[test]
fn activation_residuals_are_the_cpus_with_one_entry_or_one_per_row() {
    let (Some(family), mut stream) = (&*ACTIVATION, fresh()) else { return };
    for (rows, cols) in [(1, 1), (13, 5), (13, 64), (26, 129)] {
        let z = off_kinks(&mut stream, rows * cols);
        let target = uniform(&mut stream, rows * cols, -2.0, 2.0);
        let bias: Vec<f32> = (0..rows).map(|row| row as f32 * 0.25 - 1.0).collect();
        let all: Vec<Activation> = (0..rows).map(|row| ACTIVATIONS[row % 13]).collect();
        for activations in std::iter::once(all).chain(ACTIVATIONS.map(|one| vec![one])) {
            let bias = if activations.len() == rows { &bias[..] } else { &[] };
            let mut want = Cpu.upload(&z).unwrap();
            let target_buffer = Cpu.upload(&target).unwrap();
            Cpu.activation_residual(&activations, bias, rows, cols, &mut want, &target_buffer).unwrap();
            let table: Vec<f32> = activations
                .iter()
                .enumerate()
                .flat_map(|(row, activation)| {
                    let (kind, a, b) = coded(*activation);
                    [kind as f32, a, b, bias.get(row).copied().unwrap_or(0.0)]
                })
                .collect();
            let arguments =
                [size(rows), size(cols), size(activations.len()), input(&table), state(&z), input(&target)];
            let got = family.outputs("activation_residual", &by_rows(rows), &arguments).remove(0).f32();
            // (f(x) - target) f'(x): each factor's error times the other factor, both below 32.
            let want: Vec<f64> = want.iter().map(|z| f64::from(*z)).collect();
            let what = format!("{activations:?} [{rows}, {cols}]");
            assert_close(&what, &got, &want, 64.0 * activation::ERROR_MAX);
        }
    }
}

#[test]
fn grids_are_found_to_the_bit_as_on_the_cpu() {
    let (Some(family), mut stream) = (&*SEARCH, fresh()) else { return };
    let group = |group_size| Granularity::PerGroup { group_size };
    let cases = [
        (4, Scheme::Symmetric, group(16), 3, 64),
        (2, Scheme::Symmetric, group(32), 2, 80),
        (3, Scheme::SymmetricStrict, Granularity::PerChannel, 2, 37),
        (4, Scheme::Asymmetric, group(24), 2, 50),
        (8, Scheme::Asymmetric, Granularity::PerChannel, 1, 131),
        (16, Scheme::Symmetric, group(5), 1, 11),
        (4, Scheme::Symmetric, Granularity::PerChannel, 1, 2050),
    ];
    for (bits, scheme, granularity, rows, cols) in cases {
        for weighed in [false, true] {
            let spec = GridSpec { bits, scheme, granularity, range: RangeEstimator::Mse };
            let mut w: Vec<f32> =
                uniform(&mut stream, rows * cols, -1.0, 1.0).iter().map(|x| x * x * x + 0.1 * x).collect();
            // Nothing but zeros, numbers below any scale, large ones, one that is far out.
            let sized = cols.min(16);
            w[..sized].fill(0.0);
            if rows > 1 {
                w[cols..cols + sized].iter_mut().for_each(|x| *x *= 1e-37);
                w[cols + sized..cols + 2 * sized].iter_mut().for_each(|x| *x *= 1e37);
            }
            w[rows * cols - 1] = -7.0;
            let mut importance = uniform(&mut stream, cols, 0.0, 3.0);
            importance[cols / 2..cols / 2 + sized / 2].fill(0.0);
            let importance = weighed.then_some(&importance[..]);
            let want = estimate(&spec, &w, rows, cols, importance).unwrap();
            let grids = MseGrids::new(&spec, &w, rows, cols, importance).unwrap().unwrap();
            let ((qmin, qmax), runs) = (grids.integers(), want.scale.len());
            let arguments = [
                size(rows),
                size(cols),
                size(grids.width()),
                Arg::U32(qmin.cast_unsigned()),
                Arg::U32(qmax.cast_unsigned()),
                Arg::U32(u32::from(grids.is_symmetric())),
                input(&w),
                input(grids.importance()),
                poisoned(runs),
                Arg::Out(Array::U32(vec![u32::MAX; runs])),
            ];
            let blocks = [runs + 1, runs.div_ceil(3)];
            let launches = blocks.map(|x| Grid { blocks: [x as u32, 1, 1], threads: [256, 1, 1] });
            let outputs = family.outputs("search_grids", &launches, &arguments);
            let [scale, zero_point]: [Array; 2] = outputs.try_into().unwrap();
            let what = format!("{bits} bits {scheme} {granularity} [{rows}, {cols}] weighed {weighed}");
            assert_same(&what, &scale.f32(), &want.scale);
            let want = want.zero_point.iter().map(|zero| zero.cast_unsigned()).collect();
            assert_eq!(zero_point, Array::U32(want), "{what}");
        }
    }
}
