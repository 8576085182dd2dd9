//! Small questions about one node: its label, its attributes, the tensors its subgraphs capture.
//!
//! Not here: what operators mean (`layers`, `normalize`), whole-graph questions (`index`).

use std::collections::HashSet;

use crate::onnx::{AttributeProto, GraphProto, NodeProto, TensorProto};

/// The node's name, or its first named output's: what error messages call it.
pub(crate) fn label(node: &NodeProto) -> String {
    if !node.name().is_empty() {
        return node.name().to_owned();
    }
    let output = node.output.iter().find(|o| !o.is_empty());
    output.cloned().unwrap_or_else(|| node.op_type().to_owned())
}

/// Whether the node is the standard ONNX operator `op_type` (default domain).
pub(crate) fn is_op(node: &NodeProto, op_type: &str) -> bool {
    node.op_type() == op_type && matches!(node.domain(), "" | "ai.onnx")
}

/// The attribute of that name, if present.
pub(crate) fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|a| a.name() == name)
}

/// An integer attribute, or `default`.
pub(crate) fn int(node: &NodeProto, name: &str, default: i64) -> i64 {
    attribute(node, name).and_then(|a| a.i).unwrap_or(default)
}

/// The graphs among an attribute's values.
pub(crate) fn subgraphs(attribute: &AttributeProto) -> impl Iterator<Item = &GraphProto> {
    attribute.g.iter().chain(&attribute.graphs)
}

/// The dense tensors among an attribute's values.
pub(crate) fn attribute_tensors_mut(
    attribute: &mut AttributeProto,
) -> impl Iterator<Item = &mut TensorProto> {
    attribute.t.iter_mut().chain(&mut attribute.tensors)
}

/// Every tensor the node reads, each once, in order: its inputs, then what its subgraphs capture from outside.
pub(crate) fn reads(node: &NodeProto) -> Vec<&str> {
    let mut seen = HashSet::new();
    let mut names = Vec::new();
    for input in node.input.iter().filter(|i| !i.is_empty()) {
        if seen.insert(input.as_str()) {
            names.push(input.as_str());
        }
    }
    for graph in node.attribute.iter().flat_map(subgraphs) {
        for name in captured(graph) {
            if seen.insert(name) {
                names.push(name);
            }
        }
    }
    names
}

/// Names that `graph` reads but does not define. ONNX names are unique across nesting, so the order of nodes
/// does not matter. Depth is bounded by the protobuf decoder's nesting limit.
fn captured(graph: &GraphProto) -> Vec<&str> {
    let mut local: HashSet<&str> = HashSet::new();
    local.extend(graph.input.iter().map(|i| i.name()));
    local.extend(graph.initializer.iter().map(|i| i.name()));
    local.extend(sparse_names(graph));
    local.extend(graph.node.iter().flat_map(|n| &n.output).map(String::as_str));
    let inner = graph.node.iter().flat_map(reads);
    let outputs = graph.output.iter().map(|o| o.name());
    inner.chain(outputs).filter(|name| !name.is_empty() && !local.contains(name)).collect()
}

/// Names of the sparse initializers.
pub(crate) fn sparse_names(graph: &GraphProto) -> impl Iterator<Item = &str> {
    let values = graph.sparse_initializer.iter().filter_map(|s| s.values.as_ref());
    values.map(|v| v.name()).filter(|name| !name.is_empty())
}
