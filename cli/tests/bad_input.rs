//! The real binary on input that cannot be used: one clear error each, the documented exit code, nothing left.
//!
//! Not here: usage errors that need no file (`command_line`), full disks and interruption (`end_to_end`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use halfstep_model::TensorProto;
use halfstep_model::onnx::StringStringEntryProto;
use support::{Graph, floats, integers, noise, npy, write_npz};
use tempfile::TempDir;

const USAGE: i32 = 2;
const SOME_KEPT: i32 = 3;
const SOME_FAILED: i32 = 4;
const BAD_INPUT: i32 = 65;
const BAD_CONFIGURATION: i32 = 78;

/// `x [N, 4] -> MatMul [4, 3] -> Relu -> MatMul [3, 2] -> y`, all nodes named.
fn good() -> Graph {
    Graph::default()
        .input("x", &[None, Some(4)])
        .weight("w1", &[4, 3])
        .weight("w2", &[3, 2])
        .node("MatMul", &["x", "w1"], "a")
        .node("Relu", &["a"], "b")
        .node("MatMul", &["b", "w2"], "y")
        .output("y")
}

/// `x [N, 4] -> MatMul -> y` with the weight as given.
fn one_matmul(weight: TensorProto) -> Graph {
    let graph = Graph::default().input("x", &[None, Some(4)]).raw(weight);
    graph.node("MatMul", &["x", "w"], "y").output("y")
}

fn external(location: &str) -> TensorProto {
    let entry = StringStringEntryProto { key: Some("location".into()), value: Some(location.into()) };
    TensorProto {
        name: Some("w".into()),
        dims: vec![4, 3],
        data_type: Some(support::FLOAT),
        data_location: Some(1),
        external_data: vec![entry],
        ..Default::default()
    }
}

fn claiming(dims: &[i64]) -> TensorProto {
    TensorProto {
        name: Some("w".into()),
        dims: dims.to_vec(),
        data_type: Some(support::FLOAT),
        raw_data: Some(bytes::Bytes::from_static(&[0; 64])),
        ..Default::default()
    }
}

fn data() -> Vec<u8> {
    floats(&[16, 4], &noise(64, 1))
}

/// A folder with a good model and good data, and an empty one for results.
struct Place {
    root: TempDir,
}

impl Place {
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        std::fs::create_dir(root.path().join("results")).unwrap();
        let place = Self { root };
        place.file("good.onnx", &good().bytes());
        place.file("good.npy", &data());
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn quantize(&self, model: &Path, calibration: &Path, more: &[&str]) -> Output {
        let mut command = halfstep();
        command.arg("quantize").arg(model).arg("--calibration").arg(calibration);
        if !more.contains(&"--output") {
            command.arg("--output").arg(self.path("results/out"));
        }
        command.args(more).current_dir(self.root.path()).output().unwrap()
    }

    fn assert_nothing_left(&self, case: &str) {
        let left: Vec<_> =
            std::fs::read_dir(self.path("results")).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(left.is_empty(), "{case}: left {left:?}");
    }
}

fn halfstep() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfstep"));
    command.env_remove("HALFSTEP_ONNXRUNTIME").env_remove("HALFSTEP_LOG");
    command
}

/// The code, one `error:` line that says something and contains all of `parts`, no panic, nothing on stdout.
fn assert_refused(case: &str, output: &Output, code: i32, parts: &[&str]) {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{case}: {stderr}");
    assert!(!stderr.contains("panicked"), "{case}: {stderr}");
    let errors: Vec<&str> = stderr.lines().filter_map(|line| line.strip_prefix("error: ")).collect();
    assert_eq!(errors.len(), 1, "{case}: {stderr}");
    for part in parts {
        assert!(errors[0].contains(part), "{case}: no `{part}` in: {stderr}");
    }
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{case}");
}

#[test]
fn the_good_files_of_these_tests_are_good() {
    let place = Place::new();
    let output = place.quantize(&place.path("good.onnx"), &place.path("good.npy"), &["--bits", "3"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(place.path("results/out/model.onnx").is_file());
}

#[test]
fn models_that_cannot_be_used_are_refused() {
    let mystery = Graph::default()
        .input("x", &[None, Some(4)])
        .weight("w", &[4, 3])
        .node("Mystery", &["x"], "h")
        .in_domain("com.example")
        .node("MatMul", &["h", "w"], "y")
        .output("y");
    let no_layer = Graph::default().input("x", &[None, Some(4)]).node("Relu", &["x"], "y").output("y");
    let fixed = Graph::default()
        .input("x", &[Some(32), Some(4)])
        .weight("w", &[4, 3])
        .node("MatMul", &["x", "w"], "y")
        .output("y");
    let cycle = Graph::default()
        .input("x", &[None, Some(4)])
        .node("Add", &["x", "b"], "a")
        .node("Relu", &["a"], "b")
        .output("b");
    let half = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty file", vec![], &["m.onnx", "no"]),
        ("no protobuf", b"#!/bin/sh\necho hello\n".to_vec(), &["m.onnx", "not an ONNX model"]),
        ("cut in half", half(good().bytes()), &["m.onnx", "not an ONNX model"]),
        ("external data above", one_matmul(external("../w.data")).bytes(), &["`w`", "../w.data"]),
        ("external data anywhere", one_matmul(external("/etc/passwd")).bytes(), &["`w`", "/etc/passwd"]),
        ("external data missing", one_matmul(external("w.data")).bytes(), &["w.data"]),
        ("2^60 elements", one_matmul(claiming(&[1 << 30, 1 << 30])).bytes(), &["`w`"]),
        ("2^80 elements", one_matmul(claiming(&[1 << 40, 1 << 40])).bytes(), &["`w`", "1099511627776"]),
        (
            "unknown type",
            Graph::default()
                .input("x", &[None, Some(4)])
                .weight("w", &[4, 3])
                .raw(TensorProto { name: Some("c".into()), data_type: Some(17), ..claiming(&[4]) })
                .node("Add", &["x", "c"], "a")
                .node("MatMul", &["a", "w"], "y")
                .output("y")
                .bytes(),
            &["`c`", "FLOAT8E4M3FN"],
        ),
        ("negative dimension", one_matmul(claiming(&[-4, 3])).bytes(), &["`w`", "-4"]),
        (
            "zero channels",
            one_matmul(TensorProto { raw_data: None, ..claiming(&[4, 0]) }).bytes(),
            &["no layer"],
        ),
        ("unknown operator", mystery.bytes(), &["Mystery", "node_h"]),
        ("no layer", no_layer.bytes(), &["no layer to quantize"]),
        ("fixed batch of 32, 16 samples", fixed.bytes(), &["too few samples", "32", "16"]),
        ("cycle", cycle.bytes(), &["cycle"]),
        ("undefined tensor", good().node("Relu", &["ghost"], "z").bytes(), &["node_z", "`ghost`"]),
        ("produced twice", good().node("Relu", &["x"], "a").bytes(), &["`a`", "twice"]),
    ];
    let place = Place::new();
    for (case, bytes, parts) in cases {
        let model = place.file("m.onnx", &bytes);
        let output = place.quantize(&model, &place.path("good.npy"), &[]);
        assert_refused(case, &output, BAD_INPUT, parts);
        place.assert_nothing_left(case);
    }
}

/// The operator comes after a layer that could have been solved, and before one.
#[test]
fn an_operator_that_the_engine_lacks_is_known_before_any_work() {
    let place = Place::new();
    let mystery = Graph::default()
        .input("x", &[None, Some(4)])
        .weight("w1", &[4, 3])
        .weight("w2", &[3, 2])
        .node("MatMul", &["x", "w1"], "a")
        .node("Mystery", &["a"], "b")
        .in_domain("com.example")
        .node("MatMul", &["b", "w2"], "y")
        .output("y");
    let model = place.file("m.onnx", &mystery.bytes());
    let parts = ["cannot run the model", "com.example/Mystery", "`node_b`", "--onnxruntime"];
    let quantized = place.quantize(&model, &place.path("good.npy"), &[]);
    assert_refused("quantize", &quantized, BAD_INPUT, &parts);
    let stderr = String::from_utf8_lossy(&quantized.stderr);
    assert!(!stderr.contains("SOLVED"), "{stderr}");
    place.assert_nothing_left("quantize");
    let mut plan = halfstep();
    plan.arg("plan").arg(&model).arg("--calibration").arg(place.path("good.npy"));
    assert_refused("plan", &plan.output().unwrap(), BAD_INPUT, &parts);
}

#[test]
fn what_runs_after_the_last_layer_need_not_be_known() {
    let place = Place::new();
    let graph = good().node("Mystery", &["y"], "z").in_domain("com.example").output("z");
    let model = place.file("m.onnx", &graph.bytes());
    let output = place.quantize(&model, &place.path("good.npy"), &["--iterations", "0"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn paths_that_cannot_be_read_or_written_are_refused() {
    let place = Place::new();
    let (model, calibration) = (place.path("good.onnx"), place.path("good.npy"));
    let folder = place.path("results");
    place.file("occupied", b"a file");
    for (case, model, calibration, more, parts) in [
        ("folder as model", &folder, &calibration, &[][..], &["results", "not a regular file"][..]),
        ("no model", &place.path("none.onnx"), &calibration, &[], &["none.onnx", "No such file"]),
        ("no data", &model, &place.path("none.npz"), &[], &["none.npz", "No such file"]),
        ("empty folder as data", &model, &folder, &[], &["results", "has no .npy"]),
        ("model as data", &model, &model, &[], &["good.onnx", "unknown kind"]),
        ("output below a file", &model, &calibration, &["--output", "occupied/out"], &["occupied"]),
    ] {
        assert_refused(case, &place.quantize(model, calibration, more), BAD_INPUT, parts);
        place.assert_nothing_left(case);
    }
    let output = place.quantize(&model, &calibration, &["--output", "occupied"]);
    assert_refused("output is a file", &output, BAD_CONFIGURATION, &["occupied", "expected a folder"]);
}

#[test]
fn data_that_cannot_be_used_is_refused() {
    let mut not_a_number = noise(64, 1);
    not_a_number[37] = f32::NAN;
    let mut infinite = noise(64, 1);
    infinite[5] = f32::NEG_INFINITY;
    let whole = floats(&[16, 4], &noise(64, 1));
    let two_to_60 = format!("({}, 4)", 1u64 << 60);
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("rank", floats(&[16, 2, 2], &noise(64, 1)), &["[16, 2, 2]", "`x`", "[N, 4]"]),
        ("width", floats(&[16, 5], &noise(80, 1)), &["[16, 5]", "[N, 4]"]),
        ("integers", integers(&[16, 4], &[1; 64]), &["int64", "`x`", "float32"]),
        ("NaN", floats(&[16, 4], &not_a_number), &["[9, 1]", "NaN"]),
        ("infinity", floats(&[16, 4], &infinite), &["[1, 1]", "-inf"]),
        ("no samples", floats(&[0, 4], &[]), &["no samples", "[0, 4]"]),
        ("cut off", whole[..whole.len() - 9].to_vec(), &["c.npy"]),
        ("empty file", vec![], &["c.npy"]),
        ("2^60 rows", npy("<f4", &two_to_60, &[0; 64]), &["c.npy"]),
        ("2^128 elements", npy("<f4", "(18446744073709551615, 18446744073709551615)", &[0; 64]), &["c.npy"]),
        ("objects", npy("|O", "(4, 4)", &[0; 64]), &["c.npy", "O"]),
        ("no header", npy("<f4", "", &[0; 64]), &["c.npy"]),
    ];
    let place = Place::new();
    for (case, bytes, parts) in cases {
        let calibration = place.file("c.npy", &bytes);
        assert_refused(case, &place.quantize(&place.path("good.onnx"), &calibration, &[]), BAD_INPUT, parts);
        place.assert_nothing_left(case);
    }
}

#[test]
fn npz_files_that_cannot_be_used_are_refused() {
    let place = Place::new();
    let two = good().input("x2", &[None, Some(4)]).node("Add", &["x", "x2"], "sum").output("sum");
    let two = two.write(&place.path("two.onnx"));
    let good = place.path("good.onnx");
    let named = |names: [&str; 2]| {
        let arrays = names.map(|name| (name, data()));
        std::fs::read(write_npz(&place.path("n.npz"), &arrays)).unwrap()
    };
    let uneven = [("x", data()), ("x2", floats(&[8, 4], &noise(32, 2)))];
    let uneven = std::fs::read(write_npz(&place.path("n.npz"), &uneven)).unwrap();
    let claim =
        write_npz(&place.path("n.npz"), &[("x", npy("<f4", &format!("({}, 4)", 1u64 << 60), &[0; 64]))]);
    let claim = std::fs::read(claim).unwrap();
    let whole = named(["x", "x2"]);
    for (case, model, bytes, parts) in [
        ("other names", &two, named(["x", "z"]), &["`x2`", "`x`", "`z`"][..]),
        ("uneven", &two, uneven, &["`x` has 16", "`x2` has 8"]),
        ("cut off", &two, whole[..whole.len() - 30].to_vec(), &["n.npz"]),
        ("cut in half", &two, whole[..whole.len() / 2].to_vec(), &["n.npz"]),
        ("2^60 rows", &good, claim, &["n.npz"]),
        ("no arrays", &good, std::fs::read(write_npz(&place.path("n.npz"), &[])).unwrap(), &["n.npz"]),
    ] {
        let calibration = place.file("n.npz", &bytes);
        assert_refused(case, &place.quantize(model, &calibration, &[]), BAD_INPUT, parts);
        place.assert_nothing_left(case);
    }
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let place = Place::new();
    place.file("key.toml", b"iteration = 5\n");
    place.file("bits.toml", b"bits = 9\n");
    place.file("broken.toml", b"bits = \n");
    for (case, more, code, parts) in [
        ("pattern", &["--skip", "["][..], BAD_CONFIGURATION, &["`[`"][..]),
        ("no match", &["--skip", "head.*"], BAD_CONFIGURATION, &["`head.*`", "matches none"]),
        (
            "override no match",
            &["--override", "head.*:bits=8"],
            BAD_CONFIGURATION,
            &["`head.*`", "matches none"],
        ),
        ("override bits", &["--override", "first:bits=9"], USAGE, &["9"]),
        ("bits", &["--bits", "9"], USAGE, &["9"]),
        (
            "job key",
            &["--config", "key.toml"],
            BAD_CONFIGURATION,
            &["`iteration`", "did you mean `iterations`"],
        ),
        ("job bits", &["--config", "bits.toml"], BAD_CONFIGURATION, &["9"]),
        ("job syntax", &["--config", "broken.toml"], BAD_CONFIGURATION, &["broken.toml"]),
        ("no job file", &["--config", "none.toml"], BAD_CONFIGURATION, &["none.toml"]),
        ("everything skipped", &["--skip", "*"], BAD_INPUT, &["no layer to quantize", "skipped by pattern"]),
    ] {
        let output = place.quantize(&place.path("good.onnx"), &place.path("good.npy"), more);
        assert_refused(case, &output, code, parts);
        place.assert_nothing_left(case);
    }
}

#[test]
fn every_truncation_of_a_model_is_refused() {
    let place = Place::new();
    let whole = good().bytes();
    for length in (0..whole.len()).step_by(11).chain([whole.len() - 1]) {
        let model = place.file("m.onnx", &whole[..length]);
        let output = place.quantize(&model, &place.path("good.npy"), &[]);
        assert_refused(&format!("{length} bytes"), &output, BAD_INPUT, &["m.onnx"]);
        place.assert_nothing_left(&format!("{length} bytes"));
    }
}

/// A flipped bit may still be a model; then it is quantized, or its layers fail alone. It is never our mistake.
#[test]
fn no_flipped_bit_is_an_internal_error() {
    let place = Place::new();
    let whole = good().bytes();
    let mut refused = 0;
    for round in 0..120usize {
        let mut damaged = whole.clone();
        let bit = round * 7919 % (whole.len() * 8);
        damaged[bit / 8] ^= 1 << (bit % 8);
        let model = place.file("m.onnx", &damaged);
        let output =
            place.quantize(&model, &place.path("good.npy"), &["--force", "--iterations", "5", "--quiet"]);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let code = output.status.code().unwrap_or(-1);
        assert!([0, SOME_KEPT, SOME_FAILED, BAD_INPUT].contains(&code), "bit {bit}: code {code}: {stderr}");
        assert!(!stderr.contains("panicked"), "bit {bit}: {stderr}");
        if code == BAD_INPUT {
            refused += 1;
            assert_refused(&format!("bit {bit}"), &output, BAD_INPUT, &[]);
        }
    }
    assert!(refused > 20, "only {refused} of 120 were refused");
}
