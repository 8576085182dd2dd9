//! The running job: nodes that open it, actions of its dispatch, its end.

use super::Engine;
use super::crew::Opening;
use super::job::{Active, Running, Step};
use super::report::{layer_solved, news_event};
use crate::dispatch::{Action, AttemptEnd, News, Outcome};
use crate::service::request::{Line, Request};
use crate::service::telemetry;
use crate::store::{Change, JobStage};
use halfstep_proto::wire::coordinator_message::Body;
use halfstep_proto::{JobEvent, job_to_wire, wire};
use halfstep_work::{Failure, FailureClass, Inventory, JobId, LayerId, NodeId, TaskPhase};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tracing::Span;

/// Measurements of one job: never part of a result, apart from `timing.json`.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) phases: BTreeMap<TaskPhase, f64>,
    pub(super) refine: f64,
    pub(super) bytes_fetched: u64,
    pub(super) prepare: f64,
    pub(super) layers: BTreeMap<LayerId, f64>,
    pub(super) decided: BTreeSet<LayerId>,
    pub(super) slots: usize,
}

impl Engine {
    pub(super) async fn opened(&mut self, line: Line, job: JobId, result: Result<Inventory, Failure>) {
        let running =
            self.active.as_ref().is_some_and(|active| active.id == job && active.running().is_some());
        if !self.heard(line) || !running {
            return;
        }
        let node = line.node;
        let inventory = match result {
            Ok(inventory) => inventory,
            Err(failure) => return self.not_opened(node, job, failure),
        };
        if let Some(why) = self.misfit(job, node) {
            return self.leave_out(node, job, why);
        }
        if !self.fix_kind(job, node).await {
            return self.open_again_later(node, job);
        }
        let now = self.now_ms();
        let Some(seat) = self.seats.get_mut(&node) else { return };
        seat.opening = Opening::Open(job);
        let Some(active) = self.active.as_mut() else { return };
        active.tally.slots = active.tally.slots.max(seat.description.slots);
        if let Some(dispatch) = active.dispatch_mut() {
            // What the node has to do about it comes as actions.
            let _ = dispatch.join(node, &seat.description, &seat.address, inventory, now);
        }
    }

    fn not_opened(&mut self, node: NodeId, job: JobId, failure: Failure) {
        tracing::warn!(%node, class = ?failure.class, failure = failure.message, "node cannot open the job");
        if failure.class.retryable() {
            return self.open_again_later(node, job);
        }
        // Where others can or may, it is this node's own trouble: another engine has other operators. Where none is left
        // that could, it is the job's.
        let name = self.seats.get(&node).map_or("", |seat| seat.description.name.as_str());
        let why = format!("node `{name}`: cannot open job {job}: {}", failure.message);
        self.leave_out(node, job, why);
        if !self.seats.values().any(|seat| seat.may_take_part(job))
            && let Some(active) = self.active.as_mut()
        {
            active.broken = Some(failure);
        }
    }

    /// The first node fixes what the job is computed with, durably. False if that cannot be written now.
    async fn fix_kind(&mut self, job: JobId, node: NodeId) -> bool {
        let Some(kind) = self.seats.get(&node).map(|seat| seat.kind()) else { return false };
        let Some(record) = self.jobs.get(&job).map(|known| known.record.clone()) else { return false };
        if record.computed_by.is_some() {
            return true;
        }
        let record = crate::store::JobRecord { computed_by: Some(kind), ..record };
        if let Err(error) = self.write(vec![Change::Job(record.clone())]).await {
            tracing::error!(%error, "the job's record cannot be written");
            return false;
        }
        if let Some(known) = self.jobs.get_mut(&job) {
            known.record = record;
        }
        true
    }

    /// Does what the dispatch decided, in its order. What rests on something that is not on disk yet waits.
    pub(super) async fn act(&mut self) {
        let writing = std::mem::take(&mut self.unwritten);
        if let Err(error) = self.write(writing.clone()).await {
            tracing::error!(%error, "the state cannot be written, trying again");
            self.unwritten = writing;
            return;
        }
        loop {
            let Some(running) = self.active.as_mut().and_then(Active::running_mut) else { return };
            let new = running.dispatch.actions();
            running.held.extend(new);
            let Some(action) = running.held.pop_front() else { break };
            if !self.perform(action).await {
                return;
            }
        }
        self.note_ended();
        self.let_drained_go();
        self.look_at_outcome().await;
    }

    /// Logs and counts the leases that are over.
    fn note_ended(&mut self) {
        let Some(running) = self.active.as_mut().and_then(Active::running_mut) else { return };
        for attempt in running.dispatch.take_ended() {
            telemetry::attempt_ended(&attempt);
            let Some((at_ms, end)) = &attempt.end else { continue };
            let span = running.spans.remove(&attempt.lease).unwrap_or_else(Span::none);
            let seconds = at_ms.saturating_sub(attempt.since_ms) as f64 / 1e3;
            let (outcome, why) = (end.name(), end.message());
            span.in_scope(|| match end {
                AttemptEnd::Failed(_) => tracing::warn!(outcome, why, seconds, "lease failed"),
                _ => tracing::debug!(outcome, why, seconds, "lease over"),
            });
        }
    }

    /// False if the disk refuses: the action is held.
    async fn perform(&mut self, action: Action) -> bool {
        match action {
            Action::Grant { node, grant } => {
                self.before_grant(&grant);
                let Some(active) = self.active.as_mut() else { return true };
                let job = active.id;
                if let Some(running) = active.running_mut() {
                    running.span(job, grant.lease.id).in_scope(|| tracing::debug!("lease granted"));
                }
                self.say(node, Body::Grant((job, &grant).into()));
            }
            Action::Revoke { node, lease, why } => {
                self.say(node, Body::Revoke(wire::Revoke { lease: lease.0, why }));
            }
            Action::DropSums { node, segment } => {
                self.say(node, Body::DropSums(wire::DropSums { segment: segment.0 }));
            }
            Action::TakeOver { node, carries } => {
                let Some(active) = self.active.as_ref() else { return true };
                let carries = carries.iter().map(wire::Holding::from).collect();
                self.say(node, Body::TakeOver(wire::TakeOver { job: job_to_wire(active.id), carries }));
            }
            Action::News(News::Failed { layer, failure }) => return self.give_up(layer, failure).await,
            Action::News(news) => self.tell_news(news),
        }
        true
    }

    async fn give_up(&mut self, layer: LayerId, failure: Failure) -> bool {
        let Some(job) = self.active.as_ref().map(|active| active.id) else { return true };
        let change = Change::GivenUp { job, layer, failure: failure.clone() };
        if let Err(error) = self.write(vec![change]).await {
            tracing::error!(%error, "a layer given up cannot be written, trying again");
            if let Some(running) = self.active.as_mut().and_then(Active::running_mut) {
                running.held.push_front(Action::News(News::Failed { layer, failure }));
            }
            return false;
        }
        if let Some(running) = self.active.as_ref().and_then(Active::running) {
            running.job.source.give_up(layer);
        }
        self.tell_news(News::Failed { layer, failure });
        true
    }

    fn tell_news(&mut self, news: News) {
        let Some(active) = self.active.as_mut() else { return };
        match &news {
            News::Task { phase, seconds, .. } => {
                telemetry::task_done(*phase, *seconds);
                *active.tally.phases.entry(*phase).or_default() += seconds;
            }
            News::Solved { layer, seconds, .. } => {
                active.tally.decided.insert(*layer);
                *active.tally.layers.entry(*layer).or_default() += seconds;
            }
            News::Failed { layer, .. } => drop(active.tally.decided.insert(*layer)),
            _ => {}
        }
        let decided = active.tally.decided.len();
        let Some(plan) = active.running().map(|running| Arc::clone(&running.job.plan)) else { return };
        let event = news_event(&plan, news, decided);
        self.log(event);
    }

    pub(super) fn log(&mut self, event: JobEvent) {
        let Some(job) = self.active.as_ref().map(|active| active.id) else { return };
        if let Some(known) = self.jobs.get_mut(&job) {
            known.log.push(event);
        }
    }

    fn let_drained_go(&mut self) {
        let draining: Vec<NodeId> =
            self.seats.iter().filter(|(_, seat)| seat.draining).map(|(node, _)| *node).collect();
        draining.into_iter().for_each(|node| self.let_go(node));
    }

    async fn look_at_outcome(&mut self) {
        let Some(active) = self.active.as_mut() else { return };
        let id = active.id;
        if let Some(failure) = active.broken.take() {
            return self.end_failed(id, failure, None).await;
        }
        match active.dispatch().map(|dispatch| dispatch.outcome()) {
            Some(Outcome::Failed(failure)) if failure.class == FailureClass::Cancelled => {
                self.end(id, JobStage::Cancelled, None).await;
            }
            Some(Outcome::Failed(failure)) => self.end_failed(id, failure, None).await,
            Some(Outcome::Finished) => self.begin_export(),
            Some(Outcome::Running) | None => {}
        }
    }

    /// Layers that were decided before this coordinator took the job up, for those who watch.
    pub(super) fn recall(&mut self, running: &Running, outcome: &crate::Outcome) {
        let plan = &running.job.plan;
        for entry in &plan.layers {
            let event = match (outcome.given_up.get(&entry.id), outcome.layer(plan, entry.id)) {
                (Some(failure), _) => {
                    JobEvent::LayerFailed { name: entry.name.clone(), cause: failure.message.clone() }
                }
                (None, Some(receipts)) => {
                    let decided = self.active.as_ref().map_or(0, |active| active.tally.decided.len());
                    layer_solved(plan, entry.id, &receipts, 0.0, decided + 1)
                }
                (None, None) => continue,
            };
            if let Some(active) = self.active.as_mut() {
                active.tally.decided.insert(entry.id);
            }
            self.log(event);
        }
    }

    fn begin_export(&mut self) {
        let Some(active) = self.active.as_mut() else { return };
        let Some(running) = active.running() else { return };
        let (job, plan) = (Arc::clone(&running.job), &running.job.plan);
        let state = running.dispatch.state();
        let mut outcome =
            crate::Outcome { given_up: state.failed_layers().clone(), ..crate::Outcome::default() };
        for layer in &plan.layers {
            for receipt in state.receipts(layer.id).unwrap_or_default() {
                outcome.receipts.insert((receipt.layer, receipt.chunk), receipt);
            }
        }
        let id = active.id;
        active.step = Step::Exporting { job, outcome: Arc::new(outcome), again_ms: None };
        self.shelf.set(None);
        self.log(JobEvent::Writing);
        self.close_job(id);
        self.export();
    }

    /// Starts a thread that writes the results.
    pub(super) fn export(&mut self) {
        let Some(active) = self.active.as_mut() else { return };
        let (id, timing) = (active.id, timing(active));
        let Step::Exporting { job, outcome, again_ms } = &mut active.step else { return };
        *again_ms = None;
        let (job, outcome) = (Arc::clone(job), Arc::clone(outcome));
        let kind = self.jobs.get(&id).and_then(|known| known.record.computed_by.clone()).unwrap_or_default();
        let line = self.line.clone();
        tokio::task::spawn_blocking(move || {
            let result = Box::new(job.finish(&outcome, &kind, &timing));
            line.tell_blocking(Request::Exported { job: id, result });
        });
    }
}

fn timing(active: &Active) -> serde_json::Value {
    let plan = match &active.step {
        Step::Exporting { job, .. } => Some(Arc::clone(&job.plan)),
        _ => None,
    };
    let tally = &active.tally;
    let phase = |phase| tally.phases.get(&phase).copied().unwrap_or(0.0);
    let layers: serde_json::Map<String, serde_json::Value> = plan
        .iter()
        .flat_map(|plan| &plan.layers)
        .map(|layer| (layer.name.clone(), json!(tally.layers.get(&layer.id).copied().unwrap_or(0.0))))
        .collect();
    json!({
        "threads": tally.slots,
        "seconds": active.seconds(),
        "read_seconds": tally.prepare,
        "forward_thread_seconds": phase(TaskPhase::Forward) + phase(TaskPhase::Capture),
        "statistics_thread_seconds": phase(TaskPhase::Accumulate) + phase(TaskPhase::Reduce),
        "solve_thread_seconds": phase(TaskPhase::Solve) - tally.refine,
        "refine_thread_seconds": tally.refine,
        "bytes_fetched": tally.bytes_fetched,
        "layer_solve_thread_seconds": layers,
    })
}
