//! Operators with a constant weight that is never rounded, each with its reason, so that a report can be complete.
//!
//! Not here: operators that are rounded when their form allows it (`products`).

use crate::layers::{refusal, unusable};
use crate::node::subgraphs;
use crate::onnx::{GraphProto, NodeProto};
use crate::{Dtype, GraphIndex, Unsupported};

/// Standard operators whose constants are no weights: element-wise arithmetic, normalisation, moving data, and
/// control flow (whose inside is looked at by itself).
const NO_WEIGHTS: &[&str] = &[
    "Add",
    "And",
    "ArgMax",
    "ArgMin",
    "BatchNormalization",
    "BitShift",
    "Cast",
    "CastLike",
    "Clip",
    "Compress",
    "Concat",
    "CumSum",
    "Div",
    "Equal",
    "Expand",
    "Flatten",
    "Greater",
    "GreaterOrEqual",
    "GridSample",
    "GroupNormalization",
    "Identity",
    "If",
    "InstanceNormalization",
    "LayerNormalization",
    "Less",
    "LessOrEqual",
    "Loop",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Not",
    "OneHot",
    "Or",
    "PRelu",
    "Pad",
    "Pow",
    "QuantizeLinear",
    "RMSNormalization",
    "Range",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "Reshape",
    "Resize",
    "RotaryEmbedding",
    "Scan",
    "ScatterElements",
    "ScatterND",
    "Shape",
    "Size",
    "Slice",
    "Split",
    "Squeeze",
    "Sub",
    "Sum",
    "TensorScatter",
    "Tile",
    "TopK",
    "Transpose",
    "Unsqueeze",
    "Upsample",
    "Where",
    "Xor",
];

/// Operators described by `products`.
const PRODUCTS: &[&str] = &["Conv", "ConvTranspose", "Gemm", "MatMul"];

/// Every other use of a constant weight of rank 2 or more, with the index of its node in the main graph.
pub(crate) fn other_operators(graph: &GraphProto, index: &GraphIndex<'_>) -> Vec<(usize, Unsupported)> {
    let mut found = Vec::new();
    for (i, node) in graph.node.iter().enumerate() {
        for weight in weights(node, &|name| is_weight(index, name)) {
            found.push((i, refusal(node, weight, reason(node, index, weight))));
        }
        let inner = node.attribute.iter().flat_map(subgraphs);
        for body in inner {
            let holder =
                format!("it is inside a subgraph of {} `{}`", node.op_type(), crate::node::label(node));
            found.extend(inside(body, index, &holder).into_iter().map(|refusal| (i, refusal)));
        }
    }
    found
}

/// Constant weights that a node reads and that `products` does not describe.
fn weights<'a>(node: &'a NodeProto, is_weight: &dyn Fn(&str) -> bool) -> Vec<&'a str> {
    let standard = matches!(node.domain(), "" | "ai.onnx");
    if standard && (NO_WEIGHTS.contains(&node.op_type()) || PRODUCTS.contains(&node.op_type())) {
        return Vec::new();
    }
    node.input.iter().map(String::as_str).filter(|name| is_weight(name)).collect()
}

fn is_weight(index: &GraphIndex<'_>, name: &str) -> bool {
    index.initializer(name).is_some_and(|tensor| {
        let dtype = Dtype::from_onnx(tensor.data_type());
        // Indices are int32 or int64; smaller integers are weights that somebody quantized before.
        tensor.dims.len() >= 2 && !matches!(dtype, Dtype::I32 | Dtype::I64 | Dtype::Bool)
    })
}

fn reason(node: &NodeProto, index: &GraphIndex<'_>, weight: &str) -> String {
    let op_type = node.op_type();
    if !matches!(node.domain(), "" | "ai.onnx") {
        return format!("operator {op_type} of domain `{}` is not supported", node.domain());
    }
    match op_type {
        "Gather" | "GatherElements" | "GatherND" => {
            "it looks rows up and multiplies nothing, so no output error depends on its rounding".to_owned()
        }
        "LSTM" | "GRU" | "RNN" => format!("recurrent weights ({op_type}) are not supported"),
        "DequantizeLinear" | "QLinearConv" | "QLinearMatMul" | "ConvInteger" | "MatMulInteger" => {
            "its weight is quantized already".to_owned()
        }
        _ => match index.initializer(weight).and_then(unusable) {
            Some(unusable) => format!("operator {op_type} is not supported; {unusable}"),
            None => format!("operator {op_type} is not supported"),
        },
    }
}

/// Weights applied inside a subgraph, at any depth. Depth is bounded by the protobuf decoder's nesting limit.
fn inside(body: &GraphProto, outer: &GraphIndex<'_>, holder: &str) -> Vec<Unsupported> {
    let index = GraphIndex::new(body);
    let is_weight = |name: &str| is_weight(&index, name) || is_weight(outer, name);
    let mut found = Vec::new();
    for node in &body.node {
        let operands = node.input.iter().map(String::as_str);
        let constants: Vec<&str> = if PRODUCTS.contains(&node.op_type()) {
            operands.filter(|name| is_weight(name)).collect()
        } else {
            weights(node, &is_weight)
        };
        found.extend(constants.into_iter().map(|weight| refusal(node, weight, holder.to_owned())));
        for inner in node.attribute.iter().flat_map(subgraphs) {
            found.extend(inside(inner, outer, holder));
        }
    }
    found
}
