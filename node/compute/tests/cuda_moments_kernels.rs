//! The kernels of second moments and of sums over rows, run on the host, against their CPU twins.
//!
//! Not here: what is put together of them (`device/moments.rs`).

mod shim;

use std::sync::LazyLock;

use halfstep_compute::cpu;
use halfstep_compute::random::Stream;
use shim::values::uniform;
use shim::{Arg, Array, Family, Grid, by_rows, by_warps, flat, fresh, input, poisoned, size, state};

static MOMENTS: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("moments"));
static OBJECTIVE: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("objective"));
static DOTS: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("dots"));

/// f64 sums of some hundred terms in two orders, relative to the largest.
const SUM_ERROR_MAX: f64 = 1e-13;

fn wide(values: Vec<f64>) -> Arg {
    Arg::Out(Array::F64(values))
}

fn f64s(array: Array) -> Vec<f64> {
    let Array::F64(values) = array else { unreachable!("an array of f64") };
    values
}

fn optional(values: Option<&[f32]>) -> Arg {
    values.map_or(Arg::Null, input)
}

#[test]
fn errors_of_roundings_are_exact_and_sums_over_rows_agree() {
    let (Some(family), mut stream) = (&*OBJECTIVE, fresh()) else { return };
    for len in [1, 3, 255, 1024, 1031] {
        let [low, delta] = [(); 2].map(|()| uniform(&mut stream, len, -1.0, 1.0));
        let up: Vec<f32> = (0..len).map(|_| stream.index(2) as f32).collect();
        let mut want = vec![0.0; len];
        cpu::rounding_errors(&low, &delta, &up, &mut want);
        let arguments = [Arg::U64(len as u64), input(&low), input(&delta), input(&up), poisoned(len)];
        let got = family.outputs("rounding_errors", &flat(len), &arguments).remove(0).f32();
        assert_eq!(got, want, "{len}");
    }
    for (rows, cols) in [(1, 1), (3, 31), (2, 256), (5, 257), (4, 1033)] {
        let [errors, product, target] = [(); 3].map(|()| uniform(&mut stream, rows * cols, -1.0, 1.0));
        let [roots, gaps] = [(); 2].map(|()| uniform(&mut stream, cols, 0.0, 1.0));
        let arguments = [
            size(rows),
            size(cols),
            input(&errors),
            input(&product),
            input(&target),
            input(&roots),
            input(&gaps),
            wide(vec![f64::NAN; rows * 4]),
        ];
        let grids =
            [rows + 1, rows.div_ceil(3)].map(|x| Grid { blocks: [x as u32, 1, 1], threads: [256, 1, 1] });
        let got = f64s(family.outputs("row_sums", &grids, &arguments).remove(0));
        for row in 0..rows {
            let line = |matrix: &'_ [f32]| matrix[row * cols..(row + 1) * cols].to_vec();
            let want = cpu::row_sums(&line(&errors), &line(&product), &line(&target), &roots, &gaps);
            for (got, want) in got[row * 4..].iter().zip(want) {
                assert!(
                    (got - want).abs() <= SUM_ERROR_MAX * cols as f64,
                    "[{rows}, {cols}] row {row}: {got} for {want}"
                );
            }
        }
    }
}

/// Height and width of a tile, where it begins, and the side of what it is a part of.
const TILES: [(usize, usize, usize, usize, usize); 5] =
    [(1, 1, 0, 0, 1), (3, 5, 2, 1, 7), (8, 33, 0, 4, 37), (31, 64, 33, 0, 64), (5, 300, 1, 7, 307)];

#[test]
fn tiles_are_widened_exactly_with_another_diagonal_or_less_another_matrix() {
    let (Some(family), mut stream) = (&*MOMENTS, fresh()) else { return };
    for (rows, width, top, left, side) in TILES {
        let [plus, minus] = [(); 2].map(|()| uniform(&mut stream, side * side, -1.0, 1.0));
        let diagonal = uniform(&mut stream, side, 2.0, 3.0);
        for (own, less, factor) in [(true, true, -1.0), (true, false, -1.0), (false, true, 1.0)] {
            let (own, less) = (own.then_some(&diagonal[..]), less.then_some(&minus[..]));
            let arguments = [
                size(rows),
                size(width),
                size(top),
                size(left),
                Arg::U64(side as u64),
                input(&plus),
                optional(own),
                optional(less),
                Arg::F64(factor),
                wide(vec![f64::NAN; rows * width]),
            ];
            let got = f64s(family.outputs("widen", &by_rows(rows), &arguments).remove(0));
            for (at, got) in got.iter().enumerate() {
                let (row, col) = (top + at / width, left + at % width);
                let value = own.filter(|_| row == col).map_or(plus[row * side + col], |own| own[row]);
                let other = less.map_or(0.0, |less| f64::from(less[row * side + col]));
                assert_eq!(*got, f64::from(value) + factor * other, "[{row}, {col}] of {side}");
            }
        }
    }
}

#[test]
fn rows_are_subtracted_and_diagonals_replaced_as_on_the_cpu() {
    let (Some(family), mut stream) = (&*MOMENTS, fresh()) else { return };
    for (rows, cols, top) in [(1, 1, 0), (2, 5, 3), (9, 33, 20), (7, 301, 290)] {
        let [mut plus, minus] = [(); 2].map(|()| uniform(&mut stream, cols * cols, -1.0, 1.0));
        let diagonal = uniform(&mut stream, cols, 2.0, 3.0);
        for less in [None, Some(&minus[..])] {
            let arguments = [
                size(rows),
                size(cols),
                size(top),
                input(&plus),
                input(&diagonal),
                optional(less),
                poisoned(rows * cols),
            ];
            let got = family.outputs("subtract_rows", &by_rows(rows), &arguments).remove(0).f32();
            for (at, got) in got.iter().enumerate() {
                let (row, col) = (top + at / cols, at % cols);
                let value = if row == col { diagonal[row] } else { plus[row * cols + col] };
                assert_eq!(*got, value - less.map_or(0.0, |less| less[row * cols + col]), "[{row}, {col}]");
            }
        }
        let arguments = [size(cols), input(&diagonal), state(&plus)];
        let got = family.outputs("set_diagonal", &flat(cols), &arguments).remove(0).f32();
        plus.iter_mut().step_by(cols + 1).zip(&diagonal).for_each(|(to, from)| *to = *from);
        assert_eq!(got, plus);
    }
}

#[test]
fn columns_are_compared_bit_by_bit_as_on_the_cpu() {
    let (Some(family), mut stream) = (&*MOMENTS, fresh()) else { return };
    for cols in [1, 2, 63, 64, 65, 131] {
        let a = uniform(&mut stream, cols * cols, -1.0, 1.0);
        let mut b = a.clone();
        // Some columns are the same, one differs too little for a square.
        for (at, b) in b.iter_mut().enumerate().filter(|(at, _)| at % cols % 3 == 1) {
            *b += 0.01 * (at as f32).sin();
        }
        let mut tiny = a.clone();
        (tiny[0], b[0]) = (0.0, 1e-30);
        let (squares, differ) = cpu::column_gaps(cols, &tiny, &b);
        let grids = [1, 3].map(|blocks| Grid { blocks: [blocks, 1, 1], threads: [64, 1, 1] });
        let unset = Arg::Out(Array::U32(vec![7; cols]));
        let arguments = [size(cols), input(&tiny), input(&b), poisoned(cols), unset];
        let outputs = family.outputs("column_gaps", &grids, &arguments);
        let [got, differing]: [Array; 2] = outputs.try_into().unwrap();
        shim::values::assert_same(&format!("{cols} columns"), &got.f32(), &squares);
        let Array::U32(differing) = differing else { unreachable!("an array of u32") };
        assert!(differ && differing[0] == 1 && squares[0] == 0.0);
        for (col, differs) in differing.iter().enumerate() {
            assert_eq!(*differs, u32::from(col == 0 || col % 3 == 1), "column {col} of {cols}");
        }
    }
}

#[test]
fn differences_of_rows_are_multiplied_and_added() {
    let (Some(family), mut stream) = (&*DOTS, fresh()) else { return };
    for (rows, width, left, stride) in
        [(1, 1, 0, 1), (3, 31, 0, 31), (9, 32, 1, 40), (17, 33, 7, 40), (2, 257, 0, 300)]
    {
        let [first, second] = [(); 2].map(|()| uniform(&mut stream, rows * stride, -1.0, 1.0));
        let doubles = |stream: &mut Stream, len| -> Vec<f64> {
            (0..len).map(|_| f64::from(stream.unit_f32()) + f64::from(stream.unit_f32()) * 1e-9).collect()
        };
        let (slope, before) = (doubles(&mut stream, rows * width), doubles(&mut stream, rows));
        let arguments = [
            size(rows),
            size(width),
            size(left),
            Arg::U64(stride as u64),
            input(&first),
            input(&second),
            Arg::In(Array::F64(slope.clone())),
            wide(before.clone()),
        ];
        let got = f64s(family.outputs("difference_dots", &by_warps(rows), &arguments).remove(0));
        for row in 0..rows {
            let term = |i: usize| {
                let at = row * stride + left + i;
                (f64::from(first[at]) - f64::from(second[at])) * slope[row * width + i]
            };
            let want = before[row] + (0..width).map(term).sum::<f64>();
            let error = (got[row] - want).abs();
            assert!(error < SUM_ERROR_MAX * width as f64, "row {row} of {width}: {} for {want}", got[row]);
        }
    }
}

#[test]
fn normal_equations_have_the_sums_of_every_group_and_nothing_else_is_written() {
    let (Some(family), mut stream) = (&*DOTS, fresh()) else { return };
    for (rows, cols, width) in [(1usize, 1usize, 1usize), (3, 10, 4), (5, 64, 32), (2, 100, 33), (7, 129, 64)]
    {
        let groups = cols.div_ceil(width);
        let levels = uniform(&mut stream, rows * cols, -8.0, 8.0);
        for group in 0..groups {
            let end = cols.min((group + 1) * width);
            let product = uniform(&mut stream, rows * end, -1.0, 1.0);
            let arguments = [
                size(rows),
                size(cols),
                size(width),
                size(groups),
                size(group),
                size(end),
                input(&product),
                input(&levels),
                wide(vec![f64::NAN; rows * groups * groups]),
            ];
            let grids = by_warps(rows * (group + 1));
            let got = f64s(family.outputs("group_dots", &grids, &arguments).remove(0));
            for (at, got) in got.iter().enumerate() {
                let (row, line, other) = (at / (groups * groups), at / groups % groups, at % groups);
                if line != group || other > group {
                    assert!(got.is_nan(), "entry {at} of another group was written");
                    continue;
                }
                let term = |c: usize| f64::from(product[row * end + c]) * f64::from(levels[row * cols + c]);
                let want: f64 = (other * width..end.min((other + 1) * width)).map(term).sum();
                assert!((got - want).abs() < SUM_ERROR_MAX * 8.0 * width as f64, "{at}: {got} for {want}");
            }
        }
    }
}

#[test]
fn dots_of_runs_are_the_cpus_up_to_their_order() {
    let (Some(family), mut stream) = (&*DOTS, fresh()) else { return };
    for (rows, cols, width) in
        [(1, 1, 1), (3, 31, 8), (2, 256, 256), (5, 257, 64), (4, 1033, 1033), (70, 20, 5)]
    {
        let [a, b] = [(); 2].map(|()| uniform(&mut stream, rows * cols, -1.0, 1.0));
        let groups = cols.div_ceil(width);
        let arguments = [
            size(rows),
            size(cols),
            size(width),
            size(groups),
            input(&a),
            input(&b),
            wide(vec![f64::NAN; rows * groups]),
        ];
        let got = f64s(family.outputs("run_dots", &by_warps(rows * groups), &arguments).remove(0));
        let lines = a.chunks_exact(cols).zip(b.chunks_exact(cols));
        let want: Vec<f64> = lines.flat_map(|(a, b)| cpu::run_dots(a, b, width)).collect();
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!(
                (got - want).abs() <= SUM_ERROR_MAX * width as f64,
                "[{rows}, {cols}] {at}: {got} for {want}"
            );
        }
    }
}
