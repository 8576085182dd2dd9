//! Whole solves of made-up layers: where the time goes, how good the result is, and lanes side by side.

use std::time::Instant;

use halfstep_compute::random::Stream;
use halfstep_compute::{Cpu, Device};
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme, estimate};
use halfstep_solver::{
    Activation, GramView, Prepared, RowProblem, Settings, Solution, Statistics, Step, Workspace,
    solve_prepared,
};

use crate::figures::Figures;
use crate::{Asked, Timed};

/// A layer with second moments of correlated inputs.
struct Layer {
    rows: usize,
    cols: usize,
    w: Vec<f32>,
    h: Vec<f32>,
    encodings: Encodings,
}

/// Independent directions of the made-up inputs besides noise.
const FACTORS: usize = 64;

impl Layer {
    fn new(rows: usize, cols: usize) -> Result<Self, String> {
        let mut stream = Stream::new(21, rows as u64, cols as u32);
        let mut uniform =
            |len: usize| -> Vec<f32> { (0..len).map(|_| stream.unit_f32() * 2.0 - 1.0).collect() };
        let w = uniform(rows * cols);
        // H = F F' / factors + noise: what inputs of so many common causes have.
        let factors = Cpu.upload(&uniform(FACTORS * cols)).map_err(|error| error.to_string())?;
        let mut h = Cpu.zeros(cols * cols).map_err(|error| error.to_string())?;
        Cpu.gram(&factors, FACTORS, cols, &mut h).map_err(|error| error.to_string())?;
        let mut h: Vec<f32> = h.iter().map(|value| value / FACTORS as f32).collect();
        h.iter_mut().step_by(cols + 1).for_each(|diagonal| *diagonal += 0.05);
        let spec = GridSpec {
            bits: 4,
            scheme: Scheme::Symmetric,
            granularity: Granularity::PerChannel,
            range: RangeEstimator::MinMax,
        };
        let encodings = estimate(&spec, &w, rows, cols, None).map_err(|error| error.to_string())?;
        Ok(Self { rows, cols, w, h, encodings })
    }

    fn prepared<D: Device>(&self, device: &D) -> Result<Prepared<D::Buffer>, String> {
        let settings = Settings::default();
        let made = Prepared::new(device, &self.problem().statistics, self.cols, &settings);
        made.map_err(|error| error.to_string())
    }

    fn problem(&self) -> RowProblem<'_> {
        RowProblem {
            w: &self.w,
            rows: self.rows,
            cols: self.cols,
            encodings: &self.encodings,
            bias: None,
            output_scale: 1.0,
            activation: Activation::Identity,
            statistics: Statistics::Gram(GramView { h: &self.h, c: &self.h, g_energy: None, count: 1e4 }),
            layer_key: 0,
            first_row: 0,
        }
    }
}

/// Seconds of a solve's parts.
#[derive(Default)]
struct Parts {
    iterations: f64,
    refine: f64,
    rest: f64,
}

fn timed<D: Device>(
    device: &D,
    layer: &Layer,
    prepared: &Prepared<D::Buffer>,
    settings: &Settings,
    workspace: &mut Workspace<D::Buffer>,
) -> Result<(Solution, Parts), String> {
    let begun = Instant::now();
    let (mut first, mut last, mut refining, mut refine) = (None, begun, false, 0.0);
    let mut refine_begun = begun;
    let solution =
        solve_prepared(device, prepared, &layer.problem(), settings, workspace, &mut |step| match step {
            Step::Iterate if !refining => {
                first.get_or_insert_with(Instant::now);
            }
            Step::Iterate => {}
            Step::Refine => {
                last = Instant::now();
                (refining, refine_begun) = (true, last);
            }
            Step::Choose => refine = refine_begun.elapsed().as_secs_f64(),
            _ => {}
        });
    let solution = solution.map_err(|error| error.to_string())?;
    let total = begun.elapsed().as_secs_f64();
    // Up to the first download after the loop, which waits for what was queued.
    let iterations = first.map_or(0.0, |first| (last - first).as_secs_f64());
    Ok((solution, Parts { iterations, refine, rest: total - iterations - refine }))
}

pub(crate) fn solves<D: Timed>(device: &D, asked: &Asked, figures: &mut Figures) -> Result<(), String> {
    agreement(device, figures)?;
    let shapes = match asked.quick {
        true => vec![(16, 64)],
        false => vec![(128, 1024), (128, 4096), (1024, 4096), (4096, 4096)],
    };
    let settings = Settings::default();
    for (rows, cols) in shapes {
        let layer = Layer::new(rows, cols)?;
        let mut workspace = Workspace::new();
        let begun = Instant::now();
        let prepared = layer.prepared(device)?;
        figures.say(
            &format!("prepare statistics of {cols} columns"),
            begun.elapsed().as_secs_f64(),
            "s",
            "once per layer",
        );
        timed(device, &layer, &prepared, &Settings { iterations: 3, ..settings.clone() }, &mut workspace)?;
        let (solution, parts) = timed(device, &layer, &prepared, &settings, &mut workspace)?;
        let total = parts.iterations + parts.refine + parts.rest;
        let remark = format!(
            "iterations {:.3}, refine {:.3} ({} sweeps), rest {:.3} s; objective {:.3} of nearest",
            parts.iterations,
            parts.refine,
            solution.report.refine_sweeps,
            parts.rest,
            solution.report.objective / solution.report.objective_nearest
        );
        figures.say(
            &format!("solve [{rows}, {cols}], {} iterations", settings.iterations),
            total,
            "s",
            &remark,
        );
        if rows == 128 || asked.quick {
            side_by_side(device, &layer, &prepared, &settings, figures)?;
        }
    }
    Ok(())
}

/// How good, against the CPU.
fn agreement<D: Timed>(device: &D, figures: &mut Figures) -> Result<(), String> {
    let layer = Layer::new(64, 320)?;
    let settings = Settings::default();
    let (mine, _) = timed(device, &layer, &layer.prepared(device)?, &settings, &mut Workspace::new())?;
    let (cpu, _) = timed(&Cpu, &layer, &layer.prepared(&Cpu)?, &settings, &mut Workspace::new())?;
    let ratio = mine.report.objective / cpu.report.objective;
    figures.say("objective over the CPU's, [64, 320]", ratio, "", "allowed 0.97 to 1.03");
    match (0.97..=1.03).contains(&ratio) {
        true => Ok(()),
        false => Err(format!("objective {ratio} of the CPU's, allowed 0.97 to 1.03")),
    }
}

/// The same solve on several lanes at once.
fn side_by_side<D: Timed>(
    device: &D,
    layer: &Layer,
    prepared: &Prepared<D::Buffer>,
    settings: &Settings,
    figures: &mut Figures,
) -> Result<(), String> {
    for lanes in [4, 16] {
        let all: Result<Vec<D>, _> = (0..lanes).map(|_| device.another()).collect();
        let all = all.map_err(|error| error.to_string())?;
        let begun = Instant::now();
        let solved: Result<Vec<_>, String> = std::thread::scope(|scope| {
            let threads: Vec<_> = all
                .iter()
                .map(|lane| {
                    scope.spawn(move || {
                        let mut workspace = Workspace::new();
                        // Each thread's first solve also makes its arrays.
                        timed(lane, layer, prepared, settings, &mut workspace)?;
                        timed(lane, layer, prepared, settings, &mut workspace)
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().map_err(|_| "a lane panicked".to_owned())?)
                .collect()
        });
        solved?;
        let each = begun.elapsed().as_secs_f64() / f64::from(2 * lanes);
        let name = format!("solve [{}, {}] on {lanes} lanes, each", layer.rows, layer.cols);
        figures.say(&name, each, "s", "wall-clock over solves, two per lane");
    }
    Ok(())
}
