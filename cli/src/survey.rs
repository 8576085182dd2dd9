//! `inspect` and `plan`: what is in a model, and what a job would do with it. Nothing is rounded.
//!
//! A plan spends one sample's run through the network; bytes then follow exactly, seconds by this machine's speed.
//! Not here: running the sample (`agent`), choosing stages, shards and chunks (`coordinator`).

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use halfstep_agent::{ProbeReport, Rates, SegmentProbe, StageMemory, TapProbe, device_memory, probe};
use halfstep_coordinator::partition::{self, Fleet, StageCost};
use halfstep_coordinator::{PlanSource, inspect as list, prepare};
use halfstep_quant::Granularity;
use halfstep_work::{LayerPlan, Objective, Plan};

use crate::answers::{FleetRow, GpuRow, InspectReport, Kept, LayerRow, LinkRow, PlanReport, StageRow};
use crate::config::RunConfig;
use crate::exit::CliError;
use crate::values::DeviceArg;
use crate::{devices, engine};

/// Lists layers.
///
/// # Errors
/// Bad input for a model that cannot be read.
pub(crate) fn inspect(model: &Path, fold_batch_norm: bool) -> Result<InspectReport, CliError> {
    let listed = list(model, fold_batch_norm)?;
    Ok(InspectReport {
        inputs: listed.inputs,
        outputs: listed.outputs,
        opset: listed.opset,
        layers: listed
            .layers
            .iter()
            .map(|l| LayerRow {
                name: l.name.clone(),
                op: l.op_type.clone(),
                weight: l.weight.clone(),
                shape: l.weight_shape.clone(),
                rows: l.rows,
                cols: l.cols,
                groups: l.groups,
                activation: l.activation.clone(),
                uses: l.uses,
            })
            .collect(),
        kept: listed.kept.into_iter().map(|k| kept(k, false)).collect(),
    })
}

fn kept(layer: halfstep_work::KeptLayer, requested: bool) -> Kept {
    Kept { name: layer.name, op: layer.op_type, reason: layer.reason, requested }
}

/// Plans, and runs one sample to see what the plan costs.
///
/// # Errors
/// What `quantize` would say before it starts, or of its first sample.
pub(crate) fn plan(config: &RunConfig, fleet: Option<FleetAsked>) -> Result<PlanReport, CliError> {
    let begun = Instant::now();
    let (prepared, dataset) = prepare(&config.to_job())?;
    let read_seconds = begun.elapsed().as_secs_f64();
    let dataset_bytes = dataset.bytes_held() as u64;
    let nodes: Vec<usize> = prepared.cut.segments.iter().map(|segment| segment.nodes.len()).collect();
    let plan = Arc::new(prepared.plan);
    let source = PlanSource::new(Arc::clone(&plan), prepared.subject, dataset);
    let threads = config.resources.threads.unwrap_or_else(engine::cores);
    let engine = engine::open(config.resources.onnxruntime.as_deref())?;
    let probed = probe(&plan, &source, engine.as_ref(), threads).map_err(CliError::bad_input)?;
    let budget = config.resources.memory_budget.0;
    let costs = Costs { plan: &plan, probed: &probed };
    let mut report = costs.report(&nodes, budget, dataset_bytes, read_seconds);
    if config.resources.device.device != DeviceArg::Cpu {
        report.gpu =
            Some(gpu(&device_memory(&plan, &probed), threads, devices::memory(&config.resources.device)?));
    }
    if let Some(asked) = fleet {
        let memory_bytes = asked.memory_bytes.unwrap_or(0);
        let link_bytes_per_second = asked.link.bytes_per_second;
        let slots = asked.slots.unwrap_or(threads);
        let fleet = Fleet { nodes: asked.nodes, slots, memory_bytes, link_bytes_per_second };
        report.fleet = costs.fleet(&fleet);
        report.link = Some(asked.link);
    }
    Ok(report)
}

/// The most that any stage holds, and with how many threads all of them fit.
fn gpu(stages: &[StageMemory], threads: usize, memory_bytes: Option<u64>) -> GpuRow {
    let memory = memory_bytes.unwrap_or(u64::MAX);
    let most = |threads: usize| {
        let peaks = stages.iter().map(|stage| stage.peak(threads, memory)).enumerate();
        peaks.max_by_key(|(_, bytes)| *bytes).unwrap_or_default()
    };
    let fits = |threads: &usize| most(*threads).1.saturating_add(CUDA_ITSELF) <= memory;
    let (stage, bytes) = most(threads);
    let threads_that_fit = (1..=threads).rev().find(fits).unwrap_or(0);
    GpuRow { bytes, stage, threads, memory_bytes, threads_that_fit }
}

/// Left to contexts, kernels and CUDA's libraries where threads are said to fit.
const CUDA_ITSELF: u64 = 1 << 30;

/// The fleet a user thinks of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct FleetAsked {
    pub(crate) nodes: usize,
    /// Of each; this machine's if not said.
    pub(crate) slots: Option<usize>,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) link: LinkRow,
}

/// A plan and what one run of a few samples showed of it.
struct Costs<'a> {
    plan: &'a Plan,
    probed: &'a ProbeReport,
}

/// Wall seconds of one stage.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Seconds {
    forward: f64,
    statistics: f64,
    solve: f64,
}

impl Costs<'_> {
    fn report(&self, nodes: &[usize], budget: u64, dataset_bytes: u64, read_seconds: f64) -> PlanReport {
        let plan = self.plan;
        let seconds: Vec<Seconds> = (0..plan.stages.len()).map(|stage| self.seconds(stage)).collect();
        let stages: Vec<StageRow> = seconds
            .iter()
            .enumerate()
            .map(|(stage, seconds)| self.stage_row(stage, nodes, seconds))
            .collect();
        let sum = |of: fn(&Seconds) -> f64| seconds.iter().map(of).sum::<f64>();
        let phases = [
            ("read", read_seconds),
            ("forward", sum(|s| s.forward)),
            ("statistics", sum(|s| s.statistics)),
            ("solve and refine", sum(|s| s.solve)),
        ];
        let resident = |stage: &StageRow| stage.carry_bytes.min(budget) + stage.statistics_bytes;
        PlanReport {
            samples: plan.samples(),
            shards: plan.shards.len(),
            kept: plan.kept.iter().map(|k| kept(k.clone(), k.reason.starts_with("skipped"))).collect(),
            peak_bytes: stages.iter().map(resident).max().unwrap_or(0) + dataset_bytes,
            spill_bytes: stages.iter().map(|s| s.carry_bytes.saturating_sub(budget)).max().unwrap_or(0),
            gpu: None,
            output_bytes: plan.layers.iter().map(|l| (l.rows * l.cols * 4) as u64).sum(),
            seconds: phases.iter().map(|(_, seconds)| seconds).sum(),
            fleet: Vec::new(),
            link: None,
            phases: phases.map(|(name, seconds)| (name.to_owned(), seconds)).into(),
            stages,
        }
    }

    /// Every partition that makes sense on this fleet, the one to take marked.
    fn fleet(&self, fleet: &Fleet) -> Vec<FleetRow> {
        let stages: Vec<StageCost> =
            (0..self.plan.stages.len()).map(|stage| self.stage_cost(stage)).collect();
        let choice = partition::choose(&stages, fleet);
        let row = |(index, estimate): (usize, &partition::Estimate)| FleetRow {
            partition: estimate.to_string(),
            seconds: estimate.seconds,
            bytes_moved: estimate.bytes_moved,
            node_bytes: estimate.node_bytes,
            fits: estimate.fits,
            why: (index == choice.taken).then(|| choice.why.clone()),
        };
        choice.estimates.iter().enumerate().map(row).collect()
    }

    /// The stage in seconds of one slot.
    fn stage_cost(&self, stage: usize) -> StageCost {
        let segment = &self.probed.segments[stage];
        let run = segment.load_seconds + segment.forward_seconds * self.times();
        let shards = self.plan.shards.len() as f64;
        let of_tap = |tap: &TapProbe| tap.shard_seconds * shards + tap.sample_seconds * self.times();
        let layers = || self.plan.stages[stage].solve.iter().map(|id| self.plan.layer(*id));
        let bytes = |per_probe: u64| (per_probe as f64 * self.times()).round() as u64;
        StageCost {
            forward_seconds: if segment.streams > 0 { run } else { 0.0 },
            quantized_seconds: if segment.streams > 1 { run } else { 0.0 },
            statistics_seconds: segment.taps.iter().map(of_tap).sum(),
            solve_seconds: layers().map(|layer| self.solve_seconds(layer)).sum(),
            sums_bytes: segment.taps.iter().map(|tap| tap.statistics_bytes).sum(),
            carry_bytes: bytes(segment.original_bytes),
            quantized_carry_bytes: bytes(segment.quantized_bytes),
        }
    }

    fn stage_row(&self, stage: usize, nodes: &[usize], seconds: &Seconds) -> StageRow {
        let layers = || self.plan.stages[stage].solve.iter().map(|id| self.plan.layer(*id));
        StageRow {
            stage,
            layers: layers().map(|l| l.name.clone()).collect(),
            nodes: nodes.get(stage).copied().unwrap_or(0),
            chunks: layers().map(|l| l.chunks.len()).sum(),
            carry_bytes: self.carry_bytes(&self.probed.segments[stage]),
            statistics_bytes: self.statistics_bytes(stage),
            seconds: seconds.forward + seconds.statistics + seconds.solve,
        }
    }

    /// How many times the probe's samples go into the job's.
    fn times(&self) -> f64 {
        self.plan.samples() as f64 / self.probed.samples.max(1) as f64
    }

    /// Tensors of all samples that wait after a segment, both streams.
    fn carry_bytes(&self, segment: &SegmentProbe) -> u64 {
        ((segment.original_bytes + segment.quantized_bytes) as f64 * self.times()).round() as u64
    }

    /// A shared layer's statistics stay from each use until the stage that solves it.
    fn statistics_bytes(&self, stage: usize) -> u64 {
        let stays = |tap: &&TapProbe| self.plan.layer(tap.layer).stage.index() >= stage;
        let taps = self.probed.segments.iter().take(stage + 1).flat_map(|segment| &segment.taps);
        taps.filter(stays).map(|tap| tap.statistics_bytes).sum()
    }

    fn seconds(&self, stage: usize) -> Seconds {
        let segment = &self.probed.segments[stage];
        let shards = self.plan.shards.len();
        // While one thread loads a segment, the others wait for it.
        let forward = f64::from(segment.streams)
            * (segment.load_seconds + self.wall(segment.forward_seconds * self.times(), shards));
        let of_tap = |tap: &TapProbe| tap.shard_seconds * shards as f64 + tap.sample_seconds * self.times();
        let statistics = segment.taps.iter().map(of_tap).sum();
        let layers = || self.plan.stages[stage].solve.iter().map(|id| self.plan.layer(*id));
        let chunks = layers().map(|layer| layer.chunks.len()).sum();
        let solve = layers().map(|layer| self.solve_seconds(layer)).sum();
        Seconds { forward, statistics: self.wall(statistics, shards), solve: self.wall(solve, chunks) }
    }

    /// Seconds of one thread as seconds on the wall, for work that comes in `tasks` parts.
    fn wall(&self, seconds: f64, tasks: usize) -> f64 {
        seconds / self.probed.rates.parallel.min(tasks as f64).max(1.0)
    }

    fn solve_seconds(&self, layer: &LayerPlan) -> f64 {
        let solver = &self.plan.solver;
        let per_group = (layer.rows / layer.groups.max(1)).max(1);
        let positions: u64 = self
            .probed
            .segments
            .iter()
            .flat_map(|s| &s.taps)
            .filter(|t| t.layer == self.plan.statistics_of(layer.id))
            .map(|t| t.positions)
            .sum();
        let kept = (f64::from(solver.positions_per_shard) * self.plan.shards.len() as f64)
            .min(positions as f64 * self.times());
        let of_problem = |rows: usize| match solver.objective {
            Objective::Gram => {
                let shape = (rows, layer.cols);
                // One scale for a whole tensor is not fitted.
                let fits =
                    if layer.grid.granularity == Granularity::PerTensor { 0 } else { solver.scale_fits };
                self.rates().gram_solve_seconds(shape, solver.iterations, solver.refine_sweeps, fits)
            }
            Objective::Samples => {
                let gram = self.rates().gram_solve_seconds((rows, layer.cols), 0, solver.refine_sweeps, 0);
                // Forward and back for each minibatch; a few times all samples for the guard.
                let rows_seen = 2.0 * f64::from(solver.batch) * f64::from(solver.iterations) + 3.0 * kept;
                gram + 2.0 * rows as f64 * layer.cols as f64 * rows_seen / self.rates().flops_per_second
            }
        };
        // A chunk of several groups is a problem per group.
        let of_chunk = |rows: usize| match rows > per_group {
            true => of_problem(per_group) * (rows / per_group) as f64,
            false => of_problem(rows),
        };
        layer.chunks.iter().map(|chunk| of_chunk(chunk.len())).sum()
    }

    fn rates(&self) -> &Rates {
        &self.probed.rates
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{DataOptions, JobOptions};
    use crate::quantize::node;
    use crate::values::ByteSize;
    use halfstep_work::{LayerId, Propagation, SegmentId, StagePlan};
    use std::path::PathBuf;

    const RATES: Rates =
        Rates { flops_per_second: 1e6, parallel: 1.5, solve_seconds: 0.5, weight_seconds: 0.0 };

    fn example(samples: usize) -> RunConfig {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples/fashion-mnist");
        let calibration = Some(folder.join("calibration.npz"));
        let options = JobOptions {
            model: Some(folder.join("model.onnx")),
            data: DataOptions { calibration, samples: Some(samples), ..DataOptions::default() },
            iterations: Some(10),
            shard_size: Some(8),
            ..JobOptions::default()
        };
        RunConfig::resolve(options, false).unwrap()
    }

    /// Two layers `[40, 5]`, the second in 2 groups, in two stages; 30 samples in 3 shards.
    fn small() -> Plan {
        let config = example(1);
        let layer = |id: u32, groups, chunks| LayerPlan {
            id: LayerId(id),
            name: format!("layer{id}"),
            op_type: "Conv".into(),
            rows: 40,
            cols: 5,
            groups,
            grid: config.grid,
            chunks,
            statistics_of: None,
            slices: std::iter::once(0..5 * groups).collect(),
            stage: SegmentId(id),
        };
        let solver =
            halfstep_work::SolverSettings { refine_sweeps: 0, scale_fits: 0, ..config.to_job().solver };
        Plan {
            layers: vec![layer(0, 1, vec![0..20, 20..40]), layer(1, 2, std::iter::once(0..40).collect())],
            kept: vec![],
            stages: vec![StagePlan { solve: vec![LayerId(0)] }, StagePlan { solve: vec![LayerId(1)] }],
            shards: vec![0..10, 10..20, 20..30],
            batch: 10,
            propagation: Propagation::Sequential,
            solver,
            ranges: std::iter::once(0..2).collect(),
        }
    }

    fn tap(layer: u32, statistics_bytes: u64) -> TapProbe {
        TapProbe {
            layer: LayerId(layer),
            positions: 7,
            differs: false,
            statistics_bytes,
            shard_seconds: 1.0,
            sample_seconds: 0.1,
        }
    }

    fn probed(samples: usize) -> ProbeReport {
        let first = SegmentProbe {
            original_bytes: 100,
            taps: vec![tap(0, 200), tap(1, 1000)],
            ..SegmentProbe::default()
        };
        let second = SegmentProbe {
            original_bytes: 50,
            quantized_bytes: 40,
            streams: 2,
            load_seconds: 2.0,
            forward_seconds: 0.3,
            taps: vec![tap(1, 3000)],
        };
        ProbeReport { samples, segments: vec![first, second], rates: RATES }
    }

    fn report(samples: usize, budget: u64) -> PlanReport {
        let (plan, probed) = (small(), probed(samples));
        Costs { plan: &plan, probed: &probed }.report(&[0, 4], budget, 10_000, 1.0)
    }

    #[test]
    fn bytes_count_all_samples_both_streams_and_statistics_that_stay() {
        let all = report(1, u64::MAX);
        assert_eq!(all.stages.iter().map(|s| s.carry_bytes).collect::<Vec<_>>(), [3000, 2700]);
        // Layer 1 is used in both stages and solved in the second.
        assert_eq!(all.stages.iter().map(|s| s.statistics_bytes).collect::<Vec<_>>(), [1200, 4000]);
        assert_eq!((all.peak_bytes, all.spill_bytes), (2700 + 4000 + 10_000, 0));
        // A probe of five samples holds five times as much of one.
        assert_eq!(report(5, u64::MAX).stages[0].carry_bytes, 600);
    }

    #[test]
    fn a_device_that_is_small_fits_fewer_threads() {
        let (mut plan, mut probed) = (small(), probed(1));
        plan.layers[0].cols = 4096;
        probed.segments[0].taps[0] = TapProbe { differs: true, ..tap(0, 256 << 20) };
        let stages = device_memory(&plan, &probed);
        // Layer 1 has too few inputs for a device to sum. Products of a shard: H, C and G of 64 MiB.
        assert_eq!((stages[0].sums, stages[0].products, stages[1].products), (256 << 20, 192 << 20, 0));
        let on = |memory| gpu(&stages, 8, memory);
        // Two chunks, with their statistics, are more than the products of three shards.
        let StageMemory { sums, shared, chunk, .. } = stages[0];
        let anywhere = on(None);
        assert_eq!((anywhere.stage, anywhere.bytes), (0, sums + shared + 2 * chunk));
        assert_eq!(anywhere.threads_that_fit, 8);
        let small = on(Some(1792 << 20));
        assert_eq!((small.bytes, small.threads_that_fit), (anywhere.bytes, 1));
        assert_eq!(on(Some(1 << 30)).threads_that_fit, 0);
    }

    #[test]
    fn what_exceeds_the_budget_goes_to_files() {
        for (budget, spill, carry) in [(2999, 1, 2700), (3000, 0, 2700), (1000, 2000, 1000), (0, 3000, 0)] {
            let all = report(1, budget);
            assert_eq!((all.spill_bytes, all.peak_bytes), (spill, carry + 4000 + 10_000), "budget {budget}");
        }
    }

    #[test]
    fn seconds_are_shared_by_as_many_threads_as_there_are_tasks() {
        let (plan, probed) = (small(), probed(1));
        let costs = Costs { plan: &plan, probed: &probed };
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a}, expected {b}");
        let first = costs.seconds(0);
        close(first.forward, 0.0);
        close(first.statistics, 2.0 * (3.0 + 3.0) / 1.5);
        // Two chunks of 20 x 5 weights: a product of 2 * 20 * 25 flops for each of 10 iterations, on 1.5 threads.
        close(first.solve, 2.0 * (0.5 + 0.01) / 1.5);
        let second = costs.seconds(1);
        close(second.forward, 2.0 * (2.0 + 9.0 / 1.5));
        // One chunk of two groups: two problems, one thread.
        close(second.solve, 2.0 * (0.5 + 0.01));
        let all = report(1, u64::MAX);
        close(all.seconds, 1.0 + all.stages.iter().map(|s| s.seconds).sum::<f64>());
        close(all.phases.iter().map(|(_, seconds)| seconds).sum(), all.seconds);
    }

    /// The most carry bytes that a real run held in memory.
    fn held(config: &RunConfig) -> u64 {
        let (prepared, dataset) = prepare(&config.to_job()).unwrap();
        let node = node(&config.resources).unwrap();
        crate::drive::drive(&prepared, dataset, &node);
        node.carry_use().peak as u64
    }

    #[test]
    fn a_run_holds_the_carries_that_were_planned() {
        for propagation in [Propagation::Sequential, Propagation::Independent] {
            let mut config = example(64);
            config.rounding.propagation = propagation;
            config.resources.memory_budget = ByteSize(1 << 30);
            let planned = plan(&config, None).unwrap().stages.iter().map(|s| s.carry_bytes).max().unwrap();
            let held = held(&config);
            // Beyond what is planned, a shard in work holds its inputs and outputs at once: 2 threads of 8 shards.
            assert!(
                held >= planned && held <= planned + planned / 2,
                "{propagation:?}: planned {planned}, held {held}"
            );
        }
    }
}
