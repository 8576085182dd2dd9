//! Writes rounded weights back: as floats on the grid, or as integers behind DequantizeLinear.
//!
//! The DequantizeLinear's output takes the weight's name, so the rest of the graph does not change. int8 and uint8
//! hold 5 to 8 bits; int4 and uint4 (opset 21) up to 4; int16 and uint16 (opset 21) 16. A layer whose grid the
//! model's opset cannot express keeps float weights on the grid, and a note says so.
//! Not here: activations (they stay float), choosing grids, raising a model's opset.

use bytes::Bytes;
use halfstep_quant::{Encodings, Granularity, Scheme, packing};

use crate::batch_norm::unused_name;
use crate::onnx::attribute_proto::AttributeType;
use crate::onnx::tensor_proto::DataType;
use crate::onnx::{AttributeProto, NodeProto, TensorProto};
use crate::{Layer, Model, ModelError, WeightLayout};

/// First opset with an `axis` on DequantizeLinear.
const OPSET_PER_AXIS: i64 = 13;
/// First opset with int4, uint4, int16, uint16 and blocks in DequantizeLinear, and its IR version.
const OPSET_BLOCKED: i64 = 21;
const IR_VERSION_INT4: i64 = 10;

/// One rounded layer.
#[derive(Debug, Clone, Copy)]
pub struct RoundedLayer<'a> {
    /// The layer, as listed from the model that is written.
    pub layer: &'a Layer,
    /// Its encodings.
    pub encodings: &'a Encodings,
    /// Its integers, `[rows, cols]`.
    pub q: &'a [i32],
}

/// Replaces the layer's weight by `(q - zero_point) * scale`, in the tensor's order. `q`: `[rows, cols]`.
///
/// # Errors
/// `Layer` if encodings or integers do not fit the layer; `NoInitializer`.
pub fn set_on_grid(
    model: &mut Model,
    layer: &Layer,
    q: &[i32],
    encodings: &Encodings,
) -> Result<(), ModelError> {
    check(model, RoundedLayer { layer, encodings, q })?;
    let matrix = encodings.dequantize(q).map_err(|error| refuse(layer, error))?;
    let tensor =
        layer.layout.from_matrix(&layer.weight_shape, &matrix).map_err(|error| refuse(layer, error))?;
    model.set_f32(&layer.weight, &layer.weight_shape, tensor)
}

/// The model with every layer of `rounded` as integers behind DequantizeLinear; and notes, each naming its layer,
/// about what could not be written that way or takes more bits than the grid has.
///
/// # Errors
/// As [`set_on_grid`].
pub fn to_qdq(model: &Model, rounded: &[RoundedLayer<'_>]) -> Result<(Model, Vec<String>), ModelError> {
    let mut out = model.clone();
    let mut notes = Vec::new();
    let mut nodes = Vec::new();
    for &item in rounded {
        check(&out, item)?;
        let layer = item.layer;
        match describe(item, model.opset()) {
            Ok(form) => {
                notes.extend(form.note.iter().map(|note| format!("layer `{}`: {note}", layer.name)));
                nodes.push(write(&mut out, item, &form)?);
            }
            Err(reason) => {
                notes.push(format!("layer `{}`: weights stay float32 on the grid: {reason}", layer.name));
                set_on_grid(&mut out, layer, item.q, item.encodings)?;
            }
        }
    }
    // In front of every reader: they depend on initializers alone.
    out.graph_mut().node.splice(0..0, nodes);
    out.recheck()?;
    Ok((out, notes))
}

fn refuse(layer: &Layer, problem: impl std::fmt::Display) -> ModelError {
    ModelError::Layer { layer: layer.name.clone(), problem: problem.to_string() }
}

fn check(model: &Model, item: RoundedLayer<'_>) -> Result<(), ModelError> {
    let RoundedLayer { layer, encodings, q } = item;
    encodings.validate().map_err(|error| refuse(layer, error))?;
    let stored = model.tensor_shape(&layer.weight)?;
    if stored != layer.weight_shape {
        let problem =
            format!("weight `{}` has shape {stored:?}, expected {:?}", layer.weight, layer.weight_shape);
        return Err(refuse(layer, problem));
    }
    let (grid, matrix) = ([encodings.rows, encodings.cols], [layer.rows, layer.cols]);
    if grid != matrix {
        return Err(refuse(layer, format!("encodings are for a matrix {grid:?}, expected {matrix:?}")));
    }
    if layer.rows.checked_mul(layer.cols) != Some(q.len()) {
        return Err(refuse(layer, format!("{} integers given, expected {matrix:?}", q.len())));
    }
    let (qmin, qmax) = (encodings.qmin(), encodings.qmax());
    match q.iter().position(|v| !(qmin..=qmax).contains(v)) {
        Some(at) => Err(refuse(layer, format!("integer {at} is {}, expected {qmin} to {qmax}", q[at]))),
        None => Ok(()),
    }
}

/// How one layer is written.
struct Form {
    container: Container,
    /// Shape of scale and zero point.
    shape: Vec<usize>,
    /// The DequantizeLinear's `axis`, where the grid has more than one entry.
    axis: Option<usize>,
    block_size: Option<usize>,
    /// Entries of the encodings in the order of `shape`, if that is not their own.
    transposed: bool,
    note: Option<String>,
}

/// An ONNX integer type.
#[derive(Clone, Copy, PartialEq)]
struct Container {
    bits: u8,
    signed: bool,
}

/// How to write the layer, or why integers cannot hold it.
fn describe(item: RoundedLayer<'_>, opset: i64) -> Result<Form, String> {
    let RoundedLayer { layer, encodings, .. } = item;
    let (container, note) = container(encodings, opset)?;
    let form = Form { container, shape: vec![], axis: None, block_size: None, transposed: false, note };
    if encodings.scale.len() == 1 {
        return Ok(form);
    }
    if opset < OPSET_PER_AXIS {
        let entries = encodings.scale.len();
        return Err(format!(
            "its grid has {entries} scales, which needs opset {OPSET_PER_AXIS}; the model has opset {opset}"
        ));
    }
    match encodings.granularity {
        // The shortest block that splits a dimension is one shorter than it.
        Granularity::PerGroup { group_size } if encodings.groups_per_row() > 1 => {
            blocked(layer, encodings, opset, group_size, form)
        }
        _ if !layer.layout.channel_axis_is_complete() => {
            Err("output channels of a grouped ConvTranspose lie along no single axis of its weight"
                .to_owned())
        }
        _ => {
            let axis = Some(layer.layout.channel_axis());
            Ok(Form { shape: vec![encodings.scale.len()], axis, ..form })
        }
    }
}

fn blocked(
    layer: &Layer,
    encodings: &Encodings,
    opset: i64,
    group_size: usize,
    form: Form,
) -> Result<Form, String> {
    if opset < OPSET_BLOCKED {
        return Err(format!(
            "groups of {group_size} columns need opset {OPSET_BLOCKED}; the model has opset {opset}"
        ));
    }
    let axis = layer.layout.column_axis(&layer.weight_shape);
    let axis = axis.ok_or("groups of columns lie along no single axis of a convolution's weight")?;
    let transposed = layer.layout == WeightLayout::Transposed;
    let groups = encodings.groups_per_row();
    let shape = if transposed { vec![groups, layer.rows] } else { vec![layer.rows, groups] };
    Ok(Form { shape, axis: Some(axis), block_size: Some(group_size), transposed, ..form })
}

fn container(encodings: &Encodings, opset: i64) -> Result<(Container, Option<String>), String> {
    let signed = encodings.scheme != Scheme::Asymmetric;
    let grid = encodings.bits;
    let bits = match grid {
        0..=4 if opset >= OPSET_BLOCKED => 4,
        0..=8 => 8,
        _ if opset >= OPSET_BLOCKED => 16,
        _ => return Err(format!("{grid} bits need opset {OPSET_BLOCKED}; the model has opset {opset}")),
    };
    let container = Container { bits, signed };
    let name = container.name();
    let note = (bits != grid).then(|| {
        let hint = if grid <= 4 && bits == 8 { format!("; int4 needs opset {OPSET_BLOCKED}") } else { String::new() };
        format!("{grid}-bit integers are stored as {name}, the narrowest type of opset {opset} that holds them{hint}")
    });
    Ok((container, note))
}

impl Container {
    fn name(self) -> String {
        format!("{}int{}", if self.signed { "" } else { "u" }, self.bits)
    }

    fn data_type(self) -> DataType {
        match (self.bits, self.signed) {
            (4, true) => DataType::Int4,
            (4, false) => DataType::Uint4,
            (8, true) => DataType::Int8,
            (8, false) => DataType::Uint8,
            (_, true) => DataType::Int16,
            (_, false) => DataType::Uint16,
        }
    }

    /// `raw_data` of integers that fit: the grid's range was checked and lies within the type's.
    fn raw(self, values: &[i32]) -> Result<Vec<u8>, halfstep_quant::QuantError> {
        Ok(match (self.bits, self.signed) {
            (4, true) => packing::pack_int4(values)?,
            (4, false) => packing::pack_uint4(values)?,
            // Two's complement: the low bytes are the integer, signed or not.
            (bits, _) => {
                values.iter().flat_map(|v| v.to_le_bytes().into_iter().take(usize::from(bits / 8))).collect()
            }
        })
    }

    fn tensor(
        self,
        layer: &Layer,
        name: &str,
        shape: &[usize],
        values: &[i32],
    ) -> Result<TensorProto, ModelError> {
        let raw = self.raw(values).map_err(|error| refuse(layer, error))?;
        Ok(TensorProto {
            name: Some(name.to_owned()),
            dims: shape.iter().map(|&d| d as i64).collect(),
            data_type: Some(self.data_type() as i32),
            raw_data: Some(Bytes::from(raw)),
            ..Default::default()
        })
    }
}

/// Replaces the weight by its integers, scale and zero point; returns the node that makes the weight of them.
fn write(out: &mut Model, item: RoundedLayer<'_>, form: &Form) -> Result<NodeProto, ModelError> {
    let RoundedLayer { layer, encodings, q } = item;
    let weight = &layer.weight;
    let (index, graph) = (out.index(), out.graph());
    let [quantized, scale, zero_point] = ["quantized", "scale", "zero_point"]
        .map(|part| unused_name(graph, &index, &format!("{weight}_{part}")));
    drop(index);
    let q = layer.layout.from_matrix(&layer.weight_shape, q).map_err(|error| refuse(layer, error))?;
    let integers = form.container.tensor(layer, &quantized, &layer.weight_shape, &q)?;
    let zeros = ordered(form, encodings, &encodings.zero_point);
    let zeros = form.container.tensor(layer, &zero_point, &form.shape, &zeros)?;
    let scales = ordered(form, encodings, &encodings.scale);
    out.graph_mut().initializer.retain(|t| t.name() != weight);
    out.set_f32(&scale, &form.shape, scales)?;
    out.set_initializer(integers);
    out.set_initializer(zeros);
    if form.container.bits != 8 {
        let version = out.proto().ir_version().max(IR_VERSION_INT4);
        out.proto_mut().ir_version = Some(version);
    }
    Ok(dequantize_linear(out, weight, [quantized, scale, zero_point], form))
}

/// Entries of the encodings in the order of the tensor that holds them.
fn ordered<T: Copy>(form: &Form, encodings: &Encodings, entries: &[T]) -> Vec<T> {
    if !form.transposed {
        return entries.to_vec();
    }
    let groups = encodings.groups_per_row();
    (0..groups).flat_map(|g| entries.iter().skip(g).step_by(groups).copied()).collect()
}

fn dequantize_linear(model: &Model, weight: &str, inputs: [String; 3], form: &Form) -> NodeProto {
    let base = format!("{weight}_dequantize");
    let taken = |name: &str| model.graph().node.iter().any(|n| n.name() == name);
    let numbered = (2u64..).map(|n| format!("{base}.{n}"));
    let name = std::iter::once(base.clone()).chain(numbered).find(|name| !taken(name));
    let attributes = [("axis", form.axis), ("block_size", form.block_size)];
    let attribute = |(name, value): (&str, Option<usize>)| {
        value.map(|value| AttributeProto {
            name: Some(name.to_owned()),
            r#type: Some(AttributeType::Int as i32),
            i: Some(value as i64),
            ..Default::default()
        })
    };
    NodeProto {
        name,
        op_type: Some("DequantizeLinear".to_owned()),
        input: inputs.to_vec(),
        output: vec![weight.to_owned()],
        attribute: attributes.into_iter().filter_map(attribute).collect(),
        ..Default::default()
    }
}
