//! The job that the coordinator is busy with, from taking it up to its files.

use super::work::Tally;
use crate::Outcome;
use crate::dispatch::{Action, Dispatch};
use crate::jobs::ActiveJob;
use crate::store::JobCounts;
use halfstep_proto::{job_to_wire, wire};
use halfstep_work::{ChunkId, Failure, JobId, LayerId, LeaseId, Plan};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;
use tracing::{Span, info_span};

/// Ids of leases begin with the incarnation that granted them.
pub(super) const EPOCH_SHIFT: u32 = 40;

/// One job at a time.
pub(super) struct Active {
    pub(super) id: JobId,
    pub(super) step: Step,
    /// Somebody asked to stop it while a thread worked for it.
    pub(super) cancelled: bool,
    /// An earlier incarnation was at it: nodes may come back with work of it.
    pub(super) taken_over: bool,
    /// Why it cannot go on, found outside the dispatch.
    pub(super) broken: Option<Failure>,
    pub(super) began: Instant,
    /// The same by the wall's clock, for people alone.
    pub(super) began_unix: Duration,
    pub(super) tally: Tally,
}

/// How far it is.
pub(super) enum Step {
    /// A thread places its inputs and plans.
    Preparing,
    /// Nodes work.
    Running(Box<Running>),
    /// A thread writes the results; if there was no space, another will at that time.
    Exporting { job: Arc<ActiveJob>, outcome: Arc<Outcome>, again_ms: Option<u64> },
}

pub(super) struct Running {
    pub(super) job: Arc<ActiveJob>,
    pub(super) dispatch: Dispatch,
    /// Artefacts of the chunks that are durable.
    pub(super) durable: BTreeMap<(LayerId, ChunkId), blake3::Hash>,
    /// Actions that wait until what they rest on is on disk.
    pub(super) held: VecDeque<Action>,
    /// One per lease that is not over; see `span`.
    pub(super) spans: BTreeMap<LeaseId, Span>,
}

impl Running {
    /// The span of a lease, made when it is first asked for: when the lease is granted, or spoken of after a restart. None
    /// if it holds nothing.
    pub(super) fn span(&mut self, job: JobId, lease: LeaseId) -> Span {
        if let Some(span) = self.spans.get(&lease) {
            return span.clone();
        }
        let Some((task, node, attempt)) = self.dispatch.state().lease(lease) else { return Span::none() };
        let (task, epoch) = (self.dispatch.task_name(task), lease.0 >> EPOCH_SHIFT);
        let span = info_span!("lease", %job, lease = lease.0, task, attempt, epoch, %node);
        self.spans.insert(lease, span.clone());
        span
    }
}

impl Active {
    pub(super) fn new(id: JobId) -> Self {
        Self {
            id,
            step: Step::Preparing,
            cancelled: false,
            taken_over: false,
            broken: None,
            began: Instant::now(),
            began_unix: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            tally: Tally::default(),
        }
    }

    pub(super) fn running(&self) -> Option<&Running> {
        match &self.step {
            Step::Running(running) => Some(running),
            _ => None,
        }
    }

    pub(super) fn running_mut(&mut self) -> Option<&mut Running> {
        match &mut self.step {
            Step::Running(running) => Some(running),
            _ => None,
        }
    }

    pub(super) fn dispatch(&self) -> Option<&Dispatch> {
        self.running().map(|running| &running.dispatch)
    }

    pub(super) fn dispatch_mut(&mut self) -> Option<&mut Dispatch> {
        self.running_mut().map(|running| &mut running.dispatch)
    }

    /// What nodes are told when they are to take part.
    pub(super) fn open_message(&self) -> Option<wire::OpenJob> {
        let job = &self.running()?.job;
        Some(wire::OpenJob {
            job: job_to_wire(self.id),
            plan: job.source.plan_hash().to_vec(),
            model_path: job.config.model.to_string_lossy().into_owned(),
            fold_batch_norm: job.config.fold_batch_norm,
        })
    }

    pub(super) fn plan(&self) -> Option<&Plan> {
        match &self.step {
            Step::Preparing => None,
            Step::Running(running) => Some(&running.job.plan),
            Step::Exporting { job, .. } => Some(&job.plan),
        }
    }

    /// How far it is; zeros until it is planned.
    pub(super) fn counts(&self) -> JobCounts {
        let Some(plan) = self.plan() else { return JobCounts::default() };
        let decided = &self.tally.decided;
        let over =
            |stage: &&halfstep_work::StagePlan| stage.solve.iter().all(|layer| decided.contains(layer));
        JobCounts {
            stages: plan.stages.len() as u64,
            stages_done: plan.stages.iter().filter(over).count() as u64,
            layers: plan.layers.len() as u64,
            layers_done: decided.len() as u64,
        }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }
}
