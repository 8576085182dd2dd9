//! Failed attempts: tried again, or the layer or the job is given up.

use super::{Change, EventRefused, Group, JobState, LeaseRecord, TaskId, TaskState};
use crate::{Failure, FailureClass, LayerId, LeaseId};

impl JobState {
    pub(super) fn failed(&mut self, lease: LeaseId, failure: Failure) -> Result<(), EventRefused> {
        let record = self.leases.get(&lease).copied().ok_or(EventRefused::Stale { lease })?;
        self.attempt_failed(lease, record, &failure);
        Ok(())
    }

    pub(super) fn attempt_failed(&mut self, lease: LeaseId, record: LeaseRecord, failure: &Failure) {
        let (task, node) = (record.task, record.node);
        self.end(lease);
        let slot = &mut self.slots[task.0];
        if !slot.may_retry(failure.class) {
            let label = self.label(task);
            let verdict = self.slots[task.0].verdict(&label, failure);
            return self.give_up(task, verdict);
        }
        self.counters.retries += 1;
        let TaskState::Leased(rivals) = &mut slot.state else { return };
        rivals.retain(|other| *other != lease);
        if rivals.is_empty() {
            self.make_ready(task);
        }
        self.changes.push(Change::Retry { task, node, failure: failure.clone() });
    }

    fn give_up(&mut self, task: TaskId, failure: Failure) {
        let layer_only = failure.class == FailureClass::NonFinite || failure.class.retryable();
        match self.table.split(task).0 {
            Group::Reduce(layer) | Group::Solve(layer) if layer_only => self.give_up_layer(layer, failure),
            _ => {
                self.retire(task, TaskState::Failed, "the task is given up");
                self.stop(failure);
            }
        }
    }

    fn give_up_layer(&mut self, layer: LayerId, failure: Failure) {
        for group in [Group::Reduce(layer), Group::Solve(layer)] {
            for task in self.table.ids(group) {
                if !self.slots[task].is_done() {
                    self.retire(TaskId(task), TaskState::Failed, "its layer is given up");
                }
            }
        }
        self.layers[layer.index()].given_up = true;
        self.failed_layers.insert(layer, failure);
        self.changes.push(Change::LayerFailed(layer));
        let segment = self.plan.layer(layer).stage;
        self.recount(segment);
        self.advance(self.plan.range_of(segment).index());
    }
}
