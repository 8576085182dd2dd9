//! Outcomes of leases: roundings become durable together, then the dispatch learns of them, then nodes are answered.

use super::Engine;
use super::job::{Active, Running, Step};
use crate::failpoints::visit;
use crate::service::request::{Outcome, Reply};
use crate::service::telemetry;
use crate::store::Change;
use halfstep_work::{ChunkId, Done, Group, JobId, LayerId, Verdict};
use std::collections::BTreeMap;
use tonic::Status;
use tracing::Span;

type Place = (LayerId, ChunkId);

impl Engine {
    pub(super) async fn commit(&mut self, outcomes: Vec<(Outcome, Reply<Verdict>)>) {
        let mut fresh: BTreeMap<Place, blake3::Hash> = BTreeMap::new();
        if let Some(running) = self.active.as_ref().and_then(Active::running) {
            for (outcome, _) in &outcomes {
                if let Some((place, hash)) = self.new_rounding(running, outcome) {
                    fresh.entry(place).or_insert(hash);
                }
            }
        }
        let written = self.write_roundings(&fresh).await;
        let mut answers = Vec::with_capacity(outcomes.len());
        for (outcome, reply) in outcomes {
            // Forgetting another job may have removed what was there when the outcome came in: it is uploaded again.
            if let Some(hash) = outcome.hash.filter(|hash| !self.artefacts.contains(hash)) {
                answers.push((reply, Err(Status::not_found(format!("artefact {hash}: not here any more")))));
                continue;
            }
            let refused = written.as_ref().err().filter(|_| self.needs_disk(&outcome, &fresh));
            let answer = match refused {
                Some(why) => Err(Status::unavailable(why.clone())),
                None if self.is_coming(outcome.job) => {
                    Err(Status::unavailable(format!("job {} is being taken up, try again", outcome.job)))
                }
                None if self.is_of_before(&outcome) => {
                    let why = "the coordinator was started anew since, attach first";
                    Err(Status::unavailable(why.to_owned()))
                }
                None if self.is_unheard(&outcome) => {
                    let why = "what the node has in hand is not known yet, try again";
                    Err(Status::unavailable(why.to_owned()))
                }
                None => Ok(self.apply(outcome)),
            };
            answers.push((reply, answer));
        }
        for (reply, answer) in answers {
            if visit("engine.answer").is_ok() {
                // A node that went away asks again when it is back.
                let _ = reply.send(answer);
            }
        }
    }

    async fn write_roundings(&self, fresh: &BTreeMap<Place, blake3::Hash>) -> Result<(), String> {
        let Some(job) = self.active.as_ref().map(|active| active.id).filter(|_| !fresh.is_empty()) else {
            return Ok(());
        };
        let changes = fresh.iter().map(|((layer, chunk), hash)| Change::Rounding {
            job,
            layer: *layer,
            chunk: *chunk,
            hash: *hash,
        });
        visit("engine.commit.before").map_err(|e| e.to_string())?;
        let written = self.write(changes.collect()).await;
        if let Err(error) = &written {
            tracing::error!(%error, "roundings cannot be made durable");
        }
        written.map_err(|e| e.to_string())?;
        visit("engine.commit.after").map_err(|e| e.to_string())
    }

    /// A rounding that will count: under a current lease on just that chunk, and the first of it.
    fn new_rounding(&self, running: &Running, outcome: &Outcome) -> Option<(Place, blake3::Hash)> {
        let (Ok(Done::Solved(rounding)), Some(hash)) = (&outcome.outcome, outcome.hash) else { return None };
        let place = (rounding.layer, rounding.chunk);
        if !self.is_of_now(outcome) || running.durable.contains_key(&place) || !self.artefacts.contains(&hash)
        {
            return None;
        }
        let state = running.dispatch.state();
        let (task, node, _) = state.lease(outcome.lease)?;
        let asked = state.table().split(task) == (Group::Solve(place.0), place.1.0);
        (asked && node == outcome.node).then_some((place, hash))
    }

    fn needs_disk(&self, outcome: &Outcome, fresh: &BTreeMap<Place, blake3::Hash>) -> bool {
        matches!(&outcome.outcome, Ok(Done::Solved(r)) if fresh.contains_key(&(r.layer, r.chunk)))
    }

    /// Waits or is prepared, as after a restart of the coordinator: what nodes have of it will count.
    fn is_coming(&self, job: JobId) -> bool {
        let open = self.jobs.get(&job).is_some_and(|known| !known.record.stage.is_over());
        let active = self.active.as_ref().filter(|active| active.id == job);
        open && active.is_none_or(|active| matches!(active.step, Step::Preparing))
    }

    /// Under a lease that the node may be about to name: it is attached, and what it says it has of the job has not been read. Stale
    /// now, the same lease would be taken up then, and nobody would work on it.
    fn is_unheard(&self, outcome: &Outcome) -> bool {
        let opening = self.seats.get(&outcome.node).is_some_and(|seat| seat.is_opening(outcome.job));
        let running = self.active.as_ref().and_then(Active::running);
        let unknown = running.is_some_and(|running| running.dispatch.state().lease(outcome.lease).is_none());
        opening && unknown && self.is_of_now(outcome)
    }

    /// Under a registration of an earlier incarnation, as when one dies while a rounding is uploaded and the next one is there
    /// before it is committed. Called stale, its node would forget a lease that it names, or has named, when it attaches
    /// again: it would be taken up and be in nobody's hands.
    fn is_of_before(&self, outcome: &Outcome) -> bool {
        let running = self.active.as_ref().filter(|active| active.running().is_some());
        running.is_some_and(|active| active.id == outcome.job) && outcome.epoch < self.store.epoch()
    }

    /// Of the running job and of this incarnation.
    fn is_of_now(&self, outcome: &Outcome) -> bool {
        let running = self.active.as_ref().filter(|active| active.running().is_some());
        running.is_some_and(|active| active.id == outcome.job) && outcome.epoch == self.store.epoch()
    }

    fn apply(&mut self, outcome: Outcome) -> Verdict {
        let (job, node, lease, result) = (outcome.job, outcome.node, outcome.lease, outcome.outcome.is_ok());
        let running = self.active.as_mut().filter(|active| active.id == job).and_then(Active::running_mut);
        let span = running.map_or_else(Span::none, |running| running.span(job, lease));
        let _about = span.enter();
        let verdict = self.judge(outcome);
        if verdict == Verdict::Duplicate {
            telemetry::duplicate("identical");
        }
        if verdict != Verdict::Accepted {
            tracing::warn!(%node, %lease, ?verdict, "an outcome does not count");
        }
        if verdict == Verdict::Stale && result {
            self.count_fenced(Some(job), |fenced| fenced.results += 1);
        }
        verdict
    }

    fn judge(&mut self, outcome: Outcome) -> Verdict {
        let (now, done) = (self.now_ms(), outcome.outcome.is_ok());
        if !self.is_of_now(&outcome) {
            return Verdict::Stale;
        }
        let Some(active) = self.active.as_mut() else { return Verdict::Stale };
        let Some(running) = active.running_mut() else { return Verdict::Stale };
        let verdict = match outcome.outcome {
            Ok(done) => {
                let solved = match &done {
                    Done::Solved(rounding) => {
                        outcome.hash.map(|hash| ((rounding.layer, rounding.chunk), hash))
                    }
                    _ => None,
                };
                let dispatch = &mut running.dispatch;
                let verdict =
                    dispatch.complete(outcome.node, outcome.lease, outcome.attempt, done, outcome.cost, now);
                if let (Verdict::Accepted, Some(((layer, chunk), hash))) = (verdict, solved) {
                    tracing::info!(layer = layer.0, chunk = chunk.0, node = outcome.node.0, %hash, "rounding committed");
                    running.durable.insert((layer, chunk), hash);
                    running.job.source.commit(layer, chunk, hash);
                }
                verdict
            }
            Err(failure) => {
                let current = running.dispatch.state().lease(outcome.lease).is_some();
                running.dispatch.fail(outcome.node, outcome.lease, failure, now);
                if current { Verdict::Accepted } else { Verdict::Stale }
            }
        };
        if verdict == Verdict::Accepted {
            active.tally.refine += outcome.cost.refine_seconds;
            active.tally.bytes_fetched += outcome.cost.bytes_fetched;
            // A failure that counts is no task done.
            if let Some(seat) = self.seats.get_mut(&outcome.node).filter(|_| done) {
                seat.tasks_done += 1;
            }
        }
        verdict
    }
}
