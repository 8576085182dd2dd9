//! The outcome of a job, read from its results folder: the same whoever computed it.
//!
//! In: `report.json` and `timing.json` as the coordinator writes them. Not here: fetching the folder (`fleet`),
//! rendering (`render`).

use std::path::{Path, PathBuf};

use halfstep_quant::GridSpec;
use serde::Deserialize;
use serde_json::Value;

use crate::answers::{FailedLayer, Kept, QuantizeOutcome, ReportRow};
use crate::exit::CliError;

const REPORT: &str = "report.json";
const TIMING: &str = "timing.json";
/// How the coordinator begins the reason of a layer that a rule of the user left out.
const SKIPPED: &str = "skipped by pattern";
/// What a language model keeps is meant to be kept: embeddings, output heads, routers. ONNX has no operators so called.
const MEANT_TO_BE_KEPT: [&str; 2] = ["Embed", "Linear"];

#[derive(Deserialize)]
struct Report {
    notes: Vec<String>,
    layers: Vec<Layer>,
}

#[derive(Deserialize)]
struct Layer {
    name: String,
    op_type: String,
    outcome: Outcome,
    #[serde(default)]
    reason: String,
    solved: Option<Solved>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Solved,
    Kept,
    Failed,
}

#[derive(Deserialize)]
struct Solved {
    grid: GridSpec,
    weights: u64,
    objective_nearest: f64,
    objective: f64,
    sqnr_db: Option<f64>,
    rounded_away: u64,
}

/// What became of every layer, and where time went.
///
/// # Errors
/// Internal if the folder does not hold what the coordinator writes.
pub(crate) fn read(folder: &Path) -> Result<QuantizeOutcome, CliError> {
    let report: Report = json(&folder.join(REPORT))?;
    let timing: Value = json(&folder.join(TIMING))?;
    let mut outcome = QuantizeOutcome {
        solved: 0,
        kept: Vec::new(),
        failed: Vec::new(),
        rows: Vec::new(),
        phases: phases(&timing),
        peak_resident_bytes: timing["peak_resident_bytes"].as_u64(),
        files: files(folder)?,
        notes: report.notes,
    };
    for layer in report.layers {
        let seconds = timing["layer_solve_thread_seconds"][&layer.name].as_f64().unwrap_or(0.0);
        match (layer.outcome, layer.solved) {
            (Outcome::Kept, _) => outcome.kept.push(Kept {
                requested: layer.reason.starts_with(SKIPPED)
                    || MEANT_TO_BE_KEPT.contains(&layer.op_type.as_str()),
                name: layer.name,
                op: layer.op_type,
                reason: layer.reason,
            }),
            (Outcome::Failed, _) => {
                outcome.failed.push(FailedLayer { name: layer.name, cause: layer.reason });
            }
            (Outcome::Solved, Some(solved)) => outcome.rows.push(row(layer.name, &solved, seconds)),
            (Outcome::Solved, None) => {
                return Err(CliError::internal(format!(
                    "{REPORT}: layer `{}` is solved without numbers",
                    layer.name
                )));
            }
        }
    }
    outcome.solved = outcome.rows.len();
    Ok(outcome)
}

fn row(name: String, solved: &Solved, seconds: f64) -> ReportRow {
    ReportRow {
        name,
        bits: solved.grid.bits,
        grid: format!("{} {}", solved.grid.scheme, solved.grid.granularity),
        objective_before: solved.objective_nearest,
        objective_after: solved.objective,
        sqnr_db: solved.sqnr_db.unwrap_or(f64::INFINITY),
        rounded_away: solved.rounded_away,
        weights: solved.weights,
        seconds,
    }
}

/// Wall seconds by phase: those of threads, as far as the slots shared the work evenly.
fn phases(timing: &Value) -> Vec<(String, f64)> {
    let of = |key: &str| timing[key].as_f64().unwrap_or(0.0);
    let slots = of("threads").max(1.0);
    [
        ("read", of("read_seconds")),
        ("forward", of("forward_thread_seconds") / slots),
        ("statistics", of("statistics_thread_seconds") / slots),
        ("solve", of("solve_thread_seconds") / slots),
        ("refine", of("refine_thread_seconds") / slots),
        ("export", of("export_seconds")),
    ]
    .map(|(name, seconds)| (name.to_owned(), seconds))
    .into()
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, CliError> {
    let fail =
        |error| CliError::bad_input(format!("results `{}`: cannot be listed: {error}", folder.display()));
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        names.push(PathBuf::from(entry.map_err(fail)?.file_name()));
    }
    names.sort();
    Ok(names)
}

fn json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, CliError> {
    let fail = |what: String| CliError::internal(format!("result `{}`: {what}", path.display()));
    let text = std::fs::read(path).map_err(|error| fail(format!("cannot be read: {error}")))?;
    serde_json::from_slice(&text).map_err(|error| fail(format!("is not what was expected: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT_TEXT: &str = r#"{"version": 1, "samples": 4, "solved": 1, "kept": 2, "failed": 1, "notes": ["a note"],
        "layers": [
            {"name": "a", "op_type": "Conv", "outcome": "solved", "solved": {
                "grid": {"bits": 3, "scheme": "symmetric", "granularity": "per-channel", "range": "mse"},
                "rows": 2, "cols": 3, "weights": 6, "objective_nearest": 2.0, "objective": 1.0, "sqnr_db": null,
                "rounded_away": 4, "guarded_rows": 0, "dead_inputs": 0, "zero_rows": 0}},
            {"name": "b", "op_type": "Gemm", "outcome": "kept", "reason": "skipped by pattern `b`"},
            {"name": "c", "op_type": "LSTM", "outcome": "kept", "reason": "recurrent"},
            {"name": "d", "op_type": "Conv", "outcome": "failed", "reason": "NaN"}]}"#;

    #[test]
    fn the_folder_tells_what_became_of_every_layer() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(REPORT), REPORT_TEXT).unwrap();
        let timing = r#"{"threads": 2, "forward_thread_seconds": 3.0, "layer_solve_thread_seconds": {"a": 0.5},
            "peak_resident_bytes": 1048576}"#;
        std::fs::write(folder.path().join(TIMING), timing).unwrap();
        let outcome = read(folder.path()).unwrap();
        assert_eq!((outcome.solved, outcome.kept.len(), outcome.failed.len()), (1, 2, 1));
        assert!(outcome.kept[0].requested && !outcome.kept[1].requested);
        assert_eq!((outcome.rows[0].seconds, outcome.rows[0].sqnr_db), (0.5, f64::INFINITY));
        assert_eq!(outcome.phases[1], ("forward".to_owned(), 1.5));
        assert_eq!(outcome.peak_resident_bytes, Some(1 << 20));
        assert_eq!(outcome.files, [PathBuf::from(REPORT), PathBuf::from(TIMING)]);
    }

    #[test]
    fn a_folder_without_a_report_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(folder.path()).unwrap_err().message.contains(REPORT));
    }
}
