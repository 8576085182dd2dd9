//! What the coordinator's core costs: 10^5 tasks handed out to 1,000 simulated nodes and back.
//!
//! Prints tasks per second, processor seconds and the process' peak memory, besides the share of grants that found
//! their shard's carry on the node itself. Run: `cargo bench -p halfstep-benches --bench scheduler`.
//! Not here: sockets, the store, real work.
#![expect(clippy::print_stdout, reason = "a benchmark's result is what it prints")]

use halfstep_coordinator::dispatch::{Action, Dispatch, Limits, Outcome};
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme};
use halfstep_work::{
    ChunkReport, Cost, Done, Grant, Inventory, LayerId, LayerPlan, LeaseId, NodeDescription, NodeId,
    Objective, PeakRecord, Plan, Propagation, Rounding, SegmentId, SolverSettings, StagePlan, StartPoint,
    Task,
};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

const NODES: u32 = 1_000;
const SLOTS: usize = 2;
const SHARDS: usize = 1_000;
const STAGES: u32 = 40;
const LAYERS_PER_STAGE: u32 = 2;
/// Slices of each layer, and as many chunks: with the shards' tasks 2,500 tasks a stage.
const SLICES: usize = 125;
/// Simulated milliseconds of one round in which every busy node answers once.
const ROUND_MS: u64 = 1_000;

fn units(count: usize) -> Vec<Range<usize>> {
    (0..count).map(|at| at..at + 1).collect()
}

fn layer(id: u32) -> LayerPlan {
    let (scheme, granularity) = (Scheme::Symmetric, Granularity::PerTensor);
    LayerPlan {
        id: LayerId(id),
        name: format!("layer{id}"),
        op_type: "Conv".into(),
        rows: SLICES,
        cols: SLICES,
        groups: 1,
        grid: GridSpec { bits: 4, scheme, granularity, range: RangeEstimator::MinMax },
        chunks: units(SLICES),
        statistics_of: None,
        slices: units(SLICES),
        stage: SegmentId(id / LAYERS_PER_STAGE),
    }
}

fn plan() -> Plan {
    let solver = SolverSettings {
        objective: Objective::Gram,
        iterations: 1,
        learning_rate: 0.1,
        beta: (20.0, 2.0),
        warm_start: 0.2,
        lambda: 1.0,
        batch: 1,
        damping: 0.0,
        start: StartPoint::Nearest,
        refine_sweeps: 1,
        scale_fits: 0,
        seed: 0,
        positions_per_shard: 1,
        positions_fraction: 1.0,
    };
    let solve =
        |stage: u32| (stage * LAYERS_PER_STAGE..(stage + 1) * LAYERS_PER_STAGE).map(LayerId).collect();
    Plan {
        layers: (0..STAGES * LAYERS_PER_STAGE).map(layer).collect(),
        kept: vec![],
        stages: (0..STAGES).map(|stage| StagePlan { solve: solve(stage) }).collect(),
        shards: units(SHARDS),
        batch: 1,
        propagation: Propagation::Sequential,
        solver,
        ranges: std::iter::once(0..STAGES as usize).collect(),
    }
}

fn done(plan: &Plan, task: &Task) -> Done {
    match task {
        Task::Forward { .. } => Done::Forwarded,
        Task::Capture { segment, .. } => Done::Captured {
            peaks: plan.stages[segment.index()]
                .solve
                .iter()
                .map(|layer| PeakRecord {
                    layer: *layer,
                    use_index: 0,
                    full_precision: 1.0,
                    quantized: 1.0,
                    positions: 1,
                })
                .collect(),
        },
        Task::Accumulate { .. } => Done::Accumulated,
        Task::Reduce { .. } => Done::Reduced,
        Task::Solve { layer, chunk } => Done::Solved(Arc::new(Rounding {
            layer: *layer,
            chunk: *chunk,
            encodings: Encodings {
                bits: 4,
                scheme: Scheme::Symmetric,
                granularity: Granularity::PerTensor,
                rows: 1,
                cols: 1,
                scale: vec![1.0],
                zero_point: vec![0],
            },
            q: vec![0],
            report: ChunkReport::default(),
        })),
    }
}

#[derive(Default)]
struct Tally {
    tasks: u64,
    with_carry: u64,
    at_home: u64,
    rounds: u64,
}

struct Simulation {
    plan: Arc<Plan>,
    dispatch: Dispatch,
    hands: BTreeMap<NodeId, Vec<Grant>>,
    tally: Tally,
}

impl Simulation {
    fn new() -> Self {
        let plan = Arc::new(plan());
        let limits = Limits {
            heartbeat_ms: 1_000,
            lease_ms: 10_000,
            hung_ms: 60_000,
            no_nodes_ms: 600_000,
            first_lease_id: 1 << 32,
            speculate: true,
        };
        let dispatch = Dispatch::new(Arc::clone(&plan), limits, Vec::new(), BTreeMap::new());
        Self { plan, dispatch, hands: BTreeMap::new(), tally: Tally::default() }
    }

    fn join(&mut self, node: u32) {
        let description = NodeDescription {
            name: format!("node{node}"),
            slots: SLOTS,
            device: "cpu".into(),
            engine: "none".into(),
            flops_per_second: 1e11,
            memory_bytes: 0,
            exchange: String::new(),
        };
        let address = format!("10.0.{}.{}:9000", node / 250, node % 250);
        self.dispatch.join(NodeId(node), &description, &address, Inventory::default(), 0);
        self.collect();
    }

    fn collect(&mut self) {
        for action in self.dispatch.actions() {
            match action {
                Action::Grant { node, grant } => {
                    if matches!(grant.lease.task, Task::Capture { .. } | Task::Accumulate { .. })
                        && !grant.holdings.is_empty()
                    {
                        self.tally.with_carry += 1;
                        self.tally.at_home += u64::from(grant.holdings[0].node == node);
                    }
                    self.hands.entry(node).or_default().push(grant);
                }
                Action::Revoke { node, lease, .. } => {
                    self.hands.entry(node).or_default().retain(|grant| grant.lease.id != lease);
                }
                Action::DropSums { .. } | Action::TakeOver { .. } | Action::News(_) => {}
            }
        }
    }

    fn round(&mut self) {
        self.tally.rounds += 1;
        let now = self.tally.rounds * ROUND_MS;
        for node in (0..NODES).map(NodeId) {
            let hand = self.hands.get(&node).map_or(&[][..], Vec::as_slice);
            let beats: Vec<(LeaseId, u64)> = hand.iter().map(|grant| (grant.lease.id, now)).collect();
            self.dispatch.beat(node, &beats, now);
        }
        self.dispatch.tick(now);
        for (node, grant) in
            self.hands.iter_mut().filter_map(|(n, hand)| Some((*n, hand.pop()?))).collect::<Vec<_>>()
        {
            let lease = &grant.lease;
            let (result, cost) = (done(&self.plan, &lease.task), Cost::default());
            self.dispatch.complete(node, lease.id, lease.attempt, result, cost, now);
            self.tally.tasks += 1;
            self.collect();
        }
    }
}

/// Seconds of processor time of this process so far, if the system says.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

/// Most bytes of memory this process had so far, in MB, if the system says.
fn peak_megabytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or("");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) * 1024.0 / 1e6
}

fn main() {
    let (begun, cpu) = (Instant::now(), cpu_seconds());
    let mut simulation = Simulation::new();
    (0..NODES).for_each(|node| simulation.join(node));
    while simulation.dispatch.outcome() == Outcome::Running {
        simulation.round();
    }
    let (seconds, cpu) = (begun.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let Tally { tasks, with_carry, at_home, rounds } = simulation.tally;
    assert_eq!(simulation.dispatch.outcome(), Outcome::Finished, "every layer decided");
    println!(
        "{tasks} tasks, {NODES} nodes of {SLOTS} slots: {seconds:.2} s, {cpu:.2} s of one core, {:.0} tasks/s, peak {:.0} MB",
        tasks as f64 / seconds,
        peak_megabytes()
    );
    println!(
        "{rounds} rounds of {ROUND_MS} ms simulated; {:.1} % of shard tasks ran where their carry was",
        100.0 * at_home as f64 / with_carry.max(1) as f64
    );
}
