//! The operators whose constant weight can be rounded: Conv, ConvTranspose, Gemm, MatMul, each as one matrix
//! product.
//!
//! Reads one node's attributes and its weight's shape; anything unusual is a reason, not an error.
//! Not here: who else reads the weight (`layers`), operators that are never rounded (`refused`).

use crate::activation::{OutputChannels, float};
use crate::node::{attribute, int, is_op};
use crate::onnx::{NodeProto, TensorProto};
use crate::{AutoPad, Geometry, GraphIndex, Unfold, WeightLayout};

/// A constant operand of a product.
#[derive(Debug)]
pub(crate) struct Applied<'a> {
    /// The initializer.
    pub(crate) weight: &'a str,
    /// The product, or why it cannot be rounded.
    pub(crate) form: Result<Form, String>,
}

/// One application of a weight, as a matrix product.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Form {
    op_type: String,
    pub(crate) layout: WeightLayout,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) groups: usize,
    pub(crate) unfold: Unfold,
    pub(crate) input: String,
    pub(crate) output_scale: f32,
    pub(crate) bias: Bias,
    /// Dimensions of the output after the channel's.
    pub(crate) trailing: usize,
}

/// Where a product's bias is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Bias {
    /// The operator has none; for MatMul an Add may follow.
    None {
        /// Whether a following Add counts.
        may_follow: bool,
    },
    /// An input of the operator.
    Input { name: String, scale: f32 },
}

impl Form {
    /// Whether one rounding, decided from the statistics of both uses, serves both.
    pub(crate) fn same_problem(&self, other: &Form) -> bool {
        let matrix = |f: &Form| (f.layout, f.rows, f.cols, f.groups);
        self.op_type == other.op_type
            && matrix(self) == matrix(other)
            && self.unfold == other.unfold
            && self.output_scale == other.output_scale
    }

    /// How the bias input must lie: a Conv's is a plain vector, a Gemm's broadcasts to the output.
    pub(crate) fn bias_channels(&self) -> OutputChannels {
        let trailing = if self.op_type == "Gemm" { self.trailing } else { 0 };
        OutputChannels { rows: self.rows, trailing }
    }
}

/// The constant weights that a node applies; empty for operators that are no product with a constant.
pub(crate) fn applied_weights<'a>(node: &'a NodeProto, index: &GraphIndex<'a>) -> Vec<Applied<'a>> {
    let form: fn(&NodeProto, usize, &[usize]) -> Result<Form, String> = match node.op_type() {
        "Conv" if is_op(node, "Conv") => |node, _, shape| convolution(node, shape, false),
        "ConvTranspose" if is_op(node, "ConvTranspose") => |node, _, shape| convolution(node, shape, true),
        "Gemm" if is_op(node, "Gemm") => gemm,
        "MatMul" if is_op(node, "MatMul") => matmul,
        _ => return Vec::new(),
    };
    let operands: &[usize] = if node.op_type().starts_with("Conv") { &[1] } else { &[0, 1] };
    let name = |i: usize| node.input.get(i).map_or("", String::as_str);
    let constants: Vec<usize> = operands.iter().copied().filter(|&i| index.is_constant(name(i))).collect();
    let describe = |operand: usize| {
        let data = name(if operand == 0 { 1 } else { 0 });
        if data.is_empty() {
            return Err("it has no data input".to_owned());
        }
        if index.is_constant(data) {
            return Err("both of its operands are constant".to_owned());
        }
        // A sparse weight has no dense shape; the caller refuses it by itself.
        let shape = index.initializer(name(operand)).map(shape).transpose()?.unwrap_or_default();
        form(node, operand, &shape)
    };
    constants.into_iter().map(|i| Applied { weight: name(i), form: describe(i) }).collect()
}

fn shape(weight: &TensorProto) -> Result<Vec<usize>, String> {
    crate::tensor::shape(weight).map_err(|error| error.to_string())
}

fn input(node: &NodeProto, i: usize) -> String {
    node.input.get(i).cloned().unwrap_or_default()
}

fn bias_input(node: &NodeProto, scale: f32) -> Bias {
    match node.input.get(2) {
        Some(name) if !name.is_empty() => Bias::Input { name: name.clone(), scale },
        _ => Bias::None { may_follow: false },
    }
}

fn matmul(node: &NodeProto, operand: usize, shape: &[usize]) -> Result<Form, String> {
    if shape.len() != 2 {
        return Err(format!("its constant operand has shape {shape:?}; only matrices (rank 2) are rounded"));
    }
    product(node, operand, shape, Orientation { transposed: false, data_transposed: false })
}

fn gemm(node: &NodeProto, operand: usize, shape: &[usize]) -> Result<Form, String> {
    if shape.len() != 2 {
        return Err(format!("its constant operand has shape {shape:?}; Gemm needs a matrix"));
    }
    let flags = [int(node, "transA", 0) != 0, int(node, "transB", 0) != 0];
    let orientation = Orientation { transposed: flags[operand], data_transposed: flags[1 - operand] };
    let form = product(node, operand, shape, orientation)?;
    let (alpha, beta) = (float(node, "alpha", 1.0), float(node, "beta", 1.0));
    if !alpha.is_finite() || alpha == 0.0 || !beta.is_finite() {
        return Err(format!(
            "its alpha is {alpha} and its beta {beta}; alpha must be finite and not 0, beta finite"
        ));
    }
    Ok(Form { output_scale: alpha, bias: bias_input(node, beta), ..form })
}

/// How the operands of a matrix product are stored.
struct Orientation {
    /// The weight is used transposed.
    transposed: bool,
    /// The other operand is.
    data_transposed: bool,
}

/// `operand` 0: `y = W x`, rows are the weight's first dimension; 1: `y = x W`, rows are its second.
fn product(node: &NodeProto, operand: usize, shape: &[usize], how: Orientation) -> Result<Form, String> {
    let left = operand == 0;
    // Stored [rows, cols] for `W x` and for `x W^T`.
    let layout = if left != how.transposed { WeightLayout::AsIs } else { WeightLayout::Transposed };
    // The other operand has its inner dimension last for `x W` and for `W x^T`.
    let unfold = if left != how.data_transposed { Unfold::Columns } else { Unfold::Rows };
    let matrix = layout.matrix_shape(shape).map_err(|error| error.to_string())?;
    Ok(Form {
        op_type: node.op_type().to_owned(),
        layout,
        rows: matrix.rows,
        cols: matrix.cols,
        groups: 1,
        unfold,
        input: input(node, 1 - operand),
        output_scale: 1.0,
        bias: Bias::None { may_follow: true },
        trailing: usize::from(left),
    })
}

fn convolution(node: &NodeProto, shape: &[usize], transposed: bool) -> Result<Form, String> {
    if !(3..=5).contains(&shape.len()) {
        return Err(format!(
            "its weight has shape {shape:?}; convolutions of 1 to 3 spatial dimensions are rounded"
        ));
    }
    if transposed && attribute(node, "output_shape").is_some_and(|a| !a.ints.is_empty()) {
        return Err("it fixes its output size by `output_shape`, which is not supported".to_owned());
    }
    let geometry = geometry(node, &shape[2..], transposed)?;
    let groups = geometry.groups;
    let layout = if transposed { WeightLayout::ConvTranspose { groups } } else { WeightLayout::AsIs };
    let matrix = layout.matrix_shape(shape).map_err(|error| error.to_string())?;
    if !matrix.rows.is_multiple_of(groups) {
        return Err(format!("its {} output channels cannot be divided into {groups} groups", matrix.rows));
    }
    Ok(Form {
        op_type: node.op_type().to_owned(),
        layout,
        rows: matrix.rows,
        cols: matrix.cols,
        groups,
        unfold: if transposed { Unfold::ConvTranspose(geometry) } else { Unfold::Conv(geometry) },
        input: input(node, 0),
        output_scale: 1.0,
        bias: bias_input(node, 1.0),
        trailing: shape.len() - 2,
    })
}

fn geometry(node: &NodeProto, kernel: &[usize], transposed: bool) -> Result<Geometry, String> {
    let rank = kernel.len();
    let stated = sizes(node, "kernel_shape", rank, 0)?;
    if attribute(node, "kernel_shape").is_some() && stated != kernel {
        return Err(format!("its kernel_shape is {stated:?} but its weight's kernel is {kernel:?}"));
    }
    let auto_pad = match attribute(node, "auto_pad").map(|a| a.s()) {
        None | Some(b"NOTSET" | b"") => AutoPad::NotSet,
        Some(b"SAME_UPPER") => AutoPad::SameUpper,
        Some(b"SAME_LOWER") => AutoPad::SameLower,
        Some(b"VALID") => AutoPad::Valid,
        Some(other) => {
            return Err(format!("its auto_pad is `{}`, which is unknown", String::from_utf8_lossy(other)));
        }
    };
    let pads = sizes(node, "pads", 2 * rank, 0)?;
    let group = int(node, "group", 1);
    let geometry = Geometry {
        kernel: kernel.to_vec(),
        strides: sizes(node, "strides", rank, 1)?,
        dilations: sizes(node, "dilations", rank, 1)?,
        pads_begin: pads[..rank].to_vec(),
        pads_end: pads[rank..].to_vec(),
        auto_pad,
        groups: usize::try_from(group).map_err(|_| format!("its group is {group}, expected at least 1"))?,
        output_padding: if transposed { sizes(node, "output_padding", rank, 0)? } else { vec![0; rank] },
    };
    geometry.validate().map_err(|error| error.to_string())?;
    Ok(geometry)
}

/// A list attribute of `count` sizes; `default` for each if it is missing.
fn sizes(node: &NodeProto, name: &str, count: usize, default: usize) -> Result<Vec<usize>, String> {
    let Some(found) = attribute(node, name).filter(|a| !a.ints.is_empty()) else {
        return Ok(vec![default; count]);
    };
    let values: Result<Vec<usize>, _> = found.ints.iter().map(|&v| usize::try_from(v)).collect();
    match values {
        Ok(values) if values.len() == count => Ok(values),
        _ => Err(format!("its {name} is {:?}, expected {count} sizes of at least 0", found.ints)),
    }
}
