//! The checkpoint target: a folder made of the input's bytes, opened and read to the last tensor.
//!
//! An input is two lengths (u16), then `config.json`, the index (none if empty) and one weight file. Beside panics it
//! looks for headers that are believed here and refused by the format's own library.

use std::collections::HashMap;
use std::fs;

use anyhow::{Result, anyhow};
use halfstep_model::checkpoint::Checkpoint;
use halfstep_quant::layouts::{Compressed, Gptq, GptqVersion};
use halfstep_quant::{Encodings, Granularity, Scheme};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// Endings of tensors that stand for a packed weight.
const PACKED: [&str; 2] = [".weight_packed", ".qweight"];

/// Opens the folder and uses all of it.
pub(crate) fn run(data: &[u8]) -> Result<()> {
    let Some((config, index, weights)) = split(data) else { return Ok(()) };
    let folder = tempfile::Builder::new().prefix("halfstep-fuzz-").tempdir()?;
    fs::write(folder.path().join("config.json"), config)?;
    if index.is_empty() {
        fs::write(folder.path().join("model.safetensors"), weights)?;
    } else {
        fs::write(folder.path().join("model.safetensors.index.json"), index)?;
        fs::write(folder.path().join("one.safetensors"), weights)?;
    }
    let Ok(checkpoint) = Checkpoint::open(folder.path()) else { return Ok(()) };
    assert!(SafeTensors::deserialize(weights).is_ok(), "the format's library refuses what was opened");
    use_checkpoint(&checkpoint);
    Ok(())
}

fn split(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (lengths, rest) = data.split_first_chunk::<4>()?;
    let [config, index] =
        [[lengths[0], lengths[1]], [lengths[2], lengths[3]]].map(u16::from_le_bytes).map(usize::from);
    let (config, rest) = rest.split_at_checked(config)?;
    let (index, weights) = rest.split_at_checked(index)?;
    Some((config, index, weights))
}

fn use_checkpoint(checkpoint: &Checkpoint) {
    drop((checkpoint.dtype(), checkpoint.plain_config(), checkpoint.companions()));
    for name in checkpoint.names() {
        let info = checkpoint.info(name).expect("it was listed");
        let (dtype, shape, bytes) = checkpoint.stored(name).expect("it was listed");
        assert_eq!((dtype, &shape, bytes.len()), (info.dtype, &info.shape, info.bytes));
        if let Ok(tensor) = checkpoint.tensor(name) {
            assert_eq!(tensor.shape, shape);
            checkpoint.check(&[(name, shape)]).expect("it was read");
        }
        for module in PACKED.iter().filter_map(|end| name.strip_suffix(end)) {
            use_packed(checkpoint, module);
        }
    }
}

/// What is unpacked must be on its grid, and the same as numbers.
fn use_packed(checkpoint: &Checkpoint, module: &str) {
    let Ok(Some((encodings, q))) = checkpoint.packed(module) else { return };
    let weight = format!("{module}.weight");
    let values = encodings.dequantize(&q).expect("unpacked integers are on their grid");
    let plain = checkpoint.info(&weight).is_some();
    if let (false, Ok(tensor)) = (plain, checkpoint.tensor(&weight)) {
        assert_eq!(tensor.as_f32(), Some(values.as_slice()));
        checkpoint.check(&[(&weight, vec![encodings.rows, encodings.cols])]).expect("it was read");
    }
}

/// Plain, indexed, and every way of packing.
pub(crate) fn seeds() -> Result<Vec<Vec<u8>>> {
    let plain = [
        ("a.weight", Dtype::F32, vec![2, 3], vec![1; 24]),
        ("b", Dtype::BF16, vec![4], vec![2; 8]),
        ("c", Dtype::F16, vec![], vec![3; 2]),
        ("d", Dtype::F64, vec![0, 3], vec![]),
        ("e", Dtype::I64, vec![1], vec![4; 8]),
    ];
    let index = json!({"metadata": {"total_size": 42}, "weight_map": {"a.weight": "one.safetensors", "e": "one.safetensors"}});
    let mut seeds = vec![
        folder(&json!({"model_type": "llama"}), None, &plain)?,
        folder(&json!({"vocab_size": 3}), Some(&index), &plain)?,
    ];
    for scheme in [Scheme::Symmetric, Scheme::Asymmetric] {
        for granularity in [Granularity::PerChannel, Granularity::PerGroup { group_size: 16 }] {
            for bits in [3, 4] {
                let (encodings, q) = matrix(bits, scheme, granularity);
                seeds.push(compressed(&encodings, &q)?);
                seeds.push(gptq(&encodings, &q, GptqVersion::V1)?);
                seeds.push(gptq(&encodings, &q, GptqVersion::V2)?);
            }
        }
    }
    Ok(seeds)
}

fn matrix(bits: u8, scheme: Scheme, granularity: Granularity) -> (Encodings, Vec<i32>) {
    let (rows, cols) = (32, 32);
    let entries = if granularity == Granularity::PerChannel { rows } else { rows * 2 };
    let zero_point = if scheme.is_symmetric() { 0 } else { 2 };
    let (scale, zero_point) = (vec![0.5; entries], vec![zero_point; entries]);
    let encodings = Encodings { bits, scheme, granularity, rows, cols, scale, zero_point };
    let q = (0..rows * cols).map(|i| encodings.qmin() + (i % 5) as i32).collect();
    (encodings, q)
}

fn group_size(encodings: &Encodings) -> Option<usize> {
    match encodings.granularity {
        Granularity::PerGroup { group_size } => Some(group_size),
        _ => None,
    }
}

fn compressed(encodings: &Encodings, q: &[i32]) -> Result<Vec<u8>> {
    let packed = Compressed::pack(encodings, q)?;
    let strategy = if group_size(encodings).is_some() { "group" } else { "channel" };
    let weights = json!({
        "num_bits": encodings.bits, "type": "int", "symmetric": encodings.scheme.is_symmetric(),
        "strategy": strategy, "group_size": group_size(encodings),
    });
    let config = json!({"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": null}},
    }});
    let groups = encodings.scale.len() / 32;
    let mut tensors = vec![
        ("m.weight_packed", Dtype::I32, vec![32, packed.weight.len() / 32], words(&packed.weight)),
        (
            "m.weight_scale",
            Dtype::F32,
            vec![32, groups],
            packed.scale.iter().flat_map(|s| s.to_le_bytes()).collect(),
        ),
        ("m.weight_shape", Dtype::I64, vec![2], [32_i64, 32].iter().flat_map(|d| d.to_le_bytes()).collect()),
    ];
    if let Some(zero_point) = &packed.zero_point {
        let shape = vec![zero_point.len() / groups, groups];
        tensors.push(("m.weight_zero_point", Dtype::I32, shape, words(zero_point)));
    }
    folder(&config, None, &tensors)
}

fn gptq(encodings: &Encodings, q: &[i32], version: GptqVersion) -> Result<Vec<u8>> {
    let packed = Gptq::pack(encodings, q, version)?;
    let own =
        json!({"bits": encodings.bits, "group_size": group_size(encodings).map_or(-1, |size| size as i64)});
    let config = json!({"quantization_config": {
        "quant_method": "gptq", "bits": 8, "group_size": 1, "sym": encodings.scheme.is_symmetric(),
        "checkpoint_format": if version == GptqVersion::V1 { "gptq" } else { "gptq_v2" }, "dynamic": {"+:^m$": own},
    }});
    let groups = encodings.scale.len() / 32;
    // 0.5 in half precision.
    let scales = [0x00, 0x38].repeat(encodings.scale.len());
    let index = packed.group_index.iter().flat_map(|group| group.to_le_bytes()).collect();
    let tensors = [
        ("m.qweight", Dtype::I32, vec![packed.weight.len() / 32, 32], words(&packed.weight)),
        ("m.scales", Dtype::F16, vec![groups, 32], scales),
        ("m.qzeros", Dtype::I32, vec![groups, packed.zero_point.len() / groups], words(&packed.zero_point)),
        ("m.g_idx", Dtype::I32, vec![32], index),
    ];
    folder(&config, None, &tensors)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

type Stored<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

fn folder(config: &Value, index: Option<&Value>, tensors: &[Stored<'_>]) -> Result<Vec<u8>> {
    let config = config.to_string();
    let index = index.map(Value::to_string).unwrap_or_default();
    let mut input = Vec::new();
    for text in [&config, &index] {
        input.extend(u16::try_from(text.len())?.to_le_bytes());
    }
    input.extend(config.as_bytes());
    input.extend(index.as_bytes());
    let mut views = Vec::new();
    for (name, dtype, shape, data) in tensors {
        let view = TensorView::new(*dtype, shape.clone(), data).map_err(|e| anyhow!("seed `{name}`: {e}"))?;
        views.push((name.to_string(), view));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    input.extend(safetensors::serialize(views, Some(metadata)).map_err(|e| anyhow!("seed: {e}"))?);
    Ok(input)
}
