//! GPTQ-order start: Babai's nearest plane on the damped quadratic, kept within {floor, ceil}.
//!
//! With `H + d I = L L'` (columns ordered by rising diagonal) the objective is `|L' e + y|^2` plus a constant, `L y = b`:
//! from the last column, the largest, to the first, each takes the neighbour that makes its term smallest given those
//! decided before. That is GPTQ (Frantar et al. 2023, arXiv:2210.17323) without the inverse. Blocked, so that most of the
//! work is products; the factor's diagonal blocks are f64.
//!
//! Deviation: GPTQ rounds to any integer; here only floor and ceil are allowed.
//! Not here: GPTQ's free rounding, which overfits few samples.

use halfstep_compute::cpu;

use crate::grid::Cells;
use crate::quadratic::Quadratic;

/// Columns per block of the factorisation and of the rounding.
const BLOCK: usize = 64;

/// Smallest damping of the factorisation, as a fraction of the mean diagonal; times 10 whenever it fails.
const DAMPING_MIN: f64 = 1e-6;

/// The factor of a layer's damped H with its order of columns. It costs as much as rounding `cols / 6` rows.
#[derive(Debug)]
pub(crate) struct Factor {
    order: Vec<usize>,
    /// `[cols, cols]`, lower triangle; nothing if H is all 0.
    lower: Option<Vec<f32>>,
}

impl Factor {
    /// Factors `h` (`[cols, cols]`, symmetric) plus `damping` on its diagonal; more damping where that does not do.
    pub(crate) fn new(h: &[f32], cols: usize, damping: f32) -> Self {
        let order = ascending_diagonal(h, cols);
        let lower = factor_damped(h, f64::from(damping), &order);
        Self { order, lower }
    }
}

/// The choice (1.0: ceil) of every weight, `[rows, cols]`.
pub(crate) fn choose<B: Send + Sync>(quadratic: &Quadratic<'_, B>, cells: &Cells) -> Vec<f32> {
    let (rows, cols) = (quadratic.rows, quadratic.cols);
    let Factor { order, lower: Some(factor) } = quadratic.prepared.factor(quadratic.moments.h) else {
        return cells.nearest_up.clone();
    };
    let pick = |matrix: &[f32]| permute_columns(matrix, order);
    let (low, delta) = (pick(&cells.low), pick(&cells.delta));
    let offset = solve_lower(factor, &pick(&quadratic.linear), rows, cols);
    let chosen = nearest_plane(factor, &low, &delta, &offset, rows, cols);
    let mut up = vec![0.0; rows * cols];
    for (line, chosen) in up.chunks_exact_mut(cols).zip(chosen.chunks_exact(cols)) {
        order.iter().zip(chosen).for_each(|(column, value)| line[*column] = *value);
    }
    up
}

/// Columns by rising diagonal; ties by index, so that the order is one.
fn ascending_diagonal(h: &[f32], cols: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..cols).collect();
    order.sort_by(|a, b| h[a * cols + a].total_cmp(&h[b * cols + b]).then(a.cmp(b)));
    order
}

fn permute_columns(matrix: &[f32], order: &[usize]) -> Vec<f32> {
    matrix.chunks_exact(order.len()).flat_map(|line| order.iter().map(move |column| line[*column])).collect()
}

/// The factor of permuted `h + d I`; `d` grows until it succeeds. `None` if the diagonal is all 0.
fn factor_damped(h: &[f32], damping: f64, order: &[usize]) -> Option<Vec<f32>> {
    let cols = order.len();
    let mean = (0..cols).map(|j| f64::from(h[j * cols + j])).sum::<f64>() / cols as f64;
    let mut damping = damping.max(DAMPING_MIN * mean);
    // 1e-6 to 1e2 of the mean diagonal: then even rounding errors of every entry cannot make it indefinite.
    for _ in 0..9 {
        let mut factor: Vec<f32> =
            order.iter().flat_map(|i| order.iter().map(move |j| h[i * cols + j])).collect();
        factor.iter_mut().step_by(cols + 1).for_each(|value| *value = (f64::from(*value) + damping) as f32);
        if cholesky(&mut factor, cols) {
            return Some(factor);
        }
        damping *= 10.0;
    }
    None
}

/// Lower Cholesky factor in place (the upper triangle is left as it is); false if not positive definite.
fn cholesky(a: &mut [f32], n: usize) -> bool {
    for start in (0..n).step_by(BLOCK) {
        let end = n.min(start + BLOCK);
        if !factor_panel(a, n, start, end) {
            return false;
        }
        // Trailing update, one stripe of rows at a time so that only the lower triangle is computed.
        for from in (end..n).step_by(BLOCK) {
            let (height, width) = (BLOCK.min(n - from), BLOCK.min(n - from) + from - end);
            let (depth, panel) = (end - start, panel_copy(a, n, start, end, end..from + height));
            let left = &panel[(from - end) * depth..];
            let out = &mut a[from * n + end..];
            cpu::matmul_nt(height, width, depth, -1.0, left, depth, &panel, depth, 1.0, out, n);
        }
    }
    true
}

/// Rows `rows` of columns `start..end`, contiguous.
fn panel_copy(a: &[f32], n: usize, start: usize, end: usize, rows: std::ops::Range<usize>) -> Vec<f32> {
    rows.flat_map(|row| a[row * n + start..row * n + end].iter().copied()).collect()
}

/// Factors columns `start..end` for all rows from `start`, sums in f64.
fn factor_panel(a: &mut [f32], n: usize, start: usize, end: usize) -> bool {
    for row in start..n {
        for col in start..end.min(row + 1) {
            let (before, after) = (start..col, row * n);
            let dot: f64 = before.map(|k| f64::from(a[after + k]) * f64::from(a[col * n + k])).sum();
            let value = f64::from(a[row * n + col]) - dot;
            if row == col {
                if !(value > 0.0 && value.is_finite()) {
                    return false;
                }
                a[row * n + col] = value.sqrt() as f32;
            } else {
                a[row * n + col] = (value / f64::from(a[col * n + col])) as f32;
            }
        }
    }
    true
}

/// `y` with `L y' = b'` per row, `[rows, n]`.
fn solve_lower(factor: &[f32], b: &[f32], rows: usize, n: usize) -> Vec<f32> {
    let mut y = b.to_vec();
    if y.iter().all(|value| *value == 0.0) {
        return y;
    }
    for start in (0..n).step_by(BLOCK) {
        let end = n.min(start + BLOCK);
        for line in y.chunks_exact_mut(n) {
            for i in start..end {
                let dot: f64 = (start..i).map(|k| f64::from(factor[i * n + k]) * f64::from(line[k])).sum();
                line[i] = ((f64::from(line[i]) - dot) / f64::from(factor[i * n + i])) as f32;
            }
        }
        if end < n {
            let solved = panel_copy(&y, n, start, end, 0..rows);
            let (depth, below) = (end - start, &factor[end * n + start..]);
            cpu::matmul_nt(rows, n - end, depth, -1.0, &solved, depth, below, n, 1.0, &mut y[end..], n);
        }
    }
    y
}

/// The choices, in the factor's order, `[rows, n]`.
fn nearest_plane(
    factor: &[f32],
    low: &[f32],
    delta: &[f32],
    offset: &[f32],
    rows: usize,
    n: usize,
) -> Vec<f32> {
    let mut up = vec![0.0; rows * n];
    let mut errors = vec![0.0; rows * n];
    let mut carried = vec![0.0; rows * BLOCK];
    for start in (0..n).step_by(BLOCK).rev() {
        let end = n.min(start + BLOCK);
        let width = end - start;
        for row in 0..rows {
            carried[row * width..][..width].copy_from_slice(&offset[row * n + start..row * n + end]);
        }
        if end < n {
            let (decided, below) = (&errors[end..], &factor[end * n + start..]);
            cpu::matmul(rows, width, n - end, 1.0, decided, n, below, n, 1.0, &mut carried, width);
        }
        for row in 0..rows {
            let carried = &mut carried[row * width..][..width];
            for j in (start..end).rev() {
                let index = row * n + j;
                let diagonal = factor[j * n + j];
                let wanted = -carried[j - start] / diagonal;
                // The upper neighbour if it is closer to what would cancel the term.
                let above = wanted - low[index] >= 0.5 * delta[index] && delta[index] != 0.0;
                up[index] = if above { 1.0 } else { 0.0 };
                errors[index] = if above { low[index] + delta[index] } else { low[index] };
                let line = &factor[j * n + start..j * n + j];
                carried.iter_mut().zip(line).for_each(|(sum, weight)| *sum += weight * errors[index]);
            }
        }
    }
    up
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GramView, Prepared, RowProblem};
    use halfstep_compute::Cpu;

    /// A well-conditioned symmetric positive definite matrix.
    fn positive(n: usize) -> Vec<f32> {
        let mut stream = halfstep_compute::random::Stream::new(4, n as u64, 0);
        let x: Vec<f32> = (0..2 * n * n).map(|_| stream.normal_f32()).collect();
        let entry = |i: usize, j: usize| {
            (0..2 * n).map(|s| x[s * n + i] * x[s * n + j]).sum::<f32>() / (2 * n) as f32
        };
        (0..n * n).map(|index| entry(index / n, index % n)).collect()
    }

    #[test]
    fn factor_times_its_transpose_is_the_matrix() {
        for n in [1, 7, 63, 64, 65, 150] {
            let a = positive(n);
            let mut factor = a.clone();
            assert!(cholesky(&mut factor, n), "n {n}");
            for i in 0..n {
                for j in 0..=i {
                    let got: f32 = (0..=j).map(|k| factor[i * n + k] * factor[j * n + k]).sum();
                    assert!(
                        (got - a[i * n + j]).abs() < 1e-4,
                        "n {n} [{i}, {j}]: {got} for {}",
                        a[i * n + j]
                    );
                }
            }
        }
    }

    #[test]
    fn triangular_solution_solves() {
        for n in [1, 64, 100] {
            let mut factor = positive(n);
            assert!(cholesky(&mut factor, n));
            let b: Vec<f32> = (0..3 * n).map(|i| (i as f32 * 0.7).sin()).collect();
            let y = solve_lower(&factor, &b, 3, n);
            for row in 0..3 {
                for i in 0..n {
                    let got: f32 = (0..=i).map(|k| factor[i * n + k] * y[row * n + k]).sum();
                    assert!((got - b[row * n + i]).abs() < 1e-3, "n {n} [{row}, {i}]");
                }
            }
        }
    }

    #[test]
    fn indefinite_and_singular_matrices_are_damped_until_they_factor() {
        let order = [0, 1];
        assert!(factor_damped(&[1.0, 1.0, 1.0, 1.0], 0.0, &order).is_some());
        assert!(factor_damped(&[1.0, 1.5, 1.5, 1.0], 0.0, &order).is_some());
        assert!(factor_damped(&[0.0; 4], 0.0, &order).is_none());
    }

    #[test]
    fn nearest_plane_is_the_same_blocked_and_column_by_column() {
        let (rows, n) = (3, 130);
        let mut factor = positive(n);
        assert!(cholesky(&mut factor, n));
        let mut stream = halfstep_compute::random::Stream::new(9, 0, 0);
        let low: Vec<f32> = (0..rows * n).map(|_| -stream.unit_f32()).collect();
        let (delta, offset) = (vec![1.0; rows * n], vec![0.0; rows * n]);
        let got = nearest_plane(&factor, &low, &delta, &offset, rows, n);
        for row in 0..rows {
            let mut errors = vec![0.0f64; n];
            for j in (0..n).rev() {
                let sum: f64 = (j + 1..n).map(|i| f64::from(factor[i * n + j]) * errors[i]).sum();
                let (floor, diagonal) = (f64::from(low[row * n + j]), f64::from(factor[j * n + j]));
                let up = (sum + diagonal * (floor + 1.0)).abs() <= (sum + diagonal * floor).abs();
                errors[j] = floor + f64::from(u8::from(up));
                assert_eq!(got[row * n + j] > 0.5, up, "row {row} column {j}");
            }
        }
    }

    /// The algorithm as its paper gives it: by the inverse of H, one column after the other, errors pushed into the columns not yet
    /// decided. Choices of `rows` weights `w` with neighbours `floor(w)` and `floor(w) + 1`.
    fn by_the_inverse(h: &[f64], w: &[f64], n: usize) -> Vec<bool> {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|a, b| h[b * n + b].total_cmp(&h[a * n + a]));
        let permuted: Vec<f64> = order.iter().flat_map(|i| order.iter().map(move |j| h[i * n + j])).collect();
        let upper = upper_cholesky(&inverse(&permuted, n), n);
        let mut choices = vec![false; w.len()];
        for (weights, choices) in w.chunks_exact(n).zip(choices.chunks_exact_mut(n)) {
            let mut moved: Vec<f64> = order.iter().map(|j| weights[*j]).collect();
            for j in 0..n {
                let floor = weights[order[j]].floor();
                let up = moved[j] - floor >= 0.5;
                choices[order[j]] = up;
                let error = (moved[j] - floor - f64::from(u8::from(up))) / upper[j * n + j];
                (j..n).for_each(|k| moved[k] -= error * upper[j * n + k]);
            }
        }
        choices
    }

    /// Gauss-Jordan.
    fn inverse(a: &[f64], n: usize) -> Vec<f64> {
        let (mut a, mut b) = (a.to_vec(), vec![0.0; n * n]);
        (0..n).for_each(|i| b[i * n + i] = 1.0);
        for pivot in 0..n {
            let inverse = 1.0 / a[pivot * n + pivot];
            for k in 0..n {
                a[pivot * n + k] *= inverse;
                b[pivot * n + k] *= inverse;
            }
            for row in (0..n).filter(|row| *row != pivot) {
                let factor = a[row * n + pivot];
                for k in 0..n {
                    a[row * n + k] -= factor * a[pivot * n + k];
                    b[row * n + k] -= factor * b[pivot * n + k];
                }
            }
        }
        b
    }

    /// `U` with `U' U = a`.
    fn upper_cholesky(a: &[f64], n: usize) -> Vec<f64> {
        let mut u = vec![0.0; n * n];
        for i in 0..n {
            for j in i..n {
                let dot: f64 = (0..i).map(|k| u[k * n + i] * u[k * n + j]).sum();
                let value = a[i * n + j] - dot;
                u[i * n + j] = if i == j { value.sqrt() } else { value / u[i * n + i] };
            }
        }
        u
    }

    #[test]
    fn choices_are_those_of_the_published_algorithm() {
        for (seed, n) in [(1, 5), (2, 64), (3, 97)] {
            let rows = 4;
            let mut stream = halfstep_compute::random::Stream::new(seed, 3, 0);
            let w: Vec<f32> = (0..rows * n).map(|_| 3.0 * stream.normal_f32()).collect();
            let x: Vec<f32> = (0..3 * n * n).map(|_| stream.normal_f32()).collect();
            let h: Vec<f32> = (0..n * n)
                .map(|index| {
                    let (i, j) = (index / n, index % n);
                    let sum: f32 = (0..3 * n).map(|s| x[s * n + i] * x[s * n + j]).sum();
                    // Diagonals that differ, so that the order matters.
                    sum * ((i + 1) * (j + 1)) as f32 / (3 * n * n * n) as f32
                })
                .collect();
            let encodings = halfstep_quant::Encodings {
                bits: 8,
                scheme: halfstep_quant::Scheme::Symmetric,
                granularity: halfstep_quant::Granularity::PerTensor,
                rows,
                cols: n,
                scale: vec![1.0],
                zero_point: vec![0],
            };
            let moments = GramView { h: &h, c: &h, g_energy: None, count: 1.0 };
            let problem = RowProblem {
                w: &w,
                rows,
                cols: n,
                encodings: &encodings,
                bias: None,
                output_scale: 1.0,
                activation: crate::Activation::Identity,
                statistics: crate::Statistics::Gram(moments),
                layer_key: 0,
                first_row: 0,
            };
            let cells = Cells::new(&w, &encodings, &vec![false; n]);
            let mut workspace = crate::Workspace::new();
            let arrays = workspace.arrays(&Cpu, rows, n).unwrap();
            let settings = crate::Settings { damping: 0.01, ..crate::Settings::default() };
            let prepared = Prepared::new(&Cpu, &problem.statistics, n, &settings).unwrap();
            let quadratic =
                Quadratic::new(&Cpu, &problem, &prepared, moments, &cells, &settings, arrays).unwrap();
            let got = choose(&quadratic, &cells);
            let damping = f64::from(prepared.damping);
            let mut damped: Vec<f64> = h.iter().map(|value| f64::from(*value)).collect();
            damped.iter_mut().step_by(n + 1).for_each(|diagonal| *diagonal += damping);
            let wide: Vec<f64> = w.iter().map(|value| f64::from(*value)).collect();
            let expected = by_the_inverse(&damped, &wide, n);
            let differing =
                got.iter().zip(&expected).filter(|(up, expected)| (**up > 0.5) != **expected).count();
            // f32 here, f64 there: a tie may fall either way and take the rest of its row along.
            assert!(differing <= n / 50, "n {n}: {differing} of {}", got.len());
        }
    }
}
