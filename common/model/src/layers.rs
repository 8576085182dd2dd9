//! Lists a model's layers: every constant-weight operator that can be rounded, and every one that cannot, with
//! the reason.
//!
//! Method: describe every use of a constant weight, gather the uses of each weight, decide per weight. Only shapes
//! and small constants are read, never the weights, so a skeleton gives the same list.
//! Not here: reading one operator's attributes (`products`), operators that are never rounded (`refused`), padding and output sizes (`geometry`), the weight's order in memory (`layout`), activations
//! (`activation`), which layers run when (`cut`).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::activation::{OutputChannels, following};
use crate::node::label;
use crate::onnx::{GraphProto, NodeProto, TensorProto};
use crate::products::{Applied, Bias, Form, applied_weights};
use crate::{Activation, Dtype, GraphIndex, Model, ModelError, Unfold, WeightLayout, refused};

/// One node that applies a layer's weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerUse {
    /// Index of the node in the graph.
    pub node: usize,
    /// The tensor the weight is applied to.
    pub input: String,
    /// The layer's output, its bias included, before the activation.
    pub output: String,
    /// What directly follows, if it reads this output alone.
    pub activation: Activation,
}

/// One weight to round, with every node that uses it.
///
/// The layer computes `output = output_scale * W x + bias_scale * bias`, `W: [rows, cols]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// Unique in the model: the first node's name, or its output's.
    pub name: String,
    /// ONNX operator: Conv, ConvTranspose, Gemm or MatMul.
    pub op_type: String,
    /// The initializer that holds the weight.
    pub weight: String,
    /// Shape of that initializer.
    pub weight_shape: Vec<usize>,
    /// How that shape holds the matrix.
    pub layout: WeightLayout,
    /// Output channels, all groups together.
    pub rows: usize,
    /// Inputs per group times kernel cells.
    pub cols: usize,
    /// Channel groups; row `r` belongs to group `r / (rows / groups)`.
    pub groups: usize,
    /// How the input becomes rows `[positions, cols]`.
    pub unfold: Unfold,
    /// The initializer that is added per row: one entry or `rows` entries.
    pub bias: Option<String>,
    /// Factor of the bias (Gemm `beta`), else 1.
    pub bias_scale: f32,
    /// Factor of the product (Gemm `alpha`), else 1.
    pub output_scale: f32,
    /// Every node that applies the weight, in graph order; at least one.
    pub uses: Vec<LayerUse>,
}

impl Layer {
    /// Whether this layer's rows `[positions, cols]` are the other's, use by use and number by number.
    pub fn reads_rows_of(&self, other: &Layer) -> bool {
        let form = |layer: &Layer| (layer.cols, layer.groups, layer.uses.len());
        let mut inputs = self.uses.iter().zip(&other.uses);
        form(self) == form(other)
            && self.unfold == other.unfold
            && inputs.all(|(mine, theirs)| mine.input == theirs.input)
    }
}

/// A constant-weight operator that stays as it is, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsupported {
    /// The node's name, or its output's.
    pub name: String,
    /// ONNX operator.
    pub op_type: String,
    /// The weight.
    pub weight: String,
    /// Why it is not rounded.
    pub reason: String,
}

/// Lists the layers in graph order, and the constant-weight operators that are none.
///
/// # Errors
/// `Dims` for a weight whose shape cannot be.
pub fn list_layers(model: &Model) -> Result<(Vec<Layer>, Vec<Unsupported>), ModelError> {
    let graph = model.graph();
    let index = model.index();
    let uses = gather(graph, &index);
    let mut layers = Vec::new();
    let mut refusals: Vec<(usize, Unsupported)> = Vec::new();
    for (weight, uses) in in_graph_order(uses) {
        match decide(graph, &index, weight, &uses)? {
            Ok(layer) => layers.push(layer),
            Err(reason) => refusals.push((uses[0].0, refusal(&graph.node[uses[0].0], weight, reason))),
        }
    }
    refusals.extend(refused::other_operators(graph, &index));
    // The first reason counts: that of a product names the weight's other readers already.
    let mut seen: BTreeSet<String> = layers.iter().map(|l| l.weight.clone()).collect();
    refusals.retain(|(_, refusal)| seen.insert(refusal.weight.clone()));
    refusals.sort_by_key(|(node, _)| *node);
    // An operator with several weights is kept once.
    refusals.dedup_by(|(a, next), (b, kept)| a == b && next.name == kept.name);
    name_uniquely(graph, &mut layers);
    Ok((layers, refusals.into_iter().map(|(_, refusal)| refusal).collect()))
}

/// Uses of one weight: (node, form or why not).
type Uses = Vec<(usize, Result<Form, String>)>;

fn gather<'a>(graph: &'a GraphProto, index: &GraphIndex<'a>) -> BTreeMap<&'a str, Uses> {
    let mut uses: BTreeMap<&str, Uses> = BTreeMap::new();
    for (i, node) in graph.node.iter().enumerate() {
        for Applied { weight, form } in applied_weights(node, index) {
            uses.entry(weight).or_default().push((i, form));
        }
    }
    uses
}

fn in_graph_order(uses: BTreeMap<&str, Uses>) -> Vec<(&str, Uses)> {
    let mut ordered: Vec<(&str, Uses)> = uses.into_iter().collect();
    ordered.sort_by_key(|(_, uses)| uses[0].0);
    ordered
}

pub(crate) fn refusal(node: &NodeProto, weight: &str, reason: String) -> Unsupported {
    let op_type = node.op_type().to_owned();
    Unsupported { name: label(node), op_type, weight: weight.to_owned(), reason }
}

/// One weight's layer, or the reason why it is none.
fn decide(
    graph: &GraphProto,
    index: &GraphIndex<'_>,
    weight: &str,
    uses: &Uses,
) -> Result<Result<Layer, String>, ModelError> {
    let stored = index.initializer(weight);
    if let Some(reason) = stored.map_or_else(|| Some("its weight is sparse".to_owned()), unusable) {
        return Ok(Err(reason));
    }
    if let Some(reason) = exposed(index, weight) {
        return Ok(Err(reason));
    }
    let mut forms = Vec::new();
    for (node, form) in uses {
        match form {
            Ok(form) => forms.push((*node, form)),
            Err(reason) => return Ok(Err(reason.clone())),
        }
    }
    if let Some(reason) = conflict(graph, index, weight, &forms) {
        return Ok(Err(reason));
    }
    let shape = stored.map(crate::tensor::shape).transpose()?.unwrap_or_default();
    Ok(Ok(layer(graph, index, weight, shape, &forms)))
}

/// Why an initializer cannot be rounded, whoever applies it.
pub(crate) fn unusable(weight: &TensorProto) -> Option<String> {
    let dtype = Dtype::from_onnx(weight.data_type());
    if dtype != Dtype::F32 {
        return Some(format!("its weight has element type {dtype}; only float32 weights are rounded"));
    }
    weight.dims.contains(&0).then(|| format!("its weight has no elements (shape {:?})", weight.dims))
}

fn exposed(index: &GraphIndex<'_>, weight: &str) -> Option<String> {
    if index.is_overridable(weight) {
        return Some(format!("its weight `{weight}` is also a graph input, so a caller may replace it"));
    }
    index.is_output(weight).then(|| format!("its weight `{weight}` is also a graph output"))
}

/// Why one rounding cannot serve all readers of the weight.
fn conflict(
    graph: &GraphProto,
    index: &GraphIndex<'_>,
    weight: &str,
    forms: &[(usize, &Form)],
) -> Option<String> {
    let describe = |i: usize| format!("{} `{}`", graph.node[i].op_type(), label(&graph.node[i]));
    let (first, form) = forms.first()?;
    let other = index.consumers(weight).iter().find(|c| !forms.iter().any(|(node, _)| node == *c));
    if let Some(&other) = other {
        let (first, other) = (describe(*first), describe(other));
        return Some(format!(
            "its weight `{weight}` is shared by {first} and {other}, which reads it otherwise"
        ));
    }
    let (node, _) = forms.iter().find(|(_, other)| !form.same_problem(other))?;
    let (first, other) = (describe(*first), describe(*node));
    Some(format!("its weight `{weight}` is shared by {first} and {other}, which apply it in different ways"))
}

/// `forms`: at least one, all with the same problem.
fn layer(
    graph: &GraphProto,
    index: &GraphIndex<'_>,
    weight: &str,
    weight_shape: Vec<usize>,
    forms: &[(usize, &Form)],
) -> Layer {
    let form = forms[0].1;
    let mut bound: Vec<Bound> = forms.iter().map(|(node, form)| bind(graph, index, *node, form)).collect();
    if bound.iter().any(|b| b.bias != bound[0].bias || b.bias_scale != bound[0].bias_scale) {
        // One layer has one bias; without a common one no activation can be attributed either.
        bound = forms.iter().map(|(node, _)| Bound::unknown(graph, *node)).collect();
    }
    let (bias, bias_scale) = (bound[0].bias.clone(), bound[0].bias_scale);
    let uses = forms.iter().zip(bound).map(|((node, form), bound)| LayerUse {
        node: *node,
        input: form.input.clone(),
        output: bound.output,
        activation: bound.activation,
    });
    Layer {
        name: label(&graph.node[forms[0].0]),
        op_type: graph.node[forms[0].0].op_type().to_owned(),
        weight: weight.to_owned(),
        weight_shape,
        layout: form.layout,
        rows: form.rows,
        cols: form.cols,
        groups: form.groups,
        unfold: form.unfold.clone(),
        bias,
        bias_scale,
        output_scale: form.output_scale,
        uses: uses.collect(),
    }
}

/// What one use adds to the product: bias, output, activation.
struct Bound {
    bias: Option<String>,
    bias_scale: f32,
    output: String,
    activation: Activation,
}

impl Bound {
    /// A use whose bias is computed, varies by position, or differs from another use's.
    fn unknown(graph: &GraphProto, node: usize) -> Bound {
        let output = graph.node[node].output.first().cloned().unwrap_or_default();
        Bound { bias: None, bias_scale: 1.0, output, activation: Activation::Identity }
    }
}

fn bind(graph: &GraphProto, index: &GraphIndex<'_>, node: usize, form: &Form) -> Bound {
    let mut bound = Bound::unknown(graph, node);
    let channels = OutputChannels { rows: form.rows, trailing: form.trailing };
    match &form.bias {
        Bias::Input { name, scale } => {
            if !is_bias(index, name, form.bias_channels()) {
                return bound;
            }
            (bound.bias, bound.bias_scale) = (Some(name.clone()), *scale);
        }
        Bias::None { may_follow: true } => {
            if let Some((bias, output)) = following_bias(graph, index, &bound.output, channels) {
                (bound.bias, bound.output) = (Some(bias), output);
            }
        }
        Bias::None { may_follow: false } => {}
    }
    bound.activation = following(graph, index, &bound.output, channels);
    bound
}

/// Whether the tensor is a constant with one value per output channel, or one for all.
pub(crate) fn is_bias(index: &GraphIndex<'_>, name: &str, channels: OutputChannels) -> bool {
    !index.is_overridable(name)
        && index.initializer(name).is_some_and(|stored| {
            Dtype::from_onnx(stored.data_type()) == Dtype::F32
                && crate::tensor::shape(stored).is_ok_and(|shape| channels.fits(&shape))
        })
}

/// The Add of a constant vector that alone reads `output`: its vector and its own output.
pub(crate) fn following_bias(
    graph: &GraphProto,
    index: &GraphIndex<'_>,
    output: &str,
    channels: OutputChannels,
) -> Option<(String, String)> {
    let [only] = index.consumers(output) else { return None };
    let add = &graph.node[*only];
    if index.is_output(output) || !crate::node::is_op(add, "Add") {
        return None;
    }
    let bias = match add.input.as_slice() {
        [a, b] if a == output => b,
        [a, b] if b == output => a,
        _ => return None,
    };
    is_bias(index, bias, channels).then(|| Some((bias.clone(), add.output.first()?.clone())))?
}

/// Gives layers of equal name their output's name, then a number.
fn name_uniquely(graph: &GraphProto, layers: &mut [Layer]) {
    let mut taken = BTreeSet::new();
    for layer in layers {
        let output = graph.node[layer.uses[0].node].output.first().cloned().unwrap_or_default();
        let base = layer.name.clone();
        let numbered = (2usize..).map(|n| format!("{base}#{n}"));
        let mut names = [base.clone(), output].into_iter().chain(numbered);
        if let Some(name) = names.find(|name| !taken.contains(name)) {
            taken.insert(name.clone());
            layer.name = name;
        }
    }
}
