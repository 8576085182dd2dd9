//! The state of the engine as gauges, once a second: jobs, tasks, nodes.
//!
//! Not here: names and labels (`telemetry`), counters, which are counted where things happen.

use super::Engine;
use super::job::Active;
use crate::service::telemetry::{self, JOB_STATES, NODE_STATES};
use crate::store::JobStage;

/// Between two looks.
const LOOK_MS: u64 = 1_000;

impl Engine {
    /// Sets gauges if they are due.
    pub(super) fn gauge(&mut self, now_ms: u64) {
        if self.gauged_ms.is_some_and(|last| now_ms < last + LOOK_MS) {
            return;
        }
        self.gauged_ms = Some(now_ms);
        for state in JOB_STATES {
            let count = self.jobs.values().filter(|known| job_state(&known.record.stage) == state).count();
            telemetry::jobs(state, count);
        }
        for (state, label) in NODE_STATES {
            let count =
                self.seats.iter().filter(|(node, seat)| self.condition(**node, seat) == state).count();
            telemetry::nodes(label, count);
        }
        telemetry::longest_silence(self.longest_silence_ms() as f64 / 1e3);
        let active = self.active.as_ref();
        let census = active.and_then(Active::dispatch).map(|dispatch| dispatch.state().census());
        telemetry::tasks(census.unwrap_or_default());
        let counts = active.map(Active::counts).unwrap_or_default();
        telemetry::layers(counts.layers_done, counts.layers - counts.layers_done);
        let started = active.map(|active| active.began_unix.as_secs_f64());
        telemetry::job_started(started.unwrap_or(0.0));
    }
}

fn job_state(stage: &JobStage) -> &'static str {
    match stage {
        JobStage::Queued => "queued",
        JobStage::Running => "running",
        JobStage::Finished { .. } => "finished",
        JobStage::Failed { .. } => "failed",
        JobStage::Cancelled => "cancelled",
    }
}
