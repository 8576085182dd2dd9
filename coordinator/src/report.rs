//! What became of every layer: `report.json`.
//!
//! Contains no times and no paths, so two runs of one job write the same bytes; times are in `timing.json`.

use halfstep_quant::GridSpec;
use serde::Serialize;

/// Outcome of one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum OutcomeKind {
    /// Rounded by AdaRound.
    Solved,
    /// Left as it was, and why.
    Kept {
        /// Why.
        reason: String,
    },
    /// Could not be solved; left as it was.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A constant-weight layer of the model and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerOutcome {
    /// Name.
    pub name: String,
    /// Operator.
    pub op_type: String,
    /// What became of it.
    #[serde(flatten)]
    pub kind: OutcomeKind,
    /// Numbers of a solved layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub solved: Option<LayerReport>,
}

/// Numbers of a solved layer, on the calibration data.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerReport {
    /// Grid.
    pub grid: GridSpec,
    /// Output channels.
    pub rows: usize,
    /// Inputs per group times kernel positions.
    pub cols: usize,
    /// Weights of the layer.
    pub weights: u64,
    /// Mean squared output error (sum over channels, mean over positions), nearest rounding.
    pub objective_nearest: f64,
    /// The same, as exported.
    pub objective: f64,
    /// Output SQNR as exported, dB; absent when the error is zero.
    pub sqnr_db: Option<f64>,
    /// Weights not rounded to nearest.
    pub rounded_away: u64,
    /// Rows where the guard fell back to a better start.
    pub guarded_rows: u64,
    /// Input columns that no data reached.
    pub dead_inputs: u64,
    /// Rows whose weights are all zero.
    pub zero_rows: u64,
}

/// The whole report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Format version.
    pub version: u32,
    /// Calibration samples used.
    pub samples: usize,
    /// Layers rounded.
    pub solved: usize,
    /// Layers left alone.
    pub kept: usize,
    /// Layers given up.
    pub failed: usize,
    /// Facts to know, one sentence each.
    pub notes: Vec<String>,
    /// One per layer with constant weights.
    pub layers: Vec<LayerOutcome>,
}

/// One note for all subjects (in backquotes before a colon) of which the same is true.
pub(crate) fn grouped(notes: Vec<String>) -> Vec<String> {
    const NAMED: usize = 3;
    let mut facts: Vec<(String, Vec<String>)> = Vec::new();
    for note in notes {
        let (subject, fact) = note.split_once("`: ").map_or((None, note.as_str()), |(s, f)| (Some(s), f));
        let subject = subject.map(|s| format!("{s}`"));
        match facts.iter_mut().find(|(known, _)| known == fact) {
            Some((_, subjects)) => subjects.extend(subject),
            None => facts.push((fact.to_owned(), subject.into_iter().collect())),
        }
    }
    facts
        .into_iter()
        .map(|(fact, subjects)| match subjects.len() {
            0 => fact,
            n if n <= NAMED => format!("{}: {fact}", subjects.join(", ")),
            n => format!("{} and {} more: {fact}", subjects[..NAMED].join(", "), n - NAMED),
        })
        .collect()
}
