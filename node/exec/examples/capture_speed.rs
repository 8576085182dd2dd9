//! Times forward runs and statistics apart, segment by segment, on a real model: both streams, random inputs.
//!
//! `cargo run --release -p halfstep-exec --example capture_speed -- [MODEL] [SAMPLES] [SHARD] [optimize|plain]`
//! The default model is efficientnet-lite0 under `HALFSTEP_SHARED` (or `../shared`); without it there is nothing to do.
//! One thread: divide by the cores for a job's time.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement, not a product")]

use halfstep_compute::random::Stream as Draws;
use halfstep_exec::{Agreement, Engine, LayerStatistics, RtenEngine, Sampling, Unfolder, means, peak};
use halfstep_model::{Dim, Model, Tensor, cut, extract, fold_batch_norms, list_layers, normalize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SAMPLING: Sampling = Sampling { fraction: 1.0, keep_per_shard: 0, seed: 0 };

fn default_model() -> PathBuf {
    let shared = std::env::var_os("HALFSTEP_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"), PathBuf::from);
    shared.join("models/efficientnet-lite0/model.onnx")
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().map_or_else(default_model, PathBuf::from);
    let samples: usize = arguments.next().map_or(32, |s| s.parse().unwrap());
    let shard: usize = arguments.next().map_or(8, |s| s.parse().unwrap());
    let optimize = arguments.next().is_some_and(|s| s == "optimize");
    if !path.exists() {
        println!("{}: not there, nothing measured", path.display());
        return;
    }
    let mut model = Model::read(&path).unwrap();
    normalize(&mut model);
    fold_batch_norms(&mut model).unwrap();
    measure(&model, samples, shard, &RtenEngine::with_optimization(optimize));
}

fn measure(model: &Model, samples: usize, shard: usize, engine: &RtenEngine) {
    let (layers, _) = list_layers(model).unwrap();
    let cut = cut(model, &layers, &vec![true; layers.len()]).unwrap();
    let shards = samples.div_ceil(shard);
    let mut carries: Vec<[BTreeMap<String, Tensor>; 2]> = (0..shards)
        .map(|i| [inputs(model, shard, i as u64, 0.0), inputs(model, shard, i as u64, 0.02)])
        .collect();
    let (mut forward, mut statistics, mut load) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    for segment in &cut.segments {
        let begun = Instant::now();
        let session = (!segment.outputs.is_empty()).then(|| {
            let bytes = extract(model, &segment.nodes, &segment.inputs, &segment.outputs, &BTreeMap::new());
            engine.load(bytes.unwrap()).unwrap()
        });
        load += begun.elapsed();
        let begun = Instant::now();
        for carry in carries.iter_mut().flatten() {
            let Some(session) = &session else { continue };
            let fed: Vec<(&str, &Tensor)> = segment.inputs.iter().map(|n| (n.as_str(), &carry[n])).collect();
            let names: Vec<&str> = segment.outputs.iter().map(String::as_str).collect();
            let outputs = session.run(&fed, &names).unwrap();
            carry.extend(names.iter().map(|n| (*n).to_owned()).zip(outputs));
        }
        forward += begun.elapsed();
        for tap in &segment.taps {
            let layer = &layers[tap.layer];
            let largest = |stream: usize| {
                carries.iter().map(|c| peak(c[stream][&tap.tensor].as_f32().unwrap())).fold(0.0, f32::max)
            };
            let x = &carries[0][0][&tap.tensor];
            let positions =
                Unfolder::new("x", &layer.unfold, x, layer.cols, layer.groups).unwrap().positions();
            let agreed =
                Agreement { peak_fp: largest(0), peak_q: largest(1), positions: (positions * shards) as u64 };
            let begun = Instant::now();
            let one = LayerStatistics::new(layer, 0, agreed, SAMPLING, false).unwrap();
            for (i, carry) in carries.iter().enumerate() {
                let [fp, q] = carry;
                one.accumulate(layer, "x", i as u32, &fp[&tap.tensor], Some(&q[&tap.tensor])).unwrap();
            }
            let spent = begun.elapsed();
            let closing = Instant::now();
            drop(means(&[Arc::new(one)]).unwrap());
            let k = layer.cols as f64;
            // H and G by their lower triangles, C in full: as many as 2 full products.
            let flops = 4.0 * k * k * (positions * shards * layer.groups) as f64;
            println!(
                "{:40} groups {:5} cols {:5} positions {:8}  {:7.1} ms  {:6.1} GFLOP/s  close {:5.1} ms",
                layer.name,
                layer.groups,
                layer.cols,
                positions * shards,
                spent.as_secs_f64() * 1e3,
                flops / spent.as_secs_f64() / 1e9,
                closing.elapsed().as_secs_f64() * 1e3
            );
            statistics += begun.elapsed();
        }
        for carry in carries.iter_mut().flatten() {
            carry.retain(|name, _| segment.live_after.contains(name));
        }
    }
    println!(
        "{} samples in shards of {shard}, both streams, one thread: forward {forward:.2?}, statistics {statistics:.2?}, loading {load:.2?}",
        shards * shard
    );
}

fn inputs(model: &Model, samples: usize, seed: u64, noise: f32) -> BTreeMap<String, Tensor> {
    let mut draws = Draws::new(seed, 0, 0);
    let infos = model.inputs().into_iter();
    infos
        .map(|info| {
            let size = |dim: &Dim| if let Dim::Known(n) = dim { *n } else { 1 };
            let mut shape: Vec<usize> = info.dims.iter().map(size).collect();
            shape[0] = samples;
            let len: usize = shape.iter().product();
            let data = (0..len).map(|_| draws.normal_f32() + noise).collect();
            (info.name, Tensor::f32(shape, data).unwrap())
        })
        .collect()
}
