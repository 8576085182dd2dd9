//! The gram objective of one chunk, and AdaRound on it.
//!
//! Per row, with errors `e = w~ - w`:  `E|w x - w~ x~|^2 = e H e' + 2 e b' + k`, where `b = w (H - C)` and
//! `k = w (H - 2 C + G) w'`. Damping adds `d e e'`: H + d I, W C + d W. The gradient is `2 (e H + b)`: one product per
//! iteration over all calibration data.
//!
//! On the device rows are kept in *row units*: low, delta and b times `unit[row]`, so that the step, which knows one factor
//! for all rows, minimises a loss normalised per row (a chunk's other rows must not matter).
//!
//! Not here: refinement, the guard, the samples objective.

use halfstep_compute::{Device, DeviceError, LearnBuffers, MatMut, MatRef, Product, RowTerms, StepArgs, cpu};

use crate::grid::Cells;
use crate::prepared::{Prepared, Terms};
use crate::problem::GramView;
use crate::workspace::{Arrays, Step, Watch};
use crate::{RowProblem, Settings, schedule};

/// Host side of the quadratic, whose linear term is in the arrays it was made with.
#[derive(Debug)]
pub(crate) struct Quadratic<'a, B> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) moments: GramView<'a>,
    pub(crate) prepared: &'a Prepared<B>,
    w: &'a [f32],
    /// `unit[row]`: device values are plain values times this.
    pub(crate) unit: Vec<f32>,
    /// `k` of each row.
    constant: Vec<f64>,
    /// `w G w'` of each row.
    energy: Vec<f64>,
    /// Euclidean norms of the rows of weights.
    weight_norm: Vec<f64>,
}

/// One rounding's objective in one row, plain units, without `k`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RowValue {
    /// With damping: what AdaRound and refinement minimise.
    pub(crate) damped: f64,
    /// Without: what the guard compares.
    pub(crate) plain: f64,
    /// How far `plain` may be off (f32 products).
    pub(crate) uncertainty: f64,
}

/// Two roundings of the whole chunk, of which one row is compared.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pair<'a> {
    pub(crate) row: usize,
    pub(crate) first: &'a [f32],
    pub(crate) second: &'a [f32],
}

/// A value of every weight in the pairs' rows, `[pairs, cols]`.
fn gather<'a>(pairs: &[Pair<'a>], cols: usize, value: impl Fn(usize, &Pair<'a>) -> f32) -> Vec<f32> {
    let mut values = Vec::with_capacity(pairs.len() * cols);
    for pair in pairs {
        values.extend((pair.row * cols..(pair.row + 1) * cols).map(|index| value(index, pair)));
    }
    values
}

/// f32 products of a few thousand terms are off by less than this fraction of the sum of magnitudes.
const PRODUCT_ERROR: f64 = 4e-6;

impl<'a, B: Send + Sync> Quadratic<'a, B> {
    /// Prepares a chunk, using `arrays` as scratch. `moments` are those that `prepared` was made from.
    pub(crate) fn new<D: Device<Buffer = B>>(
        device: &D,
        problem: &RowProblem<'a>,
        prepared: &'a Prepared<B>,
        moments: GramView<'a>,
        cells: &Cells,
        settings: &Settings,
        arrays: &mut Arrays<B>,
    ) -> Result<Self, DeviceError> {
        let (rows, cols) = (problem.rows, problem.cols);
        let Terms { constant, energy } = prepared.weights_times(device, problem.w, rows, moments, arrays)?;
        Ok(Self {
            rows,
            cols,
            moments,
            prepared,
            w: problem.w,
            unit: units(cells, &prepared.squares, rows, cols, problem.output_scale, settings.normalize),
            constant,
            energy,
            weight_norm: cpu::run_dots(problem.w, problem.w, cols).map(f64::sqrt).collect(),
        })
    }

    /// The same problem on another grid: the row units change.
    pub(crate) fn regrid(&mut self, cells: &Cells, problem: &RowProblem<'_>, settings: &Settings) {
        let (alpha, normalize) = (problem.output_scale, settings.normalize);
        self.unit = units(cells, &self.prepared.squares, self.rows, self.cols, alpha, normalize);
    }

    /// Sum over the rows of [`Quadratic::full`].
    pub(crate) fn total(&self, values: &[RowValue], output_scale: f32) -> f64 {
        values.iter().enumerate().map(|(row, value)| self.full(row, value.plain, output_scale)).sum()
    }

    /// Puts the chunk on the device: low, delta, target. Uses `soft` and `product` as scratch.
    pub(crate) fn load<D: Device<Buffer = B>>(
        &self,
        device: &D,
        cells: &Cells,
        arrays: &mut Arrays<B>,
    ) -> Result<(), DeviceError> {
        let Arrays { low, delta, linear, target, soft, product, .. } = arrays;
        device.write(&cells.low, soft)?;
        device.scale_rows(self.cols, &self.unit, soft, low)?;
        device.write(&cells.delta, product)?;
        device.scale_rows(self.cols, &self.unit, product, delta)?;
        let minus: Vec<f32> = self.unit.iter().map(|unit| -unit).collect();
        device.scale_rows(self.cols, &minus, linear, target)
    }

    /// `values * unit[row]`.
    fn in_units(&self, values: &[f32]) -> Vec<f32> {
        let lines = values.chunks_exact(self.cols).zip(&self.unit);
        lines.flat_map(|(line, unit)| line.iter().map(move |value| value * unit)).collect()
    }

    /// `product = errors * H` on the device, for errors in `soft`, to be compared or carried along.
    fn multiply<D: Device<Buffer = B>>(&self, device: &D, arrays: &mut Arrays<B>) -> Result<(), DeviceError> {
        let Self { rows, cols, .. } = *self;
        device.matmul(
            Product::new(rows, cols, cols),
            MatRef::new(&arrays.soft, cols),
            MatRef::new(&self.prepared.damped, cols),
            MatMut::new(&mut arrays.product, cols),
        )
    }

    /// Puts a rounding's choices in `v`, its errors in `soft` and their product with H in `product`. The chunk must be loaded.
    pub(crate) fn place<D: Device<Buffer = B>>(
        &self,
        device: &D,
        up: &[f32],
        arrays: &mut Arrays<B>,
    ) -> Result<(), DeviceError> {
        device.write(up, &mut arrays.v)?;
        self.look(device, arrays)
    }

    /// [`Self::place`] of the choices in `v`.
    pub(crate) fn look<D: Device<Buffer = B>>(
        &self,
        device: &D,
        arrays: &mut Arrays<B>,
    ) -> Result<(), DeviceError> {
        let Arrays { low, delta, v, soft, .. } = arrays;
        device.rounding_errors(self.rows * self.cols, low, delta, v, soft)?;
        self.multiply(device, arrays)
    }

    /// The objective of a rounding in each row, without `k`. The chunk must be loaded; leaves what [`Self::place`] leaves.
    pub(crate) fn evaluate<D: Device<Buffer = B>>(
        &self,
        device: &D,
        up: &[f32],
        arrays: &mut Arrays<B>,
    ) -> Result<Vec<RowValue>, DeviceError> {
        self.place(device, up, arrays)?;
        let (roots, gaps) = (&self.prepared.roots, &self.prepared.gap_norm);
        let Arrays { soft: errors, product, target, .. } = arrays;
        let sums =
            device.row_sums(self.rows, self.cols, RowTerms { errors, product, target, roots, gaps })?;
        Ok(sums.into_iter().enumerate().map(|(row, sums)| self.row_value(row, sums)).collect())
    }

    pub(crate) fn row<'b>(&self, matrix: &'b [f32], row: usize) -> &'b [f32] {
        &matrix[row * self.cols..][..self.cols]
    }

    /// From a row's sums, which are in row units.
    fn row_value(&self, row: usize, [damped, square, spread, gap]: [f64; 4]) -> RowValue {
        let inverse = self.inverse_unit(row);
        let (damped, square) = (damped * inverse * inverse, square * inverse * inverse);
        let (spread, gap) = (spread * inverse, gap * inverse);
        let uncertainty = PRODUCT_ERROR * (spread * spread + 2.0 * gap * self.weight_norm[row]);
        RowValue { damped, plain: damped - f64::from(self.prepared.damping) * square, uncertainty }
    }

    /// From row units to plain ones.
    pub(crate) fn inverse_unit(&self, row: usize) -> f64 {
        if self.unit[row] == 0.0 { 0.0 } else { 1.0 / f64::from(self.unit[row]) }
    }

    /// How much the undamped objective of each first rounding exceeds that of the second, in f64 throughout, from H, C and the
    /// weights as they are. At most as many pairs as rows.
    ///
    /// With `d` the difference of the two rows' errors and `s` their sum, it is `d (s H + 2 w (H - C))'`.
    pub(crate) fn differences<D: Device<Buffer = B>>(
        &self,
        device: &D,
        cells: &Cells,
        pairs: &[Pair<'_>],
        arrays: &mut Arrays<B>,
    ) -> Result<Vec<f64>, DeviceError> {
        let (cols, count) = (self.cols, pairs.len());
        if pairs.is_empty() {
            return Ok(Vec::new());
        }
        let first = gather(pairs, cols, |index, pair| cells.error(index, pair.first[index]));
        let second = gather(pairs, cols, |index, pair| cells.error(index, pair.second[index]));
        let weights = match self.prepared.gap_is_zero {
            true => Vec::new(),
            false => gather(pairs, cols, |index, _| self.w[index]),
        };
        let Some(moments) = self.prepared.on_device() else {
            let gap = (!self.prepared.gap_is_zero).then_some((&weights[..], self.moments.c));
            return Ok(cpu::exact_differences(count, cols, (&first, &second), self.moments.h, gap));
        };
        let Arrays { soft: on_first, m1: on_second, m2: on_weights, .. } = arrays;
        device.write(&first, on_first)?;
        device.write(&second, on_second)?;
        device.write(&weights, on_weights)?;
        let gap = moments.c.as_ref().map(|c| (&*on_weights, c));
        device.exact_differences(count, cols, (on_first, on_second), self.prepared.undamped(moments), gap)
    }

    /// The mean squared output error of a row, from its value: plus `k`, times alpha^2; not below 0.
    pub(crate) fn full(&self, row: usize, value: f64, output_scale: f32) -> f64 {
        f64::from(output_scale).powi(2) * (value + self.constant[row]).max(0.0)
    }

    /// Mean output energy, all rows.
    pub(crate) fn signal(&self, output_scale: f32) -> f64 {
        f64::from(output_scale).powi(2) * self.energy.iter().map(|e| e.max(0.0)).sum::<f64>()
    }

    /// AdaRound: leaves the rounding variables in `arrays.v`.
    pub(crate) fn adaround<D: Device<Buffer = B>>(
        &self,
        device: &D,
        settings: &Settings,
        arrays: &mut Arrays<B>,
        watch: Watch<'_>,
    ) -> Result<(), DeviceError> {
        let (beta1, beta2) = settings.adam;
        let mut steps = (0..settings.iterations).map(|t| {
            if t > 0 {
                watch(Step::Iterate);
            }
            let (lambda, beta) = schedule::rounding(t, settings);
            let args = StepArgs::adam(settings.learning_rate);
            StepArgs { lambda, beta, beta1, beta2, grad_scale: 2.0, ..args }.at_iteration(t + 1)
        });
        let steering = self.prepared.steering(device)?;
        let Arrays { low: lo, delta, target, soft, product, v, m1, m2, .. } = arrays;
        let buffers = LearnBuffers { lo, delta, target, v, m1, m2, soft, product };
        let shape = (self.rows, self.cols);
        device.learn(shape, &self.prepared.damped, steering.as_deref(), buffers, &mut steps)?;
        watch(Step::Iterate);
        Ok(())
    }
}

/// Rounding variables at which `h(v)` is the given start; clears Adam's moments; soft errors to match.
pub(crate) fn begin<D: Device>(
    device: &D,
    start: &[f32],
    low: &[f32],
    delta: &[f32],
    arrays: &mut Arrays<D::Buffer>,
) -> Result<(), DeviceError> {
    let v: Vec<f32> = start.iter().map(|h| cpu::inverse_rectified_sigmoid(f64::from(*h)) as f32).collect();
    let mut soft = vec![0.0; v.len()];
    cpu::soften(low, delta, &v, &mut soft);
    device.write(&v, &mut arrays.v)?;
    device.write(&soft, &mut arrays.soft)?;
    soft.fill(0.0);
    device.write(&soft, &mut arrays.m1)?;
    device.write(&soft, &mut arrays.m2)
}

impl<B: Send + Sync> Quadratic<'_, B> {
    /// [`begin`] in row units.
    pub(crate) fn begin<D: Device<Buffer = B>>(
        &self,
        device: &D,
        start: &[f32],
        cells: &Cells,
        arrays: &mut Arrays<B>,
    ) -> Result<(), DeviceError> {
        begin(device, start, &self.in_units(&cells.low), &self.in_units(&cells.delta), arrays)
    }
}

/// `unit^2 = alpha^2 * cols / noise`, `noise = alpha^2 sum(delta^2 H_jj) / 12`: then nearest rounding of uncorrelated
/// inputs costs 1 per weight, in every row of every layer. 1 for a row without noise; |alpha| if not `normalize`d.
fn units(
    cells: &Cells,
    squares: &[f32],
    rows: usize,
    cols: usize,
    output_scale: f32,
    normalize: bool,
) -> Vec<f32> {
    let unit = |row: usize| {
        let delta = &cells.delta[row * cols..][..cols];
        let noise: f64 =
            delta.iter().zip(squares).map(|(d, square)| f64::from(*d).powi(2) * f64::from(*square)).sum();
        let unit = (cols as f64 * 12.0 / noise).sqrt() as f32;
        if unit.is_normal() { unit } else { 1.0 }
    };
    if normalize { (0..rows).map(unit).collect() } else { vec![output_scale.abs(); rows] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, spec};
    use crate::{Activation, Statistics, Workspace};
    use halfstep_compute::{Cpu, CpuBuffer};

    fn with_quadratic(
        settings: &Settings,
        alpha: f32,
        test: impl Fn(&Fixture, &Cells, &Quadratic<'_, CpuBuffer>, &mut Workspace<CpuBuffer>),
    ) {
        let fixture = Fixture::new(3, 4, 9, 40, spec(4));
        let moments = GramView { h: &fixture.h, c: &fixture.c, g_energy: Some(&fixture.g), count: 40.0 };
        let problem = RowProblem {
            w: &fixture.w,
            rows: 4,
            cols: 9,
            encodings: &fixture.encodings,
            bias: None,
            output_scale: alpha,
            activation: Activation::Identity,
            statistics: Statistics::Gram(moments),
            layer_key: 0,
            first_row: 0,
        };
        let cells = Cells::new(&fixture.w, &fixture.encodings, &[false; 9]);
        let mut workspace = Workspace::new();
        let arrays = workspace.arrays(&Cpu, 4, 9).unwrap();
        let prepared = Prepared::new(&Cpu, &problem.statistics, 9, settings).unwrap();
        let quadratic = Quadratic::new(&Cpu, &problem, &prepared, moments, &cells, settings, arrays).unwrap();
        test(&fixture, &cells, &quadratic, &mut workspace);
    }

    /// The undamped objective of one row's errors without `k`, by definition.
    fn exact(quadratic: &Quadratic<'_, CpuBuffer>, row: usize, errors: impl Fn(usize) -> f32) -> f64 {
        let cols = quadratic.cols;
        let w = quadratic.row(quadratic.w, row);
        let mut total = 0.0;
        for i in 0..cols {
            let (e, w) = (f64::from(errors(i)), f64::from(w[i]));
            if e == 0.0 && w == 0.0 {
                continue;
            }
            let (h, c) = (quadratic.row(quadratic.moments.h, i), quadratic.row(quadratic.moments.c, i));
            for j in 0..cols {
                let gap = 2.0 * w * (f64::from(h[j]) - f64::from(c[j]));
                total += (e * f64::from(h[j]) + gap) * f64::from(errors(j));
            }
        }
        total
    }

    #[test]
    fn gradient_matches_finite_differences_of_the_damped_objective_in_row_units() {
        for (normalize, damping) in [(true, 0.0), (true, 0.05), (false, 0.01)] {
            let settings = Settings { normalize, damping, ..Settings::default() };
            with_quadratic(&settings, 1.5, |fixture, cells, quadratic, workspace| {
                let arrays = workspace.arrays(&Cpu, 4, 9).unwrap();
                quadratic.load(&Cpu, cells, arrays).unwrap();
                let start: Vec<f32> = (0..36).map(|i| (i % 7) as f32 / 7.0).collect();
                quadratic.begin(&Cpu, &start, cells, arrays).unwrap();
                quadratic.multiply(&Cpu, arrays).unwrap();
                let loss = |row: usize, errors: &[f64]| {
                    let rounded: Vec<f32> =
                        (0..9).map(|j| (f64::from(fixture.w[row * 9 + j]) + errors[j]) as f32).collect();
                    let square: f64 = errors.iter().map(|e| e * e).sum();
                    let unit = f64::from(quadratic.unit[row]);
                    unit * unit
                        * (fixture.objective(row, &rounded, |y| y)
                            + f64::from(quadratic.prepared.damping) * square)
                };
                for row in 0..4 {
                    let unit = f64::from(quadratic.unit[row]);
                    let errors: Vec<f64> =
                        (0..9).map(|j| f64::from(arrays.soft[row * 9 + j]) / unit).collect();
                    for j in 0..9 {
                        let moved = |by: f64| {
                            let mut errors = errors.clone();
                            errors[j] += by;
                            loss(row, &errors)
                        };
                        // The step multiplies by delta in row units: one unit is already in the product, one comes there.
                        let want = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                        let got =
                            2.0 * unit * f64::from(arrays.product[row * 9 + j] - arrays.target[row * 9 + j]);
                        assert!(
                            (got - want).abs() <= 1e-3 * want.abs().max(unit * unit * 0.1),
                            "[{row}, {j}]: {got} for {want}"
                        );
                    }
                }
            });
        }
    }

    #[test]
    fn values_are_the_objective_by_definition() {
        with_quadratic(&Settings::default(), 2.0, |fixture, cells, quadratic, workspace| {
            let arrays = workspace.arrays(&Cpu, 4, 9).unwrap();
            quadratic.load(&Cpu, cells, arrays).unwrap();
            let values = quadratic.evaluate(&Cpu, &cells.nearest_up, arrays).unwrap();
            let rounded = fixture.encodings.fake_quantize(&fixture.w);
            for (row, value) in values.iter().enumerate() {
                let want = 4.0 * fixture.objective(row, &rounded[row * 9..][..9], |y| y);
                let got = quadratic.full(row, value.plain, 2.0);
                assert!((got - want).abs() < 1e-4 * want, "row {row}: {got} for {want}");
                let exact =
                    exact(quadratic, row, |j| cells.error(row * 9 + j, cells.nearest_up[row * 9 + j]));
                assert!((exact - value.plain).abs() <= value.uncertainty, "row {row}: {exact} and {value:?}");
            }
        });
    }

    #[test]
    fn differences_are_those_of_the_objectives() {
        with_quadratic(&Settings::default(), 1.0, |_, cells, quadratic, workspace| {
            let arrays = workspace.arrays(&Cpu, 4, 9).unwrap();
            let nearest = &cells.nearest_up;
            let flipped: Vec<f32> =
                nearest.iter().enumerate().map(|(i, up)| if i % 3 == 0 { 1.0 - up } else { *up }).collect();
            let pair = |row, first, second| Pair { row, first, second };
            let pairs = [pair(2, &flipped, nearest), pair(0, nearest, &flipped), pair(3, nearest, nearest)];
            for (Pair { row, first, second }, got) in
                pairs.into_iter().zip(quadratic.differences(&Cpu, cells, &pairs, arrays).unwrap())
            {
                let of = |up: &[f32]| exact(quadratic, row, |j| cells.error(row * 9 + j, up[row * 9 + j]));
                let (first, second) = (of(first), of(second));
                let off = (got - (first - second)).abs();
                assert!(
                    off <= 1e-9 * first.abs().max(second.abs()),
                    "row {row}: {got} for {first} - {second}"
                );
            }
        });
    }

    #[test]
    fn row_units_make_expected_nearest_noise_one_per_weight_whatever_the_scale() {
        with_quadratic(&Settings::default(), 1.0, |fixture, cells, quadratic, _| {
            for row in 0..4 {
                let delta = &cells.delta[row * 9..][..9];
                let noise: f32 =
                    delta.iter().enumerate().map(|(j, d)| d * d * fixture.h[j * 10] / 12.0).sum();
                assert!((noise * quadratic.unit[row].powi(2) / 9.0 - 1.0).abs() < 1e-4);
            }
        });
    }
}
