//! What an engine will have to run, as a model it can be shown before the work begins.
//!
//! Not here: asking an engine (`exec`), which nodes a job runs (`cut`).

use std::collections::{BTreeMap, BTreeSet, HashSet};

use bytes::Bytes;

use crate::extract::{extract, is_stripped};
use crate::{Model, ModelError};

/// Serializes `nodes` (indices into the graph) as a model without large weights: what a skeleton has no data for is an
/// input, with its element type. An engine that loads it has every operator of the nodes, in the version and with the
/// attributes they use.
///
/// Its outputs are the tensors that none of the nodes reads.
///
/// # Errors
/// `Request` for a node index out of range; `TooLarge` past the limit of protobuf.
pub fn outline(model: &Model, nodes: &[usize]) -> Result<Bytes, ModelError> {
    let graph = model.graph();
    let index = model.index();
    let chosen = || nodes.iter().filter_map(|n| graph.node.get(*n));
    let read: BTreeSet<&str> = nodes.iter().flat_map(|n| index.reads(*n)).copied().collect();
    let produced: HashSet<&str> = chosen().flat_map(|n| &n.output).map(String::as_str).collect();
    let has_data = |name: &str| match index.initializer(name) {
        Some(stored) => !is_stripped(stored),
        None => index.is_constant(name),
    };
    let fed = read.iter().filter(|name| !produced.contains(**name) && !has_data(name));
    let inputs: Vec<String> = fed.map(|name| (*name).to_owned()).collect();
    let outputs = chosen().flat_map(|n| &n.output);
    let outputs = outputs.filter(|name| !name.is_empty() && !read.contains(name.as_str())).cloned();
    extract(model, nodes, &inputs, &outputs.collect::<Vec<String>>(), &BTreeMap::new())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto, ValueInfoProto};
    use crate::{Tensor, skeleton};

    fn node(op_type: &str, inputs: &[&str], output: &str) -> NodeProto {
        NodeProto {
            op_type: Some(op_type.to_owned()),
            input: inputs.iter().map(|name| (*name).to_owned()).collect(),
            output: vec![output.to_owned()],
            ..Default::default()
        }
    }

    fn model() -> Model {
        let constant =
            |name: &str, rows: usize| Tensor::f32(vec![rows, 2], vec![0.5; rows * 2]).unwrap().to_proto(name);
        let info = |name: &str| ValueInfoProto { name: Some(name.to_owned()), ..Default::default() };
        let nodes = vec![
            node("MatMul", &["x", "large"], "a"),
            node("Add", &["a", "small"], "b"),
            node("Relu", &["b"], "y"),
        ];
        let graph = GraphProto {
            node: nodes,
            initializer: vec![constant("large", 1000), constant("small", 1)],
            input: vec![info("x")],
            output: vec![info("y")],
            ..Default::default()
        };
        let opset = OperatorSetIdProto { domain: None, version: Some(17) };
        let proto = ModelProto {
            ir_version: Some(8),
            opset_import: vec![opset],
            graph: Some(graph),
            ..Default::default()
        };
        Model::from_proto(proto).unwrap()
    }

    #[test]
    fn an_outline_has_the_nodes_but_no_large_weight_and_is_the_same_of_a_skeleton() {
        let bytes = outline(&model(), &[0, 1]).unwrap();
        assert!(bytes.len() < 1000, "{}", bytes.len());
        let found = Model::from_bytes(bytes.clone()).unwrap();
        let ops: Vec<&str> = found.graph().node.iter().map(|n| n.op_type()).collect();
        let inputs: Vec<&str> = found.graph().input.iter().map(|i| i.name()).collect();
        let outputs: Vec<&str> = found.graph().output.iter().map(|o| o.name()).collect();
        assert_eq!((ops, inputs, outputs), (vec!["MatMul", "Add"], vec!["large", "x"], vec!["b"]));
        assert!(found.has_initializer("small"));
        let bare = Model::from_bytes(skeleton(&model())).unwrap();
        assert_eq!(outline(&bare, &[0, 1]).unwrap(), bytes);
    }

    #[test]
    fn a_node_that_does_not_exist_is_refused() {
        assert!(matches!(outline(&model(), &[3]), Err(ModelError::Request { .. })));
    }
}
