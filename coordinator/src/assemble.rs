//! From committed chunks to whole layers, with every chunk accounted for.

use crate::report::{LayerOutcome, LayerReport, OutcomeKind, Report, grouped};
use crate::{CoordinatorError, Prepared};
use halfstep_model::Layer;
use halfstep_quant::Encodings;
use halfstep_work::{ChunkId, ChunkReport, Failure, LayerId, LayerPlan, Plan, Receipt, Rounding};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A layer's decided integers.
pub struct AssembledLayer {
    /// Geometry and names.
    pub layer: Layer,
    /// Grid of all rows.
    pub encodings: Encodings,
    /// `[rows, cols]` grid integers.
    pub q: Vec<i32>,
}

/// Everything that the exporters need.
pub struct Assembled {
    /// Solved layers in plan order.
    pub layers: Vec<AssembledLayer>,
    /// Report over all layers.
    pub report: Report,
}

/// What became of the layers of a job that is done.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Every solved chunk.
    pub receipts: BTreeMap<(LayerId, ChunkId), Receipt>,
    /// Layers that keep their weights, and why.
    pub given_up: BTreeMap<LayerId, Failure>,
}

impl Outcome {
    /// The chunks of a layer in order, if all are there.
    pub fn layer(&self, plan: &Plan, layer: LayerId) -> Option<Vec<Receipt>> {
        plan.chunk_ids(layer).map(|chunk| self.receipts.get(&(layer, chunk)).copied()).collect()
    }
}

/// Where the integers behind the receipts are.
pub trait Roundings: Sync {
    /// One committed chunk.
    ///
    /// # Errors
    /// If it is not there or not what was committed.
    fn rounding(&self, layer: LayerId, chunk: ChunkId) -> Result<Arc<Rounding>, CoordinatorError>;
}

/// Puts chunks together and checks their coverage.
///
/// # Errors
/// `ReadBack` naming the layer if chunks are missing, overlap or leave their grid.
pub fn assemble(
    prepared: &Prepared,
    outcome: &Outcome,
    roundings: &dyn Roundings,
) -> Result<Assembled, CoordinatorError> {
    let report = summarise(prepared, outcome)?;
    let mut layers = Vec::new();
    for (entry, layer) in prepared.plan.layers.iter().zip(&prepared.layers) {
        if let Some((encodings, q)) = integers(entry, outcome, roundings)? {
            layers.push(AssembledLayer { layer: layer.clone(), encodings, q });
        }
    }
    Ok(Assembled { layers, report })
}

/// What became of every layer, from the receipts alone.
///
/// # Errors
/// `ReadBack` naming the layer if chunks are missing.
pub fn summarise(prepared: &Prepared, outcome: &Outcome) -> Result<Report, CoordinatorError> {
    let plan = &prepared.plan;
    let mut outcomes = Vec::new();
    let mut starved = Vec::new();
    for entry in &plan.layers {
        if let Some(failure) = outcome.given_up.get(&entry.id) {
            outcomes.push(without_numbers(
                &entry.name,
                &entry.op_type,
                OutcomeKind::Failed { reason: failure.message.clone() },
            ));
            continue;
        }
        let receipts = outcome
            .layer(plan, entry.id)
            .ok_or_else(|| broken(entry, "not all chunks were committed".into()))?;
        let sum = sum(&receipts);
        if sum.dead_inputs >= entry.cols as u64 && sum.signal == 0.0 {
            starved
                .push(format!("layer `{}`: no calibration data reached it, rounded to nearest", entry.name));
        }
        outcomes.push(solved(entry, &sum));
    }
    for kept in &plan.kept {
        outcomes.push(without_numbers(
            &kept.name,
            &kept.op_type,
            OutcomeKind::Kept { reason: kept.reason.clone() },
        ));
    }
    let mut notes = prepared.notes.clone();
    notes.extend(grouped(starved));
    Ok(report(plan, outcomes, notes))
}

/// Grid and `[rows, cols]` integers of one layer, checked against its receipts; none if it was given up.
///
/// # Errors
/// `ReadBack` naming the layer if a chunk is not what was committed or leaves its grid.
pub fn integers(
    entry: &LayerPlan,
    outcome: &Outcome,
    roundings: &dyn Roundings,
) -> Result<Option<(Encodings, Vec<i32>)>, CoordinatorError> {
    if outcome.given_up.contains_key(&entry.id) {
        return Ok(None);
    }
    let chunks = (0..entry.chunks.len() as u32).map(ChunkId);
    let read = chunks.map(|chunk| {
        let rounding = roundings.rounding(entry.id, chunk)?;
        match outcome.receipts.get(&(entry.id, chunk)) {
            Some(receipt) if *receipt == Receipt::of(&rounding) => Ok(rounding),
            _ => Err(broken(entry, format!("{chunk} is not what was committed"))),
        }
    });
    let roundings: Vec<Arc<Rounding>> = read.collect::<Result<_, _>>()?;
    join(entry, &roundings).map(Some)
}

fn broken(entry: &LayerPlan, what: String) -> CoordinatorError {
    CoordinatorError::ReadBack { subject: format!("layer `{}`", entry.name), what }
}

fn join(entry: &LayerPlan, roundings: &[Arc<Rounding>]) -> Result<(Encodings, Vec<i32>), CoordinatorError> {
    let mut q = Vec::with_capacity(entry.rows * entry.cols);
    let mut parts = Vec::with_capacity(roundings.len());
    for (rounding, rows) in roundings.iter().zip(&entry.chunks) {
        let expected = rows.len() * entry.cols;
        if rounding.q.len() != expected || rounding.encodings.rows != rows.len() {
            return Err(broken(
                entry,
                format!("{}: expected {expected} integers, found {}", rounding.chunk, rounding.q.len()),
            ));
        }
        rounding.encodings.validate()?;
        let range = rounding.encodings.qmin()..=rounding.encodings.qmax();
        if let Some(off) = rounding.q.iter().find(|v| !range.contains(v)) {
            return Err(broken(entry, format!("{}: integer {off} is outside {range:?}", rounding.chunk)));
        }
        q.extend_from_slice(&rounding.q);
        parts.push(rounding.encodings.clone());
    }
    Ok((Encodings::concat_rows(&parts)?, q))
}

fn without_numbers(name: &str, op_type: &str, kind: OutcomeKind) -> LayerOutcome {
    LayerOutcome { name: name.into(), op_type: op_type.into(), kind, solved: None }
}

fn sum(receipts: &[Receipt]) -> ChunkReport {
    let mut sum = ChunkReport::default();
    receipts.iter().for_each(|r| sum.add(&r.report));
    sum
}

fn solved(entry: &LayerPlan, sum: &ChunkReport) -> LayerOutcome {
    let numbers = LayerReport {
        grid: entry.grid,
        rows: entry.rows,
        cols: entry.cols,
        weights: (entry.rows * entry.cols) as u64,
        objective_nearest: sum.objective_nearest,
        objective: sum.objective,
        sqnr_db: (sum.objective > 0.0 && sum.signal > 0.0)
            .then(|| 10.0 * (sum.signal / sum.objective).log10()),
        rounded_away: sum.rounded_away,
        guarded_rows: sum.guarded_rows,
        dead_inputs: sum.dead_inputs,
        zero_rows: sum.zero_rows,
    };
    LayerOutcome {
        name: entry.name.clone(),
        op_type: entry.op_type.clone(),
        kind: OutcomeKind::Solved,
        solved: Some(numbers),
    }
}

fn report(plan: &Plan, layers: Vec<LayerOutcome>, notes: Vec<String>) -> Report {
    let count = |f: fn(&OutcomeKind) -> bool| layers.iter().filter(|l| f(&l.kind)).count();
    Report {
        version: 1,
        samples: plan.samples(),
        solved: count(|k| matches!(k, OutcomeKind::Solved)),
        kept: count(|k| matches!(k, OutcomeKind::Kept { .. })),
        failed: count(|k| matches!(k, OutcomeKind::Failed { .. })),
        notes,
        layers,
    }
}
