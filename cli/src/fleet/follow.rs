//! Follows a job: the coordinator's events as progress on the screen, over any number of lost connections.
//!
//! A new stream begins with everything that still matters, so what was shown before is left out.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use halfstep_proto::{JobEvent, hello, job_to_wire, wire};
use halfstep_work::JobId;
use tokio_stream::StreamExt;
use tonic::Status;

use super::Shutdown;
use super::connect::{Line, is_passing};
use crate::answers::Progress;
use crate::exit::{CliError, Exit};

/// Between attempts to reach a coordinator that is away.
const PAUSE: Duration = Duration::from_millis(500);

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct End {
    pub(crate) exit: u32,
    pub(crate) solved: usize,
    pub(crate) kept: usize,
    pub(crate) failed: usize,
    pub(crate) seconds: f64,
    pub(crate) message: String,
}

/// See the module.
pub(crate) struct Follower<'a> {
    show: &'a (dyn Fn(Progress) + Sync),
    /// What the job runs on, if not nodes of a fleet.
    workers: Option<String>,
    /// Where results will be.
    output: PathBuf,
    planned: bool,
    stages: BTreeSet<usize>,
    layers: BTreeSet<String>,
}

impl<'a> Follower<'a> {
    /// Shows what happens by `show`. `workers`: what one process runs on; `None` for a fleet, whose nodes are shown.
    pub(crate) fn new(show: &'a (dyn Fn(Progress) + Sync), workers: Option<String>, output: PathBuf) -> Self {
        Self { show, workers, output, planned: false, stages: BTreeSet::new(), layers: BTreeSet::new() }
    }

    /// Follows the job to its end.
    ///
    /// # Errors
    /// `Interrupted` when a signal came first (the job goes on without us); what the coordinator refuses.
    pub(crate) async fn follow(
        &mut self,
        line: &Line,
        job: JobId,
        shutdown: &Shutdown,
    ) -> Result<End, CliError> {
        let mut away = false;
        loop {
            let attempt = tokio::select! {
                attempt = self.stream(line, job) => attempt,
                () = shutdown.asked() => return Err(CliError::new(Exit::Interrupted, "interrupted")),
            };
            match attempt {
                Ok(Some(end)) => return Ok(end),
                Ok(None) => {}
                Err(status) if is_passing(&status) => {
                    if !std::mem::replace(&mut away, true) {
                        (self.show)(Progress::Waiting {
                            why: format!("{}, trying again", line.refused(&status).message),
                        });
                    }
                }
                Err(status) => return Err(line.refused(&status)),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// One stream of events, until it ends or the job does.
    async fn stream(&mut self, line: &Line, job: JobId) -> Result<Option<End>, Status> {
        let request = wire::JobRequest { hello: Some(hello()), job: job_to_wire(job) };
        let mut events = line.jobs.clone().watch(request).await?.into_inner();
        while let Some(event) = events.next().await {
            let event = JobEvent::try_from(&event?).map_err(|error| Status::internal(error.to_string()))?;
            if let Some(end) = self.event(event) {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    fn event(&mut self, event: JobEvent) -> Option<End> {
        match event {
            JobEvent::Planned { layers, stages, shards, samples, nodes } => {
                let workers = self.workers.clone().unwrap_or_else(|| match nodes {
                    1 => "1 node".into(),
                    nodes => format!("{nodes} nodes"),
                });
                if !std::mem::replace(&mut self.planned, true) {
                    (self.show)(Progress::Planned { layers, stages, shards, samples, workers });
                }
            }
            JobEvent::Task { phase, stage, stages, done, total, .. } => {
                if self.stages.insert(stage) {
                    (self.show)(Progress::StageStarted { stage: stage + 1, stages });
                }
                if phase == "capture" {
                    (self.show)(Progress::ShardCaptured { stage: stage + 1, shard: done, shards: total });
                }
            }
            JobEvent::LayerKept { name, reason } => {
                self.layer(name, |name| Progress::LayerKept { name, reason })
            }
            JobEvent::LayerFailed { name, cause } => {
                self.layer(name, |name| Progress::LayerFailed { name, cause })
            }
            JobEvent::LayerSolved {
                name,
                index,
                total,
                bits,
                objective_before,
                objective_after,
                sqnr_db,
                rounded_away,
                weights,
                seconds,
            } => self.layer(name, |name| Progress::LayerSolved {
                name,
                index,
                total,
                bits,
                objective_before: objective_before.unwrap_or(f64::INFINITY),
                objective_after: objective_after.unwrap_or(f64::INFINITY),
                sqnr_db: sqnr_db.unwrap_or(f64::INFINITY),
                rounded_away,
                weights,
                seconds,
            }),
            JobEvent::NodeJoined { name, slots } => self.of_fleet(Progress::NodeJoined { name, slots }),
            JobEvent::NodeLost { name, why } => self.of_fleet(Progress::NodeLost { name, why }),
            JobEvent::NodeLeftOut { name, why } => self.of_fleet(Progress::NodeLeftOut { name, why }),
            JobEvent::Retry { task, why, attempt } => (self.show)(Progress::Retry { task, why, attempt }),
            JobEvent::Waiting { why } => self.of_fleet(Progress::Waiting { why }),
            JobEvent::Writing => (self.show)(Progress::Writing { path: self.output.clone() }),
            JobEvent::Finished { exit, solved, kept, failed, seconds, message } => {
                return Some(End { exit, solved, kept, failed, seconds, message });
            }
            JobEvent::Unknown => {}
        }
        None
    }

    /// Shown once per layer.
    fn layer(&mut self, name: String, event: impl FnOnce(String) -> Progress) {
        if self.layers.insert(name.clone()) {
            (self.show)(event(name));
        }
    }

    /// Nothing that a user of one process needs to know.
    fn of_fleet(&self, event: Progress) {
        if self.workers.is_none() {
            (self.show)(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn a_second_stream_repeats_nothing_on_the_screen() {
        let shown = Mutex::new(Vec::new());
        let show = |event: Progress| shown.lock().unwrap().push(event);
        let mut follower = Follower::new(&show, None, "out".into());
        let events = || {
            [
                JobEvent::Planned { layers: 2, stages: 1, shards: 1, samples: 4, nodes: 1 },
                JobEvent::Task {
                    phase: "capture".into(),
                    seconds: 0.1,
                    stage: 0,
                    stages: 1,
                    done: 1,
                    total: 1,
                },
                JobEvent::LayerKept { name: "a".into(), reason: "LSTM".into() },
                JobEvent::LayerFailed { name: "b".into(), cause: "NaN".into() },
            ]
        };
        for event in events().into_iter().chain(events()) {
            assert_eq!(follower.event(event), None);
        }
        let finished =
            JobEvent::Finished { exit: 4, solved: 0, kept: 1, failed: 1, seconds: 1.0, message: "m".into() };
        assert_eq!(follower.event(finished).unwrap().exit, 4);
        let shown = shown.into_inner().unwrap();
        let once = |wanted: fn(&Progress) -> bool| shown.iter().filter(|event| wanted(event)).count();
        assert_eq!(once(|e| matches!(e, Progress::Planned { workers, .. } if workers == "1 node")), 1);
        assert_eq!(once(|e| matches!(e, Progress::StageStarted { .. })), 1);
        assert_eq!(once(|e| matches!(e, Progress::LayerKept { .. } | Progress::LayerFailed { .. })), 2);
    }
}
