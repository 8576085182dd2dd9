//! Everything about one layer that its chunks share, and the solve of one chunk.
//!
//! A row's grid follows from its weights and the inputs' mean squares, so each chunk chooses the grids of its own rows:
//! nobody waits for a search over the whole layer, and no row is searched twice in a fleet. Only a grid for the whole
//! tensor is chosen first.

use crate::attempt::Attempt;
use crate::devices::{EstimateError, Lane, OnDevices};
use crate::failure;
use crate::phase_clock::{Phase, PhaseClock};
use crate::weights::{Weights, floats};
use halfstep_exec::{GroupMeans, LayerMeans};
use halfstep_model::{Activation as Follows, Layer};
use halfstep_quant::{Encodings, Granularity, GridSpec, QuantError, RangeEstimator, ScaleType};
use halfstep_solver::{Activation, GramView, RowProblem, SamplesView, Settings, Start, Statistics, Step};
use halfstep_work::{
    ChunkId, ChunkReport, Failure, LayerId, LayerPlan, Objective, Rounding, SolverSettings, Source,
    StartPoint,
};
use std::ops::Range;
use std::sync::Arc;

/// Statistics of a layer over all shards, for all that share them.
pub(crate) struct Gathered {
    /// Complete.
    means: LayerMeans,
    /// The same, where chunks have been solved.
    prepared: OnDevices,
}

impl Gathered {
    pub(crate) fn new(means: LayerMeans) -> Self {
        Self { means, prepared: OnDevices::default() }
    }

    pub(crate) fn means(&self) -> &LayerMeans {
        &self.means
    }

    fn group(&self, group: usize) -> &GroupMeans {
        &self.means.groups()[group]
    }
}

/// A layer whose statistics are complete.
pub(crate) struct LayerProblem {
    weights: Weights,
    bias: Option<Vec<f32>>,
    grid: GridSpec,
    /// The grid of all rows, where they have one.
    whole: Option<Encodings>,
    statistics: Arc<Gathered>,
    /// What scales are stored as.
    scales: ScaleType,
}

impl LayerProblem {
    pub(crate) fn new(
        entry: &LayerPlan,
        layer: &Layer,
        source: &dyn Source,
        statistics: Arc<Gathered>,
        scales: ScaleType,
    ) -> Result<Self, Failure> {
        let constant = |name: &str| source.constant(name).map_err(failure::source);
        let weights = Weights::read(layer, constant(&layer.weight)?)?;
        let bias = layer.bias.as_deref().map(|name| floats(&constant(name)?)).transpose()?;
        let bias = bias.map(|b| rows_of_bias(&b, layer));
        let scales = scales.of(entry.grid.scheme);
        let mut problem = Self { weights, bias, grid: entry.grid, scales, whole: None, statistics };
        if entry.grid.granularity == Granularity::PerTensor {
            let weights = problem.weights.rows(layer, 0..layer.rows)?;
            // One grid of all rows is searched for on the CPU.
            problem.whole = Some(problem.encodings(layer, &weights, 0..layer.rows, 0, &Lane::default())?);
        }
        Ok(problem)
    }

    /// Decides the rounding of one chunk; also the seconds spent refining. The attempt is told of every iteration.
    pub(crate) fn solve(
        &self,
        id: LayerId,
        chunk: ChunkId,
        rows: Range<usize>,
        layer: &Layer,
        settings: &SolverSettings,
        lane: &mut Lane,
        attempt: &Attempt<'_>,
    ) -> Result<(Rounding, f64), Failure> {
        let per_group = (layer.rows / layer.groups.max(1)).max(1);
        let mut q = Vec::with_capacity(rows.len() * layer.cols);
        let mut report = ChunkReport::default();
        let progress = || attempt.progress();
        let mut clock = PhaseClock::new(&progress);
        let mut parts = Vec::new();
        let mut start = rows.start;
        while start < rows.end {
            attempt.step()?;
            let group = start / per_group;
            let end = rows.end.min((group + 1) * per_group);
            clock.enter(Phase::Grids);
            let weights = self.weights.rows(layer, start..end)?;
            let encodings = self.encodings(layer, &weights, start..end, group, lane)?;
            clock.enter(Phase::Prepare);
            let problem = self.problem(id, layer, settings, (&weights, &encodings), start..end, group);
            let settings = solver_settings(settings);
            let mut tell = |step| clock.tell(step);
            let (encodings, solution) = lane
                .solve(&self.statistics.prepared, group, &problem, &settings, self.scales, &mut tell)
                .map_err(|e| failure::solve(&layer.name, &e))?;
            parts.push(encodings);
            q.extend_from_slice(&solution.q);
            add(&mut report, &solution.report);
            start = end;
        }
        let encodings = Encodings::concat_rows(&parts).map_err(|e| failure::quant(&layer.name, &e))?;
        clock.record(&layer.name, rows.len(), layer.cols);
        Ok((Rounding { layer: id, chunk, encodings, q, report }, clock.step(Step::Refine)))
    }

    /// Grids of some rows of one group; `weights` are those rows'.
    fn encodings(
        &self,
        layer: &Layer,
        weights: &[f32],
        rows: Range<usize>,
        group: usize,
        lane: &Lane,
    ) -> Result<Encodings, Failure> {
        if let Some(whole) = &self.whole {
            return Ok(whole.slice_rows(rows));
        }
        let cols = layer.cols;
        let importance = self.importance(group, cols);
        let found = lane.estimate(&self.grid, weights, (rows.len(), cols), importance.as_deref());
        let mut found = found.map_err(|error| match error {
            EstimateError::Quant(error) => failure::quant(&layer.name, &in_layer(error, rows.start)),
            EstimateError::Device(error) => failure::device(&layer.name, &error),
        })?;
        found.store_scales_as(self.scales);
        Ok(found)
    }

    /// Scales are chosen for the weights' effect on the output where the estimator can weigh columns: by the mean squares
    /// of the inputs (the Gram diagonal). Rows of different groups have no columns in common.
    fn importance(&self, group: usize, cols: usize) -> Option<Vec<f32>> {
        if self.grid.range != RangeEstimator::Mse || self.grid.granularity == Granularity::PerTensor {
            return None;
        }
        let h = &self.statistics.group(group).h;
        let diagonal: Vec<f32> = (0..cols).map(|c| h[c * cols + c].max(0.0)).collect();
        diagonal.iter().all(|d| d.is_finite()).then_some(diagonal)
    }

    fn problem<'a>(
        &'a self,
        id: LayerId,
        layer: &Layer,
        settings: &SolverSettings,
        (weights, encodings): (&'a [f32], &'a Encodings),
        rows: Range<usize>,
        group: usize,
    ) -> RowProblem<'a> {
        let means = self.statistics.group(group);
        let (statistics, activation) = match settings.objective {
            Objective::Gram => (
                Statistics::Gram(GramView {
                    h: &means.h,
                    c: means.c.as_deref().unwrap_or(&means.h),
                    g_energy: means.g.as_deref(),
                    count: self.statistics.means.positions() as f64,
                }),
                Activation::Identity,
            ),
            Objective::Samples => (
                Statistics::Samples(SamplesView {
                    x_q: &means.samples.x_q,
                    x_fp: &means.samples.x_fp,
                    n: means.samples.x_q.len() / layer.cols.max(1),
                }),
                activation(layer, rows.clone()),
            ),
        };
        RowProblem {
            w: weights,
            rows: rows.len(),
            cols: layer.cols,
            encodings,
            bias: self.bias.as_ref().map(|b| &b[rows.clone()]),
            output_scale: layer.output_scale,
            activation,
            statistics,
            layer_key: u64::from(id.0),
            first_row: rows.start,
        }
    }
}

fn rows_of_bias(bias: &[f32], layer: &Layer) -> Vec<f32> {
    let at =
        |row: usize| if bias.len() == layer.rows { bias[row] } else { bias.first().copied().unwrap_or(0.0) };
    (0..layer.rows).map(|row| layer.bias_scale * at(row)).collect()
}

/// The error as one of the layer, whose rows before `first` were not looked at.
fn in_layer(error: QuantError, first: usize) -> QuantError {
    match error {
        QuantError::NonFinite { row, col, value } => QuantError::NonFinite { row: first + row, col, value },
        other => other,
    }
}

pub(crate) fn solver_settings(s: &SolverSettings) -> Settings {
    Settings {
        iterations: s.iterations,
        learning_rate: s.learning_rate,
        beta: s.beta,
        warm_start: s.warm_start,
        lambda: s.lambda,
        batch: s.batch as usize,
        damping: s.damping,
        start: match s.start {
            StartPoint::Nearest => Start::Nearest,
            StartPoint::Gptq => Start::Gptq,
        },
        refine_sweeps: s.refine_sweeps,
        scale_fits: s.scale_fits,
        seed: s.seed,
        ..Settings::default()
    }
}

/// What follows all uses of the layer; uses that differ have no common activation.
fn activation(layer: &Layer, rows: Range<usize>) -> Activation {
    let mut uses = layer.uses.iter().map(|u| &u.activation);
    let Some(first) = uses.next().filter(|first| layer.uses.iter().all(|u| u.activation == **first)) else {
        return Activation::Identity;
    };
    match first {
        Follows::Identity => Activation::Identity,
        Follows::Relu => Activation::Relu,
        Follows::Clip { min, max } => Activation::Clip { min: *min, max: *max },
        Follows::LeakyRelu { slope } => Activation::LeakyRelu { slope: *slope },
        Follows::PRelu { slope } if slope.len() == layer.rows => {
            Activation::PRelu { slope: slope[rows].to_vec() }
        }
        Follows::PRelu { slope } => Activation::PRelu { slope: slope.clone() },
        Follows::Sigmoid => Activation::Sigmoid,
        Follows::Tanh => Activation::Tanh,
        Follows::HardSwish => Activation::HardSwish,
        Follows::Silu => Activation::Silu,
        Follows::Gelu => Activation::Gelu,
        Follows::GeluTanh => Activation::GeluTanh,
    }
}

fn add(sum: &mut ChunkReport, part: &halfstep_solver::ChunkReport) {
    sum.objective_nearest += part.objective_nearest;
    sum.objective += part.objective;
    sum.signal += part.signal;
    sum.rounded_away += part.rounded_away as u64;
    sum.guarded_rows += part.guarded_rows as u64;
    // Groups have inputs of their own, so their dead inputs add up.
    sum.dead_inputs += part.dead_inputs as u64;
    sum.zero_rows += part.zero_rows as u64;
}
