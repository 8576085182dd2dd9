//! Who produces and who reads each tensor of a graph.
//!
//! Tensors that a node's subgraphs capture from outside count as read by that node.
//! Not here: checks (`validate`), changes.

use std::collections::{HashMap, HashSet};

use crate::node;
use crate::onnx::{GraphProto, TensorProto};

/// A view of one graph; built in one pass, valid until the graph changes.
#[derive(Debug)]
pub struct GraphIndex<'a> {
    graph: &'a GraphProto,
    producers: HashMap<&'a str, usize>,
    consumers: HashMap<&'a str, Vec<usize>>,
    initializers: HashMap<&'a str, usize>,
    sparse: HashSet<&'a str>,
    inputs: HashSet<&'a str>,
    outputs: HashSet<&'a str>,
    reads: Vec<Vec<&'a str>>,
}

impl<'a> GraphIndex<'a> {
    /// Indexes `graph`. Of equal names the first counts (a checked model has none).
    pub fn new(graph: &'a GraphProto) -> GraphIndex<'a> {
        let mut index = GraphIndex {
            graph,
            producers: HashMap::new(),
            consumers: HashMap::new(),
            initializers: HashMap::new(),
            sparse: node::sparse_names(graph).collect(),
            inputs: graph.input.iter().map(|i| i.name()).collect(),
            outputs: graph.output.iter().map(|o| o.name()).collect(),
            reads: graph.node.iter().map(node::reads).collect(),
        };
        for (i, tensor) in graph.initializer.iter().enumerate() {
            index.initializers.entry(tensor.name()).or_insert(i);
        }
        for (i, node) in graph.node.iter().enumerate() {
            for output in node.output.iter().filter(|o| !o.is_empty()) {
                index.producers.entry(output).or_insert(i);
            }
            for name in &index.reads[i] {
                index.consumers.entry(name).or_default().push(i);
            }
        }
        index
    }

    /// The node that produces the tensor.
    pub fn producer(&self, tensor: &str) -> Option<usize> {
        self.producers.get(tensor).copied()
    }

    /// The nodes that read the tensor, each once, in graph order.
    pub fn consumers(&self, tensor: &str) -> &[usize] {
        self.consumers.get(tensor).map_or(&[], Vec::as_slice)
    }

    /// The initializer of that name.
    pub fn initializer(&self, tensor: &str) -> Option<&'a TensorProto> {
        self.initializers.get(tensor).map(|i| &self.graph.initializer[*i])
    }

    /// Whether the tensor is stored in the model, dense or sparse.
    pub fn is_constant(&self, tensor: &str) -> bool {
        self.initializers.contains_key(tensor) || self.sparse.contains(tensor)
    }

    /// Whether a caller must supply the tensor: a graph input that no initializer backs.
    pub fn is_input(&self, tensor: &str) -> bool {
        self.inputs.contains(tensor) && !self.is_constant(tensor)
    }

    /// Whether the tensor is a graph input that an initializer backs: a default that a caller may override.
    pub fn is_overridable(&self, tensor: &str) -> bool {
        self.inputs.contains(tensor) && self.is_constant(tensor)
    }

    /// Whether the tensor is an output of the graph.
    pub fn is_output(&self, tensor: &str) -> bool {
        self.outputs.contains(tensor)
    }

    /// Every tensor that node `node` reads, each once: its inputs, then what its subgraphs capture. Empty for an
    /// index out of range.
    pub fn reads(&self, node: usize) -> &[&'a str] {
        self.reads.get(node).map_or(&[], Vec::as_slice)
    }
}
