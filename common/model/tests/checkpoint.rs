//! Reading checkpoint folders: whole, in shards, linked, and broken in every way that a folder can be.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use halfstep_model::checkpoint::{Checkpoint, is_checkpoint};
use halfstep_model::{Data, Dtype};
use safetensors::tensor::TensorView;
use serde_json::json;
use tempfile::TempDir;

type Stored<'a> = (&'a str, safetensors::Dtype, &'a [usize], Vec<u8>);

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn write_weights(path: &Path, tensors: &[Stored<'_>]) {
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name.to_string(), TensorView::new(*dtype, shape.to_vec(), data).unwrap())
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), r#"{"model_type":"llama"}"#).unwrap();
    folder
}

fn sample() -> Vec<Stored<'static>> {
    use safetensors::Dtype::{BF16, F16, F32, F64, I64};
    vec![
        ("a.weight", F32, &[2, 2], floats(&[1.0, -2.0, 0.5, 3.0])),
        ("b.weight", BF16, &[2], vec![0x80, 0x3f, 0x40, 0xc0]),
        ("c.weight", F16, &[1, 2], vec![0x00, 0x3c, 0x00, 0xc2]),
        ("d", F64, &[], 0.25_f64.to_le_bytes().to_vec()),
        ("e", I64, &[1], 7_i64.to_le_bytes().to_vec()),
    ]
}

fn single() -> TempDir {
    let folder = folder();
    write_weights(&folder.path().join("model.safetensors"), &sample());
    folder
}

fn sharded() -> TempDir {
    let folder = folder();
    let tensors = sample();
    write_weights(&folder.path().join("one.safetensors"), &tensors[..2]);
    write_weights(&folder.path().join("two.safetensors"), &tensors[2..]);
    let map = [("a.weight", 1), ("b.weight", 1), ("c.weight", 2), ("d", 2), ("e", 2)];
    let map: HashMap<_, _> = map
        .iter()
        .map(|(name, file)| (*name, if *file == 1 { "one.safetensors" } else { "two.safetensors" }))
        .collect();
    write_index(folder.path(), &json!({"metadata": {"total_size": 40}, "weight_map": map}));
    folder
}

fn write_index(folder: &Path, value: &serde_json::Value) {
    fs::write(folder.join("model.safetensors.index.json"), value.to_string()).unwrap();
}

fn refused(folder: &Path, expect: &str) {
    let error = Checkpoint::open(folder).unwrap_err().to_string();
    assert!(error.contains(expect), "{error}: expected `{expect}`");
}

#[test]
fn one_file_and_shards_hold_the_same_tensors() {
    for (folder, files) in [(single(), 2), (sharded(), 4)] {
        assert!(is_checkpoint(folder.path()));
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.config()["model_type"], "llama");
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a.weight", "b.weight", "c.weight", "d", "e"]);
        for (name, values) in [
            ("a.weight", vec![1.0, -2.0, 0.5, 3.0]),
            ("b.weight", vec![1.0, -3.0]),
            ("c.weight", vec![1.0, -3.0]),
            ("d", vec![0.25]),
        ] {
            assert_eq!(checkpoint.tensor(name).unwrap().data, Data::F32(values), "{name}");
        }
        assert_eq!(checkpoint.tensor("c.weight").unwrap().shape, [1, 2]);
        let (dtype, shape, bytes) = checkpoint.stored("e").unwrap();
        assert_eq!((dtype, shape, &bytes[..]), (Dtype::I64, vec![1], &7_i64.to_le_bytes()[..]));
        assert_eq!(checkpoint.info("b.weight").unwrap().bytes, 4);
        assert_eq!(checkpoint.dtype(), Dtype::F32);
        assert_eq!(checkpoint.files().len(), files);
        assert!(checkpoint.files().iter().all(|file| file.is_file()));
    }
}

#[test]
fn what_cannot_be_used_is_named_with_its_file() {
    let folder = single();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let error = checkpoint.tensor("e").unwrap_err().to_string();
    assert!(error.contains("model.safetensors: tensor `e`: holds int64"), "{error}");
    let error = checkpoint.tensor("x").unwrap_err().to_string();
    assert!(error.contains("tensor `x`: expected, but not in the checkpoint"), "{error}");
    let mut tensors = sample();
    tensors[0].3 = floats(&[1.0, 2.0, f32::NEG_INFINITY, f32::NAN]);
    write_weights(&folder.path().join("model.safetensors"), &tensors);
    let error = Checkpoint::open(folder.path()).unwrap().tensor("a.weight").unwrap_err().to_string();
    assert!(error.ends_with("tensor `a.weight`: element 2 is -inf, expected a finite number"), "{error}");
}

#[test]
fn check_names_the_first_faults_in_one_sentence() {
    let folder = single();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    checkpoint.check(&[("a.weight", vec![2, 2]), ("b.weight", vec![2])]).unwrap();
    let expected: Vec<(&str, Vec<usize>)> = [("a.weight", 4), ("e", 1), ("x", 1), ("y", 1), ("z", 1)]
        .into_iter()
        .map(|(name, dim)| (name, vec![dim]))
        .collect();
    let error = checkpoint.check(&expected).unwrap_err().to_string();
    let expect = "its tensors do not fit config.json: `a.weight` has shape [2, 2], expected [4]; `e` holds int64, \
                  expected a floating-point type; `x` is missing; `y` is missing; and 1 more";
    assert!(error.ends_with(expect), "{error}");
}

#[test]
fn broken_folders_are_refused() {
    let empty = tempfile::tempdir().unwrap();
    assert!(!is_checkpoint(empty.path()));
    refused(empty.path(), "config.json: cannot open");
    refused(&empty.path().join("absent"), "cannot open");
    let folder = folder();
    refused(folder.path(), "found neither");
    fs::write(folder.path().join("config.json"), "[1]").unwrap();
    refused(folder.path(), "config: expected an object");
    fs::write(folder.path().join("config.json"), "{").unwrap();
    refused(folder.path(), "config: is not JSON");
    let folder = single();
    fs::write(folder.path().join("model.safetensors"), [0; 7]).unwrap();
    refused(folder.path(), "model.safetensors: header: expected at least 8 bytes, the file has 7");
}

#[test]
fn an_index_must_be_true_and_stay_in_the_folder() {
    let folder = sharded();
    for (map, expect) in [
        (json!({"a.weight": "two.safetensors"}), "not in `two.safetensors` where the index has it"),
        (json!({"x": "one.safetensors"}), "tensor `x`: expected, but not in"),
        (json!({"a.weight": "three.safetensors"}), "three.safetensors: cannot open"),
        (json!({"a.weight": "../one.safetensors"}), "without `/` or `..`"),
        (json!({"a.weight": "/etc/hosts"}), "without `/` or `..`"),
        (json!({"a.weight": ".."}), "without `/` or `..`"),
        (json!({"a.weight": ""}), "without `/` or `..`"),
        (json!({}), "names no tensor"),
        (json!({"a.weight": 3}), "is not an index"),
    ] {
        write_index(folder.path(), &json!({ "weight_map": map }));
        refused(folder.path(), expect);
    }
    write_index(folder.path(), &json!({"weight_map": {"b.weight": "one.safetensors"}}));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["b.weight"], "the index decides");
}

#[cfg(unix)]
#[test]
fn links_may_lead_into_the_hubs_store_and_nowhere_else() {
    let cache = tempfile::tempdir().unwrap();
    let snapshot: PathBuf = cache.path().join("snapshots/abc");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(cache.path().join("blobs")).unwrap();
    fs::write(cache.path().join("blobs/1"), "{}").unwrap();
    write_weights(&cache.path().join("blobs/2"), &sample());
    std::os::unix::fs::symlink("../../blobs/1", snapshot.join("config.json")).unwrap();
    std::os::unix::fs::symlink("../../blobs/2", snapshot.join("model.safetensors")).unwrap();
    Checkpoint::open(&snapshot).unwrap().tensor("a.weight").unwrap();
    fs::rename(cache.path().join("blobs/2"), cache.path().join("2")).unwrap();
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    std::os::unix::fs::symlink("../../2", snapshot.join("model.safetensors")).unwrap();
    refused(&snapshot, "leads out of the folder");
}
