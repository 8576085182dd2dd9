//! The engine: one task that owns the dispatch of the running job and all that is durable.
//!
//! Services and worker threads send it requests; it answers none of them before what it answers is on disk. Requests
//! that have piled up are handled together, their roundings in one commit. Time is monotonic and comes from here.
//! Not here: decisions (`dispatch`), files of a job (`jobs`), the wire (`fleet`, `client`, `data`).

mod commit;
mod crew;
mod explain;
mod forget;
mod gauges;
mod group;
mod job;
mod links;
mod queue;
mod report;
mod work;

use super::log::JobLog;
use super::options::Timing;
use super::request::{EngineLine, Reply, Request};
use super::shelf::Shelf;
use super::telemetry;
use super::trouble::Trouble;
use crate::CoordinatorError;
use crate::artefacts::Artefacts;
use crate::exchange::Exchange;
use crate::links::Links;
use crate::store::{Change, JobRecord, JobStage, Store, StoreError};
use crew::Seat;
use halfstep_proto::wire;
use halfstep_work::{JobId, NodeId};
use job::Active;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// How often time is looked at.
const TICK: Duration = Duration::from_millis(50);
/// Requests that wait for the engine; more wait at their senders.
pub(super) const REQUESTS_MAX: usize = 4096;
/// Requests handled together.
const BATCH_MAX: usize = 256;

/// A job that is known, and those who watch it.
struct Known {
    record: JobRecord,
    log: JobLog,
    fenced: Fenced,
}

/// Zombies: what came from nodes that had been given up. Counted by this incarnation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fenced {
    /// Nodes that came back and had to begin anew.
    pub(super) nodes: u64,
    /// Results under leases that held nothing any more.
    pub(super) results: u64,
}

pub(super) struct Engine {
    store: Arc<Store>,
    artefacts: Arc<Artefacts>,
    shelf: Shelf,
    timing: Timing,
    /// Jobs that are over and not forgotten, at most; all without.
    keep_jobs: Option<usize>,
    trouble: Trouble,
    started: Instant,
    line: EngineLine,
    jobs: BTreeMap<JobId, Known>,
    next_order: u64,
    active: Option<Active>,
    seats: BTreeMap<NodeId, Seat>,
    exchange: Exchange,
    links: Links,
    /// Who wants the list of nodes once their lines are measured.
    wait_for_lines: Vec<Reply<wire::NodesReply>>,
    next_node: u32,
    next_line: u64,
    next_lease_block: u64,
    /// Of all jobs, and while there was none.
    fenced: Fenced,
    /// When gauges were set last.
    gauged_ms: Option<u64>,
    /// What must be on disk before anything else is sent; not empty only while the disk refuses.
    unwritten: Vec<Change>,
    stopped: bool,
}

impl Engine {
    /// Reads the jobs back. Jobs that were running wait in the queue, in their order, with those that waited.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub(super) fn new(
        store: Arc<Store>,
        artefacts: Arc<Artefacts>,
        shelf: Shelf,
        timing: Timing,
        line: EngineLine,
        trouble: Trouble,
    ) -> Result<Self, StoreError> {
        let records = store.jobs()?;
        let next_order = records.iter().map(|record| record.order + 1).max().unwrap_or(0);
        let jobs = records.into_iter().map(|record| {
            let mut log = JobLog::default();
            if let Some(event) = report::over(&record, None) {
                log.push(event);
            }
            (record.id, Known { record, log, fenced: Fenced::default() })
        });
        Ok(Self {
            jobs: jobs.collect(),
            // Later than all of an earlier incarnation.
            exchange: Exchange::new(store.epoch() << 32),
            store,
            artefacts,
            shelf,
            timing,
            keep_jobs: None,
            trouble,
            started: Instant::now(),
            line,
            next_order,
            active: None,
            seats: BTreeMap::new(),
            links: Links::default(),
            wait_for_lines: Vec::new(),
            next_node: 1,
            next_line: 1,
            next_lease_block: 0,
            fenced: Fenced::default(),
            gauged_ms: None,
            unwritten: Vec::new(),
            stopped: false,
        })
    }

    /// Forgets the oldest jobs beyond so many that are over.
    pub(super) fn keeping(self, keep_jobs: Option<usize>) -> Self {
        Self { keep_jobs, ..self }
    }

    /// Jobs that are not over, in order.
    pub(super) fn unfinished(&self) -> Vec<JobId> {
        let mut waiting: Vec<&JobRecord> =
            self.jobs.values().map(|known| &known.record).filter(|record| !record.stage.is_over()).collect();
        waiting.sort_by_key(|record| (record.stage == JobStage::Queued, record.order));
        waiting.into_iter().map(|record| record.id).collect()
    }

    /// Works until it is told to stop.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH_MAX);
        self.forget_old().await;
        while !self.stopped {
            tokio::select! {
                count = requests.recv_many(&mut batch, BATCH_MAX) => {
                    if count == 0 {
                        break;
                    }
                    self.handle(&mut batch).await;
                }
                _ = ticks.tick() => {
                    // After a pause (a slow disk, a frozen process) what has come meanwhile counts before the time does.
                    for _ in 0..REQUESTS_MAX {
                        let Ok(request) = requests.try_recv() else { break };
                        batch.push(request);
                    }
                    self.handle(&mut batch).await;
                    self.tick().await;
                }
            }
        }
    }

    /// Counts a zombie, for its job too if that is known.
    fn count_fenced(&mut self, job: Option<JobId>, count: impl Fn(&mut Fenced)) {
        let before = self.fenced;
        count(&mut self.fenced);
        telemetry::fenced(self.fenced.nodes - before.nodes, self.fenced.results - before.results);
        if let Some(known) = job.and_then(|job| self.jobs.get_mut(&job)) {
            count(&mut known.fenced);
        }
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Arrivals first, since outcomes may refer to them; then all outcomes in one commit; then the rest.
    async fn handle(&mut self, batch: &mut Vec<Request>) {
        let mut outcomes = Vec::new();
        let mut rest = Vec::new();
        for request in batch.drain(..) {
            match request {
                Request::Attach { new, outbound, reply } => self.attach(new, outbound, reply),
                Request::Opened { line, job, result } => self.opened(line, job, result).await,
                Request::Commit { outcome, reply } => outcomes.push((*outcome, reply)),
                other => rest.push(other),
            }
        }
        if !outcomes.is_empty() {
            self.commit(outcomes).await;
        }
        for request in rest {
            self.answer(request).await;
        }
        self.act().await;
    }

    async fn answer(&mut self, request: Request) {
        // An answer that nobody waits for any more is no error.
        match request {
            Request::Attach { .. } | Request::Opened { .. } | Request::Commit { .. } => {}
            Request::Pulse { line, pulse } => self.pulse(line, pulse),
            Request::Group { line, epoch, answer } => self.group_answer(line, epoch, answer),
            Request::Measured { line, number, rate } => self.line_measured(line, number, rate),
            Request::TakenOver { line, job, carry, taken } => self.taken_over(line, job, carry, taken),
            Request::Drain { line, reason } => self.drain(line, &reason),
            Request::Detached { line } => self.detached(line),
            Request::Submit { new, reply } => drop(reply.send(self.submit(new).await)),
            Request::List { reply } => drop(reply.send(Ok(self.list()))),
            Request::Status { job, reply } => drop(reply.send(self.status(job))),
            Request::Watch { job, reply } => drop(reply.send(self.watch(job))),
            Request::Cancel { job, reply } => drop(reply.send(self.cancel(job).await)),
            Request::Forget { job, reply } => drop(reply.send(self.forget(job).await)),
            Request::Results { job, reply } => drop(reply.send(self.results(job))),
            Request::Nodes { measure, reply } => self.list_nodes(measure, reply),
            Request::Explain { job, task, reply } => drop(reply.send(self.explain(job, &task))),
            Request::AskToLeave { node, reply } => drop(reply.send(self.ask_to_leave(&node))),
            Request::Ping { reply } => drop(reply.send(Ok(()))),
            Request::Prepared { job, result, seconds } => self.prepared(job, *result, seconds).await,
            Request::Exported { job, result } => self.exported(job, *result).await,
            Request::Stop { reply } => {
                self.farewell();
                self.stopped = true;
                let _ = reply.send(());
            }
        }
    }

    async fn tick(&mut self) {
        let now = self.now_ms();
        self.expire_lines(now);
        if let Some(dispatch) = self.active.as_mut().and_then(Active::dispatch_mut) {
            dispatch.tick(now);
        }
        self.retry_opening(now);
        self.look_at_group();
        self.look_at_lines();
        self.act().await;
        self.begin_next().await;
        self.gauge(now);
    }

    /// Makes changes durable on a thread that may wait; the engine waits too.
    async fn write(&self, changes: Vec<Change>) -> Result<(), CoordinatorError> {
        if changes.is_empty() {
            return Ok(());
        }
        let store = Arc::clone(&self.store);
        let commit = move || {
            let began = std::time::Instant::now();
            let written = store.commit(&changes);
            telemetry::committed(began.elapsed());
            written
        };
        match tokio::task::spawn_blocking(commit).await {
            Ok(written) => Ok(written.inspect_err(|error| self.trouble.tell(error))?),
            Err(e) => Err(CoordinatorError::ReadBack { subject: "state".into(), what: e.to_string() }),
        }
    }
}
