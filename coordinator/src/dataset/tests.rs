//! Data sets as files on disk: each kind, each refusal.

use std::fs;
use std::io::Write;
use std::path::Path;

use super::npy::tests::npy;
use super::*;

fn open(path: &Path) -> Result<Dataset, DatasetError> {
    Dataset::open(path, &DatasetOptions::default())
}

fn write_npz(path: &Path, members: &[(&str, Vec<u8>)]) {
    let mut zip = zip::ZipWriter::new(fs::File::create(path).unwrap());
    for (name, bytes) in members {
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file(format!("{name}.npy"), options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

fn u8s(shape: &str, data: &[u8]) -> Vec<u8> {
    npy("|u1", false, shape, data)
}

#[test]
fn an_npz_gives_its_arrays_or_the_one_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.npz");
    write_npz(&path, &[("x", u8s("(2, 2)", &[1, 2, 3, 4])), ("y", npy("<i8", false, "(2,)", &[0; 16]))]);
    let mut all = open(&path).unwrap();
    assert_eq!((all.samples(), all.arrays.len(), all.files()), (2, 2, &[path.clone()][..]));
    assert_eq!(all.take_labels().unwrap(), Some(Labels::Classes(vec![0, 0])));
    assert_eq!(all.arrays.len(), 1);
    let key = format!("{}:x", path.display());
    assert_eq!(open(Path::new(&key)).unwrap().slice(1..2).unwrap()[0].bytes, [3, 4]);
    let error = open(Path::new(&format!("{}:z", path.display()))).unwrap_err().to_string();
    assert!(error.ends_with("no array `z`, it has `x`, `y`"), "{error}");
}

#[test]
fn parts_of_a_folder_are_joined_in_name_order() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("b.npy"), u8s("(1, 2)", &[5, 6])).unwrap();
    fs::write(folder.path().join("a.npy"), u8s("(2, 2)", &[1, 2, 3, 4])).unwrap();
    fs::write(folder.path().join("notes.txt"), "ignored").unwrap();
    let data = open(folder.path()).unwrap();
    assert_eq!(data.slice(0..3).unwrap()[0].bytes, [1, 2, 3, 4, 5, 6]);
    let two = DatasetOptions { samples: Some(2), ..DatasetOptions::default() };
    let first = Dataset::open(folder.path(), &two).unwrap();
    assert_eq!((first.samples(), first.files().len()), (2, 1));
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.npy"), u8s("(1, 2)", &[1, 2])).unwrap();
    fs::write(folder.path().join("b.npy"), u8s("(1, 3)", &[1, 2, 3])).unwrap();
    let error = open(folder.path()).unwrap_err().to_string();
    assert!(error.ends_with("array `x`: shape [1, 3] where the files before have [1, 2]"), "{error}");
}

#[test]
fn differing_sample_counts_are_refused_with_both() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.npz");
    write_npz(&path, &[("a", u8s("(2,)", &[1, 2])), ("b", u8s("(3,)", &[1, 2, 3]))]);
    let error = open(&path).unwrap_err().to_string();
    assert!(error.ends_with("arrays differ in sample count: `a` has 2, `b` has 3"), "{error}");
}

#[test]
fn unusable_paths_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert!(matches!(open(&at("none.npz")), Err(DatasetError::Io { .. })));
    assert!(matches!(open(folder.path()), Err(DatasetError::Folder { .. })));
    fs::write(at("a.csv"), "1,2").unwrap();
    assert!(matches!(open(&at("a.csv")), Err(DatasetError::UnknownKind { .. })));
    fs::write(at("a.npz"), "no zip").unwrap();
    assert!(matches!(open(&at("a.npz")), Err(DatasetError::Corrupt { .. })));
    fs::write(at("e.npy"), u8s("(0, 2)", &[])).unwrap();
    assert!(matches!(open(&at("e.npy")), Err(DatasetError::Empty { .. })));
    write_npz(&at("none.npz"), &[]);
    assert!(open(&at("none.npz")).unwrap_err().to_string().ends_with("holds no arrays"));
}

#[test]
fn nan_in_a_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npy");
    let data: Vec<u8> =
        [0.0, 1.0, f32::NEG_INFINITY, 2.0].iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
    fs::write(&path, npy("<f4", false, "(2, 2)", &data)).unwrap();
    assert_eq!(
        open(&path).unwrap_err().to_string(),
        "array `x`: element [1, 0] is -inf, expected finite numbers"
    );
}

#[test]
fn a_truncated_or_flipped_npz_is_an_error_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.npz");
    write_npz(&path, &[("x", u8s("(64,)", &[7; 64]))]);
    let good = fs::read(&path).unwrap();
    for cut in 0..good.len() {
        fs::write(&path, &good[..cut]).unwrap();
        assert!(open(&path).is_err(), "cut at {cut}");
    }
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0xff;
        fs::write(&path, &bad).unwrap();
        let _ = open(&path);
    }
}

#[test]
fn the_example_data_is_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fashion-mnist");
    let calibration = open(&folder.join("calibration.npz")).unwrap();
    assert_eq!(calibration.arrays[0].shape, [1024, 1, 28, 28]);
    let input =
        ModelInput { name: "input".into(), dtype: DType::F32, dims: vec![None, Some(1), Some(28), Some(28)] };
    assert_eq!(calibration.for_inputs(&[input]).unwrap().arrays[0].name, "input");
    let some = DatasetOptions { samples: Some(10), ..DatasetOptions::default() };
    let mut eval = Dataset::open(&folder.join("eval.npz"), &some).unwrap();
    assert_eq!((eval.samples(), eval.take_labels().unwrap().unwrap().len()), (10, 10));
}
