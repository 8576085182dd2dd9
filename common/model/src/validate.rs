//! The checks every model passes once, before anything else looks at it: opset, names, edges, order, tensor data.
//!
//! Not here: what operators demand of their inputs (`layers`; the engine says the rest when it runs).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use crate::model::{OPSET_MAX, OPSET_MIN};
use crate::onnx::tensor_proto::DataLocation;
use crate::onnx::{GraphProto, ModelProto, TensorProto};
use crate::{ModelError, node, tensor};

/// Metadata key that marks a skeleton.
pub(crate) const SKELETON_KEY: &str = "halfstep.skeleton";

/// First version of the file format in which an initializer that is no graph input is a constant.
const IR_VERSION_OF_CONSTANTS: i64 = 4;

/// Checks the model and puts its nodes into topological order (kept as they are where they have one).
pub(crate) fn model(proto: &mut ModelProto) -> Result<(), ModelError> {
    let skeleton = is_skeleton(proto);
    raise_ir_version(proto);
    let found = opset(proto);
    if !found.is_some_and(|v| (OPSET_MIN..=OPSET_MAX).contains(&v)) && proto.graph.is_some() {
        return Err(ModelError::Opset { found, min: OPSET_MIN, max: OPSET_MAX });
    }
    let graph = proto.graph.as_mut().ok_or(ModelError::NoGraph)?;
    tensors(graph, skeleton)?;
    names(graph)?;
    edges(graph)?;
    sort(graph)
}

/// Before IR version 4 every initializer had to be listed among the graph's inputs, constant or not. Exporters of that
/// time meant constants: they leave the list, and the version says so.
fn raise_ir_version(proto: &mut ModelProto) {
    let Some(graph) =
        proto.graph.as_mut().filter(|_| proto.ir_version.is_some_and(|v| v < IR_VERSION_OF_CONSTANTS))
    else {
        return;
    };
    let constants: HashSet<&str> = graph.initializer.iter().map(|t| t.name()).collect();
    graph.input.retain(|input| !constants.contains(input.name()));
    proto.ir_version = Some(IR_VERSION_OF_CONSTANTS);
}

/// Version of the standard operators that the model imports.
pub(crate) fn opset(proto: &ModelProto) -> Option<i64> {
    let mut imports = proto.opset_import.iter();
    imports.find(|o| matches!(o.domain(), "" | "ai.onnx")).map(|o| o.version())
}

/// Whether the model carries the mark of a skeleton.
pub(crate) fn is_skeleton(proto: &ModelProto) -> bool {
    proto.metadata_props.iter().any(|p| p.key() == SKELETON_KEY)
}

fn tensors(graph: &GraphProto, skeleton: bool) -> Result<(), ModelError> {
    for tensor in &graph.initializer {
        check_tensor(tensor, skeleton)?;
    }
    for attribute in graph.node.iter().flat_map(|n| &n.attribute) {
        for tensor in attribute.t.iter().chain(&attribute.tensors) {
            check_tensor(tensor, skeleton)?;
        }
        for inner in node::subgraphs(attribute) {
            tensors(inner, skeleton)?;
        }
    }
    Ok(())
}

fn check_tensor(proto: &TensorProto, skeleton: bool) -> Result<(), ModelError> {
    if proto.data_location() == DataLocation::External {
        let location = proto.external_data.iter().find(|e| e.key() == "location");
        return Err(ModelError::External {
            tensor: proto.name().to_owned(),
            location: location.map_or(String::new(), |e| e.value().to_owned()),
            problem: "expected data inside the model, which does not come from a folder".to_owned(),
        });
    }
    if skeleton && !tensor::has_data(proto) {
        return tensor::shape(proto).map(|_| ());
    }
    tensor::check(proto)
}

/// Static single assignment: one origin per name. An initializer may back a graph input.
fn names(graph: &GraphProto) -> Result<(), ModelError> {
    let inputs = graph.input.iter().map(|i| (i.name(), "the graph's input list".to_owned()));
    distinct(inputs.chain(node_outputs(graph)))?;
    let dense = graph.initializer.iter().map(|t| t.name());
    let initializers = dense.chain(node::sparse_names(graph));
    let initializers = initializers.map(|n| (n, "an initializer".to_owned()));
    distinct(initializers.chain(node_outputs(graph)))
}

fn node_outputs(graph: &GraphProto) -> impl Iterator<Item = (&str, String)> {
    let outputs = |n| {
        let by = format!("node `{}`", node::label(n));
        n.output.iter().map(move |o| (o.as_str(), by.clone()))
    };
    graph.node.iter().flat_map(outputs).filter(|(name, _)| !name.is_empty())
}

fn distinct<'a>(names: impl Iterator<Item = (&'a str, String)>) -> Result<(), ModelError> {
    let mut seen: HashMap<&str, String> = HashMap::new();
    for (name, second) in names {
        if let Some(first) = seen.insert(name, second.clone()) {
            return Err(ModelError::Duplicate { tensor: name.to_owned(), first, second });
        }
    }
    Ok(())
}

/// Everything that is read has an origin.
fn edges(graph: &GraphProto) -> Result<(), ModelError> {
    let mut defined: HashSet<&str> = graph.input.iter().map(|i| i.name()).collect();
    defined.extend(graph.initializer.iter().map(|t| t.name()));
    defined.extend(node::sparse_names(graph));
    defined.extend(graph.node.iter().flat_map(|n| &n.output).map(String::as_str));
    let undefined =
        |reader: String, tensor: &str| Err(ModelError::Undefined { reader, tensor: tensor.to_owned() });
    for n in &graph.node {
        if let Some(name) = node::reads(n).into_iter().find(|name| !defined.contains(name)) {
            return undefined(format!("node `{}`", node::label(n)), name);
        }
    }
    match graph.output.iter().find(|o| !defined.contains(o.name())) {
        Some(output) => undefined("the graph's output list".to_owned(), output.name()),
        None => Ok(()),
    }
}

/// Kahn's algorithm; among ready nodes the first in the file goes first, so a sorted graph does not change.
fn sort(graph: &mut GraphProto) -> Result<(), ModelError> {
    let order = topological_order(graph)?;
    if order.iter().enumerate().all(|(i, n)| i == *n) {
        return Ok(());
    }
    let mut nodes: Vec<_> = std::mem::take(&mut graph.node).into_iter().map(Some).collect();
    graph.node = order.iter().filter_map(|i| nodes[*i].take()).collect();
    Ok(())
}

fn topological_order(graph: &GraphProto) -> Result<Vec<usize>, ModelError> {
    let mut producers: HashMap<&str, usize> = HashMap::new();
    for (i, n) in graph.node.iter().enumerate() {
        producers.extend(n.output.iter().filter(|o| !o.is_empty()).map(|o| (o.as_str(), i)));
    }
    let mut waiting_for = vec![0usize; graph.node.len()];
    let mut unblocks: Vec<Vec<usize>> = vec![Vec::new(); graph.node.len()];
    for (i, n) in graph.node.iter().enumerate() {
        for producer in node::reads(n).into_iter().filter_map(|name| producers.get(name)) {
            unblocks[*producer].push(i);
            waiting_for[i] += 1;
        }
    }
    let ready = (0..graph.node.len()).filter(|i| waiting_for[*i] == 0);
    let mut ready: BinaryHeap<Reverse<usize>> = ready.map(Reverse).collect();
    let mut order = Vec::with_capacity(graph.node.len());
    while let Some(Reverse(i)) = ready.pop() {
        order.push(i);
        for next in &unblocks[i] {
            waiting_for[*next] -= 1;
            if waiting_for[*next] == 0 {
                ready.push(Reverse(*next));
            }
        }
    }
    match waiting_for.iter().position(|w| *w > 0) {
        Some(stuck) => Err(ModelError::Cycle { node: node::label(&graph.node[stuck]) }),
        None => Ok(order),
    }
}
