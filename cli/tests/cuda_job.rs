//! A language model's whole job on a CUDA device that the host pretends to be: every step of the path that a GPU's jobs take, from the
//! look-up of libraries to the files.
//!
//! The pretended device is slow: one small block, roundings by the search for ranges alone. Not here: what its kernels compute
//! (`compute`), speed, real devices (`halfstep-gpu`).
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

#[path = "../../node/compute/tests/device/libraries.rs"]
mod libraries;
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use support::npy;
use tempfile::TempDir;

/// Wide enough for statistics on the device, long enough for attention by products.
const WIDTH: usize = 256;
const VOCABULARY: usize = 64;
const WINDOWS: usize = 2;
const TOKENS: usize = 520;

/// Numbers between -1 and 1.
fn numbers(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A Llama of one block, its weights in bfloat16, and token ids.
fn checkpoint(folder: &Path) -> (PathBuf, PathBuf) {
    let (model, data) = (folder.join("model"), folder.join("tokens.npy"));
    std::fs::create_dir(&model).unwrap();
    let mut shapes = vec![("model.embed_tokens".to_owned(), vec![VOCABULARY, WIDTH])];
    for name in ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| format!("self_attn.{name}")) {
        shapes.push((format!("model.layers.0.{name}"), vec![WIDTH, WIDTH]));
    }
    for name in ["gate_proj", "up_proj", "down_proj"] {
        shapes.push((format!("model.layers.0.mlp.{name}"), vec![WIDTH, WIDTH]));
    }
    for name in ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"] {
        shapes.push((name.to_owned(), vec![WIDTH]));
    }
    let (mut header, mut bytes) = (serde_json::Map::new(), Vec::new());
    for (seed, (name, shape)) in shapes.into_iter().enumerate() {
        let (begin, mut next) = (bytes.len(), numbers(seed as u64));
        for _ in 0..shape.iter().product() {
            let value = if shape.len() == 1 { 1.0 } else { next() / 16.0 };
            bytes.extend_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
        }
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, bytes.len()]});
        header.insert(format!("{name}.weight"), entry);
    }
    let header = Value::from(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes].concat();
    std::fs::write(model.join("model.safetensors"), file).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": WIDTH,
        "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": WIDTH / 4, "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    });
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    let mut next = numbers(99);
    let mut id = || ((next() + 1.0) * 0.499 * VOCABULARY as f32) as i64;
    let ids: Vec<u8> = (0..WINDOWS * TOKENS).flat_map(|_| id().to_le_bytes()).collect();
    std::fs::write(&data, npy("<i8", &format!("({WINDOWS}, {TOKENS})"), &ids)).unwrap();
    (model, data)
}

#[test]
fn a_language_model_on_a_device_has_the_same_bytes_for_any_threads_and_is_as_good_as_the_cpus() {
    let folder = TempDir::new().unwrap();
    let libraries = folder.path().join("libraries");
    std::fs::create_dir(&libraries).unwrap();
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../node/compute/tests");
    if let Err(why) = libraries::build(&tests, &libraries) {
        return println!("SKIPPED: {why}");
    }
    let (model, data) = checkpoint(folder.path());
    let run_with = |name: &str, device: &str, options: &[&str], memory: Option<&str>| {
        let out = folder.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_halfstep"));
        command.arg("quantize").arg(&model).arg("--calibration").arg(&data).arg("--output").arg(&out);
        command.args(["--sequence-length", &TOKENS.to_string(), "--device", device, "--group-size", "64"]);
        command.args([
            "--start",
            "nearest",
            "--refine-sweeps",
            "0",
            "--scale-fits",
            "0",
            "--shard-size",
            "1",
        ]);
        command.args(options).env("LD_LIBRARY_PATH", &libraries);
        command.envs(memory.map(|bytes| ("FAKE_CUDA_MEMORY", bytes)));
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{said}");
        (out, said)
    };
    let run = |name: &str, device: &str, options: &[&str]| run_with(name, device, options, None).0;
    let read = |out: &Path, file: &str| std::fs::read(out.join(file)).unwrap();
    let errors = |out: &Path| -> Vec<(f64, f64)> {
        let report: Value = serde_json::from_slice(&read(out, "report.json")).unwrap();
        let solved = report["layers"].as_array().unwrap().iter().filter(|layer| layer["solved"].is_object());
        let of = |layer: &Value, key: &str| layer["solved"][key].as_f64().unwrap();
        solved.map(|layer| (of(layer, "objective"), of(layer, "objective_nearest"))).collect()
    };
    for carries in ["bf16", "f32"] {
        let fixed = ["--carries", carries];
        let one = run(&format!("one-{carries}"), "cuda:0", &[&fixed[..], &["--threads", "1"]].concat());
        // What takes another way with threads is activations that stay on the device.
        if carries == "bf16" {
            let two = run("two", "cuda:0", &[&fixed[..], &["--threads", "2"]].concat());
            // A device so small that activations have to leave it.
            let alone = [&fixed[..], &["--threads", "1"]].concat();
            let (small, said) = run_with("small", "cuda:0", &alone, Some("10000000"));
            assert!(said.contains("out of memory"), "{said}");
            for file in ["model.safetensors", "report.json", "manifest.json"] {
                assert!(read(&one, file) == read(&two, file), "{file}");
                assert!(read(&one, file) == read(&small, file), "{file}, on a small device");
            }
        }
        let cpu = run(&format!("cpu-{carries}"), "cpu", &fixed);
        let (ours, theirs) = (errors(&one), errors(&cpu));
        assert_eq!((ours.len(), theirs.len()), (7, 7));
        for ((ours, _), (theirs, _)) in ours.iter().zip(&theirs) {
            assert!((ours / theirs - 1.0).abs() < 0.02, "{carries}: {ours}, on the CPU {theirs}");
        }
    }
}
