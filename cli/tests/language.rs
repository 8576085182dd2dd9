//! The real binary on tiny language models of every family: quantized, exported, read back; and what is refused.
//!
//! Not here: what the families compute (`exec`), the layouts (`quant`, `coordinator`), real models (`docs/results.md`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use support::npy;
use tempfile::TempDir;

const BAD_INPUT: i32 = 65;
const BAD_CONFIGURATION: i32 = 78;

fn families() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../common/model/tests/decoders")
}

/// Twelve sequences of up to 16 tokens below 37.
fn tokens(folder: &Path) -> PathBuf {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % 37) as i64
    };
    let ids: Vec<i64> = (0..12 * 16).map(|at| if at % 48 == 47 { -1 } else { next() }).collect();
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let path = folder.join("tokens.npy");
    std::fs::write(&path, npy("<i8", "(12, 16)", &bytes)).unwrap();
    path
}

fn quantize(model: &Path, data: &Path, output: &Path, options: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfstep"));
    command.arg("quantize").arg(model).arg("--calibration").arg(data).arg("--output").arg(output);
    command.args(["--shard-size", "3", "--iterations", "20"]).args(options);
    command.env_remove("HALFSTEP_LOG").output().unwrap()
}

fn solved(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

fn report(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("report.json")).unwrap()).unwrap()
}

fn manifest(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("manifest.json")).unwrap()
}

#[test]
fn every_family_is_quantized_and_never_worse_than_nearest() {
    let folder = TempDir::new().unwrap();
    let data = tokens(folder.path());
    let mut count = 0;
    for entry in std::fs::read_dir(families()).unwrap() {
        let model = entry.unwrap().path();
        if !model.is_dir() {
            continue;
        }
        let out = folder.path().join(model.file_name().unwrap());
        solved(&quantize(&model, &data, &out, &["--format", "fake-quant", "--group-size", "4"]));
        let report = report(&out);
        assert_eq!(report["failed"], 0, "{}: {report}", model.display());
        assert!(report["solved"].as_u64().unwrap() >= 8, "{}", model.display());
        for layer in report["layers"].as_array().unwrap().iter().filter(|layer| !layer["solved"].is_null()) {
            let (now, nearest) = (&layer["solved"]["objective"], &layer["solved"]["objective_nearest"]);
            assert!(now.as_f64().unwrap() <= nearest.as_f64().unwrap(), "{}: {layer}", model.display());
        }
        count += 1;
    }
    assert!(count >= 20, "{count} families");
}

#[test]
fn threads_and_memory_never_show_in_the_bytes_and_bf16_carries_do_not_depend_on_them() {
    let folder = TempDir::new().unwrap();
    let data = tokens(folder.path());
    let model = families().join("llama");
    for carries in ["f32", "bf16"] {
        let run = |name: &str, options: &[&str]| {
            let out = folder.path().join(format!("{name}-{carries}"));
            let fixed = ["--carries", carries, "--bits", "3", "--group-size", "4"];
            solved(&quantize(&model, &data, &out, &[&fixed, options].concat()));
            manifest(&out)
        };
        let one = run("one", &["--threads", "1"]);
        assert!(one == run("three", &["--threads", "3"]), "{carries}: threads");
        assert!(one == run("spilled", &["--memory-budget", "0"]), "{carries}: memory");
    }
}

#[test]
fn what_belongs_to_the_model_is_carried_and_the_configuration_says_how_it_is_stored() {
    let folder = TempDir::new().unwrap();
    let data = tokens(folder.path());
    let out = folder.path().join("out");
    let grid = ["--bits", "4", "--group-size", "4", "--scheme", "asymmetric"];
    solved(&quantize(&families().join("llama"), &data, &out, &grid));
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["quant_method"], "compressed-tensors");
    assert_eq!(config["model_type"], "llama");
    let again = quantize(&out, &data, &folder.path().join("again"), &grid);
    assert_eq!(again.status.code(), Some(BAD_INPUT));
    let stderr = String::from_utf8_lossy(&again.stderr);
    assert!(stderr.contains("already quantized"), "{stderr}");
}

#[test]
fn what_gguf_has_no_words_for_is_said_before_any_work() {
    let folder = TempDir::new().unwrap();
    let (data, out) = (tokens(folder.path()), folder.path().join("out"));
    for (family, expect) in [
        ("gpt2", "no words for `gpt2`, expected one of llama, mistral, qwen2, qwen3"),
        ("qwen3_moe", "no words for `qwen3_moe`"),
        ("llama", "expected a multiple of 32 inputs"),
    ] {
        let refused = quantize(&families().join(family), &data, &out, &["--format", "gguf"]);
        let stderr = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(BAD_CONFIGURATION), "{family}: {stderr}");
        assert!(stderr.contains(expect), "{family}: {stderr}");
        assert!(!out.exists());
    }
}

#[test]
fn overrides_and_skips_reach_layers_by_pattern() {
    let folder = TempDir::new().unwrap();
    let (data, out) = (tokens(folder.path()), folder.path().join("out"));
    let options =
        ["--override", "model.layers.*.mlp.down_proj:bits=8", "--skip", "model.layers.0.self_attn.*"];
    solved(&quantize(&families().join("llama"), &data, &out, &options));
    let report = report(&out);
    for layer in report["layers"].as_array().unwrap() {
        let name = layer["name"].as_str().unwrap();
        let bits = layer["solved"]["grid"]["bits"].as_u64();
        let kept =
            name.starts_with("model.layers.0.self_attn") || name.contains("embed") || name == "lm_head";
        let expected = match name.ends_with("down_proj") {
            _ if kept => None,
            true => Some(8),
            false => Some(4),
        };
        assert_eq!(bits, expected, "{name}");
    }
}

/// A tokenizer of 37 words, `t0` to `t36`.
fn word_tokenizer() -> String {
    let words: serde_json::Map<String, Value> = (0..37).map(|id| (format!("t{id}"), id.into())).collect();
    let model = serde_json::json!({"type": "WordLevel", "vocab": words, "unk_token": "t0"});
    let pre = serde_json::json!({"type": "WhitespaceSplit"});
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": pre, "post_processor": null, "decoder": null, "model": model
    })
    .to_string()
}

#[test]
fn text_is_tokenised_by_the_tokenizer_that_is_named() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let ids: Vec<i64> = (0..12 * 16).map(|at| (at * 5 + at / 7) % 37).collect();
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    std::fs::write(path("ids.npy"), npy("<i8", "(12, 16)", &bytes)).unwrap();
    let words: Vec<String> = ids.iter().map(|id| format!("t{id}")).collect();
    let lines: Vec<String> =
        words.chunks(16).map(|line| format!("{{\"text\": \"{}\"}}", line.join(" "))).collect();
    std::fs::write(path("text.jsonl"), lines.join("\n")).unwrap();
    std::fs::create_dir(path("words")).unwrap();
    std::fs::write(path("words/tokenizer.json"), word_tokenizer()).unwrap();
    let llama = families().join("llama");
    solved(&quantize(&llama, &path("ids.npy"), &path("by-ids"), &["--group-size", "4"]));
    for (out, named) in [("by-file", "words/tokenizer.json"), ("by-folder", "words")] {
        let named = path(named);
        let options = ["--group-size", "4", "--tokenizer", named.to_str().unwrap()];
        solved(&quantize(&llama, &path("text.jsonl"), &path(out), &options));
        let weights = |out: &str| std::fs::read(path(out).join("model.safetensors")).unwrap();
        assert!(weights(out) == weights("by-ids"), "{out}: other weights than from the ids");
        assert!(!path(out).join("tokenizer.json").exists(), "{out}: the checkpoint has no tokenizer");
        let manifest: Value = serde_json::from_slice(&manifest(&path(out))).unwrap();
        assert!(manifest["inputs"].to_string().contains("tokenizer.json"), "{out}: {}", manifest["inputs"]);
    }
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is_computed() {
    let folder = TempDir::new().unwrap();
    let data = tokens(folder.path());
    let (llama, out) = (families().join("llama"), folder.path().join("out"));
    let unknown = folder.path().join("unknown");
    std::fs::create_dir(&unknown).unwrap();
    std::fs::copy(llama.join("model.safetensors"), unknown.join("model.safetensors")).unwrap();
    std::fs::write(unknown.join("config.json"), r#"{"model_type": "mamba", "vocab_size": 37}"#).unwrap();
    let onnx = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fashion-mnist/model.onnx");
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "no tokenizer").unwrap();
    let cases: [(&Path, &Path, &[&str], i32, &str); 8] = [
        (&unknown, &data, &[], BAD_INPUT, "mamba"),
        (&onnx, &data, &["--format", "gptq"], BAD_CONFIGURATION, "language models"),
        (&llama, &data, &["--format", "gptq"], BAD_CONFIGURATION, "32"),
        (&llama, &text, &[], BAD_INPUT, "tokenizer.json"),
        (&llama, &data, &["--skip", "nothing*"], BAD_CONFIGURATION, "nothing*"),
        (&llama, &text, &["--tokenizer", "nowhere"], BAD_INPUT, "tokenizer `nowhere`"),
        (&onnx, &data, &["--tokenizer", "nowhere"], BAD_CONFIGURATION, "language models"),
        (&llama, &data, &["--sequence-length", "65"], BAD_INPUT, "at most the 64 positions of the model"),
    ];
    for (model, data, options, code, said) in cases {
        let output = quantize(model, data, &out, options);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}: {stderr}");
        assert!(stderr.contains(said), "{said}: {stderr}");
        assert!(!out.exists(), "{said}: something was written");
    }
}
