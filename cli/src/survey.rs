//! `inspect` and `plan`: what is in a model, and what a job would do with it. Nothing is computed.

use std::path::Path;

use halfstep_coordinator::{Prepared, inspect as list, prepare};
use halfstep_work::{LayerPlan, Propagation};

use crate::answers::{InspectReport, Kept, LayerRow, PlanReport, StageRow};
use crate::config::RunConfig;
use crate::exit::CliError;

/// Lists layers.
///
/// # Errors
/// Bad input for a model that cannot be read.
pub(crate) fn inspect(model: &Path, fold_batch_norm: bool) -> Result<InspectReport, CliError> {
    let listed = list(model, fold_batch_norm)?;
    Ok(InspectReport {
        inputs: listed.inputs,
        outputs: listed.outputs,
        opset: listed.opset,
        layers: listed
            .layers
            .iter()
            .map(|l| LayerRow {
                name: l.name.clone(),
                op: l.op_type.clone(),
                weight: l.weight.clone(),
                shape: l.weight_shape.clone(),
                rows: l.rows,
                cols: l.cols,
                groups: l.groups,
                activation: l.activation.clone(),
                uses: l.uses,
            })
            .collect(),
        kept: listed.kept.into_iter().map(|k| kept(k, false)).collect(),
    })
}

fn kept(layer: halfstep_work::KeptLayer, requested: bool) -> Kept {
    Kept { name: layer.name, op: layer.op_type, reason: layer.reason, requested }
}

/// Plans without computing.
///
/// # Errors
/// What `quantize` would say before it starts.
pub(crate) fn plan(config: &RunConfig) -> Result<PlanReport, CliError> {
    let (prepared, dataset) = prepare(&config.to_job())?;
    let plan = &prepared.plan;
    let stages: Vec<StageRow> = (0..plan.stages.len()).map(|stage| stage_row(&prepared, stage)).collect();
    let statistics = stages.iter().map(|s| s.statistics_bytes).max().unwrap_or(0);
    let seconds = stages.iter().map(|s| s.seconds).sum();
    Ok(PlanReport {
        samples: plan.samples(),
        shards: plan.shards.len(),
        kept: plan.kept.iter().map(|k| kept(k.clone(), k.reason.starts_with("skipped"))).collect(),
        peak_bytes: statistics + dataset.bytes_held() as u64,
        spill_bytes: 0,
        output_bytes: plan.layers.iter().map(|l| (l.rows * l.cols * 4) as u64).sum(),
        stages,
        seconds,
    })
}

fn stage_row(prepared: &Prepared, stage: usize) -> StageRow {
    let plan = &prepared.plan;
    let layers: Vec<&LayerPlan> = plan.stages[stage].solve.iter().map(|id| plan.layer(*id)).collect();
    let matrices: u64 = if plan.propagation == Propagation::Sequential && stage > 0 { 3 } else { 1 };
    let square = |l: &&LayerPlan| (l.groups * l.cols * l.cols) as u64;
    // Two flops per multiply-add at a rate that one core of a current machine reaches.
    let flops: f64 = layers
        .iter()
        .map(|l| 2.0 * l.rows as f64 * (l.cols * l.cols) as f64 * f64::from(plan.solver.iterations + 10))
        .sum();
    StageRow {
        stage,
        layers: layers.iter().map(|l| l.name.clone()).collect(),
        nodes: prepared.cut.segments[stage].nodes.len(),
        chunks: layers.iter().map(|l| l.chunks.len()).sum(),
        carry_bytes: 0,
        statistics_bytes: layers.iter().map(square).sum::<u64>() * matrices * 8,
        seconds: flops / 100e9,
    }
}
