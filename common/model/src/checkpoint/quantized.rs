//! Packed weights: what `quantization_config` says of them, their integers, and their values.
//!
//! Read are the two layouts that Halfstep writes: compressed-tensors (`pack-quantized`, dense) and GPTQ with groups in
//! order. A packed layer `m` answers to `m.weight` as if it were plain. Not here: bits and words ([`halfstep_quant::layouts`]).

use std::collections::BTreeMap;

use halfstep_quant::layouts::{Compressed, Form, Gptq, GptqVersion};
use halfstep_quant::packing::dense_words;
use halfstep_quant::{Encodings, Granularity, Scheme};
use serde::Deserialize;
use serde_json::Value;

use super::floats;
use super::reader::{Checkpoint, TensorInfo};
use crate::{Dtype, ModelError, Tensor};

/// The key of `config.json` that says how weights are packed.
pub const QUANTIZATION_CONFIG: &str = "quantization_config";

/// How the packed weights of a checkpoint are to be read.
#[derive(Debug)]
pub(super) enum Quantization {
    Compressed(CompressedConfig),
    Gptq(GptqConfig),
    /// Not read here, and why.
    Other(String),
}

#[derive(Debug, Deserialize)]
pub(super) struct CompressedConfig {
    format: String,
    config_groups: BTreeMap<String, Group>,
}

#[derive(Debug, Deserialize)]
struct Group {
    targets: Vec<String>,
    weights: GroupWeights,
    input_activations: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct GroupWeights {
    num_bits: u8,
    r#type: String,
    symmetric: bool,
    strategy: String,
    group_size: Option<i64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct GptqConfig {
    bits: u8,
    group_size: i64,
    sym: bool,
    #[serde(alias = "format")]
    checkpoint_format: String,
    #[serde(default)]
    dynamic: BTreeMap<String, GptqOverride>,
}

/// What is different for the modules of one pattern.
#[derive(Debug, Default, Deserialize)]
struct GptqOverride {
    bits: Option<u8>,
    group_size: Option<i64>,
    sym: Option<bool>,
}

/// The key of GPTQ's `dynamic` for exactly this module: `included` with other settings, or left out.
pub fn gptq_pattern(module: &str, included: bool) -> String {
    let mut pattern = String::from(if included { "+:^" } else { "-:^" });
    for c in module.chars() {
        if !(c.is_ascii_alphanumeric() || c == '_') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push('$');
    pattern
}

impl Quantization {
    /// What the configuration says; none if it does not speak of quantization.
    pub(super) fn of(config: &Value) -> Option<Quantization> {
        let value = config.get(QUANTIZATION_CONFIG).filter(|value| !value.is_null())?;
        let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        let bad = |e: serde_json::Error| {
            Quantization::Other(format!("`{method}`, whose settings are not read: {e}"))
        };
        Some(match method {
            "compressed-tensors" => {
                CompressedConfig::deserialize(value).map_or_else(bad, Quantization::Compressed)
            }
            "gptq" => GptqConfig::deserialize(value).map_or_else(bad, Quantization::Gptq),
            other => Quantization::Other(format!("`{other}`, expected compressed-tensors or gptq")),
        })
    }
}

impl CompressedConfig {
    /// Settings of a module: those that name it, else those of all linear layers.
    fn weights(&self, module: &str) -> Result<&GroupWeights, String> {
        if self.format != "pack-quantized" {
            return Err(format!("format is `{}`, expected `pack-quantized`", self.format));
        }
        let of = |target: &str| {
            self.config_groups.values().find(|group| group.targets.iter().any(|t| t == target))
        };
        let group = of(module).or_else(|| of("Linear"));
        let group = group.ok_or("no group of `config_groups` has it or `Linear` among its targets")?;
        if group.input_activations.as_ref().is_some_and(|value| !value.is_null())
            || group.weights.r#type != "int"
        {
            return Err("expected integer weights and activations that are not quantized".to_owned());
        }
        Ok(&group.weights)
    }
}

fn granularity(group_size: Option<i64>) -> Result<Granularity, String> {
    match group_size {
        None | Some(-1) => Ok(Granularity::PerChannel),
        Some(size) => match usize::try_from(size) {
            Ok(group_size) if group_size > 0 => Ok(Granularity::PerGroup { group_size }),
            _ => Err(format!("group size is {size}, expected at least 1, or -1 for whole rows")),
        },
    }
}

fn scheme(symmetric: bool) -> Scheme {
    if symmetric { Scheme::Symmetric } else { Scheme::Asymmetric }
}

impl Checkpoint {
    /// Encodings and integers `[rows, cols]` of a packed layer; none if the checkpoint holds none of that name.
    ///
    /// # Errors
    /// `InFile` naming the layer or the tensor: a configuration that is not read, parts that are missing, have other
    /// types or shapes than the configuration says, or hold values off the grid.
    pub fn packed(&self, module: &str) -> Result<Option<(Encodings, Vec<i32>)>, ModelError> {
        let Some(form) = self.form(module)? else { return Ok(None) };
        let layer = |problem: String| self.layer(module, problem);
        let groups = form.groups().map_err(|e| layer(e.to_string()))?;
        let Form { bits, rows, cols, .. } = form;
        let name = |part: &str| format!("{module}.{part}");
        let unpacked = match &self.quantization {
            Some(Quantization::Gptq(config)) => Gptq {
                weight: self.words(&name("qweight"), &[dense_words(cols, bits), rows])?,
                scale: self.scales(&name("scales"), &[groups, rows])?,
                zero_point: self.words(&name("qzeros"), &[groups, dense_words(rows, bits)])?,
                group_index: self.words(&name("g_idx"), &[cols])?.into_iter().map(u32::cast_signed).collect(),
            }
            .unpack(form, config.version().map_err(layer)?),
            _ => {
                let zero_point = name("weight_zero_point");
                Compressed {
                    weight: self.words(&name("weight_packed"), &[rows, dense_words(cols, bits)])?,
                    scale: self.scales(&name("weight_scale"), &[rows, groups])?,
                    zero_point: match form.scheme.is_symmetric() {
                        true => None,
                        false => Some(self.words(&zero_point, &[dense_words(rows, bits), groups])?),
                    },
                }
                .unpack(form)
            }
        };
        unpacked.map(Some).map_err(|e| layer(e.to_string()))
    }

    /// `config.json` as it was before the weights were packed: without `quantization_config` where that is one of
    /// those read here, as it is otherwise.
    pub fn plain_config(&self) -> Value {
        let mut config = self.config().clone();
        if let (Some(Quantization::Compressed(_) | Quantization::Gptq(_)), Some(config)) =
            (&self.quantization, config.as_object_mut())
        {
            config.remove(QUANTIZATION_CONFIG);
        }
        config
    }

    /// A packed weight as numbers, `(q - zero_point) * scale` in f32.
    pub(super) fn dequantized(&self, name: &str) -> Result<Option<Tensor>, ModelError> {
        let Some(module) = name.strip_suffix(".weight") else { return Ok(None) };
        let Some((encodings, q)) = self.packed(module)? else { return Ok(None) };
        let values = encodings.dequantize(&q).map_err(|e| self.layer(module, e.to_string()))?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let value = values[index];
            return Err(self.layer(module, format!("weight {index} is {value}, expected a finite number")));
        }
        Ok(Some(Tensor::f32(vec![encodings.rows, encodings.cols], values)?))
    }

    /// What a packed weight would be if it were plain.
    pub(super) fn packed_info(&self, name: &str) -> Result<Option<TensorInfo>, ModelError> {
        let Some(module) = name.strip_suffix(".weight") else { return Ok(None) };
        let Some(Form { rows, cols, .. }) = self.form(module)? else { return Ok(None) };
        let scale =
            [".weight_scale", ".scales"].into_iter().find_map(|part| self.info(&format!("{module}{part}")));
        let dtype = scale.map_or(Dtype::F32, |info| info.dtype);
        let bytes = rows.saturating_mul(cols).saturating_mul(dtype.size().unwrap_or(1));
        Ok(Some(TensorInfo { dtype, shape: vec![rows, cols], bytes }))
    }

    /// Grid and shape of a packed layer, from the configuration and the shapes of its parts.
    fn form(&self, module: &str) -> Result<Option<Form>, ModelError> {
        let has = |part: &str| self.info(&format!("{module}.{part}"));
        let Some(packed) = has("weight_packed").or_else(|| has("qweight")) else { return Ok(None) };
        let form = match &self.quantization {
            None => Err(format!("holds packed weights, but config.json has no `{QUANTIZATION_CONFIG}`")),
            Some(Quantization::Other(what)) => Err(format!("quantization method is {what}")),
            Some(Quantization::Compressed(config)) => {
                let [rows, cols] = self.weight_shape(module)?;
                config.form(module, rows, cols)
            }
            Some(Quantization::Gptq(config)) => config.form(module, &packed.shape),
        };
        form.map(Some).map_err(|problem| self.layer(module, problem))
    }

    fn weight_shape(&self, module: &str) -> Result<[usize; 2], ModelError> {
        let name = format!("{module}.weight_shape");
        let bytes = self.part(&name, &[Dtype::I64], &[2])?;
        let mut shape = [0; 2];
        for (dim, bytes) in shape.iter_mut().zip(bytes.as_chunks().0) {
            let stored = i64::from_le_bytes(*bytes);
            *dim = usize::try_from(stored)
                .map_err(|_| self.wrong(&name, format!("holds {stored}, expected a dimension")))?;
        }
        Ok(shape)
    }

    fn words(&self, name: &str, shape: &[usize]) -> Result<Vec<u32>, ModelError> {
        let bytes = self.part(name, &[Dtype::I32], shape)?;
        Ok(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    fn scales(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
        let bytes = self.part(name, &dtypes, shape)?;
        let dtype = self.info(name).map_or(Dtype::F32, |info| info.dtype);
        floats::to_f32(dtype, &bytes).ok_or_else(|| self.wrong(name, format!("holds {dtype}")))
    }

    /// The bytes of a part that must have one of these types and this shape.
    fn part(&self, name: &str, dtypes: &[Dtype], shape: &[usize]) -> Result<bytes::Bytes, ModelError> {
        let (dtype, actual, bytes) = self.stored(name)?;
        if !dtypes.contains(&dtype) || actual != shape {
            let expected: Vec<String> = dtypes.iter().map(Dtype::to_string).collect();
            let expected = expected.join(" or ");
            return Err(self.wrong(name, format!("is {dtype} {actual:?}, expected {expected} {shape:?}")));
        }
        Ok(bytes)
    }

    fn layer(&self, module: &str, problem: String) -> ModelError {
        let source = ModelError::Layer { layer: module.to_owned(), problem };
        ModelError::InFile { path: self.folder().to_owned(), source: Box::new(source) }
    }
}

impl CompressedConfig {
    fn form(&self, module: &str, rows: usize, cols: usize) -> Result<Form, String> {
        let weights = self.weights(module)?;
        let granularity = match weights.strategy.as_str() {
            "channel" => Granularity::PerChannel,
            "group" => granularity(weights.group_size)?,
            other => return Err(format!("strategy is `{other}`, expected `group` or `channel`")),
        };
        Ok(Form { bits: weights.num_bits, scheme: scheme(weights.symmetric), granularity, rows, cols })
    }
}

impl GptqConfig {
    fn version(&self) -> Result<GptqVersion, String> {
        match self.checkpoint_format.as_str() {
            "gptq" => Ok(GptqVersion::V1),
            "gptq_v2" => Ok(GptqVersion::V2),
            other => Err(format!("checkpoint format is `{other}`, expected `gptq` or `gptq_v2`")),
        }
    }

    fn form(&self, module: &str, qweight: &[usize]) -> Result<Form, String> {
        let default = GptqOverride::default();
        let own = self.dynamic.get(&gptq_pattern(module, true)).unwrap_or(&default);
        let bits = own.bits.unwrap_or(self.bits);
        let &[words, rows] = qweight else {
            return Err(format!("qweight has shape {qweight:?}, expected two dimensions"));
        };
        let whole = words.checked_mul(32).filter(|all| bits > 0 && all.is_multiple_of(bits.into()));
        let cols = whole.ok_or_else(|| format!("{words} words are no whole number of {bits}-bit inputs"))?
            / usize::from(bits);
        let granularity = granularity(Some(own.group_size.unwrap_or(self.group_size)))?;
        Ok(Form { bits, scheme: scheme(own.sym.unwrap_or(self.sym)), granularity, rows, cols })
    }
}
