//! The samples objective of one chunk: `mean |f(alpha W~ x~ + b) - f(alpha W x + b)|^2`, any element-wise `f`.
//!
//! Targets are computed once. Each iteration draws a minibatch by counter-based randomness keyed by (seed, layer,
//! iteration), never by chunk, so all chunks of a layer see the same positions. Two small products by diagonal matrices
//! turn the gathered targets and scale the rows' residuals (the device gathers rows only).
//!
//! Not here: refinement (on the samples' second moments), the guard's rule.

use halfstep_compute::random::Stream;
use halfstep_compute::{
    Activation, Device, DeviceError, MatMut, MatRef, Product, StepArgs, StepBuffers, StepGradient,
};

use crate::grid::Cells;
use crate::problem::{GramView, SamplesView};
use crate::quadratic::{Quadratic, begin};
use crate::workspace::{Arrays, Step, Watch};
use crate::{RowProblem, Settings, SolveError, schedule};

/// Positions per product when the whole set is evaluated.
const BLOCK: usize = 512;

/// Second moments of samples, on the host.
#[derive(Debug)]
pub(crate) struct Moments {
    h: Vec<f32>,
    c: Vec<f32>,
    g: Vec<f32>,
    count: f64,
}

impl Moments {
    /// Means over all positions, `[cols, cols]` each.
    pub(crate) fn of<D: Device>(device: &D, view: SamplesView<'_>, cols: usize) -> Result<Self, DeviceError> {
        let SamplesView { x_q, x_fp, n } = view;
        let (x_q, x_fp) = (device.upload(x_q)?, device.upload(x_fp)?);
        let square = cols.saturating_mul(cols);
        let mean = |buffer: &D::Buffer| {
            let mut host = vec![0.0; square];
            device.download(buffer, &mut host)?;
            host.iter_mut().for_each(|value| *value /= n as f32);
            Ok::<_, DeviceError>(host)
        };
        let gram = |x: &D::Buffer| {
            let mut out = device.zeros(square)?;
            device.gram(x, n, cols, &mut out)?;
            mean(&out)
        };
        let mut cross = device.zeros(square)?;
        device.matmul(
            Product::new(cols, cols, n),
            MatRef::transposed(&x_fp, cols),
            MatRef::new(&x_q, cols),
            MatMut::new(&mut cross, cols),
        )?;
        Ok(Self { h: gram(&x_q)?, g: gram(&x_fp)?, c: mean(&cross)?, count: n as f64 })
    }

    pub(crate) fn view(&self) -> GramView<'_> {
        GramView { h: &self.h, c: &self.c, g_energy: Some(&self.g), count: self.count }
    }
}

/// Samples and targets of one chunk on the device.
pub(crate) struct Samples<'a, B> {
    problem: &'a RowProblem<'a>,
    n: usize,
    activations: Vec<Activation>,
    bias: Vec<f32>,
    x: B,
    /// `f(alpha W x + b)`, `[rows, n]`.
    targets: Vec<f32>,
}

impl<'a, B: Send + Sync> Samples<'a, B> {
    /// Uploads the quantized stream's samples and computes the targets from the other's.
    pub(crate) fn new<D: Device<Buffer = B>>(
        device: &D,
        problem: &'a RowProblem<'a>,
        view: SamplesView<'_>,
    ) -> Result<Self, SolveError> {
        let (rows, n) = (problem.rows, view.n);
        let mut samples = Self {
            problem,
            n,
            activations: problem.activation.per_row(rows)?,
            bias: problem.bias.map_or_else(|| vec![0.0; rows], <[f32]>::to_vec),
            x: device.upload(view.x_fp)?,
            targets: vec![0.0; rows.saturating_mul(n)],
        };
        let mut targets = std::mem::take(&mut samples.targets);
        samples.outputs(device, problem.w, |row, first, outputs| {
            targets[row * n + first..][..outputs.len()].copy_from_slice(outputs);
        })?;
        samples.targets = targets;
        samples.x = device.upload(view.x_q)?;
        Ok(samples)
    }

    /// Calls `visit(row, first position, f(alpha weights x + b))` for all rows and blocks of positions.
    fn outputs<D: Device<Buffer = B>>(
        &self,
        device: &D,
        weights: &[f32],
        mut visit: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), DeviceError> {
        let (rows, cols) = (self.problem.rows, self.problem.cols);
        let weights = device.upload(weights)?;
        let width = BLOCK.min(self.n);
        let mut out = device.zeros(rows * width)?;
        let mut host = vec![0.0; rows * width];
        for first in (0..self.n).step_by(BLOCK) {
            let count = BLOCK.min(self.n - first);
            device.matmul(
                Product { alpha: self.problem.output_scale, ..Product::new(rows, count, cols) },
                MatRef::new(&weights, cols),
                MatRef::transposed(&self.x, cols).at(first * cols),
                MatMut::new(&mut out, count),
            )?;
            let host = &mut host[..rows * count];
            device.download(&out, host)?;
            for (row, outputs) in host.chunks_exact_mut(count).enumerate() {
                outputs.iter_mut().for_each(|output| *output += self.bias[row]);
                self.activations[row.min(self.activations.len() - 1)].apply(outputs);
                visit(row, first, outputs);
            }
        }
        Ok(())
    }

    /// The mean squared output error of each row under a rounding; sums in f64.
    pub(crate) fn evaluate<D: Device<Buffer = B>>(
        &self,
        device: &D,
        cells: &Cells,
        up: &[f32],
    ) -> Result<Vec<f64>, DeviceError> {
        let weights = self.problem.w.iter().zip(up).enumerate().map(|(i, (w, up))| w + cells.error(i, *up));
        let weights: Vec<f32> = weights.collect();
        let mut sums = vec![0.0; self.problem.rows];
        self.outputs(device, &weights, |row, first, outputs| {
            let targets = &self.targets[row * self.n + first..];
            let square = |(y, target): (&f32, &f32)| (f64::from(*y) - f64::from(*target)).powi(2);
            sums[row] += outputs.iter().zip(targets).map(square).sum::<f64>();
        })?;
        sums.iter_mut().for_each(|sum| *sum /= self.n as f64);
        Ok(sums)
    }

    /// Mean energy of the targets, all rows.
    pub(crate) fn signal(&self) -> f64 {
        self.targets.iter().map(|target| f64::from(*target).powi(2)).sum::<f64>() / self.n as f64
    }

    /// AdaRound on minibatches from `start` (values of h); leaves the rounding variables in `arrays.v`.
    pub(crate) fn adaround<D: Device<Buffer = B>>(
        &self,
        device: &D,
        quadratic: &Quadratic<'_, B>,
        start: &[f32],
        cells: &Cells,
        settings: &Settings,
        arrays: &mut Arrays<B>,
        watch: Watch<'_>,
    ) -> Result<(), DeviceError> {
        let floor: Vec<f32> = self.problem.w.iter().zip(&cells.low).map(|(w, low)| w + low).collect();
        device.write(&floor, &mut arrays.low)?;
        device.write(&cells.delta, &mut arrays.delta)?;
        begin(device, start, &floor, &cells.delta, arrays)?;
        let mut batch = Minibatch::new(device, self, quadratic, settings.batch.min(self.n))?;
        for t in 0..settings.iterations {
            Stream::new(settings.seed, self.problem.layer_key, t).distinct(self.n as u32, &mut batch.indices);
            batch.gather(device, self)?;
            batch.gradient(device, self, arrays)?;
            let (lambda, beta) = schedule::rounding(t, settings);
            let grad_scale = 2.0 / batch.indices.len() as f32;
            let args = StepArgs { lambda, beta, grad_scale, ..StepArgs::adam(settings.learning_rate) };
            let Arrays { low, delta, soft, product, v, m1, m2, .. } = arrays;
            let len = self.problem.rows * self.problem.cols;
            let gradient = StepGradient::Given { gradient: product };
            let buffers = StepBuffers { len, gradient, lo: low, delta, v, m1, m2, soft };
            device.adaround_step(&args.at_iteration(t + 1), buffers)?;
            watch(Step::Iterate);
        }
        Ok(())
    }
}

/// One minibatch's device arrays.
struct Minibatch<B> {
    indices: Vec<u32>,
    /// All targets, `[n, rows]`.
    all_targets: B,
    /// `[batch, cols]`.
    x: B,
    /// `[batch, rows]`.
    gathered: B,
    /// `[rows, batch]`.
    targets: B,
    /// Outputs, then residuals, `[rows, batch]`.
    z: B,
    /// Residuals scaled per row.
    scaled: B,
    /// `[rows, rows]`.
    identity: B,
    /// `unit^2 / alpha^2` on the diagonal.
    row_factors: B,
}

impl<B: Send + Sync> Minibatch<B> {
    fn new<D: Device<Buffer = B>>(
        device: &D,
        samples: &Samples<'_, B>,
        quadratic: &Quadratic<'_, B>,
        batch: usize,
    ) -> Result<Self, DeviceError> {
        let (rows, cols, n) = (samples.problem.rows, samples.problem.cols, samples.n);
        let alpha = samples.problem.output_scale;
        let alpha = if alpha == 0.0 { 1.0 } else { alpha };
        let turned: Vec<f32> =
            (0..n * rows).map(|index| samples.targets[index % rows * n + index / rows]).collect();
        let diagonal = |value: &dyn Fn(usize) -> f32| {
            let entry = |index: usize| if index / rows == index % rows { value(index / rows) } else { 0.0 };
            device.upload(&(0..rows * rows).map(entry).collect::<Vec<f32>>())
        };
        Ok(Self {
            indices: vec![0; batch],
            all_targets: device.upload(&turned)?,
            x: device.zeros(batch * cols)?,
            gathered: device.zeros(batch * rows)?,
            targets: device.zeros(batch * rows)?,
            z: device.zeros(batch * rows)?,
            scaled: device.zeros(batch * rows)?,
            identity: diagonal(&|_| 1.0)?,
            row_factors: diagonal(&|row| (quadratic.unit[row] / alpha).powi(2))?,
        })
    }

    /// Inputs and targets of the drawn positions.
    fn gather<D: Device<Buffer = B>>(
        &mut self,
        device: &D,
        samples: &Samples<'_, B>,
    ) -> Result<(), DeviceError> {
        let (rows, cols, batch) = (samples.problem.rows, samples.problem.cols, self.indices.len());
        device.gather_rows(&samples.x, cols, &self.indices, &mut self.x)?;
        device.gather_rows(&self.all_targets, rows, &self.indices, &mut self.gathered)?;
        device.matmul(
            Product::new(rows, batch, rows),
            MatRef::new(&self.identity, rows),
            MatRef::transposed(&self.gathered, rows),
            MatMut::new(&mut self.targets, batch),
        )
    }

    /// Half of `batch` times dL/dW~ of the soft weights, per row in row units, into `product`.
    fn gradient<D: Device<Buffer = B>>(
        &mut self,
        device: &D,
        samples: &Samples<'_, B>,
        arrays: &mut Arrays<B>,
    ) -> Result<(), DeviceError> {
        let (rows, cols, batch) = (samples.problem.rows, samples.problem.cols, self.indices.len());
        let alpha = samples.problem.output_scale;
        device.matmul_rough(
            Product { alpha, ..Product::new(rows, batch, cols) },
            MatRef::new(&arrays.soft, cols),
            MatRef::transposed(&self.x, cols),
            MatMut::new(&mut self.z, batch),
        )?;
        device.activation_residual(
            &samples.activations,
            &samples.bias,
            rows,
            batch,
            &mut self.z,
            &self.targets,
        )?;
        device.matmul(
            Product::new(rows, batch, rows),
            MatRef::new(&self.row_factors, rows),
            MatRef::new(&self.z, batch),
            MatMut::new(&mut self.scaled, batch),
        )?;
        device.matmul_rough(
            Product { alpha, ..Product::new(rows, cols, batch) },
            MatRef::new(&self.scaled, batch),
            MatRef::new(&self.x, cols),
            MatMut::new(&mut arrays.product, cols),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, spec};
    use crate::{Prepared, Statistics, Workspace};
    use halfstep_compute::{Cpu, CpuBuffer};

    /// A fixture's problem under the samples objective.
    fn problem<'a>(
        fixture: &'a Fixture,
        activation: crate::Activation,
        bias: &'a [f32],
        alpha: f32,
    ) -> RowProblem<'a> {
        RowProblem {
            w: &fixture.w,
            rows: fixture.rows,
            cols: fixture.cols,
            encodings: &fixture.encodings,
            bias: Some(bias),
            output_scale: alpha,
            activation,
            statistics: Statistics::Samples(view(fixture)),
            layer_key: 0,
            first_row: 0,
        }
    }

    fn view(fixture: &Fixture) -> SamplesView<'_> {
        SamplesView { x_q: &fixture.x_q, x_fp: &fixture.x_fp, n: fixture.n }
    }

    const ROWS: usize = 3;
    const COLS: usize = 5;
    const ALPHA: f32 = 1.25;

    /// Loss of all rows in row units over the drawn positions, by definition: f64 except for the activation.
    fn loss(
        fixture: &Fixture,
        problem: &RowProblem<'_>,
        factors: &[f64],
        indices: &[u32],
        weights: &[f64],
    ) -> f64 {
        let activations = problem.activation.per_row(ROWS).unwrap();
        let output = |row: usize, dot: f64| {
            let mut y = [(f64::from(ALPHA) * dot) as f32 + problem.bias.unwrap()[row]];
            activations[row.min(activations.len() - 1)].apply(&mut y);
            f64::from(y[0])
        };
        let mut sum = 0.0;
        for &index in indices {
            let at = |x: &[f32], j: usize| f64::from(x[index as usize * COLS + j]);
            for (row, factor) in factors.iter().enumerate() {
                let dot = |w: &dyn Fn(usize) -> f64, x: &[f32]| {
                    (0..COLS).map(|j| w(row * COLS + j) * at(x, j)).sum()
                };
                let y = output(row, dot(&|i| f64::from(fixture.w[i]), &fixture.x_fp));
                sum += factor * (output(row, dot(&|i| weights[i], &fixture.x_q)) - y).powi(2);
            }
        }
        sum / indices.len() as f64
    }

    fn check_gradient(activation: crate::Activation) {
        let fixture = Fixture::new(8, ROWS, COLS, 24, spec(3));
        let bias = [0.2, -0.3, 0.1];
        let problem = problem(&fixture, activation, &bias, ALPHA);
        let settings = Settings::default();
        let prepared = Prepared::new(&Cpu, &problem.statistics, COLS, &settings).unwrap();
        let moments = prepared.moments(&problem, &settings).unwrap();
        let cells = Cells::new(&fixture.w, &fixture.encodings, &[false; COLS]);
        let mut workspace: Workspace<CpuBuffer> = Workspace::new();
        let arrays = workspace.arrays(&Cpu, ROWS, COLS).unwrap();
        let quadratic =
            Quadratic::new(&Cpu, &problem, &prepared, moments, &cells, &settings, arrays).unwrap();
        let samples = Samples::new(&Cpu, &problem, view(&fixture)).unwrap();
        let mut batch = Minibatch::new(&Cpu, &samples, &quadratic, 7).unwrap();
        batch.indices.copy_from_slice(&[3, 0, 23, 11, 7, 8, 15]);
        let soft: Vec<f32> = fixture.w.iter().enumerate().map(|(i, w)| w + 0.2 * (i as f32).sin()).collect();
        Cpu.write(&soft, &mut arrays.soft).unwrap();
        batch.gather(&Cpu, &samples).unwrap();
        batch.gradient(&Cpu, &samples, arrays).unwrap();
        let factors: Vec<f64> = quadratic.unit.iter().map(|unit| f64::from(unit / ALPHA).powi(2)).collect();
        let weights: Vec<f64> = soft.iter().map(|w| f64::from(*w)).collect();
        for index in 0..ROWS * COLS {
            let moved = |by: f64| {
                let mut weights = weights.clone();
                weights[index] += by;
                loss(&fixture, &problem, &factors, &batch.indices, &weights)
            };
            // Smooth over 2e-3; positions within that of a kink would show as an error of the order of their share.
            let want = (moved(1e-3) - moved(-1e-3)) / 2e-3;
            let got = 2.0 / 7.0 * f64::from(arrays.product[index]);
            assert!(
                (got - want).abs() < 0.01 * want.abs().max(1.0),
                "{:?} {index}: {got} for {want}",
                problem.activation
            );
        }
    }

    #[test]
    fn gradient_matches_finite_differences_for_every_activation() {
        use crate::Activation;
        for activation in [
            Activation::Identity,
            Activation::Relu,
            Activation::Clip { min: 0.0, max: 6.0 },
            Activation::LeakyRelu { slope: 0.1 },
            Activation::PRelu { slope: vec![0.1, 0.3, -0.2] },
            Activation::Sigmoid,
            Activation::Tanh,
            Activation::HardSwish,
            Activation::Silu,
            Activation::Gelu,
            Activation::GeluTanh,
        ] {
            check_gradient(activation);
        }
    }

    #[test]
    fn moments_are_those_of_the_positions() {
        let fixture = Fixture::new(1, 1, 6, 700, spec(4));
        let moments = Moments::of(&Cpu, view(&fixture), 6).unwrap();
        for (got, want) in [(&moments.h, &fixture.h), (&moments.c, &fixture.c), (&moments.g, &fixture.g)] {
            assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-4), "{got:?} for {want:?}");
        }
    }
}
