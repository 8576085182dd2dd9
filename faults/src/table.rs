//! The summary of a campaign: one row of numbers, then what went wrong.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::killer::{Run, Verdict};
use crate::schedule::Fault;

/// Runs, faults by kind, differing, lost, hung, failed, seconds; then one paragraph for each bad run.
pub fn summary(runs: &[Run]) -> String {
    let count = |bad: fn(&Verdict) -> bool| runs.iter().filter(|run| bad(&run.verdict)).count();
    let seconds: f64 = runs.iter().map(|run| run.took.as_secs_f64()).sum();
    let slowest = runs.iter().map(|run| run.took.as_secs_f64()).fold(0.0, f64::max);
    let mut cells = vec![("runs", runs.len().to_string())];
    cells.extend(Fault::KINDS.map(|kind| (kind, faults(runs, kind).to_string())));
    cells.extend([
        ("acknowledged", runs.iter().map(|run| run.acknowledged).sum::<usize>().to_string()),
        ("differing", count(|v| matches!(v, Verdict::Differs(_))).to_string()),
        ("lost", count(|v| matches!(v, Verdict::Lost(_))).to_string()),
        ("hung", count(|v| matches!(v, Verdict::Hung(_))).to_string()),
        ("failed", count(|v| matches!(v, Verdict::Failed(_))).to_string()),
        ("seconds", format!("{seconds:.0}")),
        ("slowest", format!("{slowest:.1}")),
    ]);
    let mut text = rows(&cells);
    for run in runs.iter().filter(|run| run.verdict != Verdict::Identical) {
        let _ = write!(text, "\nseed {}: {}\n", run.seed, what(&run.verdict));
    }
    text
}

/// The same for programs: every run.
pub fn figures(runs: &[Run]) -> Value {
    let one = |run: &Run| {
        json!({
            "seed": run.seed,
            "verdict": word(&run.verdict),
            "faults": run.faults,
            "acknowledged": run.acknowledged,
            "seconds": run.took.as_secs_f64(),
            "detail": if run.verdict == Verdict::Identical { String::new() } else { what(&run.verdict) },
        })
    };
    let identical = runs.iter().filter(|run| run.verdict == Verdict::Identical).count();
    json!({"runs": runs.iter().map(one).collect::<Vec<_>>(), "identical": identical, "other": runs.len() - identical})
}

/// A verdict in a word.
pub fn word(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Identical => "identical",
        Verdict::Differs(_) => "DIFFERS",
        Verdict::Lost(_) => "LOST",
        Verdict::Hung(_) => "HUNG",
        Verdict::Failed(_) => "FAILED",
    }
}

fn faults(runs: &[Run], kind: &str) -> usize {
    runs.iter().filter_map(|run| run.faults.get(kind)).sum()
}

fn rows(cells: &[(&str, String)]) -> String {
    let width = |(head, value): &(&str, String)| head.len().max(value.len());
    let line = |pick: fn(&(&str, String)) -> String| {
        let padded = cells.iter().map(|cell| format!("{:>1$}", pick(cell), width(cell)));
        padded.collect::<Vec<_>>().join("  ")
    };
    format!("{}\n{}\n", line(|cell| cell.0.to_string()), line(|cell| cell.1.clone()))
}

fn what(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Identical => "identical".into(),
        Verdict::Differs(files) => format!("differs\n{}", files.join("\n")),
        Verdict::Lost(places) => format!("acknowledged and lost\n{}", places.join("\n")),
        Verdict::Hung(error) | Verdict::Failed(error) => error.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::time::Duration;

    #[test]
    fn a_bad_run_is_counted_and_explained_with_its_seed() {
        let run = |seed, verdict| Run {
            seed,
            verdict,
            faults: BTreeMap::from([("node", 2)]),
            acknowledged: 3,
            took: Duration::from_secs(2),
        };
        let runs = [run(1, Verdict::Identical), run(77, Verdict::Lost(vec!["layer 1".into()]))];
        let text = summary(&runs);
        let mut lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let (head, row) = (lines.next().unwrap(), lines.next().unwrap());
        let cell = |name| row[head.iter().position(|head| *head == name).unwrap()];
        assert_eq!(["runs", "node", "acknowledged", "lost", "hung"].map(cell), ["2", "4", "6", "1", "0"]);
        assert!(text.contains("seed 77: acknowledged and lost\nlayer 1"), "{text}");
        let figures = figures(&runs);
        assert_eq!((&figures["identical"], &figures["other"]), (&json!(1), &json!(1)));
        assert_eq!(figures["runs"][1]["verdict"], "LOST");
    }
}
