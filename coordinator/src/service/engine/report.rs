//! What people are told: events, status lines.

use crate::Finished;
use crate::OutcomeKind;
use crate::dispatch::News;
use crate::store::{JobRecord, JobStage};
use halfstep_proto::JobEvent;
use halfstep_proto::events::finite;
use halfstep_work::{ChunkReport, LayerId, Plan, Receipt};

/// Exit code of an interrupted job.
const CANCELLED: u8 = 75;

/// `decided`: layers that are over, with this one.
pub(super) fn news_event(plan: &Plan, news: News, decided: usize) -> JobEvent {
    match news {
        News::Task { phase, seconds, progress } => JobEvent::Task {
            phase: phase.name().into(),
            seconds,
            stage: progress.stage,
            stages: progress.stages,
            done: progress.done,
            total: progress.total,
        },
        News::Solved { layer, receipts, elapsed, .. } => {
            layer_solved(plan, layer, &receipts, elapsed, decided)
        }
        News::Failed { layer, failure } => {
            JobEvent::LayerFailed { name: plan.layer(layer).name.clone(), cause: failure.message }
        }
        News::NodeJoined { name, slots, .. } => JobEvent::NodeJoined { name, slots },
        News::NodeLost { name, why, .. } => JobEvent::NodeLost { name, why },
        News::Retry { task, why, attempt } => JobEvent::Retry { task, why, attempt },
        News::Waiting { why } => JobEvent::Waiting { why },
    }
}

pub(super) fn layer_solved(
    plan: &Plan,
    layer: LayerId,
    receipts: &[Receipt],
    seconds: f64,
    index: usize,
) -> JobEvent {
    let entry = plan.layer(layer);
    let mut sum = ChunkReport::default();
    receipts.iter().for_each(|receipt| sum.add(&receipt.report));
    let sqnr_db = 10.0 * (sum.signal / sum.objective).log10();
    JobEvent::LayerSolved {
        name: entry.name.clone(),
        index,
        total: plan.layers.len(),
        bits: entry.grid.bits,
        objective_before: finite(sum.objective_nearest),
        objective_after: finite(sum.objective),
        sqnr_db: finite(sqnr_db),
        rounded_away: sum.rounded_away,
        weights: (entry.rows * entry.cols) as u64,
        seconds,
    }
}

/// The last event of a job; none if it is not over.
pub(super) fn over(record: &JobRecord, done: Option<(&Finished, f64)>) -> Option<JobEvent> {
    let (exit, message) = match &record.stage {
        JobStage::Queued | JobStage::Running => return None,
        JobStage::Finished { exit, .. } => (*exit, String::new()),
        JobStage::Failed { exit, failure } => (*exit, failure.message.clone()),
        JobStage::Cancelled => (CANCELLED, "cancelled".into()),
    };
    let count = |kind: fn(&OutcomeKind) -> bool| {
        let layers = done.iter().flat_map(|(finished, _)| &finished.report.layers);
        layers.filter(|layer| kind(&layer.kind)).count()
    };
    Some(JobEvent::Finished {
        exit: exit.into(),
        solved: count(|kind| matches!(kind, OutcomeKind::Solved)),
        kept: count(|kind| matches!(kind, OutcomeKind::Kept { .. })),
        failed: count(|kind| matches!(kind, OutcomeKind::Failed { .. })),
        seconds: done.map_or(0.0, |(_, seconds)| seconds),
        message,
    })
}

/// Exit code of a job, 0 while it is not over.
pub(super) fn exit_of(stage: &JobStage) -> u8 {
    match stage {
        JobStage::Queued | JobStage::Running => 0,
        JobStage::Finished { exit, .. } | JobStage::Failed { exit, .. } => *exit,
        JobStage::Cancelled => CANCELLED,
    }
}
