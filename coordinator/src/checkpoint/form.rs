//! The formats, and what each makes of one layer: names, types and shapes of tensors. Known before any layer is solved.
//!
//! Not here: the tensors' contents (`encode`), the configuration that goes with them (`settings`).

use super::gguf;
use crate::CoordinatorError;
use halfstep_model::checkpoint::{Checkpoint, TensorInfo};
use halfstep_model::{Dtype, WeightLayout};
use halfstep_quant::layouts::{Form, GPTQ_MULTIPLE};
use halfstep_quant::packing::dense_words;
use halfstep_quant::{Granularity, GridSpec, ScaleType, Scheme};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// `pack-quantized`: what vLLM and transformers read natively. 2 to 8 bits.
    CompressedTensors,
    /// GPTQ, in version 1 where all grids are symmetric; else in version 2, because version 1 cannot hold zero point 0.
    Gptq,
    /// GPTQ version 2. 2, 3, 4 or 8 bits like version 1.
    GptqV2,
    /// Plain weights of the original's type, each at its point of the grid.
    FakeQuant,
    /// One file for llama.cpp and its relatives: blocks of 32 weights at 4 or 8 bits.
    Gguf,
}

const FORMATS: [(&str, Format); 5] = [
    ("compressed-tensors", Format::CompressedTensors),
    ("gptq", Format::Gptq),
    ("gptq-v2", Format::GptqV2),
    ("fake-quant", Format::FakeQuant),
    ("gguf", Format::Gguf),
];

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(FORMATS.iter().find(|entry| entry.1 == *self).map_or("", |entry| entry.0))
    }
}

impl FromStr for Format {
    type Err = CoordinatorError;

    fn from_str(text: &str) -> Result<Self, CoordinatorError> {
        FORMATS.iter().find(|entry| entry.0 == text).map(|entry| entry.1).ok_or_else(|| {
            let known: Vec<&str> = FORMATS.iter().map(|entry| entry.0).collect();
            CoordinatorError::Configuration(format!(
                "format is `{text}`, expected one of {}",
                known.join(", ")
            ))
        })
    }
}

/// A solved layer as the exporter has to know it.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerForm {
    /// Name of the layer.
    pub name: String,
    /// Name of its weight in the checkpoint.
    pub weight: String,
    /// How the weight holds the matrix.
    pub layout: WeightLayout,
    /// Its grid.
    pub grid: GridSpec,
}

impl LayerForm {
    /// The weight's name without `.weight`: the module that loaders know.
    pub(super) fn module(&self) -> &str {
        self.weight.strip_suffix(".weight").unwrap_or(&self.weight)
    }

    /// What a packed layout stores: one scale for the whole tensor is said for each row.
    pub(super) fn packed(&self, rows: usize, cols: usize) -> Form {
        let scheme = if self.grid.scheme.is_symmetric() { Scheme::Symmetric } else { Scheme::Asymmetric };
        let granularity = match self.grid.granularity {
            Granularity::PerTensor => Granularity::PerChannel,
            other => other,
        };
        Form { bits: self.grid.bits, scheme, granularity, rows, cols }
    }

    pub(super) fn wrong(&self, problem: impl fmt::Display) -> CoordinatorError {
        CoordinatorError::Configuration(format!("layer `{}`: {problem}", self.name))
    }
}

/// The values that scales can have in this format; encodings must be brought to it before rounding is learned.
pub fn scale_type(checkpoint: &Checkpoint, format: Format) -> ScaleType {
    match (format, checkpoint.dtype()) {
        (Format::FakeQuant, _) => ScaleType::F32,
        (Format::Gguf, _) => ScaleType::F16AndMinimum,
        (Format::Gptq | Format::GptqV2, _) | (Format::CompressedTensors, Dtype::F16) => ScaleType::F16,
        (Format::CompressedTensors, Dtype::Bf16) => ScaleType::Bf16,
        (Format::CompressedTensors, _) => ScaleType::F32,
    }
}

/// Whether all these layers can be written in this format; asked before any work is done.
///
/// # Errors
/// `Configuration` naming the first layer that cannot and why; `Model` if the checkpoint lacks its weight.
pub fn check(checkpoint: &Checkpoint, layers: &[LayerForm], format: Format) -> Result<(), CoordinatorError> {
    if checkpoint.config().get(halfstep_model::checkpoint::QUANTIZATION_CONFIG).is_some_and(|v| !v.is_null())
    {
        return Err(CoordinatorError::BadInput(format!(
            "{}: its weights are quantized already, expected a checkpoint without `quantization_config`",
            checkpoint.folder().display()
        )));
    }
    if format == Format::Gguf {
        return gguf::check(checkpoint, layers);
    }
    layers.iter().try_for_each(|layer| parts(checkpoint, layer, format).map(drop))
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl Part {
    pub(super) fn bytes(&self) -> u64 {
        let size = self.dtype.size().unwrap_or(1) as u64;
        self.shape.iter().fold(size, |bytes, dim| bytes.saturating_mul(*dim as u64))
    }
}

/// The tensors that take the place of a layer's weight, in the order in which `encode` makes them.
pub(super) fn parts(
    checkpoint: &Checkpoint,
    layer: &LayerForm,
    format: Format,
) -> Result<Vec<Part>, CoordinatorError> {
    let TensorInfo { dtype, shape, .. } = checkpoint.expect(&layer.weight)?.clone();
    if !dtype.is_float() {
        return Err(layer.wrong(format!("weight `{}` holds {dtype}, expected floats", layer.weight)));
    }
    let matrix = layer.layout.matrix_shape(&shape).map_err(|e| layer.wrong(e))?;
    let (rows, cols) = (matrix.rows, matrix.cols);
    if format == Format::FakeQuant {
        return Ok(vec![Part { name: layer.weight.clone(), dtype, shape }]);
    }
    check_packable(layer, format, rows, cols)?;
    let groups = layer.packed(rows, cols).groups().map_err(|e| layer.wrong(e))?;
    let bits = layer.grid.bits;
    let part = |suffix: &str, dtype, shape: &[usize]| Part {
        name: format!("{}.{suffix}", layer.module()),
        dtype,
        shape: shape.to_vec(),
    };
    Ok(match format {
        Format::CompressedTensors => {
            let scale = stored_scale(scale_type(checkpoint, format));
            let mut parts = vec![
                part("weight_packed", Dtype::I32, &[rows, dense_words(cols, bits)]),
                part("weight_scale", scale, &[rows, groups]),
                part("weight_shape", Dtype::I64, &[2]),
            ];
            if !layer.grid.scheme.is_symmetric() {
                parts.push(part("weight_zero_point", Dtype::I32, &[dense_words(rows, bits), groups]));
            }
            parts
        }
        _ => vec![
            part("qweight", Dtype::I32, &[dense_words(cols, bits), rows]),
            part("scales", Dtype::F16, &[groups, rows]),
            part("qzeros", Dtype::I32, &[groups, dense_words(rows, bits)]),
            part("g_idx", Dtype::I32, &[cols]),
        ],
    })
}

fn check_packable(
    layer: &LayerForm,
    format: Format,
    rows: usize,
    cols: usize,
) -> Result<(), CoordinatorError> {
    let gptq = matches!(format, Format::Gptq | Format::GptqV2);
    let bits = layer.grid.bits;
    if layer.layout != WeightLayout::AsIs {
        return Err(layer.wrong(format!(
            "weight `{}` is stored transposed, which {format} cannot say; `--format fake-quant` can",
            layer.weight
        )));
    }
    if !layer.weight.ends_with(".weight") {
        return Err(
            layer.wrong(format!("weight `{}` has no module, expected a name in `.weight`", layer.weight))
        );
    }
    if gptq && !matches!(bits, 2 | 3 | 4 | 8) {
        return Err(layer.wrong(format!("{format} has no {bits}-bit weights, expected 2, 3, 4 or 8")));
    }
    if gptq && !(rows.is_multiple_of(GPTQ_MULTIPLE) && cols.is_multiple_of(GPTQ_MULTIPLE)) {
        return Err(layer.wrong(format!(
            "{format} cannot hold {rows} outputs and {cols} inputs, expected multiples of {GPTQ_MULTIPLE}"
        )));
    }
    Ok(())
}

fn stored_scale(kind: ScaleType) -> Dtype {
    match kind {
        ScaleType::F32 => Dtype::F32,
        ScaleType::F16 | ScaleType::F16AndMinimum => Dtype::F16,
        ScaleType::Bf16 => Dtype::Bf16,
    }
}
