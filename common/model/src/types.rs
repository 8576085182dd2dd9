//! Element types and ranks of tensors inside a graph, for the interfaces of sub-models.
//!
//! Method: what the graph states (inputs, outputs, `value_info`, initializers), else one pass over the nodes with
//! the output-type rule of each standard operator whose outputs are not simply of its first input's type.
//! Not here: shape inference. A rank is known only where the graph states one.

use std::collections::HashMap;

use crate::node;
use crate::onnx::{GraphProto, NodeProto, ValueInfoProto, type_proto};

const FLOAT: i32 = 1;
const UINT8: i32 = 2;
const INT64: i32 = 7;
const BOOL: i32 = 9;

/// What is known of the tensors of one graph.
pub(crate) struct Types<'a> {
    elements: HashMap<&'a str, i32>,
    stated: HashMap<&'a str, &'a ValueInfoProto>,
}

impl<'a> Types<'a> {
    /// Collects what `graph` (sorted) states and follows the operators for the rest.
    pub(crate) fn new(graph: &'a GraphProto) -> Types<'a> {
        let infos = graph.input.iter().chain(&graph.value_info).chain(&graph.output);
        let stated: HashMap<_, _> = infos.map(|info| (info.name(), info)).collect();
        let initializers = graph.initializer.iter().map(|t| (t.name(), t.data_type()));
        let mut elements: HashMap<&str, i32> = initializers.collect();
        let known = stated.iter().filter_map(|(name, info)| Some((*name, element(info)?)));
        elements.extend(known);
        let mut types = Types { elements, stated };
        for node in &graph.node {
            types.visit(node);
        }
        types
    }

    fn visit(&mut self, node: &'a NodeProto) {
        for (i, output) in node.output.iter().enumerate() {
            if output.is_empty() || self.elements.contains_key(output.as_str()) {
                continue;
            }
            if let Some(element) = self.output(node, i) {
                self.elements.insert(output, element);
            }
        }
    }

    /// Element type of output `i` by the operator's rule; `None` where that is unknown.
    fn output(&self, node: &NodeProto, i: usize) -> Option<i32> {
        let input = |i: usize| {
            let name = node.input.get(i).filter(|name| !name.is_empty())?;
            self.elements.get(name.as_str()).copied()
        };
        let attribute = |name: &str, default: i32| {
            let value = node::attribute(node, name).and_then(|a| a.i);
            Some(value.and_then(|v| i32::try_from(v).ok()).unwrap_or(default))
        };
        match (node.op_type(), i) {
            ("Shape" | "Size" | "ArgMax" | "ArgMin" | "NonZero", _) => Some(INT64),
            ("TopK" | "MaxPool", 1) | ("Unique", 1..) => Some(INT64),
            ("Dropout", 1) => Some(BOOL),
            ("Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual", _) => Some(BOOL),
            ("And" | "Or" | "Xor" | "Not" | "IsNaN" | "IsInf", _) => Some(BOOL),
            ("Cast", _) => attribute("to", FLOAT),
            ("CastLike" | "Where" | "DequantizeLinear", _) => input(1),
            ("OneHot", _) => input(2),
            ("QuantizeLinear", _) => input(2).or_else(|| attribute("output_dtype", UINT8)),
            ("DynamicQuantizeLinear", 1) => Some(FLOAT),
            ("DynamicQuantizeLinear", _) => Some(UINT8),
            ("MatMulInteger" | "ConvInteger", _) => Some(6),
            ("QLinearConv" | "QLinearMatMul", _) => input(7),
            ("RandomNormal" | "RandomUniform", _) => attribute("dtype", FLOAT),
            ("EyeLike" | "RandomNormalLike" | "RandomUniformLike", _) => {
                attribute("dtype", input(0).unwrap_or(FLOAT))
            }
            ("ConstantOfShape" | "Constant", _) => constant(node),
            ("If" | "Loop" | "Scan", _) => self.branch(node, i),
            _ => input(0),
        }
    }

    /// Type of a control-flow output, as the first subgraph states or implies it. Loop bodies return their
    /// condition first.
    fn branch(&self, node: &NodeProto, i: usize) -> Option<i32> {
        let graph = node.attribute.iter().flat_map(node::subgraphs).next()?;
        let skip = usize::from(node.op_type() == "Loop");
        let output = graph.output.get(i + skip)?;
        element(output).or_else(|| self.elements.get(output.name()).copied())
    }

    /// Interface entry for a tensor. Dimensions of tensors inside the graph are dropped, their rank is kept:
    /// files in the wild state the sizes of the batch they were exported with.
    pub(crate) fn value_info(&self, graph: &GraphProto, name: &str) -> ValueInfoProto {
        let on_interface = graph.input.iter().any(|i| i.name() == name);
        let stated = self.stated.get(name).filter(|info| info.r#type.is_some());
        if let Some(info) = stated {
            let mut info = (*info).clone();
            if !on_interface {
                forget_sizes(&mut info);
            }
            return info;
        }
        let element = self.elements.get(name).copied().unwrap_or(FLOAT);
        let tensor = type_proto::Tensor { elem_type: Some(element), shape: None };
        ValueInfoProto {
            name: Some(name.to_owned()),
            r#type: Some(crate::onnx::TypeProto {
                value: Some(type_proto::Value::TensorType(tensor)),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

fn element(info: &ValueInfoProto) -> Option<i32> {
    match info.r#type.as_ref()?.value.as_ref()? {
        type_proto::Value::TensorType(tensor) => tensor.elem_type.filter(|e| *e != 0),
        _ => None,
    }
}

/// Element type of a Constant's or ConstantOfShape's value.
fn constant(node: &NodeProto) -> Option<i32> {
    let has = |name| node::attribute(node, name).is_some();
    match node::attribute(node, "value").and_then(|a| a.t.as_ref()) {
        Some(tensor) => Some(tensor.data_type()),
        None if has("value_int") || has("value_ints") => Some(INT64),
        None => Some(FLOAT),
    }
}

fn forget_sizes(info: &mut ValueInfoProto) {
    if let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_mut().and_then(|t| t.value.as_mut()) {
        let dims = tensor.shape.iter_mut().flat_map(|s| &mut s.dim);
        dims.for_each(|dim| dim.value = None);
    }
}
