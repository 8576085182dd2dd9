//! The real binary on the real example: what the README promises, and what happens when a run is cut short.
//!
//! Not here: refusals of bad input (`bad_input`), options and help (`command_line`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use halfstep_model::Model;
use serde_json::Value;
use tempfile::TempDir;

const INTERRUPTED: i32 = 75;
const BAD_INPUT: i32 = 65;
const BAD_CONFIGURATION: i32 = 78;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fashion-mnist").join(name)
}

fn halfstep() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfstep"));
    command.env_remove("HALFSTEP_ONNXRUNTIME").env_remove("HALFSTEP_LOG");
    command
}

/// `quantize` of the example into `output`.
fn quantize(output: &Path, arguments: &[&str]) -> Command {
    let mut command = halfstep();
    command.arg("quantize").arg(example("model.onnx")).arg("--calibration").arg(example("calibration.npz"));
    command.arg("--output").arg(output).args(arguments);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn succeed(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{command:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// One `error:` line, no panic; returns stderr.
fn refused(output: &Output, code: i32) -> String {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stderr.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Rows of `eval --json` by the name of the model's folder.
fn measure(models: &[PathBuf]) -> Vec<Value> {
    let mut command = halfstep();
    command.args(["eval", "--json", "--reference"]).arg(example("model.onnx"));
    command.arg("--data").arg(example("eval.npz")).args(models);
    let rows: Value = serde_json::from_str(&succeed(command)).unwrap();
    rows.as_array().unwrap()[1..].to_vec()
}

fn at_least(row: &Value, key: &str, floor: f64) {
    let actual = row[key].as_f64().unwrap();
    assert!(actual >= floor, "{key}: {actual}, expected at least {floor}");
}

#[test]
fn three_and_two_bits_reach_the_published_accuracy_with_default_options() {
    let root = TempDir::new().unwrap();
    let models = ["3", "2"].map(|bits| {
        let output = root.path().join(bits);
        succeed(quantize(&output, &["--bits", bits, "--quiet"]));
        output.join("model.onnx")
    });
    let rows = measure(&models);
    for (row, [top1, agreement, sqnr_db]) in rows.iter().zip([[0.902, 0.98, 22.5], [0.890, 0.95, 12.5]]) {
        assert_eq!(row["samples"], 10_000);
        at_least(row, "top1", top1);
        at_least(row, "agreement", agreement);
        at_least(row, "sqnr_db", sqnr_db);
    }
}

/// Every file but the one that holds times.
fn bytes_of(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |name: String| {
        let bytes = std::fs::read(folder.join(&name)).unwrap();
        (name, bytes)
    };
    names(folder).into_iter().filter(|name| name != "timing.json").map(read).collect()
}

#[test]
fn bytes_do_not_depend_on_threads_memory_or_the_run() {
    let root = TempDir::new().unwrap();
    let spill = root.path().join("spill");
    std::fs::create_dir(&spill).unwrap();
    let spill = spill.to_str().unwrap();
    let run = |name: &str, more: &[&str]| {
        let output = root.path().join(name);
        let mut command = quantize(&output, &["--bits", "3", "--samples", "256", "--quiet"]);
        command.args(more);
        succeed(command);
        bytes_of(&output)
    };
    let first = run("first", &["--threads", "2"]);
    let files = ["manifest.json", "model.encodings", "model.onnx", "model.qdq.onnx", "report.json"];
    assert_eq!(first.keys().map(String::as_str).collect::<Vec<_>>(), files);
    for (name, more) in [
        ("again", ["--threads", "2"].as_slice()),
        ("one-thread", &["--threads", "1"]),
        ("three-threads", &["--threads", "3"]),
        ("spilled", &["--memory-budget", "0", "--spill-dir", spill]),
    ] {
        let other = run(name, more);
        for (file, bytes) in &first {
            assert!(other[file] == *bytes, "{name}: {file} differs");
        }
        assert_eq!(other.len(), first.len(), "{name}");
    }
    assert_eq!(names(Path::new(spill)), [""; 0]);
}

#[test]
fn the_seed_decides_the_minibatches() {
    let root = TempDir::new().unwrap();
    let run = |name: &str, seed: &str| {
        let output = root.path().join(name);
        let options =
            ["--objective", "samples", "--iterations", "20", "--refine-sweeps", "0", "--samples", "32"];
        let mut command = quantize(&output, &options);
        command.args(["--bits", "2", "--quiet", "--seed", seed]);
        succeed(command);
        bytes_of(&output)
    };
    let one = run("one", "1");
    assert!(run("again", "1") == one);
    assert!(run("two", "2")["model.onnx"] != one["model.onnx"]);
}

#[test]
fn verify_notices_one_flipped_bit_in_any_output() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("out");
    succeed(quantize(&output, &["--samples", "32", "--iterations", "10", "--quiet"]));
    let verify = || {
        let mut command = halfstep();
        command.arg("verify").arg(output.join("manifest.json"));
        command
    };
    succeed(verify());
    let manifest = json(&output.join("manifest.json"));
    let outputs: Vec<&str> =
        manifest["outputs"].as_array().unwrap().iter().map(|o| o["path"].as_str().unwrap()).collect();
    assert_eq!(outputs, ["model.encodings", "model.onnx", "model.qdq.onnx", "report.json"]);
    for name in outputs {
        let path = output.join(name);
        let intact = std::fs::read(&path).unwrap();
        let mut damaged = intact.clone();
        damaged[intact.len() / 2] ^= 1;
        std::fs::write(&path, damaged).unwrap();
        assert!(refused(&verify().output().unwrap(), BAD_INPUT).contains(name));
        std::fs::write(&path, intact).unwrap();
    }
    succeed(verify());
}

fn weight(model: &Path, name: &str) -> Vec<u32> {
    let tensor = Model::read(model).unwrap().tensor(name).unwrap();
    tensor.as_f32().unwrap().iter().map(|w| w.to_bits()).collect()
}

#[test]
fn skips_and_overrides_reach_report_encodings_and_weights() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("out");
    let rules =
        ["--skip", "first", "--skip", "/2/*", "--override", "/5/*:bits=6", "--override", "last:bits=8"];
    let mut command = quantize(&output, &["--bits", "3", "--samples", "64", "--iterations", "20", "--quiet"]);
    command.args(rules);
    succeed(command);
    let expected = [
        ("/0/0.0/Conv", "0.0.weight", None),
        ("/1/a/a.0/Conv", "1.a.0.weight", Some(3)),
        ("/1/b/b.0/Conv", "1.b.0.weight", Some(3)),
        ("/2/2.0/Conv", "2.0.weight", None),
        ("/3/a/a.0/Conv", "3.a.0.weight", Some(3)),
        ("/3/b/b.0/Conv", "3.b.0.weight", Some(3)),
        ("/4/4.0/Conv", "4.0.weight", Some(3)),
        ("/5/a/a.0/Conv", "5.a.0.weight", Some(6)),
        ("/5/b/b.0/Conv", "5.b.0.weight", Some(6)),
        ("/8/Gemm", "8.weight", Some(8)),
    ];
    let report = json(&output.join("report.json"));
    let encodings = json(&output.join("model.encodings"));
    assert_eq!((&report["solved"], &report["kept"], &report["failed"]), (&8.into(), &2.into(), &0.into()));
    let find =
        |list: &Value, name: &str| list.as_array().unwrap().iter().find(|e| e["name"] == name).cloned();
    for (layer, tensor, bits) in expected {
        let reported = find(&report["layers"], layer).unwrap();
        let encoding = find(&encodings["param_encodings"], tensor);
        let same = weight(&example("model.onnx"), tensor) == weight(&output.join("model.onnx"), tensor);
        assert_eq!(same, bits.is_none(), "{layer}");
        assert_eq!(reported["outcome"], if bits.is_some() { "solved" } else { "kept" }, "{layer}");
        assert_eq!(reported["solved"]["grid"]["bits"].as_u64(), bits, "{layer}");
        assert_eq!(encoding.map(|e| e["bw"].as_u64().unwrap()), bits, "{layer}");
    }
    let reason = find(&report["layers"], "/2/2.0/Conv").unwrap()["reason"].clone();
    assert_eq!(reason, "skipped by pattern `/2/*`");
}

/// Integers `w / scale` of every weight of a layer must be whole and within the grid.
#[test]
fn weights_lie_on_the_grid_that_the_encodings_state() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("out");
    succeed(quantize(&output, &["--bits", "3", "--samples", "64", "--iterations", "20", "--quiet"]));
    let encodings = json(&output.join("model.encodings"));
    let model = Model::read(output.join("model.onnx")).unwrap();
    let original = Model::read(example("model.onnx")).unwrap();
    for entry in encodings["param_encodings"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let (weights, before) = (model.tensor(name).unwrap(), original.tensor(name).unwrap());
        let rows = weights.shape[0];
        let scales: Vec<f32> =
            entry["scale"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap() as f32).collect();
        assert_eq!(scales.len(), rows, "{name}");
        let cols = weights.len() / rows;
        for (index, (w, w0)) in weights.as_f32().unwrap().iter().zip(before.as_f32().unwrap()).enumerate() {
            let scale = scales[index / cols];
            let q = (w / scale).round();
            assert!((-4.0..=3.0).contains(&q) && q * scale == *w, "{name}[{index}]: {w} at scale {scale}");
            let (low, high) = ((w0 / scale).floor(), (w0 / scale).floor() + 1.0);
            let allowed = [low.clamp(-4.0, 3.0), high.clamp(-4.0, 3.0)];
            assert!(allowed.contains(&q), "{name}[{index}]: {q} is neither side of {}", w0 / scale);
        }
    }
}

#[test]
fn json_lines_parse_and_tell_the_whole_story() {
    let root = TempDir::new().unwrap();
    let stdout =
        succeed(quantize(&root.path().join("out"), &["--samples", "32", "--iterations", "10", "--json"]));
    let lines: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let events: Vec<&str> = lines.iter().map(|line| line["event"].as_str().unwrap()).collect();
    assert_eq!(events[0], "planned");
    let stages = lines.iter().filter(|line| line["event"] == "stage-started");
    assert!(stages.map(|line| line["stage"].as_u64().unwrap()).eq(1..=10), "{stdout}");
    assert_eq!(events.iter().filter(|e| **e == "layer-solved").count(), 10);
    assert_eq!(events[events.len() - 3..], ["writing", "summary", "outcome"]);
    assert_eq!(lines.last().unwrap()["outcome"]["solved"], 10);
}

#[test]
fn every_encodings_version_asked_for_is_written() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("out");
    let mut command = quantize(&output, &["--samples", "32", "--iterations", "10", "--quiet"]);
    command.args(["--encodings", "0.6.1", "--encodings", "2.0.0"]);
    succeed(command);
    assert!(json(&output.join("model.encodings"))["param_encodings"].is_object());
    let newest = json(&output.join("model.2.0.0.encodings"));
    assert_eq!(newest["version"], "2.0.0");
    let manifest = json(&output.join("manifest.json"));
    assert_eq!(manifest["configuration"]["encodings"], serde_json::json!(["0.6.1", "2.0.0"]));
    assert_eq!(manifest["outputs"].as_array().unwrap().len(), 5);
}

/// A run that is cut short leaves what it has in a hidden folder beside the output, and nothing else.
#[cfg(unix)]
#[test]
fn an_interrupted_or_killed_run_leaves_no_results_and_goes_on_with_the_same_command() {
    let root = TempDir::new().unwrap();
    let (place, spill) = (root.path().join("place"), root.path().join("spill"));
    std::fs::create_dir(&place).unwrap();
    std::fs::create_dir(&spill).unwrap();
    let command = |place: &Path| {
        let mut command =
            quantize(&place.join("out"), &["--iterations", "2000", "--samples", "64", "--json"]);
        command.args(["--memory-budget", "0", "--spill-dir"]).arg(&spill);
        command
    };
    for (signal, code) in [("-INT", Some(INTERRUPTED)), ("-KILL", None)] {
        let mut child = command(&place).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // In the middle: some layers are solved, others are not.
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        lines.by_ref().find(|line| line.as_ref().unwrap().contains("layer-solved")).unwrap().unwrap();
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let rest: Vec<String> = lines.map(Result::unwrap).collect();
        assert!(!rest.iter().any(|line| line.contains("\"writing\"")), "{rest:?}");
        let output = child.wait_with_output().unwrap();
        if let Some(code) = code {
            assert!(refused(&output, code).contains("the same command goes on"));
            assert_eq!(names(&spill), [""; 0]);
        }
        assert_eq!(names(&place), [".out.halfstep"]);
    }
    succeed(command(&place));
    assert_eq!(names(&place), ["out"]);
    let undisturbed = root.path().join("undisturbed");
    succeed(command(&undisturbed));
    assert!(bytes_of(&place.join("out")) == bytes_of(&undisturbed.join("out")));
}

/// A small file system of its own, gone when dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(bytes: &str) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let size = format!("size={bytes}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "none"])
            .arg(folder.path())
            .stderr(Stdio::null())
            .status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_one_clear_error_and_leaves_nothing() {
    // The model alone takes 476 KiB; 600 KiB hold it but not the files after it.
    for size in ["256k", "600k"] {
        let Some(disk) = SmallDisk::new(size) else {
            eprintln!("left out: this user may not mount a tmpfs");
            return;
        };
        let out = disk.0.path().join("out");
        let output = quantize(&out, &["--samples", "32", "--iterations", "10"]).output().unwrap();
        let stderr = refused(&output, BAD_INPUT);
        assert!(stderr.contains("No space left on device"), "{stderr}");
        assert_eq!(names(disk.0.path()), [""; 0]);
    }
}

/// The same failure without any right to mount: the system refuses to let a file grow.
#[cfg(unix)]
#[test]
fn a_write_that_fails_half_way_leaves_nothing() {
    let root = TempDir::new().unwrap();
    let inner = quantize(&root.path().join("out"), &["--samples", "32", "--iterations", "10"]);
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; ulimit -f 200; exec \"$0\" \"$@\""]);
    command.arg(inner.get_program()).args(inner.get_args().collect::<Vec<&OsStr>>());
    let stderr = refused(&command.output().unwrap(), BAD_INPUT);
    assert!(stderr.contains("File too large"), "{stderr}");
    assert_eq!(names(root.path()), [""; 0]);
}

#[test]
fn results_are_replaced_only_when_asked_and_only_if_they_are_results() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("out");
    let run = |more: &[&str]| {
        let mut command = quantize(&output, &["--samples", "32", "--iterations", "10", "--quiet"]);
        command.args(more).output().unwrap()
    };
    std::fs::create_dir(&output).unwrap();
    std::fs::write(output.join("thesis.txt"), "mine").unwrap();
    assert!(refused(&run(&[]), BAD_CONFIGURATION).contains("expected an empty or absent folder"));
    assert!(refused(&run(&["--force"]), BAD_CONFIGURATION).contains("refusing to replace it"));
    assert_eq!(names(&output), ["thesis.txt"]);
    std::fs::remove_file(output.join("thesis.txt")).unwrap();

    assert_eq!(run(&["--bits", "4"]).status.code(), Some(0));
    let four = bytes_of(&output);
    assert!(refused(&run(&["--bits", "3"]), BAD_CONFIGURATION).contains("--force"));
    assert!(bytes_of(&output) == four);
    assert_eq!(run(&["--bits", "3", "--force", "--encodings", "2.0.0"]).status.code(), Some(0));
    assert_ne!(bytes_of(&output)["model.onnx"], four["model.onnx"]);
    assert_eq!(names(root.path()), ["out"]);
}
