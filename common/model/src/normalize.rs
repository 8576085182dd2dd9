//! Turns constants that the graph computes into initializers, so that layers see their weights.
//!
//! Method: one pass in graph order over Constant, Identity, Transpose and Reshape nodes whose inputs are all
//! initializers; the new initializer has the name of the node's output. Nodes that produce a graph output stay.
//! Not here: general constant folding (the engine does it), batch normalisation (`batch_norm`).

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use crate::onnx::{GraphProto, NodeProto, TensorProto};
use crate::{Data, Dtype, Model, ModelError, Tensor, node, tensor};

/// Replaces constant nodes by initializers. What cannot be replaced (strings, sparse values, a shape that does not
/// fit) stays as it is. Initializers that only replaced nodes read are removed. Running it again changes nothing.
pub fn normalize(model: &mut Model) {
    let (added, replaced) = constants(model.graph());
    if replaced.is_empty() {
        return;
    }
    let mut orphans = constant_inputs(model.graph(), &replaced);
    let mut position = 0;
    model.graph_mut().node.retain(|_| {
        position += 1;
        !replaced.contains(&(position - 1))
    });
    for tensor in added {
        model.set_initializer(tensor);
    }
    let index = model.index();
    // An initializer that backs a graph input is part of the interface.
    let listed: HashSet<&str> = model.graph().input.iter().map(|i| i.name()).collect();
    orphans.retain(|name| {
        index.consumers(name).is_empty() && !index.is_output(name) && !listed.contains(name.as_str())
    });
    model.graph_mut().initializer.retain(|t| !orphans.contains(t.name()));
}

/// The initializers to add, and the nodes they stand for.
fn constants(graph: &GraphProto) -> (Vec<TensorProto>, HashSet<usize>) {
    let outputs: HashSet<&str> = graph.output.iter().map(|o| o.name()).collect();
    let mut known: HashMap<String, TensorProto> =
        graph.initializer.iter().map(|t| (t.name().to_owned(), t.clone())).collect();
    let mut added = Vec::new();
    let mut replaced = HashSet::new();
    for (i, n) in graph.node.iter().enumerate() {
        let [output] = n.output.as_slice() else { continue };
        if output.is_empty() || outputs.contains(output.as_str()) {
            continue;
        }
        if let Some(mut value) = evaluate(n, &known) {
            value.name = Some(output.clone());
            known.insert(output.clone(), value.clone());
            added.push(value);
            replaced.insert(i);
        }
    }
    (added, replaced)
}

/// Names that the replaced nodes read or produce.
fn constant_inputs(graph: &GraphProto, replaced: &HashSet<usize>) -> HashSet<String> {
    let nodes = replaced.iter().map(|n| &graph.node[*n]);
    nodes.flat_map(|n| n.input.iter().chain(&n.output)).cloned().collect()
}

fn evaluate(n: &NodeProto, known: &HashMap<String, TensorProto>) -> Option<TensorProto> {
    if !matches!(n.domain(), "" | "ai.onnx") {
        return None;
    }
    let input = |i: usize| n.input.get(i).and_then(|name| known.get(name));
    match n.op_type() {
        "Constant" => constant(n).ok().flatten(),
        "Identity" => input(0).cloned(),
        "Transpose" => transpose(input(0)?, node::attribute(n, "perm").map(|a| a.ints.as_slice())),
        "Reshape" => reshape(input(0)?, input(1)?, node::int(n, "allowzero", 0) != 0),
        _ => None,
    }
}

/// The value of a Constant node (ONNX operator Constant, versions 11 and later), if it is a dense numeric tensor.
fn constant(n: &NodeProto) -> Result<Option<TensorProto>, ModelError> {
    let [attribute] = n.attribute.as_slice() else { return Ok(None) };
    let tensor = match attribute.name() {
        "value" => return Ok(attribute.t.clone()),
        "value_float" => Tensor::f32(Vec::new(), vec![attribute.f()])?,
        "value_floats" => Tensor::f32(vec![attribute.floats.len()], attribute.floats.clone())?,
        "value_int" => Tensor::new(Vec::new(), Data::I64(vec![attribute.i()]))?,
        "value_ints" => Tensor::new(vec![attribute.ints.len()], Data::I64(attribute.ints.clone()))?,
        _ => return Ok(None),
    };
    Ok(Some(tensor.to_proto("")))
}

/// The tensor with other dimensions and data; its type stays.
fn with(value: &TensorProto, shape: &[usize], raw: Bytes) -> TensorProto {
    TensorProto {
        dims: shape.iter().map(|d| *d as i64).collect(),
        data_type: value.data_type,
        raw_data: Some(raw),
        ..Default::default()
    }
}

/// ONNX Transpose; without `perm` the dimensions are reversed.
fn transpose(value: &TensorProto, perm: Option<&[i64]>) -> Option<TensorProto> {
    let shape = tensor::shape(value).ok()?;
    let perm: Vec<usize> = match perm {
        Some(perm) => perm.iter().map(|p| usize::try_from(*p).ok()).collect::<Option<_>>()?,
        None => (0..shape.len()).rev().collect(),
    };
    let mut sorted = perm.clone();
    sorted.sort_unstable();
    if !sorted.iter().copied().eq(0..shape.len()) {
        return None;
    }
    let size = Dtype::from_onnx(value.data_type()).size()?;
    tensor::check(value).ok()?;
    let raw = tensor::raw_bytes(value).ok()?;
    let permuted: Vec<usize> = perm.iter().map(|p| shape[*p]).collect();
    Some(with(value, &permuted, permute(&raw, size, &shape, &perm)))
}

/// Moves elements of `size` bytes from row-major `shape` into the order of `perm`.
fn permute(raw: &[u8], size: usize, shape: &[usize], perm: &[usize]) -> Bytes {
    let mut strides = vec![size; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    let mut out = Vec::with_capacity(raw.len());
    let mut at = vec![0usize; perm.len()];
    let mut from = 0usize;
    while out.len() < raw.len() {
        out.extend_from_slice(&raw[from..from + size]);
        for d in (0..perm.len()).rev() {
            at[d] += 1;
            from += strides[perm[d]];
            if at[d] < shape[perm[d]] {
                break;
            }
            from -= strides[perm[d]] * at[d];
            at[d] = 0;
        }
    }
    Bytes::from(out)
}

/// ONNX Reshape (version 5 and later; `allowzero` from 14).
fn reshape(value: &TensorProto, target: &TensorProto, allow_zero: bool) -> Option<TensorProto> {
    let shape = tensor::shape(value).ok()?;
    let elements: usize = shape.iter().product();
    let Data::I64(target) = Tensor::from_proto(target).ok()?.data else { return None };
    let mut dims = Vec::with_capacity(target.len());
    let mut free = None;
    for (i, dim) in target.iter().enumerate() {
        dims.push(match dim {
            -1 if free.is_none() => {
                free = Some(i);
                1
            }
            0 if !allow_zero => *shape.get(i)?,
            dim => usize::try_from(*dim).ok()?,
        });
    }
    let product = dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
    if let Some(free) = free {
        dims[free] = elements.checked_div(product)?;
    }
    let product = dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
    if product != elements {
        return None;
    }
    tensor::check(value).ok()?;
    Some(with(value, &dims, tensor::raw_bytes(value).ok()?))
}
