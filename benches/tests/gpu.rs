//! The dry run of the GPU benchmark: every part, on the CPU, with tiny shapes; and what it says when something is wrong.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a helper that fails fails its test, and says what it skips"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const GPU: &str = env!("CARGO_BIN_EXE_halfstep-gpu");

/// `halfstep` beside the benchmark, where `cargo test --workspace` and `cargo build` put it.
fn halfstep() -> Option<PathBuf> {
    let path = Path::new(GPU).with_file_name(format!("halfstep{}", std::env::consts::EXE_SUFFIX));
    if !path.is_file() {
        println!("skipped: whole jobs, {} is not there; `cargo build --release -p halfstep`", path.display());
    }
    path.is_file().then_some(path)
}

fn gpu(words: &[&str]) -> Output {
    Command::new(GPU).args(["--device", "cpu", "--quick"]).args(words).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn lines_of(text: &str, expected: &[&str]) {
    for part in expected {
        assert!(text.contains(part), "no `{part}` in {text}");
    }
}

const KERNELS: [&str; 15] = [
    "check adaround, 20 iterations",
    "check refine block",
    "check dots, scaled and copied rows",
    "check grids searched for",
    "check refine whole rows",
    "check objective of rows",
    "copy on the device",
    "gradient product",
    "step [",
    "iteration [",
    "gram [",
    "statistics of 64, f32",
    "sweep [",
    "solve [",
    "block tiny, bf16, capture, 8 threads",
];
const JOBS: [&str; 9] = [
    "fashion-mnist W3, files that differ                0.0000          of 5, ",
    "fashion-mnist W3, cpu, over nearest rounding",
    "fashion-mnist W3, eval.npz, original",
    "fashion-mnist W3, eval.npz, cpu",
    " dB",
    "smollm2 W4: left out, ",
    "tiny written",
    "tiny 4x64 cpu",
    "256 tokens, CPU; forward ",
];

#[test]
fn every_part_of_the_gpu_benchmark_runs_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("figures.json");
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples");
    let whole = halfstep().is_some();
    let mut words = vec!["--json", file.to_str().unwrap(), "--models", examples];
    if !whole {
        words.extend("check floors products step iteration gram statistics refine solve decoder".split(' '));
    }
    let output = gpu(&words);
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    lines_of(&text, &KERNELS);
    let figures = std::fs::read_to_string(file).unwrap();
    assert!(figures.starts_with("[\n  {\"name\": \"check product\""), "{figures}");
    assert!(figures.ends_with("{\"name\": \"failures\", \"value\": 0, \"unit\": \"\"}\n]\n"), "{figures}");
    if whole {
        lines_of(&text, &JOBS);
        lines_of(
            &figures,
            &["W3, eval.npz, cpu, agreement", "tiny 4x64 cpu, whole model", "cpu, host memory"],
        );
    }
}

#[test]
fn wrong_words_get_one_sentence_and_what_there_is() {
    for (words, expect) in [
        (vec!["everything"], "invalid value 'everything' for '[PART]...'"),
        (vec!["--gpus", "2"], "--gpus counts CUDA devices, but --device is cpu"),
    ] {
        let output = gpu(&words);
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(expect), "{said}");
    }
}

#[test]
fn without_halfstep_the_parts_that_run_it_say_how_to_get_it() {
    let output = gpu(&["blocks", "--halfstep", "nowhere/halfstep"]);
    assert_eq!(output.status.code(), Some(1));
    lines_of(
        &text(&output),
        &["FAILED: ", "nowhere/halfstep is not there: build it where there is Rust with `cargo build"],
    );
}

#[test]
fn a_job_that_fails_is_named_with_its_last_words() {
    if halfstep().is_none() {
        return;
    }
    let output = gpu(&["blocks", "--samples", "1", "--", "--bits", "1"]);
    assert_eq!(output.status.code(), Some(1));
    let text = text(&output);
    lines_of(&text, &["  | ", "--bits", "FAILED: block tiny: `halfstep quantize "]);
}

/// A `halfstep` that takes the CPU for every CUDA device, and `more` options on `cuda:0,1`.
#[cfg(unix)]
fn pretending(real: &Path, folder: &Path, more: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join("halfstep");
    let script = format!(
        "#!/bin/sh\nfor word; do shift; case $word in cuda:0,1) set -- \"$@\" cpu {more};; cuda:*) set -- \"$@\" cpu;; \
         *) set -- \"$@\" \"$word\";; esac; done\nexec '{}' \"$@\"\n",
        real.display()
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[cfg(unix)]
#[test]
fn devices_are_compared_with_the_cpu_and_with_each_other() {
    let Some(real) = halfstep() else { return };
    let folder = tempfile::tempdir().unwrap();
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples");
    let run = |parts: &str, more: &str| {
        let halfstep = pretending(&real, folder.path(), more);
        let mut command = Command::new(GPU);
        command.args(parts.split(' ')).args(["--quick", "--gpus", "1,2", "--models", examples]);
        command.arg("--halfstep").arg(halfstep).output().unwrap()
    };
    let output = run("models blocks", "");
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    lines_of(
        &said,
        &[
            "fashion-mnist W3, cuda:0 over cpu                  1.0000",
            "fashion-mnist W3, eval.npz, cpu",
            "256 tokens, 2 GPUs; ",
            "tiny 4x64 cuda:0,1, files that differ              0.0000",
        ],
    );
    let output = run("blocks", "--damping 0.2");
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output);
    lines_of(
        &said,
        &["FAILED: tiny 4x64 cuda:0,1: ", "model.safetensors", " differ between cuda:0 and cuda:0,1"],
    );
}

#[test]
fn a_file_that_cannot_be_written_is_found_out_first() {
    let output = gpu(&["--json", "nowhere/figures.json"]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output);
    assert!(said.starts_with("FAILED: nowhere/figures.json: ") && said.lines().count() == 1, "{said}");
}
