//! The real binary on folders of language models: what `eval` prints of them and what it refuses.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn repository(path: &str) -> String {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    path.to_str().unwrap().to_owned()
}

fn model() -> String {
    repository("common/model/tests/decoders/llama")
}

fn eval(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfstep"));
    command.arg("eval").args(arguments).env_remove("HALFSTEP_ONNXRUNTIME").output().unwrap()
}

fn ids(key: &str) -> String {
    repository(&format!("coordinator/tests/golden/tokens/ids.npz:{key}"))
}

#[test]
fn a_language_model_is_compared_with_its_reference() {
    let output = eval(&["--json", "--data", &ids("two"), "--reference", &model(), &model()]);
    assert!(output.status.success(), "{output:?}");
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let [reference, row] = &rows.as_array().unwrap()[..] else { panic!("{rows}") };
    // Three and two tokens, the first of each not predicted.
    assert_eq!((&row["tokens"], &row["windows"], &row["method"]), (&3.into(), &2.into(), &"chunked".into()));
    assert_eq!((&row["kl"], &row["agreement"]), (&0.0.into(), &1.0.into()));
    assert!(reference["kl"].is_null() && row["perplexity"].as_f64().unwrap() > 1.0, "{rows}");
    assert_eq!(row["perplexity"], reference["perplexity"]);
}

#[test]
fn the_table_says_how_windows_were_made() {
    let output = eval(&["--data", &ids("one"), "--sequence-length", "4", "--samples", "1", &model()]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("chunked: 1 window of up to 4 tokens, each by itself"), "{text}");
    assert!(text.contains("1 document, 2 windows of up to 4 tokens, 1 used with 4 tokens"), "{text}");
}

#[test]
fn what_cannot_be_measured_is_refused_in_a_sentence() {
    let onnx = repository("examples/fashion-mnist/model.onnx");
    for (arguments, code, expect) in [
        (vec!["--data", &ids("two"), &model(), &onnx], 2, "1 of 2 models are folders of language models"),
        (
            vec!["--data", &repository("README.md"), &model()],
            65,
            "unknown kind, expected .txt, .jsonl, .parquet",
        ),
        (
            vec!["--data", &repository("coordinator/tests/golden/tokens/documents.jsonl"), &model()],
            65,
            "tokenizer `tokenizer.json`: is missing",
        ),
        (
            vec!["--data", &repository("coordinator/tests/golden/tokens/ids.npz"), &model()],
            65,
            "`two`, `one`",
        ),
    ] {
        let output = eval(&arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expect), "{arguments:?}: {stderr}");
    }
}
