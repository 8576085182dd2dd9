//! Folds batch normalisations into the Conv, ConvTranspose, Gemm or MatMul before them, so that what is rounded is what
//! is computed.
//!
//! Method: `g = gamma / sqrt(variance + epsilon)` (ONNX BatchNormalization, inference): `W[r, :] *= g[r]`,
//! `bias[r] = g[r] * (bias[r] - mean[r]) + offset[r]`, in f64, rounded once. Find, describe, apply, check again.
//! A MatMul has no bias: the normalisation, and an Add of a constant before it, become one Add.
//! Not folded: after a MatMul that is not known to give a matrix (the channels of a normalisation are dimension 1), and
//! where anything else reads the layer's output, its weight or a replaceable parameter.

use serde::{Deserialize, Serialize};

use crate::activation::{OutputChannels, constant, float};
use crate::layers::{following_bias, is_bias};
use crate::node::{int, is_op, label};
use crate::onnx::{AttributeProto, GraphProto, NodeProto, ValueInfoProto, type_proto};
use crate::products::{Applied, Bias, Form, applied_weights};
use crate::{Dtype, GraphIndex, Model, ModelError, Tensor};

/// One batch normalisation that was folded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Folded {
    /// The node it was folded into.
    pub conv: String,
    /// The node that is gone.
    pub batch_norm: String,
}

/// Folds every batch normalisation that directly and alone follows a layer. Its output keeps its name.
///
/// # Errors
/// `Node` if a channel has a variance that leaves no finite factor; errors of decoding a weight.
pub fn fold_batch_norms(model: &mut Model) -> Result<Vec<Folded>, ModelError> {
    let mut all = Vec::new();
    // A second round folds a batch normalisation that followed one just folded.
    loop {
        let rewrites = find(model)?;
        if rewrites.is_empty() {
            return Ok(all);
        }
        all.extend(rewrites.iter().map(|r| r.folded.clone()));
        apply(model, rewrites);
        model.recheck()?;
    }
}

/// One fold, decided and computed, not yet applied.
struct Rewrite {
    folded: Folded,
    conv: usize,
    /// The Add of a MatMul's bias, and whether the layer is a MatMul.
    add: Option<usize>,
    is_matmul: bool,
    batch_norm: usize,
    weight: (String, Tensor),
    bias: (String, Tensor),
}

fn find(model: &Model) -> Result<Vec<Rewrite>, ModelError> {
    let graph = model.graph();
    let index = model.index();
    let mut rewrites = Vec::new();
    for conv in 0..graph.node.len() {
        if let Some(site) = site(graph, &index, conv) {
            rewrites.push(rewrite(graph, &index, &site)?);
        }
    }
    Ok(rewrites)
}

/// A layer and the batch normalisation that can be folded into it.
struct Site<'a> {
    conv: usize,
    /// The Add of a MatMul's bias.
    add: Option<usize>,
    batch_norm: usize,
    weight: &'a str,
    /// With the bias of `add`.
    form: Form,
}

fn site<'a>(graph: &'a GraphProto, index: &GraphIndex<'a>, conv: usize) -> Option<Site<'a>> {
    let node = &graph.node[conv];
    let mut applied = applied_weights(node, index);
    let (Some(Applied { weight, form: Ok(mut form) }), true) = (applied.pop(), applied.is_empty()) else {
        return None;
    };
    let mut output = node.output.first()?;
    let mut last = conv;
    let is_matmul = is_op(node, "MatMul");
    if is_matmul && let Some((add, bias)) = matrix_bias(graph, index, output, &form) {
        form.bias = Bias::Input { name: bias, scale: 1.0 };
        last = add;
        output = graph.node[add].output.first()?;
    }
    let [batch_norm] = *index.consumers(output) else { return None };
    let norm = &graph.node[batch_norm];
    let usable = !index.is_output(output)
        && index.consumers(weight) == [conv]
        && node.input.iter().filter(|name| *name == weight).count() == 1
        && is_own_f32(index, weight)
        && is_inference(norm)
        && norm.input.first() == Some(output)
        // The rows of a product of matrices are the channels of its output only when they are its last dimension.
        && (form.trailing == 0 || node.op_type().starts_with("Conv"))
        && has_constant_parameters(index, norm, form.rows)
        && bias_is_constant(index, &form)
        && (!is_matmul || is_matrix(graph, index, &form.input));
    usable.then(|| Site { conv, add: (last != conv).then_some(last), batch_norm, weight, form })
}

/// The Add of a constant that alone reads a MatMul's output and leaves it a matrix: its index and the constant.
fn matrix_bias(
    graph: &GraphProto,
    index: &GraphIndex<'_>,
    output: &str,
    form: &Form,
) -> Option<(usize, String)> {
    let [add] = *index.consumers(output) else { return None };
    let channels = OutputChannels { rows: form.rows, trailing: form.trailing };
    let (bias, _) = following_bias(graph, index, output, channels)?;
    (index.initializer(&bias)?.dims.len() <= 2).then_some((add, bias))
}

/// Whether a tensor is known to have two dimensions: the graph says so, or the operators before it do.
fn is_matrix(graph: &GraphProto, index: &GraphIndex<'_>, tensor: &str) -> bool {
    let infos = || graph.input.iter().chain(&graph.value_info);
    let mut name = tensor;
    loop {
        if infos().any(|info| info.name() == name && rank(info) == Some(2)) {
            return true;
        }
        let Some(node) = index.producer(name).map(|i| &graph.node[i]) else { return false };
        let rank_of = |i: usize| {
            let stored = node.input.get(i).and_then(|name| index.initializer(name));
            stored.map(|tensor| tensor.dims.len())
        };
        // What these do to a matrix gives a matrix.
        let through = match node.op_type() {
            _ if !is_op(node, node.op_type()) => None,
            "Gemm" | "Flatten" => return true,
            "Relu" | "LeakyRelu" | "Elu" | "Sigmoid" | "Tanh" | "Clip" | "Identity" | "Dropout"
            | "BatchNormalization" => Some(0),
            "MatMul" if rank_of(1) == Some(2) => Some(0),
            "Add" | "Mul" if rank_of(1).is_some_and(|rank| rank <= 2) => Some(0),
            "Add" | "Mul" if rank_of(0).is_some_and(|rank| rank <= 2) => Some(1),
            _ => None,
        };
        let Some(next) = through.and_then(|i| node.input.get(i)) else { return false };
        name = next;
    }
}

fn rank(info: &ValueInfoProto) -> Option<usize> {
    match info.r#type.as_ref()?.value.as_ref()? {
        type_proto::Value::TensorType(tensor) => Some(tensor.shape.as_ref()?.dim.len()),
        _ => None,
    }
}

fn is_own_f32(index: &GraphIndex<'_>, name: &str) -> bool {
    let stored = index.initializer(name);
    stored.is_some_and(|t| Dtype::from_onnx(t.data_type()) == Dtype::F32)
        && !index.is_overridable(name)
        && !index.is_output(name)
}

/// Before opset 14 training is told from inference by its further outputs.
fn is_inference(node: &NodeProto) -> bool {
    is_op(node, "BatchNormalization")
        && int(node, "training_mode", 0) == 0
        && node.output.first().is_some_and(|o| !o.is_empty())
        && node.output.iter().skip(1).all(String::is_empty)
}

fn has_constant_parameters(index: &GraphIndex<'_>, norm: &NodeProto, rows: usize) -> bool {
    norm.input.len() == 5 && norm.input[1..].iter().all(|name| parameter(index, name, rows).is_some())
}

fn parameter(index: &GraphIndex<'_>, name: &str, rows: usize) -> Option<Vec<f32>> {
    let tensor = constant(index, name)?;
    (tensor.shape == [rows]).then(|| tensor.as_f32().map(<[f32]>::to_vec))?
}

fn bias_is_constant(index: &GraphIndex<'_>, form: &Form) -> bool {
    match &form.bias {
        Bias::None { .. } => true,
        Bias::Input { name, .. } => is_bias(index, name, form.bias_channels()),
    }
}

fn rewrite(graph: &GraphProto, index: &GraphIndex<'_>, site: &Site<'_>) -> Result<Rewrite, ModelError> {
    let (conv, norm) = (&graph.node[site.conv], &graph.node[site.batch_norm]);
    let old = index.initializer(site.weight).map(Tensor::from_proto).transpose()?;
    let old = old.ok_or_else(|| ModelError::NoInitializer { tensor: site.weight.to_owned() })?;
    let (factor, mean, offset) = factors(index, norm, site.form.rows)?;
    let bias = old_bias(index, &site.form);
    let new_bias: Vec<f32> =
        (0..site.form.rows).map(|r| (factor[r] * (bias[r] - mean[r]) + offset[r]) as f32).collect();
    Ok(Rewrite {
        folded: Folded { conv: label(conv), batch_norm: label(norm) },
        conv: site.conv,
        add: site.add,
        is_matmul: is_op(conv, "MatMul"),
        batch_norm: site.batch_norm,
        weight: (site.weight.to_owned(), scaled(&old, site, &factor)?),
        bias: (bias_name(graph, index, site), Tensor::f32(vec![site.form.rows], new_bias)?),
    })
}

/// Factor, mean and offset per channel.
type Factors = (Vec<f64>, Vec<f64>, Vec<f64>);

fn factors(index: &GraphIndex<'_>, norm: &NodeProto, rows: usize) -> Result<Factors, ModelError> {
    let read = |i: usize| -> Vec<f64> {
        parameter(index, &norm.input[i], rows).unwrap_or_default().into_iter().map(f64::from).collect()
    };
    let (gamma, offset, mean, variance) = (read(1), read(2), read(3), read(4));
    let epsilon = f64::from(float(norm, "epsilon", 1e-5));
    let factor: Vec<f64> = gamma.iter().zip(&variance).map(|(g, v)| g / (v + epsilon).sqrt()).collect();
    if let Some(channel) = factor.iter().position(|f| !f.is_finite()) {
        let (gamma, variance) = (gamma[channel], variance[channel]);
        let problem = format!(
            "channel {channel} has scale {gamma} and variance {variance}, epsilon is {epsilon}; expected finite values and a positive sum"
        );
        return Err(ModelError::Node { node: label(norm), op_type: norm.op_type().to_owned(), problem });
    }
    Ok((factor, mean, offset))
}

/// The bias as the layer adds it, one value per row.
fn old_bias(index: &GraphIndex<'_>, form: &Form) -> Vec<f64> {
    let Bias::Input { name, scale } = &form.bias else { return vec![0.0; form.rows] };
    let tensor = constant(index, name);
    let values = tensor.as_ref().and_then(Tensor::as_f32).unwrap_or_default();
    let value = |r: usize| f64::from(if values.len() == 1 { values[0] } else { values[r] });
    (0..form.rows).map(|r| f64::from(*scale) * value(r)).collect()
}

fn scaled(old: &Tensor, site: &Site<'_>, factor: &[f64]) -> Result<Tensor, ModelError> {
    let refuse = |error: crate::LayoutError| ModelError::Layer {
        layer: site.weight.to_owned(),
        problem: error.to_string(),
    };
    let layout = site.form.layout;
    let mut matrix = layout.to_matrix(&old.shape, old.as_f32().unwrap_or_default()).map_err(refuse)?;
    for (row, g) in matrix.chunks_exact_mut(site.form.cols).zip(factor) {
        row.iter_mut().for_each(|w| *w = (f64::from(*w) * g) as f32);
    }
    Tensor::f32(old.shape.clone(), layout.from_matrix(&old.shape, &matrix).map_err(refuse)?)
}

/// The layer's own bias keeps its name; otherwise a new one is made from the weight's.
fn bias_name(graph: &GraphProto, index: &GraphIndex<'_>, site: &Site<'_>) -> String {
    if let Bias::Input { name, .. } = &site.form.bias
        && index.consumers(name) == [site.add.unwrap_or(site.conv)]
        && !index.is_output(name)
    {
        return name.clone();
    }
    unused_name(graph, index, &format!("{}.folded_bias", site.weight))
}

/// `base`, or `base` with the first number that no tensor has.
pub(crate) fn unused_name(graph: &GraphProto, index: &GraphIndex<'_>, base: &str) -> String {
    let taken = |name: &str| {
        index.is_constant(name)
            || index.producer(name).is_some()
            || index.is_input(name)
            || !index.consumers(name).is_empty()
            || graph.value_info.iter().any(|v| v.name() == name)
    };
    let mut name = base.to_owned();
    let mut number = 2u64;
    while taken(&name) {
        name = format!("{base}.{number}");
        number += 1;
    }
    name
}

fn apply(model: &mut Model, rewrites: Vec<Rewrite>) {
    let gone = |r: &Rewrite| if r.is_matmul { r.add } else { Some(r.batch_norm) };
    let gone: Vec<usize> = rewrites.iter().filter_map(gone).collect();
    for rewrite in rewrites {
        let graph = model.graph_mut();
        let old = if rewrite.is_matmul { become_add(graph, &rewrite) } else { take_over(graph, &rewrite) };
        graph.value_info.retain(|v| v.name() != old);
        model.set_tensor(&rewrite.weight.0, &rewrite.weight.1);
        model.set_tensor(&rewrite.bias.0, &rewrite.bias.1);
    }
    let graph = model.graph_mut();
    let mut position = 0;
    graph.node.retain(|_| {
        position += 1;
        !gone.contains(&(position - 1))
    });
    drop_unused_initializers(graph);
}

/// The layer adds the new bias and takes the normalisation's place; gives the name of the tensor that is gone.
fn take_over(graph: &mut GraphProto, rewrite: &Rewrite) -> String {
    let output = graph.node[rewrite.batch_norm].output[0].clone();
    let node = &mut graph.node[rewrite.conv];
    node.input.resize(2, String::new());
    node.input.push(rewrite.bias.0.clone());
    set_beta_to_one(node);
    std::mem::replace(&mut node.output[0], output)
}

/// The normalisation becomes the Add of the new bias; gives the name of the tensor that is gone, if one is.
fn become_add(graph: &mut GraphProto, rewrite: &Rewrite) -> String {
    let product = graph.node[rewrite.conv].output[0].clone();
    let gone = rewrite.add.map(|add| graph.node[add].output[0].clone()).unwrap_or_default();
    let node = &mut graph.node[rewrite.batch_norm];
    node.op_type = Some("Add".to_owned());
    node.input = vec![product, rewrite.bias.0.clone()];
    node.attribute.clear();
    node.output.truncate(1);
    gone
}

/// The folded bias contains a Gemm's `beta` already.
fn set_beta_to_one(node: &mut NodeProto) {
    for beta in node.attribute.iter_mut().filter(|a: &&mut AttributeProto| a.name() == "beta") {
        beta.f = Some(1.0);
    }
}

/// Removes the initializers that nothing reads and that are not part of the interface.
fn drop_unused_initializers(graph: &mut GraphProto) {
    let index = GraphIndex::new(graph);
    let unused = |name: &str| {
        index.consumers(name).is_empty() && !index.is_output(name) && !index.is_overridable(name)
    };
    let keep: Vec<bool> = graph.initializer.iter().map(|t| !unused(t.name())).collect();
    let mut keep = keep.into_iter();
    graph.initializer.retain(|_| keep.next().unwrap_or(true));
}
