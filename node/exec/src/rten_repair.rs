//! Says in words rten 0.27 understands what it would otherwise misread in convolutions and poolings.
//!
//! It counts spatial dimensions by the `kernel_shape` attribute alone (ONNX also allows to read it off the weight), and
//! computes `SAME_LOWER` as `SAME_UPPER`. The first is written down, the second becomes explicit pads where they do not
//! depend on the input's size; elsewhere the node is refused rather than computed wrongly.
//! Not here: operators rten does not have.

use crate::engine::node_name;
use crate::error::ExecError;
use crate::rten_engine::refused;
use bytes::Bytes;
use halfstep_model::onnx::{AttributeProto, attribute_proto::AttributeType};
use halfstep_model::{Model, NodeProto, extract};
use std::collections::BTreeMap;

/// The model's bytes as rten should get them; `None` if it can have them as they are.
///
/// # Errors
/// `Load` for `SAME_LOWER` with a stride above 1.
pub(crate) fn repaired(model: &mut Model) -> Result<Option<Bytes>, ExecError> {
    let mut changes = Vec::new();
    for (index, node) in model.graph().node.iter().enumerate() {
        let Some(kernel) = kernel(model, node) else { continue };
        let pads = match text(node, "auto_pad") {
            b"SAME_LOWER" => Some(same_lower(node, &kernel).ok_or_else(|| refusal(node))?),
            _ => None,
        };
        let stated = ints(node, "kernel_shape").is_some();
        if !stated || pads.is_some() {
            changes.push((index, (!stated).then_some(kernel), pads));
        }
    }
    if changes.is_empty() {
        return Ok(None);
    }
    for (index, kernel, pads) in changes {
        let attributes = &mut model.graph_mut().node[index].attribute;
        attributes.extend(kernel.map(|kernel| list("kernel_shape", kernel)));
        if let Some(pads) = pads {
            attributes.retain(|a| !matches!(a.name(), "auto_pad" | "pads"));
            attributes.push(list("pads", pads));
        }
    }
    whole(model).map(Some)
}

/// Kernel size of a node that slides a window.
fn kernel(model: &Model, node: &NodeProto) -> Option<Vec<i64>> {
    match node.op_type() {
        "Conv" | "ConvTranspose" => ints(node, "kernel_shape").map(<[i64]>::to_vec).or_else(|| {
            let weight = model.initializer(node.input.get(1)?)?;
            weight.dims.get(2..).map(<[i64]>::to_vec)
        }),
        "MaxPool" | "AveragePool" => ints(node, "kernel_shape").map(<[i64]>::to_vec),
        _ => None,
    }
}

/// `SAME_LOWER` as pads, all beginnings then all ends; `None` where they depend on the input's size.
///
/// A window that advances by 1 keeps the size with `window - 1` cells; a transposed one of any stride multiplies it with
/// `window + output_padding - stride`. The odd cell is at the beginning.
fn same_lower(node: &NodeProto, kernel: &[i64]) -> Option<Vec<i64>> {
    let at = |name, dimension: usize, default| match ints(node, name) {
        Some(values) => values.get(dimension).copied(),
        None => Some(default),
    };
    let transposed = node.op_type() == "ConvTranspose";
    let (mut begins, mut ends) = (Vec::new(), Vec::new());
    for (dimension, size) in kernel.iter().enumerate() {
        let (stride, dilation) = (at("strides", dimension, 1)?, at("dilations", dimension, 1)?);
        let window = size.checked_sub(1)?.checked_mul(dilation)?.checked_add(1)?;
        let total = match (transposed, stride) {
            (true, _) => window.checked_add(at("output_padding", dimension, 0)?)?.checked_sub(stride)?,
            (false, 1) => window - 1,
            (false, _) => return None,
        };
        let total = total.max(0);
        begins.push(total - total / 2);
        ends.push(total / 2);
    }
    begins.extend(ends);
    Some(begins)
}

fn refusal(node: &NodeProto) -> ExecError {
    let reason = "auto_pad SAME_LOWER with a stride above 1 is not computed as ONNX defines it";
    refused(node_name(node), node.op_type().to_owned(), reason)
}

fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|a| a.name() == name)
}

fn ints<'a>(node: &'a NodeProto, name: &str) -> Option<&'a [i64]> {
    attribute(node, name).map(|a| a.ints.as_slice()).filter(|ints| !ints.is_empty())
}

fn text<'a>(node: &'a NodeProto, name: &str) -> &'a [u8] {
    attribute(node, name).map_or(b"", |a| a.s())
}

fn list(name: &str, ints: Vec<i64>) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Ints as i32),
        ints,
        ..Default::default()
    }
}

/// The whole model, serialized.
fn whole(model: &Model) -> Result<Bytes, ExecError> {
    let nodes: Vec<usize> = (0..model.graph().node.len()).collect();
    let inputs: Vec<String> = model.inputs().into_iter().map(|info| info.name).collect();
    let outputs: Vec<String> = model.outputs().into_iter().map(|info| info.name).collect();
    Ok(extract(model, &nodes, &inputs, &outputs, &BTreeMap::new())?)
}
