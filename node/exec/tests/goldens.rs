//! The model crate's golden models, run by the engine: outputs as recorded, and every layer's output equal to its
//! unfolded input times its weight matrix.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr, reason = "a test may stop")]

use halfstep_exec::{Engine, ExecError, OrtEngine, RtenEngine, Unfolder};
use halfstep_model::{Layer, LayerUse, Model, Tensor, Unfold, extract, list_layers, normalize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Goldens are recorded with seven digits; sums here have at most a few hundred terms of size 1.
const TOLERANCE: f32 = 2e-4;

/// An export format, which has no layers and 4-bit integers that rten does not read.
const NO_LAYERS: &str = "qdq_opset21";
/// rten 0.27 convolves in one and two dimensions, and pads `SAME_LOWER` wrongly where strides are above 1 (refused);
/// ONNX Runtime runs these.
const NOT_RUN: [&str; 3] = ["conv2d_same_lower", "conv3d", "conv_transpose3d"];

fn goldens() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../common/model/tests/goldens");
    let files = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<_> = files
        .filter(|p| p.extension().is_some_and(|e| e == "onnx"))
        .filter(|p| stem(p) != NO_LAYERS)
        .collect();
    files.sort();
    assert!(files.len() > 30, "found {} goldens", files.len());
    files
}

fn stem(path: &Path) -> &str {
    path.file_stem().unwrap().to_str().unwrap()
}

fn tensors(json: &Value) -> BTreeMap<String, Tensor> {
    let numbers = |v: &Value| v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>();
    let tensor = |v: &Value| {
        let shape = numbers(&v["shape"]).iter().map(|d| *d as usize).collect();
        Tensor::f32(shape, numbers(&v["data"]).iter().map(|x| *x as f32).collect()).unwrap()
    };
    json.as_object().unwrap().iter().map(|(name, v)| (name.clone(), tensor(v))).collect()
}

fn record(path: &Path) -> (BTreeMap<String, Tensor>, BTreeMap<String, Tensor>) {
    let json: Value = serde_json::from_slice(&std::fs::read(path.with_extension("json")).unwrap()).unwrap();
    (tensors(&json["inputs"]), tensors(&json["outputs"]))
}

fn run(
    engine: &dyn Engine,
    model: &Model,
    inputs: &BTreeMap<String, Tensor>,
    outputs: &[&str],
) -> Vec<Tensor> {
    try_run(engine, model, inputs, outputs).unwrap_or_else(|e| panic!("{e}"))
}

fn try_run(
    engine: &dyn Engine,
    model: &Model,
    inputs: &BTreeMap<String, Tensor>,
    outputs: &[&str],
) -> Result<Vec<Tensor>, ExecError> {
    let nodes: Vec<usize> = (0..model.graph().node.len()).collect();
    let input_names: Vec<String> = model.inputs().into_iter().map(|i| i.name).collect();
    let output_names: Vec<String> = outputs.iter().map(|o| (*o).to_owned()).collect();
    let bytes = extract(model, &nodes, &input_names, &output_names, &BTreeMap::new()).unwrap();
    let session = engine.load(bytes)?;
    let fed: Vec<(&str, &Tensor)> = input_names.iter().map(|n| (n.as_str(), &inputs[n])).collect();
    session.run(&fed, outputs)
}

#[test]
fn what_rten_cannot_compute_is_refused_by_node_and_operator() {
    for path in goldens().into_iter().filter(|p| NOT_RUN.contains(&stem(p))) {
        let (inputs, expected) = record(&path);
        let model = Model::read(&path).unwrap();
        let names: Vec<&str> = expected.keys().map(String::as_str).collect();
        let error = try_run(&RtenEngine::new(), &model, &inputs, &names).unwrap_err();
        let node = model.graph().node.iter().find(|n| n.op_type().starts_with("Conv")).unwrap();
        let text = error.to_string();
        assert!(text.contains(node.name()) && text.contains(node.op_type()), "{path:?}: {text}");
    }
}

fn close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= TOLERANCE * (1.0 + b.abs()))
}

fn engines() -> [RtenEngine; 2] {
    [RtenEngine::with_optimization(false), RtenEngine::with_optimization(true)]
}

#[test]
fn golden_outputs_are_reproduced_with_and_without_graph_optimisation() {
    for path in goldens().into_iter().filter(|p| !NOT_RUN.contains(&stem(p))) {
        let (inputs, expected) = record(&path);
        let model = Model::read(&path).unwrap();
        let names: Vec<&str> = expected.keys().map(String::as_str).collect();
        for engine in engines() {
            let outputs = run(&engine, &model, &inputs, &names);
            for (output, (name, expected)) in outputs.iter().zip(&expected) {
                assert_eq!(output.shape, expected.shape, "{path:?} {name}");
                assert!(close(output.as_f32().unwrap(), expected.as_f32().unwrap()), "{path:?} {name}");
            }
        }
    }
}

/// With a library in `HALFSTEP_ONNXRUNTIME`: everything, these three included.
#[test]
fn golden_outputs_are_reproduced_by_onnx_runtime() {
    let Some(library) = std::env::var_os("HALFSTEP_ONNXRUNTIME") else {
        eprintln!("skipped: HALFSTEP_ONNXRUNTIME is not set");
        return;
    };
    let engine = OrtEngine::open(library).unwrap();
    for path in goldens() {
        let (inputs, expected) = record(&path);
        let model = Model::read(&path).unwrap();
        let names: Vec<&str> = expected.keys().map(String::as_str).collect();
        for (output, (name, expected)) in run(&engine, &model, &inputs, &names).iter().zip(&expected) {
            assert_eq!(output.shape, expected.shape, "{path:?} {name}");
            assert!(close(output.as_f32().unwrap(), expected.as_f32().unwrap()), "{path:?} {name}");
        }
    }
}

#[test]
fn a_layers_output_is_its_unfolded_input_times_its_weight_matrix() {
    let mut uses = 0;
    for path in goldens() {
        let (mut known, outputs) = record(&path);
        known.extend(outputs);
        let mut model = Model::read(&path).unwrap();
        normalize(&mut model);
        let (layers, _) = list_layers(&model).unwrap();
        for layer in &layers {
            for one in &layer.uses {
                check_use(&model, layer, one, &known, &path);
                uses += 1;
            }
        }
    }
    assert!(uses > 30, "only {uses} layer uses were checked");
}

/// `known`: the golden's inputs and outputs; what lies between is computed.
fn check_use(model: &Model, layer: &Layer, one: &LayerUse, known: &BTreeMap<String, Tensor>, path: &Path) {
    let tapped = |name: &str| match known.get(name) {
        Some(tensor) => tensor.clone(),
        None => run(&RtenEngine::new(), model, known, &[name]).remove(0),
    };
    // What the node itself computes: its bias may be an Add node's, in which case that node's output is meant.
    let (x, y) = (tapped(&one.input), tapped(&one.output));
    let rows = product(model, layer, &x);
    let y = y.as_f32().unwrap();
    let conv = matches!(layer.unfold, Unfold::Conv(_) | Unfold::ConvTranspose(_));
    let images = if conv { x.shape[0] } else { x.shape[..x.shape.len().max(2) - 2].iter().product() };
    let planes = planes(&rows, layer.rows, images);
    let fits = close(&planes, y) || (!conv && close(&rows, y));
    assert!(
        fits,
        "{path:?}: layer `{}` ({:?}): {:?} and {:?}",
        layer.name,
        layer.unfold,
        &rows[..4.min(rows.len())],
        &y[..4.min(y.len())]
    );
}

/// `alpha * x W^T + beta * bias`, `[positions, rows]`.
fn product(model: &Model, layer: &Layer, x: &Tensor) -> Vec<f32> {
    let weight = model.tensor(&layer.weight).unwrap();
    let w = layer.layout.to_matrix(&layer.weight_shape, weight.as_f32().unwrap()).unwrap();
    let bias = layer.bias.as_ref().map(|b| model.tensor(b).unwrap().as_f32().unwrap().to_vec());
    let bias = |row: usize| bias.as_ref().map_or(0.0, |b| layer.bias_scale * b[row % b.len()]);
    let unfolder = Unfolder::new("x", &layer.unfold, x, layer.cols, layer.groups).unwrap();
    let positions = unfolder.positions();
    let mut y = vec![0.0; positions * layer.rows];
    let mut block = vec![f32::NAN; positions * layer.cols];
    for group in 0..layer.groups {
        unfolder.block(x.as_f32().unwrap(), group, 0..positions, &mut block).unwrap();
        let per_group = layer.rows / layer.groups;
        for position in 0..positions {
            for row in group * per_group..(group + 1) * per_group {
                let w = &w[row * layer.cols..][..layer.cols];
                let x = &block[position * layer.cols..][..layer.cols];
                let sum: f32 = w.iter().zip(x).map(|(w, x)| w * x).sum();
                y[position * layer.rows + row] = layer.output_scale * sum + bias(row);
            }
        }
    }
    y
}

/// `[images * cells, rows]` to `[images, rows, cells]`.
fn planes(y: &[f32], rows: usize, images: usize) -> Vec<f32> {
    let cells = y.len() / (rows * images).max(1);
    let mut out = vec![0.0; y.len()];
    for (position, values) in y.chunks_exact(rows).enumerate() {
        let (image, cell) = (position / cells, position % cells);
        for (row, value) in values.iter().enumerate() {
            out[(image * rows + row) * cells + cell] = *value;
        }
    }
    out
}
