//! Golden models of `tests/goldens`, and a plain evaluator of one layer: loops over the definition in `Unfold`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use halfstep_model::{Activation, Geometry, Layer, Model, Unfold, list_layers};

/// A tensor of a golden file.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
pub(crate) struct Values {
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<f32>,
}

#[derive(Debug, serde::Deserialize)]
pub(crate) struct Golden {
    pub(crate) inputs: BTreeMap<String, Values>,
    pub(crate) outputs: BTreeMap<String, Values>,
}

/// ONNX Runtime sums in another order, and goldens keep 7 digits.
pub(crate) const TOLERANCE: f32 = 3e-5;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// Model and golden of one case.
pub(crate) fn load(case: &str) -> (Model, Golden) {
    let model = Model::read(folder().join(format!("{case}.onnx"))).unwrap();
    let text = std::fs::read_to_string(folder().join(format!("{case}.json"))).unwrap();
    (model, serde_json::from_str(&text).unwrap())
}

/// All cases whose name starts with one of `prefixes`, sorted; at least one.
pub(crate) fn cases(prefixes: &[&str]) -> Vec<String> {
    let files = std::fs::read_dir(folder()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let names = files.filter_map(|f| f.strip_suffix(".onnx").map(str::to_owned));
    let mut names: Vec<String> = names.filter(|n| prefixes.iter().any(|p| n.starts_with(p))).collect();
    names.sort();
    assert!(!names.is_empty());
    names
}

/// The only layer of a model in which nothing is unsupported.
pub(crate) fn only_layer(model: &Model) -> Layer {
    let (mut layers, unsupported) = list_layers(model).unwrap();
    assert_eq!(unsupported, []);
    assert_eq!(layers.len(), 1);
    layers.remove(0)
}

pub(crate) fn assert_close(actual: &Values, expected: &Values, case: &str) {
    assert_eq!(actual.shape, expected.shape, "{case}");
    for (i, (a, e)) in actual.data.iter().zip(&expected.data).enumerate() {
        assert!((a - e).abs() <= TOLERANCE * e.abs().max(1.0), "{case}: entry {i} is {a}, expected {e}");
    }
}

/// `output_scale * W x + bias_scale * bias` in matrix form, put back into the operator's output order.
pub(crate) fn evaluate(model: &Model, layer: &Layer, x: &Values) -> Values {
    let weight = model.tensor(&layer.weight).unwrap();
    let w = layer.layout.to_matrix(&layer.weight_shape, weight.as_f32().unwrap()).unwrap();
    let bias = layer.bias.as_ref().map(|b| model.tensor(b).unwrap().as_f32().unwrap().to_vec());
    let left =
        layer.op_type == "MatMul" && layer.unfold == Unfold::Columns || gemm_weight_is_left(model, layer);
    let (positions, rows_of_x) = unfold(layer, x);
    // y[row][position]
    let mut y = vec![vec![0.0f32; positions]; layer.rows];
    for (r, y) in y.iter_mut().enumerate() {
        let group = r / (layer.rows / layer.groups);
        for (p, y) in y.iter_mut().enumerate() {
            let product: f32 = (0..layer.cols).map(|c| w[r * layer.cols + c] * rows_of_x(group, p, c)).sum();
            let b = bias.as_ref().map_or(0.0, |b| if b.len() == 1 { b[0] } else { b[r] });
            *y = layer.output_scale * product + layer.bias_scale * b;
        }
    }
    fold(layer, x, left, &y)
}

fn gemm_weight_is_left(model: &Model, layer: &Layer) -> bool {
    layer.op_type == "Gemm" && model.graph().node[layer.uses[0].node].input[0] == layer.weight
}

type Cell<'a> = Box<dyn Fn(usize, usize, usize) -> f32 + 'a>;

/// Number of positions, and the entry of the unfolded input at (group, position, column).
fn unfold<'a>(layer: &'a Layer, x: &'a Values) -> (usize, Cell<'a>) {
    match &layer.unfold {
        Unfold::Rows => {
            let k = layer.cols;
            (x.data.len() / k, Box::new(move |_, p, c| x.data[p * k + c]))
        }
        Unfold::Columns => {
            let (k, last) = (layer.cols, x.shape[x.shape.len() - 1]);
            let cell = move |_: usize, p: usize, c: usize| x.data[(p / last * k + c) * last + p % last];
            (x.data.len() / k, Box::new(cell))
        }
        Unfold::Conv(g) => {
            let extents = g.conv_extents(&x.shape[2..]).unwrap();
            let begin: Vec<usize> = extents.iter().map(|e| e.pad_begin).collect();
            let out: Vec<usize> = extents.iter().map(|e| e.output).collect();
            conv_cells(g, x, out, move |g, d, o, k| {
                (o * g.strides[d] + k * g.dilations[d]).checked_sub(begin[d])
            })
        }
        Unfold::ConvTranspose(g) => {
            let extents = g.conv_transpose_extents(&x.shape[2..]).unwrap();
            let begin: Vec<usize> = extents.iter().map(|e| e.pad_begin).collect();
            let out: Vec<usize> = extents.iter().map(|e| e.output).collect();
            conv_cells(g, x, out, move |g, d, o, k| {
                let scaled = (o + begin[d]).checked_sub(k * g.dilations[d])?;
                scaled.is_multiple_of(g.strides[d]).then(|| scaled / g.strides[d])
            })
        }
    }
}

/// `source(geometry, dimension, output cell, kernel cell)`: the input cell, if there may be one.
fn conv_cells<'a>(
    g: &'a Geometry,
    x: &'a Values,
    out: Vec<usize>,
    source: impl Fn(&Geometry, usize, usize, usize) -> Option<usize> + 'a,
) -> (usize, Cell<'a>) {
    let per_image: usize = out.iter().product();
    let kernel: usize = g.kernel.iter().product();
    let channels = x.shape[1] / g.groups;
    let cell = move |group: usize, p: usize, c: usize| {
        let (channel, mut k, mut o) = (group * channels + c / kernel, c % kernel, p % per_image);
        let mut index = 0;
        let mut step = 1;
        for d in (0..out.len()).rev() {
            let (ok, kk) = (o % out[d], k % g.kernel[d]);
            (o, k) = (o / out[d], k / g.kernel[d]);
            match source(g, d, ok, kk) {
                Some(i) if i < x.shape[2 + d] => index += i * step,
                _ => return 0.0,
            }
            step *= x.shape[2 + d];
        }
        x.data[(p / per_image * x.shape[1] + channel) * step + index]
    };
    (x.shape[0] * per_image, Box::new(cell))
}

/// Puts `y[row][position]` into the order of the operator's output.
fn fold(layer: &Layer, x: &Values, left: bool, y: &[Vec<f32>]) -> Values {
    let rows = layer.rows;
    let (outer, inner, shape) = match &layer.unfold {
        Unfold::Conv(g) => conv_shape(rows, x, &g.conv_extents(&x.shape[2..]).unwrap()),
        Unfold::ConvTranspose(g) => conv_shape(rows, x, &g.conv_transpose_extents(&x.shape[2..]).unwrap()),
        _ if left => {
            let positions = y[0].len();
            let rank = x.shape.len();
            let last = if layer.unfold == Unfold::Columns { x.shape[rank - 1] } else { positions };
            let shape = [&x.shape[..rank - 2], &[rows, last]].concat();
            (positions / last, last, shape)
        }
        Unfold::Rows => {
            let shape = [&x.shape[..x.shape.len() - 1], &[rows]].concat();
            (y[0].len(), 1, shape)
        }
        Unfold::Columns => (y[0].len(), 1, vec![y[0].len(), rows]),
    };
    let mut data = Vec::new();
    for o in 0..outer {
        for row in y {
            data.extend_from_slice(&row[o * inner..(o + 1) * inner]);
        }
    }
    Values { shape, data }
}

fn conv_shape(rows: usize, x: &Values, extents: &[halfstep_model::Extent]) -> (usize, usize, Vec<usize>) {
    let out: Vec<usize> = extents.iter().map(|e| e.output).collect();
    (x.shape[0], out.iter().product(), [&[x.shape[0], rows], out.as_slice()].concat())
}

/// The activation as its doc comment defines it. `y`: `[N, rows, ..]`.
pub(crate) fn activate(activation: &Activation, y: &Values) -> Values {
    let inner: usize = y.shape[2..].iter().product();
    let apply = |(i, &x): (usize, &f32)| match activation {
        Activation::Identity => x,
        Activation::Relu => x.max(0.0),
        Activation::Clip { min, max } => x.clamp(*min, *max),
        Activation::LeakyRelu { slope } => {
            if x < 0.0 {
                slope * x
            } else {
                x
            }
        }
        Activation::PRelu { slope } => {
            let slope = if slope.len() == 1 { slope[0] } else { slope[i / inner % y.shape[1]] };
            if x < 0.0 { slope * x } else { x }
        }
        Activation::Sigmoid => sigmoid(x),
        Activation::Tanh => x.tanh(),
        Activation::HardSwish => x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
        Activation::Silu => x * sigmoid(x),
        Activation::Gelu => x * (1.0 + erf(x / 2f32.sqrt())) / 2.0,
        Activation::GeluTanh => {
            let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            x * (1.0 + inner.tanh()) / 2.0
        }
    };
    Values { shape: y.shape.clone(), data: y.data.iter().enumerate().map(apply).collect() }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Midpoint rule over the integral that defines erf.
fn erf(x: f32) -> f32 {
    let (x, steps) = (f64::from(x), 20_000);
    let h = x / f64::from(steps);
    let sum: f64 = (0..steps).map(|i| (-((f64::from(i) + 0.5) * h).powi(2)).exp()).sum();
    (sum * h * 2.0 / std::f64::consts::PI.sqrt()) as f32
}
