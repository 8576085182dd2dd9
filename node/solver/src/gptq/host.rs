//! On the host: substitution, sums in f64 inside blocks.
//!
//! Not here: the order of columns, which implementation serves (`super`).

use halfstep_compute::cpu;

/// Columns per block of the factorisation and of the rounding.
const BLOCK: usize = 64;

/// The choices (1.0: ceil), in the order of the columns given, `[rows, cols]`. `low`, `delta`: errors of the lower neighbours and the
/// distances to the upper ones; `linear`: the objective's linear term. `factor`: lower triangle, `[cols, cols]`.
pub(super) fn choose(
    factor: &[f32],
    low: &[f32],
    delta: &[f32],
    linear: &[f32],
    rows: usize,
    cols: usize,
) -> Vec<f32> {
    let offset = solve_lower(factor, linear, rows, cols);
    nearest_plane(factor, low, delta, &offset, rows, cols)
}

/// The factor of `h + d I` with its columns in the order given. `None` if it is not positive definite.
pub(super) fn factor(h: &[f32], damping: f64, order: &[u32]) -> Option<Vec<f32>> {
    let cols = order.len();
    let entry = |i: &u32, j: &u32| h[*i as usize * cols + *j as usize];
    // Exactly as long as it will be: what collecting doubles, the widest layers notice.
    let mut factor = Vec::with_capacity(cols * cols);
    order.iter().for_each(|i| factor.extend(order.iter().map(|j| entry(i, j))));
    factor.iter_mut().step_by(cols + 1).for_each(|value| *value = (f64::from(*value) + damping) as f32);
    cholesky(&mut factor, cols).then_some(factor)
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
}
