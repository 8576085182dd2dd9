//! The real binary: usage errors, job files, help. What a user sees before any network is read.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::path::Path;
use std::process::{Command, Output};

fn halfstep(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfstep"));
    command.args(arguments).env_remove("HALFSTEP_ONNXRUNTIME").env_remove("HALFSTEP_LOG").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Exit code and stderr; a refused command prints no data.
fn refused(arguments: &[&str]) -> (i32, String) {
    let output = halfstep(arguments);
    assert_eq!(text(&output.stdout), "", "{arguments:?}");
    (output.status.code().unwrap(), text(&output.stderr))
}

fn job_file(folder: &Path, content: &str) -> String {
    let path = folder.join("job.toml");
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_string()
}

#[test]
fn help_says_what_there_is_and_what_exit_codes_mean() {
    let output = halfstep(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    insta::assert_snapshot!(text(&output.stdout), @r"
    Quantize trained networks to low-bit integers by learning which way each weight rounds (AdaRound)

    Usage: halfstep <COMMAND>

    Commands:
      quantize     Round the weights of an ONNX network and write the results
      plan         Show what `quantize` would do: stages, bytes, estimated time; spends one sample's run
      inspect      List the layers of a network and what would be rounded
      eval         Measure networks on data: top-1, agreement with the original, noise, perplexity
      verify       Check the files of a finished run against their manifest
      devices      Show what this machine can solve on, and what is missing to use its GPUs
      coordinator  Run the coordinator of a fleet: it plans jobs, leases work and writes results
      node         Work for a coordinator: leave it running on every machine that should help
      pod          Be one pod of a Kubernetes Job: index 0 coordinates, all of them work
      submit       Give a coordinator a network to quantize
      status       Show the jobs of a coordinator
      watch        Follow a job until it is over
      cancel       Stop a job
      fetch        Fetch the results of a finished job
      forget       Remove a job that is over from its coordinator, results included
      nodes        Show the nodes of a coordinator
      explain      Say why a job or one of its tasks waits, and what became of its attempts
      drain        Make a node hand back its work and leave
      certs        Make a certificate authority and certificates for a fleet of your own
      completions  Print a completion script for a shell
      man          Write a manual page for every command into a folder

    Options:
      -h, --help
              Print help (see a summary with '-h')

      -V, --version
              Print version

    Exit codes:
       0  all layers solved, or the command did what it was asked
       1  internal error: please report it
       2  wrong usage of the command line
       3  finished, but some layers were kept as they are or at nearest rounding
       4  finished, but some layers failed
      65  a file cannot be used: model, data, manifest, or a place to write to
      75  interrupted; no results were written, the same command goes on from there
      78  a setting or job file cannot be used
    ");
}

#[test]
fn help_of_quantize_repeats_the_advice_on_hyper_parameters() {
    let help = text(&halfstep(&["quantize", "--help"]).stdout);
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for (flag, advice) in [
        ("--samples <N>", "Change at will"),
        ("--iterations <N>", "Change at will"),
        ("--lambda <WEIGHT>", "Change with caution"),
        ("--damping <FRACTION>", "Change with caution"),
        ("--beta-range <START,END>", "Leave it"),
        ("--warm-start <FRACTION>", "Leave it"),
    ] {
        let at = words.find(flag).unwrap_or_else(|| panic!("no {flag} in {help}"));
        let rest = &words[at + flag.len()..];
        let section = &rest[..rest.find(" --").unwrap_or(rest.len())];
        assert!(section.contains(advice), "{flag}: {section}");
    }
    assert!(words.contains("75 interrupted"), "{help}");
}

#[test]
fn short_help_groups_options_and_fits_a_terminal() {
    for command in ["quantize", "plan", "inspect", "eval", "verify"] {
        let help = text(&halfstep(&[command, "-h"]).stdout);
        let longest = help.lines().max_by_key(|line| line.chars().count()).unwrap();
        assert!(longest.chars().count() <= 100, "{command}: {longest}");
        assert!(help.contains(&format!("Usage: halfstep {command} ")), "{help}");
    }
    let help = text(&halfstep(&["quantize", "-h"]).stdout);
    let at = |heading: &str| help.find(heading).unwrap_or_else(|| panic!("no {heading} in {help}"));
    let groups = ["\nData:", "\nGrid:", "\nRounding:", "\nResources:", "\nOutput:", "\nExit codes:"].map(at);
    assert!(groups.is_sorted(), "{groups:?}");
}

#[test]
fn wrong_usage_exits_2_and_offers_the_nearest_flag() {
    let (code, stderr) = refused(&["quantize", "m.onnx", "--iteration", "5"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("--iterations"), "{stderr}");
    for arguments in [
        &[][..],
        &["quantise"],
        &["quantize", "m.onnx", "--bits", "9"],
        &["quantize", "m.onnx", "--scheme", "round"],
        &["quantize", "m.onnx", "--objective", "gramm"],
        &["quantize", "m.onnx", "--warm-start", "1.5"],
        &["quantize", "m.onnx", "--json", "--quiet"],
        &["eval", "--data", "x.npz"],
        &["eval", "m.onnx"],
        &["eval", "m.onnx", "--data", "x.npz", "--batch", "0"],
    ] {
        assert_eq!(refused(arguments).0, 2, "{arguments:?}");
    }
}

#[test]
fn a_value_out_of_range_says_what_is_expected() {
    let (_, stderr) = refused(&["quantize", "m.onnx", "--bits", "9"]);
    assert!(stderr.contains("bit width is `9`, expected 2 to 8 or 16"), "{stderr}");
    let (_, stderr) = refused(&["quantize", "m.onnx", "--override", "conv1:bit=8"]);
    assert!(stderr.contains("override setting `bit` is unknown, did you mean `bits`?"), "{stderr}");
}

#[test]
fn what_is_missing_is_asked_for() {
    let (code, stderr) = refused(&["quantize"]);
    assert_eq!((code, stderr.lines().next()), (2, Some("error: no MODEL given")));
    let (code, stderr) = refused(&["quantize", "m.onnx"]);
    assert_eq!((code, stderr.lines().next()), (2, Some("error: no data given")));
    let (code, stderr) = refused(&["quantize", "m.onnx", "--calibration", "c.npz"]);
    assert_eq!((code, stderr.as_str()), (2, "error: no output folder given\nhint: add `--output DIR`\n"));
}

#[test]
fn unknown_keys_of_a_job_file_are_refused_with_path_and_nearest_match() {
    let folder = tempfile::tempdir().unwrap();
    let job = job_file(folder.path(), "model = 'm.onnx'\niteration = 5\n");
    let (code, stderr) = refused(&["quantize", "--config", &job]);
    let expect = format!("error: job file `{job}`: key `iteration` is unknown, did you mean `iterations`?\n");
    assert_eq!((code, stderr), (78, expect));
}

#[test]
fn job_files_that_cannot_be_used_exit_78() {
    let folder = tempfile::tempdir().unwrap();
    for (content, expect) in [
        ("bits = 9", "key `bits`: bit width is `9`, expected 2 to 8 or 16"),
        ("model = 'm.onnx'\nbits = ", "TOML parse error at line 2"),
        ("model = 'm'\ncalibration = 'c'\noutput = 'o'\ngranularity = 'per-group'", "no group size is given"),
        (
            "model = 'm'\ncalibration = 'c'\noutput = 'o'\nshard-size = 0",
            "shard-size is 0, expected 1 or more",
        ),
        ("model = 'm'\ncalibration = 'c'\nsamples = 0", "samples is 0, expected 1 or more"),
    ] {
        let (code, stderr) = refused(&["quantize", "--config", &job_file(folder.path(), content)]);
        assert_eq!(code, 78, "{content}");
        assert!(stderr.contains(expect), "{content}: {stderr}");
    }
    let (code, stderr) = refused(&["quantize", "--config", "/nonexistent/job.toml"]);
    assert_eq!(code, 78);
    assert!(stderr.starts_with("error: job file `/nonexistent/job.toml`: cannot be read"), "{stderr}");
}

#[test]
fn verify_exits_65_and_names_the_changed_file() {
    let folder = tempfile::tempdir().unwrap();
    let (file, manifest) = (folder.path().join("model.onnx"), folder.path().join("manifest.json"));
    std::fs::write(&file, b"").unwrap();
    // BLAKE3 of nothing, from the paper's test vectors.
    let hash = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
    let text_of =
        format!(r#"{{"version": 1, "outputs": [{{"path": "model.onnx", "bytes": 0, "blake3": "{hash}"}}]}}"#);
    std::fs::write(&manifest, text_of).unwrap();
    let good = halfstep(&["verify", manifest.to_str().unwrap()]);
    assert_eq!(
        (good.status.code(), text(&good.stdout)),
        (Some(0), "1 output and 0 inputs match (0 B)\n".to_string())
    );
    std::fs::write(&file, b"x").unwrap();
    let (code, stderr) = refused(&["verify", manifest.to_str().unwrap()]);
    let expect = format!("error: file `{}`: has 1 bytes, the manifest says 0\n", file.display());
    assert_eq!((code, stderr), (65, expect));
}

#[test]
fn devices_reports_on_any_machine_for_people_and_programs() {
    let output = halfstep(&["devices"]);
    assert_eq!(output.status.code(), Some(0));
    let report = text(&output.stdout);
    assert!(report.lines().nth(1).unwrap().starts_with("cpu "), "{report}");
    let verdict = report.lines().last().unwrap();
    assert!(
        verdict.starts_with("CUDA can be used") || verdict.starts_with("CUDA cannot be used: "),
        "{report}"
    );
    let json: serde_json::Value = serde_json::from_slice(&halfstep(&["devices", "--json"]).stdout).unwrap();
    assert_eq!(json["cuda"]["usable"], verdict.starts_with("CUDA can be used"));
    assert_eq!(json["cuda"]["reason"].is_null(), json["cuda"]["usable"].as_bool().unwrap());
}

#[test]
fn a_device_that_cannot_be_used_exits_78_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out").display().to_string();
    let run = |more: &[&str]| {
        let example = |name: &str| format!("{}/../examples/fashion-mnist/{name}", env!("CARGO_MANIFEST_DIR"));
        let (model, data) = (example("model.onnx"), example("calibration.npz"));
        let base = ["quantize", &model, "--calibration", &data, "--output", &output];
        refused(&[&base[..], more].concat())
    };
    // No machine has so many.
    let (code, stderr) = run(&["--device", "cuda:4095"]);
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("error: device `cuda:4095`: "), "{stderr}");
    assert!(stderr.contains("hint: `halfstep devices`"), "{stderr}");
    let (code, stderr) = run(&["--device", "cpu", "--cuda-libraries", "/no/such/folder"]);
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("CUDA libraries `/no/such/folder`: cannot be listed"), "{stderr}");
    assert!(!folder.path().join("out").exists() && !folder.path().join(".out.halfstep").exists());
}

/// The commands, as help lists them.
fn commands() -> Vec<String> {
    let help = text(&halfstep(&["--help"]).stdout);
    let listed =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    listed.map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
}

#[test]
fn shells_complete_every_command_and_option() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = halfstep(&["completions", shell]);
        let script = text(&output.stdout);
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""), "{shell}");
        assert!(commands().iter().all(|command| script.contains(command.as_str())), "{shell}: {script}");
        assert!(script.contains("metrics") && script.contains("log-format"), "{shell}");
    }
    let (code, stderr) = refused(&["completions", "csh"]);
    assert!(code == 2 && stderr.contains("possible values: bash"), "{stderr}");
    // Bash itself can read it, and offers what begins so.
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("halfstep.bash");
    std::fs::write(&script, halfstep(&["completions", "bash"]).stdout).unwrap();
    let ask = "source \"$1\"; COMP_WORDS=(halfstep expl); COMP_CWORD=1; _halfstep halfstep expl halfstep; echo \"${COMPREPLY[@]}\"";
    let offered = Command::new("bash").args(["-c", ask, "-", script.to_str().unwrap()]).output().unwrap();
    assert_eq!(text(&offered.stdout), "explain\n", "{}", text(&offered.stderr));
}

#[test]
fn there_is_a_manual_page_for_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man/man1");
    let output = halfstep(&["man", pages.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let listed: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
    assert_eq!(listed.len(), commands().len() + 1);
    for command in commands() {
        let page = std::fs::read_to_string(pages.join(format!("halfstep-{command}.1"))).unwrap();
        assert!(page.contains(&format!("halfstep {command}")) && page.contains(".SH OPTIONS"), "{page}");
    }
    assert!(std::fs::read_to_string(pages.join("halfstep.1")).unwrap().contains("halfstep\\-explain(1)"));
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (code, stderr) = refused(&["man", file.to_str().unwrap()]);
    assert!(code == 65 && stderr.contains("cannot be written"), "{stderr}");
}
