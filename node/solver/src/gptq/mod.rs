//! GPTQ-order start: Babai's nearest plane on the damped quadratic, kept within {floor, ceil}.
//!
//! With `H + d I = L L'` (columns ordered by rising diagonal) the objective is `|L' e + y|^2` plus a constant, `L y = b`:
//! from the last column, the largest, to the first, each takes the neighbour that makes its term smallest given those
//! decided before. That is GPTQ (Frantar et al. 2023, arXiv:2210.17323) without the inverse. Blocked, so that most of the
//! work is products; the factor's diagonal blocks are f64. The host substitutes inside blocks, a device multiplies by their
//! inverses: each is the quicker way there, and results differ by rounding.
//!
//! Deviation: GPTQ rounds to any integer; here only floor and ceil are allowed.
//! Not here: GPTQ's free rounding, which overfits few samples.

mod device;
mod host;

use halfstep_compute::{Device, DeviceError};

use crate::grid::Cells;
use crate::quadratic::Quadratic;
use crate::workspace::Arrays;

/// Smallest damping of the factorisation, as a fraction of the mean diagonal; times 10 whenever it fails.
const DAMPING_MIN: f64 = 1e-6;

/// 1e-6 to 1e2 of the mean diagonal: then even rounding errors of every entry cannot make it indefinite.
const DAMPINGS: u32 = 9;

/// The factor of a layer's damped H with its order of columns. It costs as much as rounding `cols / 6` rows.
#[derive(Debug)]
pub(crate) struct Factor<B> {
    order: Vec<u32>,
    /// Nothing if H is all 0.
    lower: Option<Lower<B>>,
}

#[derive(Debug)]
enum Lower<B> {
    /// `[cols, cols]`, lower triangle.
    Host(Vec<f32>),
    Device(device::Lower<B>),
}

impl<B: Send + Sync> Factor<B> {
    /// Factors `h` (`[cols, cols]`, symmetric) plus `damping` on its diagonal; more damping where that does not do. `damped`: their
    /// sum on the device.
    pub(crate) fn new<D: Device<Buffer = B>>(
        device: &D,
        h: &[f32],
        damped: &B,
        cols: usize,
        damping: f32,
    ) -> Result<Self, DeviceError> {
        let order = ascending_diagonal(h, cols);
        let given = f64::from(damping);
        let lower = damped_until(h, cols, given, |damping| match D::IS_HOST {
            true => Ok(host::factor(h, damping, &order).map(Lower::Host)),
            false => {
                let extra = (damping - given) as f32;
                Ok(device::Lower::new(device, damped, &order, extra)?.map(Lower::Device))
            }
        })?;
        Ok(Self { order, lower })
    }
}

/// The choice (1.0: ceil) of every weight, `[rows, cols]`; `arrays` are scratch.
pub(crate) fn choose<D: Device>(
    device: &D,
    quadratic: &Quadratic<'_, D::Buffer>,
    cells: &Cells,
    arrays: &mut Arrays<D::Buffer>,
) -> Result<Vec<f32>, DeviceError> {
    let (rows, cols) = (quadratic.rows, quadratic.cols);
    let factor = quadratic.prepared.factor(device, quadratic.moments.h)?;
    let order = &factor.order;
    match &factor.lower {
        None => Ok(cells.nearest_up.clone()),
        Some(Lower::Device(lower)) => {
            let linear = !quadratic.prepared.gap_is_zero;
            lower.choose(device, order, rows, (&cells.low, &cells.delta), linear, arrays)
        }
        Some(Lower::Host(lower)) => {
            let pick = |matrix: &[f32]| permute_columns(matrix, order);
            let mut linear = vec![0.0; rows * cols];
            device.download(&arrays.linear, &mut linear)?;
            let (low, delta, linear) = (pick(&cells.low), pick(&cells.delta), pick(&linear));
            let chosen = host::choose(lower, &low, &delta, &linear, rows, cols);
            let mut up = vec![0.0; rows * cols];
            for (line, chosen) in up.chunks_exact_mut(cols).zip(chosen.chunks_exact(cols)) {
                order.iter().zip(chosen).for_each(|(column, value)| line[*column as usize] = *value);
            }
            Ok(up)
        }
    }
}

/// Columns by rising diagonal; ties by index, so that the order is one.
fn ascending_diagonal(h: &[f32], cols: usize) -> Vec<u32> {
    let diagonal = |column: &u32| h[*column as usize * cols + *column as usize];
    let mut order: Vec<u32> = (0..cols as u32).collect();
    order.sort_by(|a, b| diagonal(a).total_cmp(&diagonal(b)).then(a.cmp(b)));
    order
}

fn permute_columns(matrix: &[f32], order: &[u32]) -> Vec<f32> {
    let lines = matrix.chunks_exact(order.len());
    lines.flat_map(|line| order.iter().map(move |column| line[*column as usize])).collect()
}

/// What `factor` makes of the smallest damping that does. `None` if the diagonal is all 0.
fn damped_until<T>(
    h: &[f32],
    cols: usize,
    damping: f64,
    mut factor: impl FnMut(f64) -> Result<Option<T>, DeviceError>,
) -> Result<Option<T>, DeviceError> {
    let mean = (0..cols).map(|j| f64::from(h[j * cols + j])).sum::<f64>() / cols as f64;
    let mut damping = damping.max(DAMPING_MIN * mean);
    for _ in 0..DAMPINGS {
        if let Some(made) = factor(damping)? {
            return Ok(Some(made));
        }
        damping *= 10.0;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GramView, Prepared, RowProblem};
    use halfstep_compute::Cpu;

    #[test]
    fn indefinite_and_singular_matrices_are_damped_until_they_factor() {
        for (h, factors) in [([1.0, 1.0, 1.0, 1.0], true), ([1.0, 1.5, 1.5, 1.0], true), ([0.0; 4], false)] {
            let on_host = damped_until(&h, 2, 0.0, |damping| Ok(host::factor(&h, damping, &[0, 1])));
            assert_eq!(on_host.unwrap().is_some(), factors, "{h:?}");
            let damped = Cpu.upload(&h).unwrap();
            let on_device = damped_until(&h, 2, 0.0, |damping| {
                device::Lower::new(&Cpu, &damped, &[0, 1], damping as f32)
            });
            assert_eq!(on_device.unwrap().is_some(), factors, "{h:?}");
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
            let got = choose(&Cpu, &quadratic, &cells, arrays).unwrap();
            let order = ascending_diagonal(&h, n);
            let lower = device::Lower::new(&Cpu, &prepared.damped, &order, 0.0).unwrap().unwrap();
            let values = (&cells.low[..], &cells.delta[..]);
            let by_inverses = lower.choose(&Cpu, &order, rows, values, true, arrays).unwrap();
            let damping = f64::from(prepared.damping);
            let mut damped: Vec<f64> = h.iter().map(|value| f64::from(*value)).collect();
            damped.iter_mut().step_by(n + 1).for_each(|diagonal| *diagonal += damping);
            let wide: Vec<f64> = w.iter().map(|value| f64::from(*value)).collect();
            let expected = by_the_inverse(&damped, &wide, n);
            for got in [got, by_inverses] {
                let differing =
                    got.iter().zip(&expected).filter(|(up, expected)| (**up > 0.5) != **expected).count();
                // f32 here, f64 there: a tie may fall either way and take the rest of its row along.
                assert!(differing <= n / 50, "n {n}: {differing} of {}", got.len());
            }
        }
    }
}
