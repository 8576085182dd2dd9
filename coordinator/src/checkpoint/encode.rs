//! The contents of a layer's tensors, as bytes.
//!
//! Not here: names and shapes (`form`), bit layouts ([`halfstep_quant::layouts`]).

use super::form::{Format, LayerForm, scale_type};
use crate::CoordinatorError;
use half::{bf16, f16};
use halfstep_model::Dtype;
use halfstep_model::checkpoint::{Checkpoint, TensorInfo};
use halfstep_quant::layouts::{Compressed, Gptq, GptqVersion};
use halfstep_quant::{Encodings, ScaleType};

/// A layer's tensors in the order of `form::parts`, and what reading them back must give.
pub(super) struct Encoded {
    pub(super) parts: Vec<Vec<u8>>,
    /// BLAKE3 of the weights as f32, as they lie in the checkpoint.
    pub(super) weights: blake3::Hash,
    /// Weights that their storage type cannot hold exactly.
    pub(super) moved: usize,
}

/// Checks a solved layer against its form and encodes it.
///
/// # Errors
/// `ReadBack` if it is not what its form says or has scales that the format would round; `Quant`.
pub(super) fn encode(
    checkpoint: &Checkpoint,
    layer: &LayerForm,
    format: Format,
    version: GptqVersion,
    solved: &(Encodings, Vec<i32>),
) -> Result<Encoded, CoordinatorError> {
    let (encodings, q) = solved;
    let TensorInfo { dtype, shape, .. } = checkpoint.expect(&layer.weight)?.clone();
    let kind = scale_type(checkpoint, format);
    check_solved(layer, &shape, kind, encodings)?;
    let matrix = encodings.dequantize(q)?;
    if format == Format::FakeQuant {
        let values = layer.layout.from_matrix(&shape, &matrix).map_err(|e| layer.wrong(e))?;
        return plain(layer, dtype, values);
    }
    let parts = match format {
        Format::CompressedTensors => {
            let packed = Compressed::pack(encodings, q)?;
            let shape = [encodings.rows as i64, encodings.cols as i64].map(i64::to_le_bytes).concat();
            let parts = [words(&packed.weight), scales(kind, &packed.scale), shape];
            parts.into_iter().chain(packed.zero_point.map(|zero_point| words(&zero_point))).collect()
        }
        _ => {
            let packed = Gptq::pack(encodings, q, version)?;
            let index = packed.group_index.iter().flat_map(|group| group.to_le_bytes()).collect();
            vec![words(&packed.weight), scales(kind, &packed.scale), words(&packed.zero_point), index]
        }
    };
    Ok(Encoded { parts, weights: fingerprint(&matrix), moved: 0 })
}

/// Equal exactly for equal weights.
pub(super) fn fingerprint(weights: &[f32]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = Vec::with_capacity(1 << 16);
    for run in weights.chunks(1 << 14) {
        buffer.clear();
        // The two zeros are one weight.
        run.iter().for_each(|value| buffer.extend_from_slice(&(value + 0.0).to_le_bytes()));
        hasher.update(&buffer);
    }
    hasher.finalize()
}

/// Whether encodings are those of the form, with scales that are stored as they are.
///
/// # Errors
/// `ReadBack` if not; `Configuration` for a weight that is no matrix.
pub(super) fn check_solved(
    layer: &LayerForm,
    shape: &[usize],
    kind: ScaleType,
    encodings: &Encodings,
) -> Result<(), CoordinatorError> {
    check_form(layer, shape, encodings)?;
    check_scales(layer, kind.of(layer.grid.scheme), encodings)
}

fn check_form(layer: &LayerForm, shape: &[usize], encodings: &Encodings) -> Result<(), CoordinatorError> {
    let matrix = layer.layout.matrix_shape(shape).map_err(|e| layer.wrong(e))?;
    let grid = &layer.grid;
    let expected = (grid.bits, grid.scheme, grid.granularity, matrix.rows, matrix.cols);
    let actual = (encodings.bits, encodings.scheme, encodings.granularity, encodings.rows, encodings.cols);
    if expected == actual {
        return Ok(());
    }
    let text = |(bits, scheme, granularity, rows, cols): (u8, _, _, _, _)| {
        format!("{rows} x {cols} at {bits} bits {scheme} {granularity}")
    };
    Err(broken(layer, format!("it was solved as {}, expected {}", text(actual), text(expected))))
}

/// Rounding was learned against these scales: none may change on its way to the disk.
fn check_scales(layer: &LayerForm, kind: ScaleType, encodings: &Encodings) -> Result<(), CoordinatorError> {
    let changed = encodings.scale.iter().position(|scale| kind.nearest(*scale) != *scale);
    changed.map_or(Ok(()), |index| {
        let scale = encodings.scale[index];
        let stored = kind.nearest(scale);
        Err(broken(layer, format!("scale {index} is {scale}, which {kind:?} stores as {stored}")))
    })
}

pub(super) fn broken(layer: &LayerForm, what: String) -> CoordinatorError {
    CoordinatorError::ReadBack { subject: format!("layer `{}`", layer.name), what }
}

/// The weights in their original type.
fn plain(layer: &LayerForm, dtype: Dtype, mut values: Vec<f32>) -> Result<Encoded, CoordinatorError> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.size().unwrap_or(1));
    let mut moved = 0;
    for value in &mut values {
        let exact = *value;
        match dtype {
            Dtype::F16 => {
                let stored = f16::from_f32(exact);
                *value = stored.to_f32();
                bytes.extend_from_slice(&stored.to_le_bytes());
            }
            Dtype::Bf16 => {
                let stored = bf16::from_f32(exact);
                *value = stored.to_f32();
                bytes.extend_from_slice(&stored.to_le_bytes());
            }
            Dtype::F64 => bytes.extend_from_slice(&f64::from(exact).to_le_bytes()),
            _ => bytes.extend_from_slice(&exact.to_le_bytes()),
        }
        moved += usize::from(*value != exact);
    }
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        return Err(broken(layer, format!("weight {index} is too large for {dtype}")));
    }
    Ok(Encoded { parts: vec![bytes], weights: fingerprint(&values), moved })
}

fn words(words: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(words.len() * 4);
    words.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
    bytes
}

/// Exact: the scales were checked.
fn scales(kind: ScaleType, scales: &[f32]) -> Vec<u8> {
    match kind {
        ScaleType::F32 => scales.iter().flat_map(|scale| scale.to_le_bytes()).collect(),
        ScaleType::F16 | ScaleType::F16AndMinimum => {
            scales.iter().flat_map(|scale| f16::from_f32(*scale).to_le_bytes()).collect()
        }
        ScaleType::Bf16 => scales.iter().flat_map(|scale| bf16::from_f32(*scale).to_le_bytes()).collect(),
    }
}
