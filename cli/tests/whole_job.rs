//! Whole jobs in process, a coordinator and a node wired as the command line wires them, on an engine that counts.
//!
//! Here because only this crate may know both. Not here: accuracy and files (`end_to_end`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

#[path = "support/drive.rs"]
mod drive;
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use halfstep_agent::{CarryUse, CountingEngine, LocalNode, NodeOptions, RtenEngine};
use halfstep_coordinator::dataset::DatasetOptions;
use halfstep_coordinator::{
    Assembled, EncodingsVersion, JobConfig, LanguageConfig, OutcomeKind, Prepared, assemble, prepare,
};
use halfstep_quant::{Granularity, GridSpec, RangeEstimator, Scheme};
use halfstep_work::{Objective, Partition, Propagation, SolverSettings, StartPoint};
use support::{Graph, floats, integers, noise, write_npz};
use tempfile::TempDir;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fashion-mnist").join(name)
}

fn solver() -> SolverSettings {
    SolverSettings {
        objective: Objective::Gram,
        iterations: 20,
        learning_rate: 0.1,
        beta: (20.0, 2.0),
        warm_start: 0.2,
        lambda: 1.0,
        batch: 32,
        damping: 0.01,
        start: StartPoint::Nearest,
        refine_sweeps: 10,
        scale_fits: 0,
        seed: 0,
        positions_per_shard: 256,
        positions_fraction: 1.0,
    }
}

/// Three bits, symmetric, per channel; quick.
fn job(model: PathBuf, calibration: PathBuf) -> JobConfig {
    JobConfig {
        model,
        calibration,
        dataset: DatasetOptions::default(),
        output: PathBuf::new(),
        force: false,
        grid: GridSpec {
            bits: 3,
            scheme: Scheme::Symmetric,
            granularity: Granularity::PerChannel,
            range: RangeEstimator::Mse,
        },
        rules: Vec::new(),
        solver: solver(),
        propagation: Propagation::Sequential,
        partition: Partition::Batches,
        shard_size: None,
        fold_batch_norm: true,
        encodings: vec![EncodingsVersion::V1_0_0],
        language: LanguageConfig::default(),
    }
}

struct Ran {
    prepared: Prepared,
    assembled: Assembled,
    /// Samples through each node, by its first output.
    counts: BTreeMap<String, u64>,
    carry: CarryUse,
}

const ENOUGH: usize = 1 << 30;

fn run_with(config: &JobConfig, memory_budget: usize) -> Ran {
    run_on(2, config, memory_budget)
}

fn run_on(threads: usize, config: &JobConfig, memory_budget: usize) -> Ran {
    let spill = TempDir::new().unwrap();
    let (engine, counts) = CountingEngine::new(RtenEngine::default());
    let options = NodeOptions { threads, memory_budget, spill_dir: spill.path().into() };
    let node = LocalNode::new(Box::new(engine), options);
    let (prepared, dataset) = prepare(config).unwrap();
    let committed = drive::drive(&prepared, dataset, &node);
    let assembled = assemble(&prepared, &committed.outcome, &committed).unwrap();
    let counts = counts.lock().unwrap().clone();
    Ran { assembled, counts, carry: node.carry_use(), prepared }
}

impl Ran {
    fn rounded(&self) -> Vec<(&str, &[i32])> {
        self.assembled.layers.iter().map(|l| (l.layer.name.as_str(), l.q.as_slice())).collect()
    }

    /// Asserts that all `solved` layers, and no others, were solved, and none failed.
    fn assert_solved(&self, solved: usize) {
        let report = &self.assembled.report;
        assert_eq!((report.solved, report.failed), (solved, 0), "{:?}", report.layers);
        for layer in &report.layers {
            if let Some(numbers) = &layer.solved {
                assert!(numbers.objective <= numbers.objective_nearest, "{}: {numbers:?}", layer.name);
                assert!(numbers.objective.is_finite(), "{}", layer.name);
            }
        }
    }
}

fn example_job(samples: usize, propagation: Propagation) -> JobConfig {
    let mut config = job(example("model.onnx"), example("calibration.npz"));
    config.dataset.samples = Some(samples);
    config.propagation = propagation;
    config
}

/// Nodes before the first rounded layer have one stream even in sequential propagation, the last layer has none.
#[test]
fn every_operator_runs_at_most_once_per_sample_and_stream() {
    let samples = 80;
    for (propagation, streams) in [(Propagation::Sequential, 2), (Propagation::Independent, 1)] {
        let ran = run_with(&example_job(samples, propagation), ENOUGH);
        ran.assert_solved(10);
        let nodes = &ran.prepared.subject.onnx().unwrap().graph().node;
        let expected: BTreeMap<String, u64> = nodes
            .iter()
            .filter(|node| node.output[0] != "logits")
            .map(|node| (node.output[0].clone(), streams * samples as u64))
            .collect();
        assert_eq!(ran.counts, expected, "{propagation:?}");
    }
}

#[test]
fn nodes_without_a_rounded_layer_before_them_run_once_in_all() {
    let samples = 40;
    let place = TempDir::new().unwrap();
    let model = Graph::default()
        .input("x", &[None, Some(6)])
        .weight("w1", &[6, 5])
        .weight("w2", &[5, 4])
        .node("Relu", &["x"], "before")
        .node("MatMul", &["before", "w1"], "a")
        .node("Relu", &["a"], "between")
        .node("Tanh", &["before"], "aside")
        .node("MatMul", &["between", "w2"], "b")
        .node("Sigmoid", &["b"], "after")
        .output("after")
        .output("aside")
        .write(&place.path().join("m.onnx"));
    let data =
        write_npz(&place.path().join("d.npz"), &[("x", floats(&[samples, 6], &noise(samples * 6, 3)))]);
    let ran = run_with(&job(model, data), ENOUGH);
    ran.assert_solved(2);
    let n = samples as u64;
    let expected =
        [("before", n), ("a", 2 * n), ("between", 2 * n)].map(|(name, count)| (name.to_owned(), count));
    assert_eq!(ran.counts, BTreeMap::from(expected));
}

/// On one thread the peak is the same in every run: a budget of just that spills nothing, one byte less does.
#[test]
fn the_memory_budget_is_obeyed_at_its_edge_and_does_not_change_the_result() {
    let config = example_job(96, Propagation::Sequential);
    let free = run_on(1, &config, ENOUGH);
    let peak = free.carry.peak;
    assert_eq!(free.carry.spilled, 0);
    assert!(peak > 1 << 20, "{:?}", free.carry);
    for (threads, budget) in [(1, peak), (1, peak - 1), (1, 1), (2, peak / 2), (2, 1 << 16), (2, 0)] {
        let ran = run_on(threads, &config, budget);
        assert!(ran.carry.peak <= budget, "{budget}: {:?}", ran.carry);
        assert_eq!(ran.carry.spilled > 0, budget < peak, "{budget}: {:?}", ran.carry);
        assert!(ran.rounded() == free.rounded(), "{budget}");
    }
}

/// The same Conv at two depths: the input width is 2 so that its output can go through it again.
#[test]
fn a_shared_weight_is_decided_once_from_all_its_uses() {
    let place = TempDir::new().unwrap();
    let graph = |second: &str| {
        Graph::default()
            .input("x", &[None, Some(2), Some(6), Some(6)])
            .weight("w", &[2, 2, 3, 3])
            .weight("v", &[2, 2, 3, 3])
            .weight("head", &[2, 3])
            .node("Conv", &["x", "w"], "a")
            .ints("pads", &[1, 1, 1, 1])
            .node("Relu", &["a"], "b")
            .node("Conv", &["b", "v"], "c")
            .ints("pads", &[1, 1, 1, 1])
            .node("Conv", &["c", second], "d")
            .ints("pads", &[1, 1, 1, 1])
            .node("GlobalAveragePool", &["d"], "e")
            .node("Flatten", &["e"], "f")
            .node("MatMul", &["f", "head"], "y")
            .output("y")
    };
    let samples = 48;
    let values = noise(samples * 72, 5);
    let data = write_npz(&place.path().join("d.npz"), &[("x", floats(&[samples, 2, 6, 6], &values))]);
    let model = graph("w").write(&place.path().join("m.onnx"));
    let ran = run_with(&job(model, data), ENOUGH);
    ran.assert_solved(3);
    let shared: Vec<_> = ran.assembled.layers.iter().filter(|l| l.layer.weight == "w").collect();
    assert_eq!(shared.len(), 1);
    assert_eq!(shared[0].layer.uses.len(), 2);
    // Decided at the later use: two stages before it, `v` first.
    let stage = |weight: &str| {
        let index = ran.prepared.layers.iter().position(|l| l.weight == weight).unwrap();
        ran.prepared.plan.layers[index].stage.0
    };
    assert!(stage("v") < stage("w") && stage("w") < stage("head"), "{:?}", ran.prepared.plan.stages);
    for (node, count) in &ran.counts {
        assert!(*count <= 2 * samples as u64, "{node}: {count}");
    }
}

#[test]
fn a_fixed_batch_is_run_at_that_size_and_the_remainder_left_out() {
    let place = TempDir::new().unwrap();
    let model = Graph::default()
        .input("x", &[Some(8), Some(6)])
        .weight("w1", &[6, 4])
        .weight("w2", &[4, 3])
        .node("MatMul", &["x", "w1"], "a")
        .node("Relu", &["a"], "b")
        .node("MatMul", &["b", "w2"], "y")
        .output("y")
        .write(&place.path().join("m.onnx"));
    let data = write_npz(&place.path().join("d.npz"), &[("x", floats(&[21, 6], &noise(126, 7)))]);
    let ran = run_with(&job(model, data), ENOUGH);
    ran.assert_solved(2);
    assert_eq!(ran.prepared.plan.shards, [0..8, 8..16]);
    assert_eq!(ran.counts["a"], 32);
    let notes = &ran.assembled.report.notes;
    assert!(notes.iter().any(|note| note.starts_with("5 of 21 samples left out")), "{notes:?}");
}

#[test]
fn integer_inputs_feed_a_lookup_and_the_layers_behind_it() {
    let place = TempDir::new().unwrap();
    let model = Graph::default()
        .indices("ids", &[None, Some(5)])
        .input("extra", &[None, Some(5), Some(4)])
        .weight("table", &[10, 4])
        .weight("w1", &[4, 6])
        .weight("w2", &[6, 3])
        .node("Gather", &["table", "ids"], "words")
        .node("Add", &["words", "extra"], "sum")
        .node("MatMul", &["sum", "w1"], "a")
        .node("Relu", &["a"], "b")
        .node("MatMul", &["b", "w2"], "y")
        .output("y")
        .write(&place.path().join("m.onnx"));
    let samples = 40;
    let ids: Vec<i64> = (0..samples as i64 * 5).map(|i| i * 7 % 10).collect();
    let arrays = [
        ("extra", floats(&[samples, 5, 4], &noise(samples * 20, 9))),
        ("ids", integers(&[samples, 5], &ids)),
    ];
    let data = write_npz(&place.path().join("d.npz"), &arrays);
    let ran = run_with(&job(model, data), ENOUGH);
    ran.assert_solved(2);
    assert_eq!(ran.counts["words"], samples as u64);
}

/// With no input there is no error to trade: every weight goes to nearest.
#[test]
fn a_layer_that_sees_only_zeros_is_rounded_to_nearest() {
    let place = TempDir::new().unwrap();
    let model = Graph::default()
        .input("x", &[None, Some(6)])
        .weight("w1", &[6, 5])
        .constant("zero", &[1], vec![0.0])
        .weight("w2", &[5, 4])
        .weight("w3", &[4, 3])
        .node("MatMul", &["x", "w1"], "a")
        .node("Mul", &["a", "zero"], "dead")
        .node("MatMul", &["dead", "w2"], "b")
        .node("MatMul", &["b", "w3"], "y")
        .output("y")
        .write(&place.path().join("m.onnx"));
    let data = write_npz(&place.path().join("d.npz"), &[("x", floats(&[32, 6], &noise(192, 11)))]);
    let ran = run_with(&job(model, data), ENOUGH);
    ran.assert_solved(3);
    for weight in ["w2", "w3"] {
        let done = ran.assembled.layers.iter().find(|l| l.layer.weight == weight).unwrap();
        let tensor = ran.prepared.subject.onnx().unwrap().tensor(weight).unwrap();
        let matrix = done.layer.layout.to_matrix(&tensor.shape, tensor.as_f32().unwrap()).unwrap();
        assert_eq!(done.q, done.encodings.quantize_nearest(&matrix), "{weight}");
        let reported = ran.assembled.report.layers.iter().find(|l| l.name == done.layer.name).unwrap();
        let numbers = reported.solved.as_ref().unwrap();
        assert_eq!((numbers.objective, numbers.rounded_away), (0.0, 0), "{weight}");
        assert_eq!(numbers.dead_inputs as usize, done.layer.cols, "{weight}");
        let said = ran.assembled.report.notes.iter().find(|note| note.contains(&done.layer.name)).unwrap();
        assert!(said.contains("no calibration data reached it"), "{said}");
    }
}

/// The layer with weights that are no numbers fails, and the one that sees its outputs; their neighbours do not.
#[test]
fn layers_that_cannot_be_solved_leave_the_others_alone() {
    let place = TempDir::new().unwrap();
    let mut broken = noise(20, 13);
    broken[7] = f32::NAN;
    let model = Graph::default()
        .input("x", &[None, Some(6)])
        .weight("w1", &[6, 5])
        .constant("bad", &[5, 4], broken)
        .weight("w3", &[5, 3])
        .node("MatMul", &["x", "w1"], "a")
        .weight("w4", &[4, 2])
        .node("MatMul", &["a", "bad"], "b")
        .node("MatMul", &["b", "w4"], "d")
        .node("Relu", &["a"], "c")
        .node("MatMul", &["c", "w3"], "y")
        .output("d")
        .output("y")
        .write(&place.path().join("m.onnx"));
    let data = write_npz(&place.path().join("d.npz"), &[("x", floats(&[32, 6], &noise(192, 15)))]);
    let ran = run_with(&job(model, data), ENOUGH);
    let report = &ran.assembled.report;
    assert_eq!((report.solved, report.failed), (2, 2));
    let failed = report.layers.iter().filter(|l| matches!(l.kind, OutcomeKind::Failed { .. }));
    assert_eq!(failed.map(|l| l.name.as_str()).collect::<Vec<_>>(), ["node_b", "node_d"]);
}
