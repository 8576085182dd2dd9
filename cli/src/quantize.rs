//! `quantize`: a coordinator and a node in this process, and what the user sees of them.
//!
//! Not here: planning, scheduling and writing (`coordinator`), computing (`agent`).

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use halfstep_agent::{LocalNode, NodeOptions};
use halfstep_coordinator::{
    Assembled, JobConfig, JobSource, OutcomeKind, Prepared, RunEvent, assemble, check_target, export,
    prepare, run,
};
use halfstep_work::{JobState, Node, Plan, TaskPhase};
use serde_json::json;

use crate::answers::{FailedLayer, Kept, Progress, QuantizeOutcome, ReportRow};
use crate::config::{Resources, RunConfig};
use crate::engine;
use crate::exit::{CliError, Exit};

/// Raised by Ctrl-C; slots finish the task in hand and stop.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Quantizes a network.
///
/// # Errors
/// Whatever stops the whole job; a layer that fails is part of the outcome.
pub(crate) fn quantize(
    config: &RunConfig,
    events: &(dyn Fn(Progress) + Sync),
) -> Result<QuantizeOutcome, CliError> {
    let started = Instant::now();
    // A second handler in one process is refused by the library; the first one serves.
    let _ = ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed));
    let job = config.to_job();
    check_target(&job.output, job.force)?;
    let (prepared, dataset) = prepare(&job)?;
    let read_seconds = started.elapsed().as_secs_f64();
    let node = node(&config.resources)?;
    let description = node.describe();
    events(planned(&prepared, description.slots));
    let inputs: Vec<PathBuf> =
        std::iter::once(job.model.clone()).chain(dataset.files().iter().cloned()).collect();
    let plan = Arc::new(prepared.plan.clone());
    let source = Arc::new(JobSource::new(Arc::clone(&plan), Arc::new(prepared.model.clone()), dataset));
    let watch = Watch::new(&plan, events);
    let state = run(&plan, &node, &source, &INTERRUPTED, &|event| watch.observe(&event))?;
    drop(source);
    let begun = Instant::now();
    events(Progress::Writing { path: job.output.clone() });
    let mut assembled = assemble(&prepared, &state)?;
    let seconds = watch.finish();
    let timing = timing(&state, &plan, read_seconds, &seconds, description.slots);
    let files = export(&job, &prepared, &mut assembled, &description, &inputs, &timing)?;
    let mut phases = vec![("read".to_owned(), read_seconds)];
    phases.extend(seconds.phases(description.slots));
    phases.push(("export".to_owned(), begun.elapsed().as_secs_f64()));
    let outcome = outcome(&job, &assembled, &state, phases, files);
    events(Progress::Summary {
        solved: outcome.solved,
        kept: outcome.kept.len(),
        failed: outcome.failed.len(),
        seconds: started.elapsed().as_secs_f64(),
        output: job.output.clone(),
    });
    Ok(outcome)
}

/// The node of this process.
///
/// # Errors
/// Bad input if the ONNX Runtime library cannot be loaded.
pub(crate) fn node(resources: &Resources) -> Result<LocalNode, CliError> {
    let threads = resources.threads.unwrap_or_else(engine::cores);
    let options = NodeOptions {
        threads,
        memory_budget: usize::try_from(resources.memory_budget.0).unwrap_or(usize::MAX),
        spill_dir: resources.spill_dir.clone().unwrap_or_else(std::env::temp_dir),
    };
    Ok(LocalNode::new(engine::open(resources.onnxruntime.as_deref())?, options))
}

fn planned(prepared: &Prepared, threads: usize) -> Progress {
    let plan = &prepared.plan;
    Progress::Planned {
        layers: plan.layers.len(),
        stages: plan.stages.len(),
        shards: plan.shards.len(),
        samples: plan.samples(),
        threads,
        estimated_seconds: None,
    }
}

/// Seconds of slots by phase.
#[derive(Default, Clone, Copy)]
struct PhaseSeconds {
    forward: f64,
    statistics: f64,
    solve: f64,
    refine: f64,
}

impl PhaseSeconds {
    /// Wall seconds, as far as the slots shared the work evenly.
    fn phases(self, slots: usize) -> Vec<(String, f64)> {
        let share = 1.0 / slots.max(1) as f64;
        [
            ("forward", self.forward),
            ("statistics", self.statistics),
            ("solve", self.solve - self.refine),
            ("refine", self.refine),
        ]
        .map(|(name, seconds)| (name.to_owned(), seconds * share))
        .into()
    }
}

struct Watch<'a> {
    plan: &'a Plan,
    events: &'a (dyn Fn(Progress) + Sync),
    inner: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    seconds: PhaseSeconds,
    decided: usize,
    stage: Option<usize>,
}

impl<'a> Watch<'a> {
    fn new(plan: &'a Plan, events: &'a (dyn Fn(Progress) + Sync)) -> Self {
        for kept in &plan.kept {
            events(Progress::LayerKept { name: kept.name.clone(), reason: kept.reason.clone() });
        }
        Self { plan, events, inner: Mutex::default() }
    }

    fn finish(self) -> PhaseSeconds {
        self.inner.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).seconds
    }

    fn observe(&self, event: &RunEvent) {
        let mut seen = self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match event {
            RunEvent::Task { phase, seconds, progress } => {
                match phase {
                    TaskPhase::Capture => seen.seconds.forward += seconds,
                    TaskPhase::Accumulate => seen.seconds.statistics += seconds,
                    TaskPhase::Reduce | TaskPhase::Solve => seen.seconds.solve += seconds,
                }
                if *phase == TaskPhase::Capture && progress.phase == TaskPhase::Capture {
                    let (stage, shard, shards) = (progress.stage + 1, progress.done, progress.total);
                    (self.events)(Progress::ShardCaptured { stage, shard, shards });
                }
                // Slots report in any order: news of an earlier stage may come last.
                let next = seen.stage.map_or(0, |stage| stage + 1);
                for stage in next..(progress.stage + 1).min(progress.stages) {
                    seen.stage = Some(stage);
                    let layers = self.plan.stages[stage].solve.len();
                    let stages = progress.stages;
                    (self.events)(Progress::StageStarted { stage: stage + 1, stages, layers });
                }
            }
            RunEvent::Solved { layer, roundings, seconds } => {
                seen.decided += 1;
                let entry = self.plan.layer(*layer);
                let mut sum = halfstep_work::ChunkReport::default();
                roundings.iter().for_each(|r| sum.add(&r.report));
                seen.seconds.refine += sum.refine_seconds;
                (self.events)(Progress::LayerSolved {
                    name: entry.name.clone(),
                    index: seen.decided,
                    total: self.plan.layers.len(),
                    bits: entry.grid.bits,
                    objective_before: sum.objective_nearest,
                    objective_after: sum.objective,
                    sqnr_db: sqnr_db(sum.signal, sum.objective),
                    rounded_away: sum.rounded_away,
                    weights: (entry.rows * entry.cols) as u64,
                    seconds: *seconds,
                });
            }
            RunEvent::Failed { layer, failure } => {
                seen.decided += 1;
                let name = self.plan.layer(*layer).name.clone();
                (self.events)(Progress::LayerFailed { name, cause: failure.message.clone() });
            }
        }
    }
}

fn sqnr_db(signal: f64, error: f64) -> f64 {
    if error > 0.0 { 10.0 * (signal / error).log10() } else { f64::INFINITY }
}

fn timing(
    state: &JobState,
    plan: &Plan,
    read: f64,
    seconds: &PhaseSeconds,
    threads: usize,
) -> serde_json::Value {
    let layers: serde_json::Map<String, serde_json::Value> =
        plan.layers.iter().map(|l| (l.name.clone(), json!(layer_seconds(state, l.id)))).collect();
    json!({
        "threads": threads,
        "read_seconds": read,
        "forward_thread_seconds": seconds.forward,
        "statistics_thread_seconds": seconds.statistics,
        "solve_thread_seconds": seconds.solve - seconds.refine,
        "refine_thread_seconds": seconds.refine,
        "layer_solve_thread_seconds": layers,
    })
}

fn layer_seconds(state: &JobState, layer: halfstep_work::LayerId) -> f64 {
    state.roundings(layer).map_or(0.0, |all| all.iter().map(|r| r.report.seconds).sum())
}

fn outcome(
    job: &JobConfig,
    assembled: &Assembled,
    state: &JobState,
    phases: Vec<(String, f64)>,
    files: Vec<PathBuf>,
) -> QuantizeOutcome {
    let mut kept = Vec::new();
    let mut failed = Vec::new();
    let mut rows = Vec::new();
    for (index, layer) in assembled.report.layers.iter().enumerate() {
        let name = layer.name.clone();
        match &layer.kind {
            OutcomeKind::Kept { reason } => kept.push(Kept {
                name,
                op: layer.op_type.clone(),
                requested: job
                    .rules
                    .iter()
                    .any(|rule| rule.skip && reason.contains(&format!("`{}`", rule.pattern))),
                reason: reason.clone(),
            }),
            OutcomeKind::Failed { reason } => failed.push(FailedLayer { name, cause: reason.clone() }),
            OutcomeKind::Solved => {}
        }
        let Some(solved) = &layer.solved else { continue };
        rows.push(ReportRow {
            name: layer.name.clone(),
            bits: solved.grid.bits,
            grid: format!("{} {}", solved.grid.scheme, solved.grid.granularity),
            objective_before: solved.objective_nearest,
            objective_after: solved.objective,
            sqnr_db: solved.sqnr_db.unwrap_or(f64::INFINITY),
            rounded_away: solved.rounded_away,
            weights: solved.weights,
            seconds: layer_seconds(state, halfstep_work::LayerId(index as u32)),
        });
    }
    let notes = assembled.report.notes.clone();
    QuantizeOutcome { solved: rows.len(), kept, failed, rows, phases, files, notes }
}

/// The exit code of an interrupted job differs from the errors it may cause on its way out.
pub(crate) fn interrupted(error: CliError) -> CliError {
    if INTERRUPTED.load(Ordering::Relaxed) && error.exit != Exit::Interrupted {
        return CliError::new(Exit::Interrupted, error.message);
    }
    error
}
