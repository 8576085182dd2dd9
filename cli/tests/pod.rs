//! `halfstep pod` by itself: index 0 does a whole job, says so once, and touches nobody else's results.
//!
//! Not here: several pods (`faults/tests/kubernetes.rs`), manifests (`kubernetes`).
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

const BAD_INPUT: i32 = 65;
const BAD_CONFIGURATION: i32 = 78;

fn halfstep(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfstep"));
    for name in ["HALFSTEP_ONNXRUNTIME", "HALFSTEP_LOG", "HALFSTEP_CERTS", "JOB_COMPLETION_INDEX"] {
        command.env_remove(name);
    }
    command.args(arguments).output().unwrap()
}

/// A job on part of the example; no more of it is tried than takes a second.
fn job_file(folder: &Path, options: &str) -> String {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fashion-mnist");
    let path = folder.join("job.toml");
    let text = format!(
        "model = '{0}/model.onnx'\ncalibration = '{0}/calibration.npz'\noutput = 'out'\nsamples = 32\niterations = 5\n{options}",
        example.display()
    );
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().into()
}

/// Index 0 alone; exit code and stderr.
fn pod(folder: &Path, config: &str, more: &[&str]) -> (Option<i32>, String) {
    let state = folder.join("state");
    let mut arguments = vec!["pod", "--index", "0", "--peers", "127.0.0.1", "--insecure", "--config", config];
    arguments.extend(["--state-dir", state.to_str().unwrap(), "--listen", "127.0.0.1:0"]);
    arguments.extend(["--serve", "127.0.0.1:0"]);
    arguments.extend(more);
    let output = halfstep(&arguments);
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// Every file but that of times.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let named = files.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), path));
    named
        .filter(|(name, _)| name != "timing.json")
        .map(|(name, path)| (name, fs::read(path).unwrap()))
        .collect()
}

#[test]
fn index_0_alone_does_what_quantize_does_and_does_it_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = job_file(folder.path(), "bits = 3");
    let golden = folder.path().join("golden");
    let done = halfstep(&["quantize", "--config", &config, "--output", golden.to_str().unwrap()]);
    assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
    let output = folder.path().join("out");

    let (exit, said) = pod(folder.path(), &config, &[]);
    assert_eq!(exit, Some(0), "{said}");
    assert!(said.contains("SOLVED"), "{said}");
    assert!(contents(&output) == contents(&golden), "{said}");

    // The pod that comes after one that died too early to say so.
    let before = fs::metadata(output.join("report.json")).unwrap().modified().unwrap();
    let (exit, said) = pod(folder.path(), &config, &[]);
    assert_eq!(exit, Some(0), "{said}");
    assert_eq!(fs::metadata(output.join("report.json")).unwrap().modified().unwrap(), before);

    // One byte that is not the job's: somebody else's folder.
    fs::write(output.join("report.json"), "{}").unwrap();
    let (exit, said) = pod(folder.path(), &config, &[]);
    assert_eq!(exit, Some(BAD_CONFIGURATION), "{said}");
    assert!(said.contains("expected an empty or absent folder"), "{said}");
    assert_eq!(fs::read_to_string(output.join("report.json")).unwrap(), "{}");

    // Another job is refused the folder, and the state of the first one survives it.
    let other = job_file(folder.path(), "bits = 4");
    assert_eq!(pod(folder.path(), &other, &[]).0, Some(BAD_CONFIGURATION));
    let config = job_file(folder.path(), "bits = 3");
    let (exit, said) = pod(folder.path(), &config, &["--force"]);
    assert_eq!(exit, Some(0), "{said}");
    assert!(contents(&output) == contents(&golden), "{said}");
}

#[test]
fn what_cannot_be_done_is_said_with_the_code_that_ends_the_job() {
    let folder = tempfile::tempdir().unwrap();
    let config = job_file(folder.path(), "");
    for (more, code, says) in [
        (&["--failures", "20"][..], BAD_CONFIGURATION, "the pod of index 0 has failed 20 times"),
        (&["--failures", "", "--failures-max", "0"], 2, "0 is not in 1.."),
        (&["--coordinator", "127.0.0.1:1"], 2, "cannot be used with"),
        (&["--threads", "0"], BAD_CONFIGURATION, "threads is 0"),
    ] {
        let (exit, said) = pod(folder.path(), &config, more);
        assert_eq!(exit, Some(code), "{said}");
        assert!(said.contains(says), "{more:?}: {said}");
    }
    let auto = job_file(folder.path(), "partition = 'auto'");
    let (exit, said) = pod(folder.path(), &auto, &[]);
    assert!(exit == Some(BAD_CONFIGURATION) && said.contains("partition `auto`"), "{said}");
    fs::write(folder.path().join("job.toml"), "model = 'none.onnx'\ncalibration = 'none.npz'\noutput = 'o'")
        .unwrap();
    let (exit, said) = pod(folder.path(), &auto, &[]);
    assert!(exit == Some(BAD_INPUT) && said.contains("none.onnx"), "{said}");
    assert!(!folder.path().join("out").exists() && !folder.path().join("o").exists());
}
