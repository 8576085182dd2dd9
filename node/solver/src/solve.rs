//! Solves one row chunk: start, AdaRound, refine, choose, guard.
//!
//! Rules: a dead input (`H_jj == 0`) keeps its weights at nearest; a row of zeros becomes zero points; a weight outside the
//! grid has one value; statistics that are not finite are refused, naming the entry. Refinement also runs from nearest
//! and from the start, and each row keeps the best of the results.
//!
//! Not here: the steps themselves.

use halfstep_compute::{Device, DeviceError, cpu};

use crate::candidates::{ByQuadratic, ByValue, Candidate, select};
use crate::check::check;
use crate::grid::Cells;
use crate::prepared::Prepared;
use crate::problem::GramView;
use crate::quadratic::{Quadratic, RowValue};
use crate::samples::Samples;
use crate::workspace::{Arrays, Step, Watch};
use crate::{
    Activation, ChunkReport, RowProblem, Settings, Solution, SolveError, Start, Statistics, Workspace, gptq,
    refine,
};

/// Rounds the rows of one chunk.
///
/// Deterministic: equal arguments on equal device kinds give equal bytes. The result is never worse than nearest rounding
/// in any row, nor than the start: on the undamped gram objective, or, with samples, on the objective over all of them.
///
/// # Errors
/// `Setting`, `Length`, `Encodings`, `NonFinite`, `NegativeDiagonal`, `NoSamples`, `ActivationNeedsSamples` for what the
/// caller gave; `Overflow` if f32 does not suffice; `Device`.
pub fn solve<D: Device>(
    device: &D,
    problem: &RowProblem<'_>,
    settings: &Settings,
    workspace: &mut Workspace<D::Buffer>,
) -> Result<Solution, SolveError> {
    solve_watched(device, problem, settings, workspace, &mut |_| {})
}

/// [`solve`], telling `watch` of every step.
///
/// # Errors
/// The same.
pub fn solve_watched<D: Device>(
    device: &D,
    problem: &RowProblem<'_>,
    settings: &Settings,
    workspace: &mut Workspace<D::Buffer>,
    watch: &mut dyn FnMut(Step),
) -> Result<Solution, SolveError> {
    check(problem)?;
    let prepared = Prepared::new(device, &problem.statistics, problem.cols, settings)?;
    solve_prepared(device, &prepared, problem, settings, workspace, watch)
}

/// [`solve_watched`] with statistics that are on the device already: those of the problem, whatever its rows.
///
/// The result is the same, bit for bit. That the problem's statistics are the prepared ones is the caller's to see to;
/// their width and the damping are checked.
///
/// # Errors
/// The same.
pub fn solve_prepared<D: Device>(
    device: &D,
    prepared: &Prepared<D::Buffer>,
    problem: &RowProblem<'_>,
    settings: &Settings,
    workspace: &mut Workspace<D::Buffer>,
    watch: &mut dyn FnMut(Step),
) -> Result<Solution, SolveError> {
    let solution = solve_keeping(device, prepared, problem, settings, workspace, watch)?.0;
    watch(Step::Done);
    Ok(solution)
}

/// [`solve_prepared`], and the quadratic and cells that it was solved with: they need not be made again.
pub(crate) fn solve_keeping<'a, D: Device>(
    device: &D,
    prepared: &'a Prepared<D::Buffer>,
    problem: &RowProblem<'a>,
    settings: &Settings,
    workspace: &mut Workspace<D::Buffer>,
    watch: Watch<'_>,
) -> Result<(Solution, Quadratic<'a, D::Buffer>, Cells), SolveError> {
    settings.validate()?;
    check(problem)?;
    let moments = prepared.moments(problem, settings)?;
    let arrays = workspace.arrays(device, problem.rows, problem.cols)?;
    match problem.statistics {
        Statistics::Gram(_) => run(device, problem, (prepared, moments), None, settings, arrays, watch),
        Statistics::Samples(view) => {
            let samples = Samples::new(device, problem, view)?;
            run(device, problem, (prepared, moments), Some(&samples), settings, arrays, watch)
        }
    }
}

/// What every step of one solve works on.
struct Chunk<'a, D: Device> {
    device: &'a D,
    settings: &'a Settings,
    cells: &'a Cells,
    quadratic: &'a Quadratic<'a, D::Buffer>,
    samples: Option<&'a Samples<'a, D::Buffer>>,
}

fn run<'a, D: Device>(
    device: &D,
    problem: &RowProblem<'a>,
    (prepared, moments): (&'a Prepared<D::Buffer>, GramView<'a>),
    samples: Option<&Samples<'_, D::Buffer>>,
    settings: &Settings,
    arrays: &mut Arrays<D::Buffer>,
    watch: Watch<'_>,
) -> Result<(Solution, Quadratic<'a, D::Buffer>, Cells), SolveError> {
    watch(Step::Multiply);
    let dead = &prepared.dead;
    let cells = Cells::new(problem.w, problem.encodings, dead);
    let quadratic = Quadratic::new(device, problem, prepared, moments, &cells, settings, arrays)?;
    let chunk = Chunk { device, settings, cells: &cells, quadratic: &quadratic, samples };
    let mut report = ChunkReport {
        dead_inputs: dead.iter().filter(|dead| **dead).count(),
        zero_rows: cells.zero_rows,
        iterations: settings.iterations,
        ..ChunkReport::default()
    };
    let roundings = chunk.roundings(arrays, &mut report, watch)?;
    let up = match samples {
        Some(samples) if problem.activation != Activation::Identity => {
            judge_samples(&chunk, samples, roundings, problem, &mut report, watch)?
        }
        _ => judge_quadratic(&chunk, roundings, problem, arrays, &mut report, watch)?,
    };
    report.rounded_away = up.iter().zip(&cells.nearest_up).filter(|(up, nearest)| up != nearest).count();
    Ok((Solution { q: cells.integers(&up), report }, quadratic, cells))
}

/// Roundings to choose from.
struct Roundings {
    /// Made by AdaRound and refinement.
    solved: Vec<Vec<f32>>,
    /// Nearest, then the start if it is another.
    fallbacks: Vec<Vec<f32>>,
}

impl<D: Device> Chunk<'_, D> {
    /// All roundings that compete.
    fn roundings(
        &self,
        arrays: &mut Arrays<D::Buffer>,
        report: &mut ChunkReport,
        watch: Watch<'_>,
    ) -> Result<Roundings, DeviceError> {
        let mut fallbacks = vec![self.cells.nearest_up.clone()];
        if self.settings.start == Start::Gptq {
            watch(Step::Start);
            fallbacks.push(gptq::choose(self.device, self.quadratic, self.cells, arrays)?);
        }
        let mut solved = Vec::new();
        if self.settings.iterations > 0 {
            watch(Step::Learn);
            solved.push(self.adaround(fallbacks.get(1).map(Vec::as_slice), arrays, watch)?);
        }
        // For refinement, and for measuring what came of it.
        self.quadratic.load(self.device, self.cells, arrays)?;
        if self.settings.refine_sweeps > 0 {
            watch(Step::Refine);
            // The unrefined result stays in the contest: after an activation the quadratic is only a model.
            for mut up in solved.iter().chain(&fallbacks).cloned().collect::<Vec<_>>() {
                let sweeps = self.settings.refine_sweeps;
                report.refine_sweeps +=
                    refine::refine(self.device, self.quadratic, sweeps, &mut up, arrays, watch)?;
                solved.push(up);
            }
        }
        Ok(Roundings { solved, fallbacks })
    }

    /// The hardened result of AdaRound from the start.
    fn adaround(
        &self,
        chosen: Option<&[f32]>,
        arrays: &mut Arrays<D::Buffer>,
        watch: Watch<'_>,
    ) -> Result<Vec<f32>, DeviceError> {
        let start = self.start(chosen);
        match self.samples {
            Some(samples) => {
                let (device, settings) = (self.device, self.settings);
                samples.adaround(device, self.quadratic, &start, self.cells, settings, arrays, watch)?;
            }
            None => {
                self.quadratic.load(self.device, self.cells, arrays)?;
                self.quadratic.begin(self.device, &start, self.cells, arrays)?;
                self.quadratic.adaround(self.device, self.settings, arrays, watch)?;
            }
        }
        let mut v = vec![0.0; start.len()];
        self.device.download(&arrays.v, &mut v)?;
        let mut up = start;
        cpu::harden(&v, &self.cells.delta, &mut up);
        Ok(up)
    }

    /// Where `h(v)` starts: at the weight, or halfway from there to the chosen neighbour.
    fn start(&self, chosen: Option<&[f32]>) -> Vec<f32> {
        let fraction = (0..self.cells.low.len()).map(|index| self.cells.fraction(index));
        match chosen {
            Some(up) => fraction.zip(up).map(|(fraction, up)| 0.5 * (fraction + up)).collect(),
            None => fraction.collect(),
        }
    }
}

/// Chooses by the quadratic; returns the final rounding.
fn judge_quadratic<D: Device>(
    chunk: &Chunk<'_, D>,
    roundings: Roundings,
    problem: &RowProblem<'_>,
    arrays: &mut Arrays<D::Buffer>,
    report: &mut ChunkReport,
    watch: Watch<'_>,
) -> Result<Vec<f32>, SolveError> {
    watch(Step::Choose);
    let Chunk { device, cells, quadratic, .. } = *chunk;
    let mut measure = |up: Vec<f32>| -> Result<Candidate<RowValue>, SolveError> {
        let values = quadratic.evaluate(device, &up, arrays)?;
        finite("objective", values.iter().map(|value| value.damped), problem)?;
        Ok(Candidate { up, values })
    };
    let solved = roundings.solved.into_iter().map(&mut measure).collect::<Result<Vec<_>, _>>()?;
    let fallbacks = roundings.fallbacks.into_iter().map(&mut measure).collect::<Result<Vec<_>, _>>()?;
    watch(Step::Guard);
    let mut judge = ByQuadratic { device, quadratic, cells, arrays };
    let (best, guarded) = select(&mut judge, problem.rows, problem.cols, &solved, &fallbacks)?;
    report.objective_nearest = quadratic.total(&fallbacks[0].values, problem.output_scale);
    report.objective = quadratic.total(&best.values, problem.output_scale);
    report.signal = quadratic.signal(problem.output_scale);
    report.guarded_rows = guarded;
    Ok(best.up)
}

/// Chooses by the samples objective; returns the final rounding.
fn judge_samples<D: Device>(
    chunk: &Chunk<'_, D>,
    samples: &Samples<'_, D::Buffer>,
    roundings: Roundings,
    problem: &RowProblem<'_>,
    report: &mut ChunkReport,
    watch: Watch<'_>,
) -> Result<Vec<f32>, SolveError> {
    watch(Step::Choose);
    let measure = |up: Vec<f32>| -> Result<Candidate<f64>, SolveError> {
        let values = samples.evaluate(chunk.device, chunk.cells, &up)?;
        finite("objective", values.iter().copied(), problem)?;
        Ok(Candidate { up, values })
    };
    let solved = roundings.solved.into_iter().map(measure).collect::<Result<Vec<_>, _>>()?;
    let fallbacks = roundings.fallbacks.into_iter().map(measure).collect::<Result<Vec<_>, _>>()?;
    let (best, guarded) = select(&mut ByValue, problem.rows, problem.cols, &solved, &fallbacks)?;
    report.objective_nearest = fallbacks[0].values.iter().sum();
    report.objective = best.values.iter().sum();
    report.signal = samples.signal();
    report.guarded_rows = guarded;
    Ok(best.up)
}

pub(crate) fn finite(
    what: &'static str,
    values: impl Iterator<Item = f64>,
    problem: &RowProblem<'_>,
) -> Result<(), SolveError> {
    match values.enumerate().find(|(_, value)| !value.is_finite()) {
        Some((row, value)) => Err(SolveError::Overflow { what, row: problem.first_row + row, value }),
        None => Ok(()),
    }
}
