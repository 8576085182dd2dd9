//! `config.json` of the result: the original's keys in their order and spelling, and how the weights are packed.
//!
//! Not here: what follows from it for a reader ([`halfstep_model::checkpoint`]).

use super::form::{Format, LayerForm};
use crate::CoordinatorError;
use halfstep_model::checkpoint::{Checkpoint, QUANTIZATION_CONFIG, gptq_pattern};
use halfstep_quant::layouts::GptqVersion;
use halfstep_quant::{Granularity, Scheme};
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fmt;

/// Module that is in the model even where its weight is the embedding's and not in the checkpoint.
const HEAD: &str = "lm_head";

/// Bits, symmetric or not, columns per group or -1: what layers of one group of settings share.
type Key = (u8, bool, i64);

fn key(layer: &LayerForm) -> Key {
    let group_size = match layer.grid.granularity {
        Granularity::PerGroup { group_size } => i64::try_from(group_size).unwrap_or(i64::MAX),
        Granularity::PerChannel | Granularity::PerTensor => -1,
    };
    (layer.grid.bits, layer.grid.scheme != Scheme::Asymmetric, group_size)
}

/// Version 1 unless a zero point might be 0.
pub(super) fn gptq_version(layers: &[LayerForm], format: Format) -> GptqVersion {
    let symmetric = layers.iter().all(|layer| layer.grid.scheme.is_symmetric());
    if format == Format::Gptq && symmetric { GptqVersion::V1 } else { GptqVersion::V2 }
}

/// The text of the new `config.json`.
///
/// # Errors
/// `ReadBack` if the original's text is no object; it was one when it was opened.
pub(super) fn config(
    checkpoint: &Checkpoint,
    layers: &[LayerForm],
    format: Format,
) -> Result<Vec<u8>, CoordinatorError> {
    let settings = match format {
        // A GGUF file says it in its header.
        Format::FakeQuant | Format::Gguf => return Ok(checkpoint.config_text().to_vec()),
        Format::CompressedTensors => compressed(checkpoint, layers),
        Format::Gptq | Format::GptqV2 => gptq(checkpoint, layers, gptq_version(layers, format)),
    };
    let broken = |e: serde_json::Error| CoordinatorError::ReadBack {
        subject: "config.json".into(),
        what: e.to_string(),
    };
    let original: Entries<'_> = serde_json::from_slice(checkpoint.config_text()).map_err(broken)?;
    let mut text = String::from("{\n");
    for (name, value) in original.0.iter().filter(|(name, _)| name != QUANTIZATION_CONFIG) {
        text.push_str(&format!("  {}: {},\n", Value::from(name.as_str()), value.get()));
    }
    let settings = serde_json::to_string_pretty(&settings).map_err(broken)?.replace('\n', "\n  ");
    text.push_str(&format!("  \"{QUANTIZATION_CONFIG}\": {settings}\n}}\n"));
    Ok(text.into_bytes())
}

/// Values as they are written, in order.
struct Entries<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<'de>, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Entries(entries))
    }
}

fn compressed(checkpoint: &Checkpoint, layers: &[LayerForm]) -> Value {
    let groups = grouped(layers);
    let whole = groups.len() == 1;
    let group = |(index, (key, members)): (usize, &(Key, Vec<&LayerForm>))| {
        let (bits, symmetric, group_size) = *key;
        let per_group = group_size > 0;
        // One kind of grid: the class stands for all that is not ignored, which is what loaders know best.
        let targets: Vec<&str> =
            if whole { vec!["Linear"] } else { members.iter().map(|l| l.module()).collect() };
        let settings = json!({
            "format": "pack-quantized",
            "input_activations": null,
            "output_activations": null,
            "targets": targets,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": if per_group { "group" } else { "channel" },
                "group_size": per_group.then_some(group_size),
                "dynamic": false,
            },
        });
        (format!("group_{index}"), settings)
    };
    let config_groups: Map<String, Value> = groups.iter().enumerate().map(group).collect();
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "ignore": plain_modules(checkpoint, layers),
        "config_groups": config_groups,
    })
}

fn gptq(checkpoint: &Checkpoint, layers: &[LayerForm], version: GptqVersion) -> Value {
    let groups = grouped(layers);
    // The settings of most layers are the rule, the others its exceptions.
    let rule = groups.iter().max_by_key(|(_, members)| members.len()).map_or((4, true, -1), |(key, _)| *key);
    let mut dynamic = Map::new();
    for ((bits, sym, group_size), members) in groups.iter().filter(|(key, _)| *key != rule) {
        for layer in members {
            let own = json!({"bits": bits, "sym": sym, "group_size": group_size});
            dynamic.insert(gptq_pattern(layer.module(), true), own);
        }
    }
    // Outside the blocks nothing is taken for quantized anyway, but for the head, which has its own key.
    let in_block = |module: &&String| module.split('.').any(|part| part.parse::<u32>().is_ok());
    for module in plain_modules(checkpoint, layers).iter().filter(in_block) {
        dynamic.insert(gptq_pattern(module, false), json!({}));
    }
    let (bits, sym, group_size) = rule;
    let mut settings = json!({
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": false,
        "checkpoint_format": match version { GptqVersion::V1 => "gptq", GptqVersion::V2 => "gptq_v2" },
        "lm_head": layers.iter().any(|layer| layer.module() == HEAD),
        "pack_dtype": "int32",
        "true_sequential": true,
        "meta": {"quantizer": [format!("halfstep:{}", env!("CARGO_PKG_VERSION"))]},
    });
    if let (false, Some(settings)) = (dynamic.is_empty(), settings.as_object_mut()) {
        settings.insert("dynamic".into(), dynamic.into());
    }
    settings
}

/// Layers by their settings, both in order of appearance.
fn grouped(layers: &[LayerForm]) -> Vec<(Key, Vec<&LayerForm>)> {
    let mut groups: Vec<(Key, Vec<&LayerForm>)> = Vec::new();
    for layer in layers {
        match groups.iter_mut().find(|(known, _)| *known == key(layer)) {
            Some((_, members)) => members.push(layer),
            None => groups.push((key(layer), vec![layer])),
        }
    }
    groups
}

/// Modules with a matrix that stays as it is, sorted, and the head if it is not packed.
fn plain_modules(checkpoint: &Checkpoint, layers: &[LayerForm]) -> Vec<String> {
    let packed: BTreeSet<&str> = layers.iter().map(LayerForm::module).collect();
    let matrix =
        |name: &&str| checkpoint.info(name).is_some_and(|i| i.shape.len() == 2 && i.dtype.is_float());
    let modules = checkpoint.names().filter(matrix).filter_map(|name| name.strip_suffix(".weight"));
    let mut modules: Vec<String> =
        modules.chain([HEAD]).filter(|m| !packed.contains(m)).map(str::to_owned).collect();
    modules.sort();
    modules.dedup();
    modules
}
