//! Everything in `k8s/` is valid, and every argument in it is one of this binary's: `k8s/check.py` says how.
//!
//! Skipped, saying why, without the tools. Not here: whether pods do their work (`faults/tests/kubernetes.rs`).
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it skips")]

use std::path::Path;
use std::process::Command;

/// Names the Python that has the packages of k8s/requirements.txt.
const PYTHON: &str = "HALFSTEP_K8S_PYTHON";

#[test]
fn manifests_chart_and_dockerfile_are_valid_and_their_arguments_known() {
    let Some(python) = std::env::var_os(PYTHON) else {
        eprintln!("SKIPPED: {PYTHON} names no Python with the packages of k8s/requirements.txt");
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../k8s/check.py");
    let mut command = Command::new(python);
    command.arg(script).args(["--halfstep", env!("CARGO_BIN_EXE_halfstep")]);
    for name in ["HALFSTEP_COORDINATOR", "HALFSTEP_CERTS", "HALFSTEP_ONNXRUNTIME", "HALFSTEP_LOG"] {
        command.env_remove(name);
    }
    let output = command.output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    // Not a script that checked nothing.
    let passed = said.lines().last().and_then(|line| line.strip_suffix(" passed, 0 failed"));
    assert!(passed.and_then(|number| number.parse().ok()).is_some_and(|passed: u32| passed > 60), "{said}");
}
