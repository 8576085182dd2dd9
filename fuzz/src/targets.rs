//! What is fuzzed: one function per parser, each with everything that its result is normally used for.
//!
//! Not here: the model's (`model_target`), the checkpoint's (`checkpoint_target`), the fleet's (`fleet_target`) and the nodes'
//! (`node_target`), where inputs come from (`seeds`, `mutate`).

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use halfstep_coordinator::dataset::{Dataset, DatasetOptions};
use halfstep_quant::{Encodings, aimet};
use halfstep_work::Plan;

use crate::{checkpoint_target, fleet_target, model_target, node_target, seeds};

/// A parser under test.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name on the command line and in `regressions/`.
    pub name: &'static str,
    /// Must return for any bytes. Errors of the parser are its business; errors here are the harness's own.
    pub run: fn(&[u8]) -> Result<()>,
    /// Well-formed inputs to start from.
    pub seeds: fn() -> Result<Vec<Vec<u8>>>,
}

/// All targets, in the order they run.
pub const TARGETS: &[Target] = &[
    Target { name: "model", run: model_target::run, seeds: seeds::models },
    Target { name: "checkpoint", run: checkpoint_target::run, seeds: checkpoint_target::seeds },
    Target { name: "npy", run: npy, seeds: seeds::npy },
    Target { name: "npz", run: npz, seeds: seeds::npz },
    Target { name: "aimet", run: encodings, seeds: seeds::aimet },
    Target { name: "plan", run: plan, seeds: seeds::plans },
    Target { name: "rounding", run: fleet_target::rounding, seeds: fleet_target::roundings },
    Target { name: "tensors", run: fleet_target::tensors, seeds: fleet_target::tensor_blobs },
    Target { name: "message", run: fleet_target::message, seeds: fleet_target::messages },
    Target { name: "slice", run: node_target::slice, seeds: node_target::slices },
    Target { name: "carry", run: node_target::carry, seeds: node_target::carries },
    Target { name: "spilled", run: node_target::spilled, seeds: node_target::spilled_files },
];

fn npy(data: &[u8]) -> Result<()> {
    dataset(data, ".npy")
}

fn npz(data: &[u8]) -> Result<()> {
    dataset(data, ".npz")
}

/// Opens the bytes as a data set file, whole and limited, and uses all of what it holds.
fn dataset(data: &[u8], suffix: &str) -> Result<()> {
    let mut file = tempfile::Builder::new().prefix("halfstep-fuzz-").suffix(suffix).tempfile()?;
    file.write_all(data)?;
    for samples in [None, Some(3)] {
        let options = DatasetOptions { samples, ..DatasetOptions::default() };
        if let Ok(dataset) = Dataset::open(file.path(), &options) {
            use_dataset(dataset, samples);
        }
    }
    let mut keyed = file.path().as_os_str().to_owned();
    keyed.push(":y");
    drop(Dataset::open(Path::new(&keyed), &DatasetOptions::default()));
    Ok(())
}

fn use_dataset(mut dataset: Dataset, limit: Option<usize>) {
    let samples = dataset.samples();
    assert!(samples > 0 && samples <= limit.unwrap_or(usize::MAX), "{samples} samples of {limit:?}");
    let slices = dataset.slice(0..samples).expect("the whole range lies within the data");
    assert_eq!(slices.len(), dataset.arrays.len());
    drop(dataset.slice(samples - 1..samples));
    assert!(dataset.slice(samples..samples + 1).is_err(), "a slice beyond the data");
    if let Ok(Some(labels)) = dataset.take_labels() {
        assert_eq!(labels.len(), samples);
        assert!((0..samples.min(8)).all(|sample| labels.accepts(sample, 0) || !labels.accepts(sample, 0)));
    }
}

/// Reads an encodings file and puts its encodings to use on matrices of several shapes.
fn encodings(data: &[u8]) -> Result<()> {
    let Ok(file) = serde_json::from_slice(data) else { return Ok(()) };
    let Ok((_, params)) = aimet::from_json(&file) else { return Ok(()) };
    for param in &params {
        let entries = param.scale.len();
        for (rows, cols) in [(entries, 6), (1, entries), (2, entries / 2), (0, 0), (usize::MAX, 2)] {
            for (axis, positions) in [(0, 1), (1, 1), (0, 9), (1, usize::MAX)] {
                if let Ok(encodings) = param.to_encodings(rows, cols, axis, positions) {
                    use_encodings(&encodings);
                }
            }
        }
    }
    Ok(())
}

/// Quantizes zeros and reads every value back; skipped for matrices too large to hold.
fn use_encodings(encodings: &Encodings) {
    let elements = encodings.rows.checked_mul(encodings.cols).filter(|n| *n <= 1 << 16);
    let Some(elements) = elements else { return };
    let q = encodings.quantize_nearest(&vec![0.0; elements]);
    assert!(q.iter().all(|q| (encodings.qmin()..=encodings.qmax()).contains(q)));
    let back = encodings.dequantize(&q).expect("values on the grid of the same matrix");
    assert!(back.iter().all(|value| *value == 0.0), "zero is on every grid");
}

/// Reads a plan and checks it; what `validate` promises of a good one must hold, for every id in it.
fn plan(data: &[u8]) -> Result<()> {
    let Ok(plan) = serde_json::from_slice::<Plan>(data) else { return Ok(()) };
    if plan.validate().is_err() {
        return Ok(());
    }
    let samples: usize = plan.shards.iter().map(ExactSizeIterator::len).sum();
    assert_eq!(plan.samples(), samples);
    assert_eq!(plan.shard_ids().count(), plan.shards.len());
    for id in plan.stages.iter().flat_map(|stage| &stage.solve) {
        assert_eq!(plan.layer(*id).id, *id);
        assert_eq!(plan.chunk_ids(*id).count(), plan.layer(*id).chunks.len());
    }
    Ok(())
}
