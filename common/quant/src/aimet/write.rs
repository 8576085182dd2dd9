//! Weight encodings to AIMET JSON.

use super::Version;
use crate::{Encodings, Granularity, QuantError};
use serde_json::{Map, Value, json};

/// The encodings of one weight tensor, with what is needed to say them in the tensor's own axes.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamEncoding {
    /// Name of the initializer.
    pub name: String,
    /// Its encodings in matrix form.
    pub encodings: Encodings,
    /// Axis of the output channels in the tensor: the rows of the matrix.
    pub tensor_axis: usize,
    /// Number of axes of the tensor.
    pub tensor_rank: usize,
    /// Kernel positions per input channel (`kh * kw`); 1 for matrices. Columns are input channel major.
    pub kernel_positions: usize,
}

/// The encodings file of `version` for weights `params`, in the order given. Scales are exact: f32 as JSON numbers.
///
/// # Errors
/// `NotExpressible` where the version has no words: blocks in 0.6.1, blocks that split a kernel or do not run along
/// the other of the first two axes, widths that 2.0.0 has no type for; what [`Encodings::validate`] finds.
pub fn to_json(version: Version, params: &[ParamEncoding]) -> Result<Value, QuantError> {
    for param in params {
        param.encodings.validate()?;
        check_axes(version, param)?;
    }
    match version {
        Version::V0_6_1 => {
            let entries: Result<Map<_, _>, _> =
                params.iter().map(|p| Ok((p.name.clone(), entry_0_6_1(p)?))).collect();
            Ok(json!({ "version": "0.6.1", "activation_encodings": {}, "param_encodings": entries? }))
        }
        Version::V1_0_0 => {
            let entries: Result<Vec<_>, _> = params.iter().map(entry_1_0_0).collect();
            Ok(json!({
                "version": "1.0.0",
                "activation_encodings": [],
                "param_encodings": entries?,
                "producer": { "name": "halfstep", "version": env!("CARGO_PKG_VERSION") },
                "quantizer_args": {},
            }))
        }
        Version::V2_0_0 => {
            let entries: Result<Vec<_>, _> = params.iter().map(entry_2_0_0).collect();
            Ok(json!({ "version": "2.0.0", "encodings": entries? }))
        }
    }
}

/// AIMET's offset of entry `index`: `-zero_point`, counted from the smallest integer of the full grid.
fn offset(encodings: &Encodings, index: usize) -> i64 {
    let half = if encodings.scheme.is_symmetric() { 1_i64 << (encodings.bits - 1) } else { 0 };
    -i64::from(encodings.zero_point[index]) - half
}

fn entry_0_6_1(param: &ParamEncoding) -> Result<Value, QuantError> {
    let e = &param.encodings;
    if block_size(param)?.is_some() {
        return Err(refused(param, Version::V0_6_1, "the version has no blocks".to_owned()));
    }
    let steps = f64::from((1_u32 << e.bits) - 1);
    let entry = |index: usize| {
        let (scale, offset) = (f64::from(e.scale[index]), offset(e, index));
        json!({
            "bitwidth": e.bits,
            "dtype": "int",
            // A string, as AIMET has it.
            "is_symmetric": if e.scheme.is_symmetric() { "True" } else { "False" },
            "min": offset as f64 * scale,
            "max": (offset as f64 + steps) * scale,
            "offset": offset,
            "scale": scale,
        })
    };
    Ok((0..e.scale.len()).map(entry).collect())
}

fn entry_1_0_0(param: &ParamEncoding) -> Result<Value, QuantError> {
    let e = &param.encodings;
    let order = tensor_order(param);
    let mut entry = json!({
        "name": param.name,
        "bw": e.bits,
        "dtype": "INT",
        "is_sym": e.scheme.is_symmetric(),
        "offset": order.iter().map(|&i| offset(e, i)).collect::<Vec<_>>(),
        "scale": order.iter().map(|&i| f64::from(e.scale[i])).collect::<Vec<_>>(),
    });
    entry["enc_type"] = json!(match e.granularity {
        Granularity::PerTensor => "PER_TENSOR",
        Granularity::PerChannel => "PER_CHANNEL",
        Granularity::PerGroup { .. } => "PER_BLOCK",
    });
    if let Some(block_size) = block_size(param)? {
        entry["block_size"] = json!(block_size);
    }
    Ok(entry)
}

fn entry_2_0_0(param: &ParamEncoding) -> Result<Value, QuantError> {
    let e = &param.encodings;
    if !matches!(e.bits, 2 | 4 | 8 | 16) {
        return Err(refused(param, Version::V2_0_0, format!("ONNX has no {}-bit integer type", e.bits)));
    }
    let sign = if e.scheme.is_symmetric() { "" } else { "u" };
    let mut entry = json!({
        "name": param.name,
        "output_dtype": format!("{sign}int{}", e.bits),
        "y_scale": arranged(param, |i| json!(f64::from(e.scale[i]))),
    });
    if e.zero_point.iter().any(|&z| z != 0) {
        entry["y_zero_point"] = arranged(param, |i| json!(e.zero_point[i]));
    }
    match block_size(param)? {
        Some(block_size) => {
            entry["axis"] = json!(block_axis(param));
            entry["block_size"] = json!(block_size);
        }
        None if e.granularity == Granularity::PerChannel => entry["axis"] = json!(param.tensor_axis),
        None => {}
    }
    Ok(entry)
}

/// Entries in the shape QuantizeLinear wants: a number, a list by channel, or for blocks nested lists by the tensor's
/// axes (one entry per block and channel; kernel axes have length 1).
fn arranged(param: &ParamEncoding, value: impl Fn(usize) -> Value) -> Value {
    let values: Vec<Value> = tensor_order(param).into_iter().map(value).collect();
    match param.encodings.granularity {
        Granularity::PerTensor => values.into_iter().next().unwrap_or(Value::Null),
        Granularity::PerChannel => Value::Array(values),
        Granularity::PerGroup { .. } => {
            let groups = param.encodings.groups_per_row();
            let inner = if param.tensor_axis == 0 { groups } else { param.encodings.rows };
            let kernel_axes = param.tensor_rank.saturating_sub(2);
            let leaf = |v: &Value| (0..kernel_axes).fold(v.clone(), |v, _| Value::Array(vec![v]));
            values.chunks(inner).map(|line| Value::Array(line.iter().map(leaf).collect())).collect()
        }
    }
}

/// Entry indices in the order of the tensor's axes: block-major if the channel axis comes second.
fn tensor_order(param: &ParamEncoding) -> Vec<usize> {
    let e = &param.encodings;
    let (rows, groups) = (e.rows, e.groups_per_row());
    match e.granularity {
        Granularity::PerGroup { .. } if param.tensor_axis != 0 => {
            (0..groups).flat_map(|g| (0..rows).map(move |r| r * groups + g)).collect()
        }
        _ => (0..e.scale.len()).collect(),
    }
}

/// Length of a block in input channels, or `None` without blocks.
fn block_size(param: &ParamEncoding) -> Result<Option<usize>, QuantError> {
    let Granularity::PerGroup { group_size } = param.encodings.granularity else { return Ok(None) };
    match group_size.checked_rem(param.kernel_positions) {
        Some(0) => Ok(Some(group_size / param.kernel_positions)),
        _ => Err(refused(
            param,
            Version::V1_0_0,
            format!(
                "groups of {group_size} columns split kernels of {} positions; \
                 expected a multiple of the kernel",
                param.kernel_positions
            ),
        )),
    }
}

/// Blocks run along the input channels: whichever of the first two axes is not the output channels'.
fn block_axis(param: &ParamEncoding) -> usize {
    1 - param.tensor_axis.min(1)
}

fn check_axes(version: Version, param: &ParamEncoding) -> Result<(), QuantError> {
    let blocks = matches!(param.encodings.granularity, Granularity::PerGroup { .. });
    let axes = if blocks { param.tensor_rank.min(2) } else { param.tensor_rank };
    let shared = param.encodings.granularity == Granularity::PerTensor;
    if shared || (param.tensor_axis < axes && (!blocks || axes == 2)) {
        return Ok(());
    }
    let reason = format!(
        "output channels are axis {} of {}, expected an axis below {axes}",
        param.tensor_axis, param.tensor_rank
    );
    Err(refused(param, version, reason))
}

fn refused(param: &ParamEncoding, version: Version, reason: String) -> QuantError {
    QuantError::NotExpressible { name: param.name.clone(), format: format!("AIMET {version}"), reason }
}
