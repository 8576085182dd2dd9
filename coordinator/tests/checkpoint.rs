//! Quantized checkpoints: every format holds exactly what was solved, or says why it cannot.
//!
//! Layers are rounded to nearest; how they were rounded does not matter here. With `HALFSTEP_PYTHON` naming a Python
//! that has torch, transformers, compressed-tensors and gguf, the formats' own loaders must agree (`checkpoint/load.py`).

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use halfstep_coordinator::checkpoint::{
    Exported, Format, LayerForm, Options, SolvedLayers, check, export, scale_type,
};
use halfstep_coordinator::{CoordinatorError, Staging};
use halfstep_model::checkpoint::Checkpoint;
use halfstep_model::{Dtype, WeightLayout};
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, ScaleType, Scheme, estimate};
use safetensors::tensor::TensorView;
use tempfile::TempDir;

#[path = "checkpoint/gguf.rs"]
mod gguf;

const HIDDEN: usize = 64;
const INTER: usize = 96;
const KV: usize = 32;
const VOCABULARY: usize = 64;

/// Keys in no order, numbers in their own spelling: both must survive.
const CONFIG: &str = r#"{
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "hidden_act": "silu",
  "vocab_size": 64,
  "rms_norm_eps": 1e-05,
  "rope_theta": 10000.0,
  "max_position_embeddings": 128,
  "tie_word_embeddings": false,
  "dtype": "float32"
}
"#;

/// Numbers in -1..1 that depend on name and position alone.
fn noise(name: &str, count: usize) -> Vec<f32> {
    let mut state =
        name.bytes().fold(0x9e37_79b9_7f4a_7c15_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensors() -> BTreeMap<String, Vec<usize>> {
    let mut shapes = BTreeMap::from([
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("lm_head.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
    ]);
    for block in 0..2 {
        for (part, shape) in [
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![KV, HIDDEN]),
            ("self_attn.v_proj", vec![KV, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![INTER, HIDDEN]),
            ("mlp.up_proj", vec![INTER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INTER]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ] {
            shapes.insert(format!("model.layers.{block}.{part}.weight"), shape);
        }
    }
    shapes
}

fn encode(dtype: Dtype, values: &[f32]) -> (safetensors::Dtype, Vec<u8>) {
    match dtype {
        Dtype::F16 => (
            safetensors::Dtype::F16,
            values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        ),
        Dtype::Bf16 => (
            safetensors::Dtype::BF16,
            values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        ),
        _ => (safetensors::Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
    }
}

/// A tiny Llama with everything that a folder from the hub has beside it.
fn llama(dtype: Dtype) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_weights(folder.path(), dtype, &tensors());
    fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    for name in
        ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "generation_config.json"]
    {
        fs::write(folder.path().join(name), format!("{{\"_name\": \"{name}\"}}")).unwrap();
    }
    for name in ["pytorch_model.bin", "manifest.json", "other.safetensors", ".hidden.json"] {
        fs::write(folder.path().join(name), "not to be carried along").unwrap();
    }
    fs::create_dir(folder.path().join("tokenizer_old")).unwrap();
    folder
}

fn write_weights(folder: &Path, dtype: Dtype, shapes: &BTreeMap<String, Vec<usize>>) {
    let data: Vec<(String, Vec<usize>, safetensors::Dtype, Vec<u8>)> = shapes
        .iter()
        .map(|(name, shape)| {
            let norm = shape.len() == 1;
            let values = noise(name, shape.iter().product());
            let values: Vec<f32> =
                values.iter().map(|v| if norm { 1.0 + v / 8.0 } else { v / 2.0 }).collect();
            let (kind, bytes) = encode(dtype, &values);
            (name.clone(), shape.clone(), kind, bytes)
        })
        .collect();
    let views = data.iter().map(|(name, shape, kind, bytes)| {
        (name.clone(), TensorView::new(*kind, shape.clone(), bytes).unwrap())
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    fs::write(folder.join("model.safetensors"), safetensors::serialize(views, Some(metadata)).unwrap())
        .unwrap();
}

/// Layers as a job would have solved them.
#[derive(Default)]
struct Rounded {
    layers: Vec<(LayerForm, Encodings, Vec<i32>)>,
}

impl Rounded {
    /// Every projection at the grid that `grid` gives for its name.
    fn all(checkpoint: &Checkpoint, kind: ScaleType, grid: impl Fn(&str) -> Option<GridSpec>) -> Self {
        let mut rounded = Self::default();
        for weight in checkpoint.names().filter(|name| name.ends_with("proj.weight")) {
            let name = weight.strip_suffix(".weight").unwrap().to_owned();
            let Some(grid) = grid(&name) else { continue };
            let form = LayerForm { name, weight: weight.to_owned(), layout: WeightLayout::AsIs, grid };
            rounded.add(checkpoint, kind, form);
        }
        rounded
    }

    fn add(&mut self, checkpoint: &Checkpoint, kind: ScaleType, form: LayerForm) {
        let tensor = checkpoint.tensor(&form.weight).unwrap();
        let shape = form.layout.matrix_shape(&tensor.shape).unwrap();
        let matrix = form.layout.to_matrix(&tensor.shape, tensor.as_f32().unwrap()).unwrap();
        let mut encodings = estimate(&form.grid, &matrix, shape.rows, shape.cols, None).unwrap();
        encodings.store_scales_as(kind);
        let q = encodings.quantize_nearest(&matrix);
        self.layers.push((form, encodings, q));
    }
}

impl SolvedLayers for Rounded {
    fn forms(&self) -> Vec<LayerForm> {
        self.layers.iter().map(|(form, ..)| form.clone()).collect()
    }

    fn layer(&self, name: &str) -> Result<Option<(Encodings, Vec<i32>)>, CoordinatorError> {
        let found = self.layers.iter().find(|(form, ..)| form.name == name);
        Ok(found.map(|(_, encodings, q)| (encodings.clone(), q.clone())))
    }
}

fn grid(bits: u8, scheme: Scheme, granularity: Granularity) -> GridSpec {
    GridSpec { bits, scheme, granularity, range: RangeEstimator::MinMax }
}

const G32: Granularity = Granularity::PerGroup { group_size: 32 };

fn write(
    checkpoint: &Checkpoint,
    rounded: &Rounded,
    format: Format,
    to: &Path,
) -> Result<Exported, CoordinatorError> {
    let staging = Staging::new(to, false)?;
    let options = Options { format, shard_bytes: 1 << 30 };
    let exported = export(checkpoint, rounded, options, &staging)?;
    staging.publish()?;
    Ok(exported)
}

/// The folder's weights are the solved ones, in f32, and all else is the original's.
fn compare(original: &Checkpoint, written: &Path, rounded: &Rounded) {
    let written = Checkpoint::open(written).unwrap();
    let weights: BTreeMap<&str, _> =
        rounded.layers.iter().map(|layer| (layer.0.weight.as_str(), layer)).collect();
    for name in original.names() {
        match weights.get(name) {
            None => assert_eq!(written.stored(name).unwrap(), original.stored(name).unwrap(), "{name}"),
            Some((_, encodings, q)) => {
                let shape = original.info(name).unwrap().shape.clone();
                written.check(&[(name, shape.clone())]).unwrap();
                let found = written.tensor(name).unwrap();
                assert_eq!(found.shape, shape);
                assert_eq!(found.as_f32().unwrap(), encodings.dequantize(q).unwrap(), "{name}");
            }
        }
    }
}

#[test]
fn every_format_and_grid_holds_what_was_solved() {
    let folder = llama(Dtype::F32);
    let original = Checkpoint::open(folder.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let mut cases = 0;
    for format in [Format::CompressedTensors, Format::Gptq, Format::GptqV2, Format::FakeQuant] {
        for bits in 2..=8 {
            for scheme in [Scheme::Symmetric, Scheme::SymmetricStrict, Scheme::Asymmetric] {
                for granularity in [Granularity::PerTensor, Granularity::PerChannel, G32] {
                    // A strict grid is stored as any symmetric one: once is enough.
                    if scheme == Scheme::SymmetricStrict && bits != 4 {
                        continue;
                    }
                    let kind = scale_type(&original, format);
                    let rounded = Rounded::all(&original, kind, |_| Some(grid(bits, scheme, granularity)));
                    let to = out.path().join(format!("{cases}"));
                    let gptq = matches!(format, Format::Gptq | Format::GptqV2);
                    let result = write(&original, &rounded, format, &to);
                    if gptq && matches!(bits, 5..=7) {
                        let error = result.unwrap_err().to_string();
                        assert!(error.contains(&format!("no {bits}-bit weights")), "{error}");
                        assert!(!to.exists());
                    } else {
                        result.unwrap();
                        compare(&original, &to, &rounded);
                        fs::remove_dir_all(&to).unwrap();
                    }
                    cases += 1;
                }
            }
        }
    }
    assert_eq!(cases, 4 * (7 * 6 + 3));
}

#[test]
fn the_folder_keeps_its_other_files_and_the_order_of_its_configuration() {
    let folder = llama(Dtype::Bf16);
    let original = Checkpoint::open(folder.path()).unwrap();
    let rounded = Rounded::all(&original, ScaleType::Bf16, |_| Some(grid(4, Scheme::Symmetric, G32)));
    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("out");
    write(&original, &rounded, Format::CompressedTensors, &to).unwrap();
    compare(&original, &to, &rounded);
    let mut files: Vec<String> =
        fs::read_dir(&to).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    let expected = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ];
    assert_eq!(files, expected);
    assert_eq!(fs::read_to_string(to.join("merges.txt")).unwrap(), "{\"_name\": \"merges.txt\"}");
    let config = fs::read_to_string(to.join("config.json")).unwrap();
    let start = CONFIG.trim_end().trim_end_matches('}').trim_end();
    assert!(config.starts_with(&format!("{start},\n  \"quantization_config\": {{")), "{config}");
    let settings = &serde_json::from_str::<serde_json::Value>(&config).unwrap()["quantization_config"];
    assert_eq!(settings["ignore"], serde_json::json!(["lm_head", "model.embed_tokens"]));
    assert_eq!(settings["config_groups"]["group_0"]["targets"], serde_json::json!(["Linear"]));
    let written = Checkpoint::open(&to).unwrap();
    assert_eq!(written.info("model.layers.0.mlp.up_proj.weight_scale").unwrap().dtype, Dtype::Bf16);
    assert_eq!(written.plain_config(), *original.config());
    let bytes = fs::read(to.join("model.safetensors")).unwrap();
    assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
}

#[test]
fn large_checkpoints_are_split_into_files_with_an_index() {
    let folder = llama(Dtype::F32);
    let original = Checkpoint::open(folder.path()).unwrap();
    let rounded = Rounded::all(&original, ScaleType::F32, |_| Some(grid(4, Scheme::Asymmetric, G32)));
    let out = tempfile::tempdir().unwrap();
    for (shard_bytes, fewest) in [(1, 30), (20_000, 3), (1 << 30, 1)] {
        let to = out.path().join(shard_bytes.to_string());
        let staging = Staging::new(&to, false).unwrap();
        let options = Options { format: Format::CompressedTensors, shard_bytes };
        export(&original, &rounded, options, &staging).unwrap();
        staging.publish().unwrap();
        compare(&original, &to, &rounded);
        let shards: Vec<PathBuf> = fs::read_dir(&to)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|end| end == "safetensors"))
            .collect();
        assert!(shards.len() >= fewest, "{} files of at most {shard_bytes} bytes", shards.len());
        assert_eq!(shards.len() > 1, to.join("model.safetensors.index.json").exists());
        for path in shards {
            let bytes = fs::read(path).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let size: usize = tensors.iter().map(|(_, view)| view.data().len()).sum();
            assert!(size as u64 <= shard_bytes || tensors.len() == 1);
        }
    }
}

/// Three kinds of layers: most as given, the second block's gates at 8 bits per channel, one left alone.
fn mixed(name: &str, scheme: Scheme) -> Option<GridSpec> {
    match name {
        "model.layers.0.self_attn.o_proj" => None,
        "model.layers.1.mlp.gate_proj" => Some(grid(8, Scheme::Symmetric, Granularity::PerChannel)),
        _ => Some(grid(4, scheme, G32)),
    }
}

#[test]
fn layers_may_differ_and_some_may_stay() {
    let folder = llama(Dtype::F32);
    let original = Checkpoint::open(folder.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    for format in [Format::CompressedTensors, Format::Gptq, Format::FakeQuant] {
        let kind = scale_type(&original, format);
        let rounded = Rounded::all(&original, kind, |name| mixed(name, Scheme::Symmetric));
        let to = out.path().join(format.to_string());
        write(&original, &rounded, format, &to).unwrap();
        compare(&original, &to, &rounded);
        let settings = &Checkpoint::open(&to).unwrap().config()["quantization_config"].clone();
        match format {
            Format::CompressedTensors => {
                let ignored = ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.o_proj"];
                assert_eq!(settings["ignore"], serde_json::json!(ignored));
                let groups = settings["config_groups"].as_object().unwrap();
                let of = |bits| groups.values().find(|group| group["weights"]["num_bits"] == bits).unwrap();
                assert_eq!(of(8)["targets"], serde_json::json!(["model.layers.1.mlp.gate_proj"]));
                assert_eq!(of(8)["weights"]["strategy"], "channel");
                assert_eq!(of(4)["targets"].as_array().unwrap().len(), 12);
            }
            Format::Gptq => {
                assert_eq!(settings["checkpoint_format"], "gptq");
                let dynamic = serde_json::json!({
                    r"+:^model\.layers\.1\.mlp\.gate_proj$": {"bits": 8, "sym": true, "group_size": -1},
                    r"-:^model\.layers\.0\.self_attn\.o_proj$": {},
                });
                assert_eq!(settings["dynamic"], dynamic);
            }
            _ => assert!(settings.is_null()),
        }
    }
}

#[test]
fn gptq_takes_version_2_where_a_zero_point_may_be_0() {
    let folder = llama(Dtype::F32);
    let original = Checkpoint::open(folder.path()).unwrap();
    let mut rounded = Rounded::all(&original, ScaleType::F16, |_| Some(grid(4, Scheme::Asymmetric, G32)));
    rounded.layers[0].1.zero_point[0] = 0;
    let out = tempfile::tempdir().unwrap();
    let exported = write(&original, &rounded, Format::Gptq, &out.path().join("1")).unwrap();
    assert!(exported.notes[0].contains("gptq_v2"), "{:?}", exported.notes);
    compare(&original, &out.path().join("1"), &rounded);
    let config = Checkpoint::open(&out.path().join("1")).unwrap().config().clone();
    assert_eq!(config["quantization_config"]["checkpoint_format"], "gptq_v2");
}

#[test]
fn plain_weights_are_rounded_to_their_type_and_the_report_says_so() {
    let out = tempfile::tempdir().unwrap();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let folder = llama(dtype);
        let original = Checkpoint::open(folder.path()).unwrap();
        let rounded = Rounded::all(&original, ScaleType::F32, |_| Some(grid(4, Scheme::Symmetric, G32)));
        let to = out.path().join(dtype.to_string());
        let exported = write(&original, &rounded, Format::FakeQuant, &to).unwrap();
        assert_eq!(exported.notes.is_empty(), dtype == Dtype::F32, "{:?}", exported.notes);
        let written = Checkpoint::open(&to).unwrap();
        for (form, encodings, q) in &rounded.layers {
            let expected: Vec<f32> = encodings
                .dequantize(q)
                .unwrap()
                .into_iter()
                .map(|value| match dtype {
                    Dtype::F16 => half::f16::from_f32(value).to_f32(),
                    Dtype::Bf16 => half::bf16::from_f32(value).to_f32(),
                    _ => value,
                })
                .collect();
            assert_eq!(written.tensor(&form.weight).unwrap().as_f32().unwrap(), expected);
            assert_eq!(written.info(&form.weight).unwrap().dtype, dtype);
        }
        assert_eq!(fs::read_to_string(to.join("config.json")).unwrap(), CONFIG);
    }
}

#[test]
fn transposed_weights_are_plain_or_refused() {
    let folder = llama(Dtype::F32);
    let original = Checkpoint::open(folder.path()).unwrap();
    let mut rounded = Rounded::default();
    let name = "model.layers.0.mlp.down_proj".to_owned();
    let weight = format!("{name}.weight");
    let grid = grid(4, Scheme::Symmetric, Granularity::PerChannel);
    let form = LayerForm { name, weight, layout: WeightLayout::Transposed, grid };
    rounded.add(&original, ScaleType::F32, form.clone());
    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("plain");
    write(&original, &rounded, Format::FakeQuant, &to).unwrap();
    let (_, encodings, q) = &rounded.layers[0];
    let expected = form.layout.from_matrix(&[HIDDEN, INTER], &encodings.dequantize(q).unwrap()).unwrap();
    let found = Checkpoint::open(&to).unwrap().tensor(&form.weight).unwrap();
    assert_eq!(found.as_f32().unwrap(), expected);
    for format in [Format::CompressedTensors, Format::Gptq, Format::GptqV2] {
        let error = check(&original, &rounded.forms(), format).unwrap_err().to_string();
        assert!(error.contains("stored transposed"), "{error}");
    }
}

#[test]
fn what_a_format_cannot_hold_is_refused_before_anything_is_written() {
    let folder = llama(Dtype::F32);
    let original = Checkpoint::open(folder.path()).unwrap();
    let per_group = |group_size| Granularity::PerGroup { group_size };
    for (format, grid, expect) in [
        (Format::CompressedTensors, grid(16, Scheme::Symmetric, G32), "bit width is 16"),
        (
            Format::CompressedTensors,
            grid(4, Scheme::Symmetric, per_group(48)),
            "group size 48 does not divide the 64",
        ),
        (Format::GptqV2, grid(6, Scheme::Symmetric, G32), "no 6-bit weights, expected 2, 3, 4 or 8"),
    ] {
        let rounded = Rounded::all(&original, ScaleType::F32, |_| Some(grid));
        let error = check(&original, &rounded.forms(), format).unwrap_err().to_string();
        assert!(error.starts_with("layer `model.layers.0.mlp.") && error.contains(expect), "{error}");
    }
    let narrow = tempfile::tempdir().unwrap();
    fs::write(narrow.path().join("config.json"), "{}").unwrap();
    write_weights(narrow.path(), Dtype::F32, &BTreeMap::from([("a_proj.weight".to_owned(), vec![40, 64])]));
    let narrow = Checkpoint::open(narrow.path()).unwrap();
    let rounded = Rounded::all(&narrow, ScaleType::F16, |_| Some(grid(4, Scheme::Symmetric, G32)));
    let error = check(&narrow, &rounded.forms(), Format::Gptq).unwrap_err().to_string();
    assert!(error.contains("gptq cannot hold 40 outputs and 64 inputs, expected multiples of 32"), "{error}");

    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("packed");
    write(&narrow, &rounded, Format::CompressedTensors, &to).unwrap();
    let error = check(&Checkpoint::open(&to).unwrap(), &[], Format::FakeQuant).unwrap_err().to_string();
    assert!(error.contains("quantized already"), "{error}");
}

#[test]
fn results_that_are_not_what_was_planned_never_appear() {
    let folder = llama(Dtype::Bf16);
    let original = Checkpoint::open(folder.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("out");
    let good = |kind| Rounded::all(&original, kind, |_| Some(grid(4, Scheme::Symmetric, G32)));
    let refused = |rounded: &Rounded, expect: &str| {
        let error = write(&original, rounded, Format::CompressedTensors, &to).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}: expected `{expect}`");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "nothing is left behind");
    };
    refused(&good(ScaleType::F32), "which Bf16 stores as");
    let mut rounded = good(ScaleType::Bf16);
    rounded.layers[3].1.bits = 5;
    refused(&rounded, "at 5 bits symmetric per-group:32, expected");
    let mut rounded = good(ScaleType::Bf16);
    rounded.layers[3].2[7] = 8;
    refused(&rounded, "integer 7 is 8");
    let mut rounded = good(ScaleType::Bf16);
    rounded.layers[3].0.weight = "absent.weight".into();
    refused(&rounded, "tensor `absent.weight`: expected, but not in the checkpoint");

    struct Gone(Rounded);
    impl SolvedLayers for Gone {
        fn forms(&self) -> Vec<LayerForm> {
            self.0.forms()
        }
        fn layer(&self, _name: &str) -> Result<Option<(Encodings, Vec<i32>)>, CoordinatorError> {
            Ok(None)
        }
    }
    let staging = Staging::new(&to, false).unwrap();
    let options = Options { format: Format::CompressedTensors, shard_bytes: 1 << 30 };
    let error = export(&original, &Gone(good(ScaleType::Bf16)), options, &staging).unwrap_err().to_string();
    assert!(error.contains("its integers are gone"), "{error}");
}

#[test]
fn damage_in_packed_weights_is_named() {
    let folder = llama(Dtype::F32);
    let original = Checkpoint::open(folder.path()).unwrap();
    let rounded = Rounded::all(&original, ScaleType::F32, |_| Some(grid(4, Scheme::Asymmetric, G32)));
    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("out");
    write(&original, &rounded, Format::CompressedTensors, &to).unwrap();
    let config = fs::read_to_string(to.join("config.json")).unwrap();
    let weight = "model.layers.0.mlp.up_proj.weight";
    for (from, into, expect) in [
        ("\"num_bits\": 4", "\"num_bits\": 8", "weight_packed`: is int32 [96, 8], expected int32 [96, 16]"),
        ("\"num_bits\": 4", "\"num_bits\": 0", "bit width is 0"),
        ("\"group_size\": 32", "\"group_size\": 16", "weight_scale`: is float [96, 2], expected float or"),
        ("\"group_size\": 32", "\"group_size\": 0", "group size is 0"),
        ("\"Linear\"", "\"Other\"", "no group of `config_groups`"),
        (
            "\"compressed-tensors\"",
            "\"awq\"",
            "quantization method is `awq`, expected compressed-tensors or gptq",
        ),
        ("\"quantization_config\"", "\"other\"", "has no `quantization_config`"),
    ] {
        let text = config.replace(from, into);
        assert_ne!(text, config);
        fs::write(to.join("config.json"), text).unwrap();
        let error = Checkpoint::open(&to).unwrap().tensor(weight).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}: expected `{expect}`");
    }
}

/// Writes all that the formats' own loaders are asked to read, and asks them.
#[test]
fn other_programs_compute_the_same() {
    let Some(python) = std::env::var_os("HALFSTEP_PYTHON") else {
        eprintln!(
            "skipped: HALFSTEP_PYTHON names no Python with torch, transformers, compressed-tensors and gguf"
        );
        return;
    };
    let folder = llama(Dtype::F32);
    let original = Checkpoint::open(folder.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let mut pairs = 0;
    for (format, bits) in [
        (Format::CompressedTensors, &[2, 3, 4, 5, 8][..]),
        (Format::Gptq, &[2, 3, 4, 8]),
        (Format::GptqV2, &[2, 3, 4, 8]),
    ] {
        for bits in bits {
            for (scheme, granularity) in [
                (Scheme::Symmetric, G32),
                (Scheme::Asymmetric, G32),
                (Scheme::Symmetric, Granularity::PerChannel),
                (Scheme::Asymmetric, Granularity::PerChannel),
            ] {
                let kind = scale_type(&original, format);
                let rounded = Rounded::all(&original, kind, |_| Some(grid(*bits, scheme, granularity)));
                pair(
                    &original,
                    &rounded,
                    format,
                    &out.path().join(format!("{format}-{bits}-{scheme}-{granularity}")),
                );
                pairs += 1;
            }
        }
        for scheme in [Scheme::Symmetric, Scheme::Asymmetric] {
            let kind = scale_type(&original, format);
            let rounded = Rounded::all(&original, kind, |name| mixed(name, scheme));
            pair(&original, &rounded, format, &out.path().join(format!("{format}-mixed-{scheme}")));
            pairs += 1;
        }
    }
    pairs += gguf::pairs(out.path());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checkpoint/load.py");
    let output = Command::new(python).arg(script).arg(out.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    eprintln!("{text}");
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.lines().filter(|line| line.starts_with("PASS")).count(), pairs, "{text}");
}

/// The packed checkpoint, and beside it the same weights in the plain.
fn pair(original: &Checkpoint, rounded: &Rounded, format: Format, to: &Path) {
    fs::create_dir_all(to).unwrap();
    write(original, rounded, format, &to.join("packed")).unwrap();
    write(original, rounded, Format::FakeQuant, &to.join("plain")).unwrap();
}
