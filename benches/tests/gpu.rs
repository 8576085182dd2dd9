//! The dry run of the GPU benchmark: every part, on the CPU, with tiny shapes.

use std::process::Command;

#[test]
fn every_part_of_the_gpu_benchmark_runs_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("figures.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfstep-gpu"));
    let output = command.args(["--device", "cpu", "--quick", "--json"]).arg(&file).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    for part in [
        "check refine block",
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
        "block tiny, capture, 8 threads",
    ] {
        assert!(text.contains(part), "no `{part}` in {text}");
    }
    let figures = std::fs::read_to_string(file).unwrap();
    assert!(
        figures.starts_with("[\n  {\"name\": \"check product\"") && figures.ends_with("\n]\n"),
        "{figures}"
    );
}

#[test]
fn wrong_words_get_the_usage() {
    let output = Command::new(env!("CARGO_BIN_EXE_halfstep-gpu")).arg("everything").output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains("`everything` is no part\nusage: gpu"));
}
