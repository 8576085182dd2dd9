//! Takes real sub-models out of a model: chosen nodes with just the initializers they need.
//!
//! Not here: which nodes make a segment (`cut`), running them.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use bytes::Bytes;
use prost::Message;

use crate::onnx::{GraphProto, ModelProto, StringStringEntryProto, TensorProto};
use crate::tensor::has_data;
use crate::types::Types;
use crate::validate::SKELETON_KEY;
use crate::{Dtype, GraphIndex, Model, ModelError, Tensor, node};

/// Float initializers larger than this lose their data in a skeleton, in bytes.
const SKELETON_BYTES_MAX: usize = 1024;

/// Serializes the sub-model of `nodes` (indices into the graph, any order) from `inputs` to `outputs`.
///
/// It has the model's opset imports and functions and the initializers its nodes read; an entry of `replace`
/// takes the place of the initializer of that name, and one that no node reads is left out. A name in `inputs`
/// is an input even if an initializer has it. All data is inline.
///
/// # Errors
/// `Request`: a node index out of range, or an output that none of the nodes produces; `Undefined`: a node reads
/// what is neither an input, a constant, nor an output of the nodes; `TooLarge`: past the limit of protobuf.
pub fn extract(
    model: &Model,
    nodes: &[usize],
    inputs: &[String],
    outputs: &[String],
    replace: &BTreeMap<String, Tensor>,
) -> Result<Bytes, ModelError> {
    let graph = model.graph();
    let index = model.index();
    let nodes: BTreeSet<usize> = nodes.iter().copied().collect();
    if let Some(outside) = nodes.iter().find(|n| **n >= graph.node.len()) {
        return Err(ModelError::Request {
            subject: format!("node {outside}"),
            problem: format!("the model has {} nodes", graph.node.len()),
        });
    }
    let constants = constants(graph, &index, &nodes, inputs, replace)?;
    let produced = produced(graph, &nodes);
    if let Some(missing) = outputs.iter().find(|o| !produced.contains(o.as_str())) {
        return Err(ModelError::Request {
            subject: format!("output `{missing}`"),
            problem: "none of the chosen nodes produces it".to_owned(),
        });
    }
    let types = Types::new(graph);
    let sub = GraphProto {
        name: Some(format!("{}.part", graph.name())),
        node: nodes.iter().map(|n| graph.node[*n].clone()).collect(),
        initializer: initializers(&index, &constants, replace),
        sparse_initializer: sparse(graph, &constants),
        input: inputs.iter().map(|name| types.value_info(graph, name)).collect(),
        output: outputs.iter().map(|name| types.value_info(graph, name)).collect(),
        ..Default::default()
    };
    encode(shell(model, sub))
}

/// Names of the constants the nodes read, after checking that everything they read is there.
fn constants<'a>(
    graph: &'a GraphProto,
    index: &GraphIndex<'a>,
    nodes: &BTreeSet<usize>,
    inputs: &[String],
    replace: &BTreeMap<String, Tensor>,
) -> Result<BTreeSet<&'a str>, ModelError> {
    let mut available: HashSet<&str> = inputs.iter().map(String::as_str).collect();
    let mut constants = BTreeSet::new();
    for n in nodes {
        for name in index.reads(*n).iter().filter(|name| !available.contains(**name)) {
            if !index.is_constant(name) && !replace.contains_key(*name) {
                let reader = format!("node `{}` of the part", node::label(&graph.node[*n]));
                return Err(ModelError::Undefined { reader, tensor: (*name).to_owned() });
            }
            constants.insert(*name);
        }
        available.extend(graph.node[*n].output.iter().map(String::as_str));
    }
    Ok(constants)
}

fn produced<'a>(graph: &'a GraphProto, nodes: &BTreeSet<usize>) -> HashSet<&'a str> {
    let outputs = nodes.iter().flat_map(|n| &graph.node[*n].output);
    outputs.map(String::as_str).filter(|o| !o.is_empty()).collect()
}

fn initializers(
    index: &GraphIndex<'_>,
    constants: &BTreeSet<&str>,
    replace: &BTreeMap<String, Tensor>,
) -> Vec<TensorProto> {
    let tensor = |name: &&str| match replace.get(*name) {
        Some(tensor) => Some(tensor.to_proto(name)),
        None => index.initializer(name).cloned(),
    };
    constants.iter().filter_map(tensor).collect()
}

fn sparse(graph: &GraphProto, constants: &BTreeSet<&str>) -> Vec<crate::onnx::SparseTensorProto> {
    let wanted =
        |s: &&crate::onnx::SparseTensorProto| s.values.as_ref().is_some_and(|v| constants.contains(v.name()));
    graph.sparse_initializer.iter().filter(wanted).cloned().collect()
}

/// A model around `graph` with everything its nodes may refer to.
fn shell(model: &Model, graph: GraphProto) -> ModelProto {
    let proto = model.proto();
    ModelProto {
        // From IR version 4 on, initializers need not be graph inputs.
        ir_version: Some(proto.ir_version().max(4)),
        opset_import: proto.opset_import.clone(),
        functions: proto.functions.clone(),
        producer_name: Some("halfstep".to_owned()),
        graph: Some(graph),
        ..Default::default()
    }
}

fn encode(proto: ModelProto) -> Result<Bytes, ModelError> {
    let actual = proto.encoded_len() as u64;
    let limit = crate::write::INLINE_BYTES_MAX;
    if actual > limit {
        return Err(ModelError::TooLarge { actual, limit });
    }
    Ok(Bytes::from(proto.encode_to_vec()))
}

/// The model without the data of float initializers above 1 KiB, which keep name, type and dimensions.
///
/// [`Model::from_bytes`] reads it (it is marked in the model's metadata); [`Model::tensor`] of a missing weight
/// is an error.
pub fn skeleton(model: &Model) -> Bytes {
    let mut proto = model.proto().clone();
    let initializers = proto.graph.iter_mut().flat_map(|g| &mut g.initializer);
    initializers.for_each(strip);
    if !model.is_skeleton() {
        proto
            .metadata_props
            .push(StringStringEntryProto { key: Some(SKELETON_KEY.to_owned()), value: Some("1".to_owned()) });
    }
    Bytes::from(proto.encode_to_vec())
}

/// Whether a skeleton does not have the data of this initializer.
pub(crate) fn is_stripped(proto: &TensorProto) -> bool {
    let float = Dtype::from_onnx(proto.data_type()).is_float();
    float && (proto.encoded_len() > SKELETON_BYTES_MAX || !has_data(proto))
}

fn strip(proto: &mut TensorProto) {
    if is_stripped(proto) {
        *proto = TensorProto {
            name: proto.name.take(),
            dims: std::mem::take(&mut proto.dims),
            data_type: proto.data_type,
            ..Default::default()
        };
    }
}
