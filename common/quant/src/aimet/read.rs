//! AIMET JSON to weight encodings. Nothing in the file is trusted.

use super::Version;
use crate::encodings::check_length;
use crate::grid::check_bits;
use crate::{Encodings, Granularity, QuantError, Scheme};
use serde_json::Value;

/// How the entries of a file's parameter are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One entry.
    PerTensor,
    /// One entry per output channel.
    PerChannel,
    /// One entry per block of input channels and output channel.
    PerBlock {
        /// Input channels per block, at least 1.
        block_size: usize,
    },
}

/// One parameter of an encodings file, entries in the file's order.
#[derive(Debug, Clone, PartialEq)]
pub struct AimetParam {
    /// Name of the tensor.
    pub name: String,
    /// Bit width.
    pub bits: u8,
    /// Integers and zero point. Strict grids cannot be told from symmetric ones, and are read as those.
    pub scheme: Scheme,
    /// Sharing of the entries.
    pub layout: Layout,
    /// Positive normal scales.
    pub scale: Vec<f32>,
    /// Zero points in our domain (0 for symmetric grids).
    pub zero_point: Vec<i32>,
}

impl AimetParam {
    /// The encodings in matrix form `[rows, cols]`, for a tensor whose output channels are axis `tensor_axis` and whose
    /// kernels have `kernel_positions` positions.
    ///
    /// # Errors
    /// `Length` if the number of entries does not fit the matrix; what [`Encodings::validate`] finds.
    pub fn to_encodings(
        &self,
        rows: usize,
        cols: usize,
        tensor_axis: usize,
        kernel_positions: usize,
    ) -> Result<Encodings, QuantError> {
        let granularity = match self.layout {
            Layout::PerTensor => Granularity::PerTensor,
            Layout::PerChannel => Granularity::PerChannel,
            Layout::PerBlock { block_size } => Granularity::PerGroup {
                group_size: block_size
                    .checked_mul(kernel_positions)
                    .ok_or(QuantError::TooLarge { rows: block_size, cols: kernel_positions })?,
            },
        };
        let mut encodings = Encodings {
            bits: self.bits,
            scheme: self.scheme,
            granularity,
            rows,
            cols,
            scale: self.scale.clone(),
            zero_point: self.zero_point.clone(),
        };
        encodings.validate()?;
        if matches!(granularity, Granularity::PerGroup { .. }) && tensor_axis != 0 {
            encodings.scale = transposed(&self.scale, rows);
            encodings.zero_point = transposed(&self.zero_point, rows);
        }
        Ok(encodings)
    }
}

/// `[groups, rows]` to `[rows, groups]`.
fn transposed<T: Copy>(values: &[T], rows: usize) -> Vec<T> {
    (0..rows).flat_map(|row| values.iter().skip(row).step_by(rows).copied()).collect()
}

/// Reads the weight encodings of a file of any of the three versions, in file order (0.6.1: by name).
///
/// # Errors
/// `Malformed` with the entry and what was expected; `Bits`; `Length` if scales and offsets differ in number.
pub fn from_json(file: &Value) -> Result<(Version, Vec<AimetParam>), QuantError> {
    let version: Version = text(file, "version", "encodings file")?.parse()?;
    let params = match version {
        Version::V0_6_1 => read_0_6_1(file)?,
        Version::V1_0_0 => each(file, "param_encodings", read_1_0_0)?,
        Version::V2_0_0 => each(file, "encodings", read_2_0_0)?,
    };
    Ok((version, params))
}

fn read_0_6_1(file: &Value) -> Result<Vec<AimetParam>, QuantError> {
    let params = file.get("param_encodings").and_then(Value::as_object);
    let params = params.ok_or_else(|| malformed("param_encodings", "an object", &file["param_encodings"]))?;
    params.iter().map(|(name, entries)| param_0_6_1(name, entries)).collect()
}

fn param_0_6_1(name: &str, entries: &Value) -> Result<AimetParam, QuantError> {
    let list = entries.as_array().filter(|list| !list.is_empty());
    let list = list.ok_or_else(|| malformed(name, "a list of entries", entries))?;
    let symmetric = match text(&list[0], "is_symmetric", name)? {
        "True" => true,
        "False" => false,
        _ => return Err(malformed(&format!("is_symmetric of `{name}`"), "\"True\" or \"False\"", &list[0])),
    };
    let bits = bit_width(&list[0], "bitwidth", name)?;
    if let Some(other) = list
        .iter()
        .find(|e| e["bitwidth"] != list[0]["bitwidth"] || e["is_symmetric"] != list[0]["is_symmetric"])
    {
        return Err(malformed(name, "one bit width and symmetry for all channels", other));
    }
    let scale: Result<Vec<_>, _> = list.iter().map(|e| scale(&e["scale"], name)).collect();
    let offset: Result<Vec<_>, _> = list.iter().map(|e| integer(&e["offset"], name)).collect();
    // The version does not say: a single entry of a one-channel tensor means the same either way.
    let layout = if list.len() == 1 { Layout::PerTensor } else { Layout::PerChannel };
    param_from_offsets(name, bits, symmetric, layout, scale?, offset?)
}

fn read_1_0_0(entry: &Value) -> Result<AimetParam, QuantError> {
    let name = text(entry, "name", "entry")?;
    let symmetric = entry["is_sym"].as_bool();
    let symmetric =
        symmetric.ok_or_else(|| malformed(&format!("is_sym of `{name}`"), "a boolean", &entry["is_sym"]))?;
    let layout = match text(entry, "enc_type", name)? {
        "PER_TENSOR" => Layout::PerTensor,
        "PER_CHANNEL" => Layout::PerChannel,
        "PER_BLOCK" => Layout::PerBlock { block_size: positive(entry, "block_size", name)? },
        _ => {
            let subject = format!("enc_type of `{name}`");
            return Err(malformed(&subject, "PER_TENSOR, PER_CHANNEL or PER_BLOCK", &entry["enc_type"]));
        }
    };
    let bits = bit_width(entry, "bw", name)?;
    let scales: Result<Vec<_>, _> = flattened(&entry["scale"]).into_iter().map(|v| scale(v, name)).collect();
    let offsets: Result<Vec<_>, _> =
        flattened(&entry["offset"]).into_iter().map(|v| integer(v, name)).collect();
    param_from_offsets(name, bits, symmetric, layout, scales?, offsets?)
}

fn read_2_0_0(entry: &Value) -> Result<AimetParam, QuantError> {
    let name = text(entry, "name", "entry")?;
    let dtype = text(entry, "output_dtype", name)?;
    let (scheme, digits) = match dtype.strip_prefix('u') {
        Some(rest) => (Scheme::Asymmetric, rest),
        None => (Scheme::Symmetric, dtype),
    };
    let bits: Option<u8> = digits.strip_prefix("int").and_then(|bits| bits.parse().ok());
    let bits = bits.ok_or_else(|| malformed("output_dtype", "an integer type", &entry["output_dtype"]))?;
    check_bits(bits)?;
    let layout = match (entry.get("block_size"), entry["y_scale"].is_array()) {
        (Some(size), _) if !size.is_null() => {
            Layout::PerBlock { block_size: positive(entry, "block_size", name)? }
        }
        (_, true) => Layout::PerChannel,
        (_, false) => Layout::PerTensor,
    };
    let scale: Result<Vec<_>, _> = flattened(&entry["y_scale"]).into_iter().map(|v| scale(v, name)).collect();
    let scale = scale?;
    let zero_point = match entry.get("y_zero_point").filter(|z| !z.is_null()) {
        Some(zero_point) => flattened(zero_point).into_iter().map(|v| integer(v, name)).collect(),
        None => Ok(vec![0; scale.len()]),
    }?;
    let param = AimetParam { name: name.to_owned(), bits, scheme, layout, scale, zero_point };
    checked(param)
}

/// A parameter from AIMET's offsets; symmetric grids are those whose offset is `-2^(b-1)`.
fn param_from_offsets(
    name: &str,
    bits: u8,
    symmetric: bool,
    layout: Layout,
    scale: Vec<f32>,
    offset: Vec<i32>,
) -> Result<AimetParam, QuantError> {
    let (scheme, half) =
        if symmetric { (Scheme::Symmetric, 1_i32 << (bits - 1)) } else { (Scheme::Asymmetric, 0) };
    let zero_point = offset.into_iter().map(|o| o.saturating_neg().saturating_sub(half)).collect();
    checked(AimetParam { name: name.to_owned(), bits, scheme, layout, scale, zero_point })
}

fn checked(param: AimetParam) -> Result<AimetParam, QuantError> {
    check_length("list of offsets", param.scale.len(), param.zero_point.len())?;
    let (min, max) = match param.scheme.is_symmetric() {
        true => (0, 0),
        false => param.scheme.integer_range(param.bits),
    };
    match param.zero_point.iter().position(|z| !(min..=max).contains(z)) {
        Some(index) => Err(QuantError::ZeroPoint { index, value: param.zero_point[index], min, max }),
        None => Ok(param),
    }
}

fn each<T>(
    file: &Value,
    key: &str,
    read: impl Fn(&Value) -> Result<T, QuantError>,
) -> Result<Vec<T>, QuantError> {
    let list = file.get(key).and_then(Value::as_array);
    list.ok_or_else(|| malformed(key, "a list", &file[key]))?.iter().map(read).collect()
}

/// A number as a list of one, nested lists in order. serde_json bounds the nesting of what it parses.
fn flattened(value: &Value) -> Vec<&Value> {
    match value.as_array() {
        Some(list) => list.iter().flat_map(flattened).collect(),
        None => vec![value],
    }
}

fn text<'a>(value: &'a Value, key: &str, subject: &str) -> Result<&'a str, QuantError> {
    value[key].as_str().ok_or_else(|| malformed(&format!("{key} of `{subject}`"), "a string", &value[key]))
}

fn positive(value: &Value, key: &str, subject: &str) -> Result<usize, QuantError> {
    let number = value[key].as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
    number.ok_or_else(|| malformed(&format!("{key} of `{subject}`"), "a positive integer", &value[key]))
}

fn bit_width(value: &Value, key: &str, subject: &str) -> Result<u8, QuantError> {
    let bits = value[key].as_u64().and_then(|n| u8::try_from(n).ok());
    let bits = bits.ok_or_else(|| malformed(&format!("{key} of `{subject}`"), "a bit width", &value[key]))?;
    check_bits(bits)?;
    Ok(bits)
}

fn scale(value: &Value, subject: &str) -> Result<f32, QuantError> {
    let scale = value.as_f64().map(|s| s as f32).filter(|s| s.is_normal() && *s > 0.0);
    scale.ok_or_else(|| malformed(&format!("scale of `{subject}`"), "a positive normal number", value))
}

fn integer(value: &Value, subject: &str) -> Result<i32, QuantError> {
    // Some writers put offsets down as 0.0.
    let whole = value.as_i64().or_else(|| value.as_f64().filter(|v| v.fract() == 0.0).map(|v| v as i64));
    let integer = whole.and_then(|n| i32::try_from(n).ok());
    integer.ok_or_else(|| malformed(&format!("offset of `{subject}`"), "a 32-bit integer", value))
}

fn malformed(subject: &str, expected: &str, actual: &Value) -> QuantError {
    // By characters, so that a cut never falls inside one.
    let actual = match actual {
        Value::Null => "missing".to_owned(),
        other => other.to_string().chars().take(80).collect(),
    };
    QuantError::Malformed { subject: subject.to_owned(), expected: expected.to_owned(), actual }
}
