//! Jobs from submission to their end; one at a time, in the order of submission.

use super::job::{Active, EPOCH_SHIFT, Running, Step};
use super::report::{exit_of, over};
use super::{Engine, Fenced, Known};
use crate::CoordinatorError;
use crate::dispatch::{Dispatch, Limits};
use crate::jobs::{ActiveJob, Finished, JobFolder, JobSpec, Resumed};
use crate::service::log::{JobLog, Subscription};
use crate::service::request::{NewJob, Request};
use crate::service::shelf::Current;
use crate::service::telemetry;
use crate::store::{Change, JobCounts, JobRecord, JobStage, ResultFile};
use halfstep_proto::{JobEvent, job_to_wire, wire};
use halfstep_work::{ChunkId, Failure, FailureClass, JobId, LayerId, NodeId};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::time::Instant;
use tonic::Status;

/// Jobs that wait.
const QUEUE_MAX: usize = 1000;
/// Results that could not be written are written again after so long.
const EXPORT_AGAIN_MS: u64 = 5_000;

impl Engine {
    /// True if the job was there already, finished or on its way. One that failed or was cancelled begins again, with
    /// all that it had solved.
    pub(super) async fn submit(&mut self, new: NewJob) -> Result<bool, Status> {
        if let Some(known) = self.jobs.get(&new.id) {
            let there = match &known.record.stage {
                JobStage::Queued | JobStage::Running => true,
                JobStage::Finished { .. } => JobFolder::new(self.store.folder(), new.id).results().is_dir(),
                JobStage::Failed { .. } | JobStage::Cancelled => false,
            };
            if there {
                return Ok(true);
            }
        }
        if self.unfinished().len() >= QUEUE_MAX {
            return Err(Status::resource_exhausted(format!("{QUEUE_MAX} jobs wait already")));
        }
        let computed_by = self.jobs.get(&new.id).and_then(|known| known.record.computed_by.clone());
        let record = JobRecord {
            id: new.id,
            order: self.next_order,
            submitted_unix_ms: unix_ms(),
            spec: new.spec,
            files: new.files,
            stage: JobStage::Queued,
            computed_by,
            counts: JobCounts::default(),
        };
        let written = self.write(vec![Change::Job(record.clone())]).await;
        written.map_err(|e| Status::unavailable(e.to_string()))?;
        self.next_order += 1;
        tracing::info!(job = %new.id, "job submitted");
        match self.jobs.get_mut(&new.id) {
            Some(known) => {
                known.record = record;
                known.log.restart();
            }
            None => {
                let known = Known { record, log: JobLog::default(), fenced: Fenced::default() };
                self.jobs.insert(new.id, known);
            }
        }
        self.begin_next().await;
        Ok(false)
    }

    /// Takes up the next job if none is active.
    pub(super) async fn begin_next(&mut self) {
        let now = self.now_ms();
        if let Some(active) = &self.active {
            let due = matches!(&active.step, Step::Exporting { again_ms: Some(at), .. } if *at <= now);
            if due {
                self.export();
            }
            return;
        }
        let Some(id) = self.unfinished().first().copied() else { return };
        let Some(known) = self.jobs.get(&id) else { return };
        let taken_over = known.record.stage == JobStage::Running;
        let record = JobRecord { stage: JobStage::Running, ..known.record.clone() };
        if let Err(error) = self.write(vec![Change::Job(record.clone())]).await {
            tracing::error!(%error, "the next job cannot begin, trying again");
            return;
        }
        if let Some(known) = self.jobs.get_mut(&id) {
            known.record = record.clone();
        }
        self.active = Some(Active { taken_over, ..Active::new(id) });
        let (store, artefacts, line) =
            (Arc::clone(&self.store), Arc::clone(&self.artefacts), self.line.clone());
        tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let prepared = ActiveJob::prepare(store.folder(), &artefacts, &record).and_then(|job| {
                let resumed = job.resume(&store, &artefacts)?;
                store.commit(&resumed.lost)?;
                Ok((job, resumed))
            });
            let seconds = began.elapsed().as_secs_f64();
            line.tell_blocking(Request::Prepared { job: id, result: Box::new(prepared), seconds });
        });
    }

    pub(super) async fn prepared(
        &mut self,
        id: JobId,
        result: Result<(ActiveJob, Resumed), CoordinatorError>,
        seconds: f64,
    ) {
        let Some(active) = self.active.as_mut().filter(|active| active.id == id) else { return };
        active.tally.prepare = seconds;
        let taken_over = active.taken_over;
        if active.cancelled {
            return self.end(id, JobStage::Cancelled, None).await;
        }
        let (job, resumed) = match result {
            Ok(prepared) => prepared,
            Err(error) => {
                let exit = error.exit();
                return self.end_failed(id, error.into_failure(), Some(exit)).await;
            }
        };
        self.announce(&job);
        let durable: BTreeMap<(LayerId, ChunkId), blake3::Hash> = match self.store.committed(id) {
            Ok(committed) => committed.roundings,
            Err(error) => {
                return self.end_failed(id, CoordinatorError::from(error).into_failure(), None).await;
            }
        };
        let receipts = resumed.outcome.receipts.values().copied().collect();
        let limits = self.limits();
        let mut dispatch =
            Dispatch::new(Arc::clone(&job.plan), limits, receipts, resumed.outcome.given_up.clone());
        if taken_over {
            dispatch.hold_until(self.now_ms() + limits.heartbeat_ms);
        }
        let (held, spans) = (VecDeque::new(), BTreeMap::new());
        let running = Running { job: Arc::new(job), dispatch, durable, held, spans };
        self.recall(&running, &resumed.outcome);
        let (plan, source) = (Arc::clone(&running.job.plan), Arc::clone(&running.job.source));
        self.shelf.set(Some(Current { job: id, plan, source }));
        if let Some(active) = self.active.as_mut() {
            active.step = Step::Running(Box::new(running));
        }
        let nodes: Vec<NodeId> = self.seats.keys().copied().collect();
        nodes.into_iter().for_each(|node| self.ask_to_open(node));
    }

    fn announce(&mut self, job: &ActiveJob) {
        let plan = &job.plan;
        if let Some(known) = self.jobs.get_mut(&job.id) {
            known.log.restart();
        }
        self.log(JobEvent::Planned {
            layers: plan.layers.len(),
            stages: plan.stages.len(),
            shards: plan.shards.len(),
            samples: plan.samples(),
            nodes: self.seats.len(),
        });
        for kept in &plan.kept {
            self.log(JobEvent::LayerKept { name: kept.name.clone(), reason: kept.reason.clone() });
        }
    }

    /// Lease ids are never used twice: 24 bits count within a job, 16 the jobs of this incarnation.
    fn limits(&mut self) -> Limits {
        let first_lease_id = (self.store.epoch() << EPOCH_SHIFT) | (self.next_lease_block << 24) | 1;
        self.next_lease_block += 1;
        Limits {
            heartbeat_ms: self.timing.heartbeat.as_millis() as u64,
            lease_ms: self.timing.lease.as_millis() as u64,
            hung_ms: self.timing.hung.as_millis() as u64,
            no_nodes_ms: self.timing.no_nodes.as_millis() as u64,
            first_lease_id,
            speculate: true,
        }
    }

    pub(super) async fn exported(&mut self, id: JobId, result: Result<Finished, CoordinatorError>) {
        let now = self.now_ms();
        let Some(active) = self.active.as_mut().filter(|active| active.id == id) else { return };
        match result {
            Ok(finished) => {
                let (exit, results) = (finished.exit, finished.results.clone());
                self.end(id, JobStage::Finished { exit, results }, Some(&finished)).await;
            }
            Err(error @ CoordinatorError::Storage { .. }) => {
                if let Step::Exporting { again_ms, .. } = &mut active.step {
                    *again_ms = Some(now + EXPORT_AGAIN_MS);
                }
                tracing::error!(%error, "results cannot be written, trying again");
                let why = format!("{error}; trying again in {} s", EXPORT_AGAIN_MS / 1000);
                self.log(JobEvent::Waiting { why });
            }
            Err(error) => {
                let exit = error.exit();
                self.end_failed(id, error.into_failure(), Some(exit)).await;
            }
        }
    }

    pub(super) async fn end_failed(&mut self, id: JobId, failure: Failure, exit: Option<u8>) {
        if failure.class == FailureClass::Nondeterminism {
            telemetry::duplicate("different");
        }
        tracing::error!(job = %id, class = failure.class.name(), failure = failure.message, "job failed");
        let exit = exit.unwrap_or_else(|| CoordinatorError::from(failure.clone()).exit());
        self.end(id, JobStage::Failed { exit, failure }, None).await;
    }

    /// The active job is over.
    pub(super) async fn end(&mut self, id: JobId, stage: JobStage, finished: Option<&Finished>) {
        let seconds = self.active.as_ref().map_or(0.0, Active::seconds);
        if let (Some(active), Some(known)) = (self.active.as_ref(), self.jobs.get_mut(&id)) {
            known.record.counts = active.counts();
        }
        self.close_job(id);
        self.active = None;
        self.shelf.set(None);
        self.conclude(id, stage, finished.map(|finished| (finished, seconds))).await;
    }

    /// Writes down that a job is over and tells those who watch.
    async fn conclude(&mut self, id: JobId, stage: JobStage, done: Option<(&Finished, f64)>) {
        let Some(known) = self.jobs.get(&id) else { return };
        let record = JobRecord { stage, ..known.record.clone() };
        if let Err(error) = self.write(vec![Change::Job(record.clone())]).await {
            tracing::error!(%error, "the end of a job cannot be written, trying again");
            self.unwritten.push(Change::Job(record.clone()));
        }
        tracing::info!(job = %id, exit = exit_of(&record.stage), "job over");
        let event = over(&record, done);
        if let Some(known) = self.jobs.get_mut(&id) {
            known.record = record;
            event.into_iter().for_each(|event| known.log.push(event));
        }
        self.forget_old().await;
    }

    pub(super) async fn cancel(&mut self, id: JobId) -> Result<wire::JobStatus, Status> {
        let now = self.now_ms();
        let stage = self.known(id)?.record.stage.clone();
        match (stage, self.active.as_mut().filter(|active| active.id == id)) {
            (JobStage::Queued, _) => self.conclude(id, JobStage::Cancelled, None).await,
            (JobStage::Running, Some(active)) => match &mut active.step {
                Step::Preparing => active.cancelled = true,
                Step::Running(running) => running.dispatch.cancel(now),
                Step::Exporting { .. } => {
                    let why = format!("job {id}: its results are being written, too late to cancel");
                    return Err(Status::failed_precondition(why));
                }
            },
            (JobStage::Running, None) => self.conclude(id, JobStage::Cancelled, None).await,
            (JobStage::Finished { .. } | JobStage::Failed { .. } | JobStage::Cancelled, _) => {}
        }
        self.act().await;
        self.status(id)
    }

    pub(super) fn known(&self, id: JobId) -> Result<&Known, Status> {
        self.jobs.get(&id).ok_or_else(|| Status::not_found(format!("job {id}: not known here")))
    }

    pub(super) fn watch(&mut self, id: JobId) -> Result<Subscription, Status> {
        self.known(id)?;
        let known = self.jobs.get_mut(&id);
        known.map(|known| known.log.subscribe()).ok_or_else(|| Status::internal("job is gone"))
    }

    pub(super) fn results(&self, id: JobId) -> Result<Vec<ResultFile>, Status> {
        match &self.known(id)?.record.stage {
            JobStage::Finished { results, .. } => Ok(results.clone()),
            _ => Err(Status::failed_precondition(format!("job {id}: is not finished"))),
        }
    }

    pub(super) fn list(&self) -> Vec<wire::JobStatus> {
        let mut all: Vec<&Known> = self.jobs.values().collect();
        all.sort_by_key(|known| known.record.order);
        all.into_iter().map(|known| self.status_of(&known.record)).collect()
    }

    pub(super) fn status(&self, id: JobId) -> Result<wire::JobStatus, Status> {
        Ok(self.status_of(&self.known(id)?.record))
    }

    fn status_of(&self, record: &JobRecord) -> wire::JobStatus {
        let active = self.active.as_ref().filter(|active| active.id == record.id);
        let counts = active.map_or(record.counts, Active::counts);
        let fenced = self.jobs.get(&record.id).map(|known| known.fenced).unwrap_or_default();
        wire::JobStatus {
            job: job_to_wire(record.id),
            state: state_of(&record.stage).into(),
            detail: self.detail(record, active),
            model: JobSpec::from_json(&record.spec).map(|spec| spec.model).unwrap_or_default(),
            stages: counts.stages,
            stages_done: counts.stages_done,
            layers: counts.layers,
            layers_done: counts.layers_done,
            nodes: if active.is_some() { self.seats.len() as u64 } else { 0 },
            exit: exit_of(&record.stage).into(),
            submitted_unix_ms: record.submitted_unix_ms,
            fenced_nodes: fenced.nodes,
            fenced_results: fenced.results,
        }
    }

    fn detail(&self, record: &JobRecord, active: Option<&Active>) -> String {
        match (&record.stage, active.map(|active| &active.step)) {
            (JobStage::Failed { failure, .. }, _) => failure.message.clone(),
            (JobStage::Finished { .. }, _) => String::new(),
            (JobStage::Cancelled, _) => "cancelled".into(),
            (_, Some(Step::Preparing)) => "inputs are read and planned".into(),
            (_, Some(Step::Running(running))) => {
                running.dispatch.explain(self.now_ms()) + &self.left_out(record.id)
            }
            (_, Some(Step::Exporting { again_ms: None, .. })) => "results are being written".into(),
            (_, Some(Step::Exporting { .. })) => "results could not be written, trying again".into(),
            (JobStage::Queued | JobStage::Running, None) => {
                let before = self.unfinished().iter().position(|id| *id == record.id).unwrap_or(0);
                format!("waits for {before} jobs before it")
            }
        }
    }
}

fn state_of(stage: &JobStage) -> wire::JobState {
    match stage {
        JobStage::Queued => wire::JobState::Queued,
        JobStage::Running => wire::JobState::Running,
        JobStage::Finished { .. } => wire::JobState::Finished,
        JobStage::Failed { .. } => wire::JobState::Failed,
        JobStage::Cancelled => wire::JobState::Cancelled,
    }
}

/// For people only; nothing is decided by it.
fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
