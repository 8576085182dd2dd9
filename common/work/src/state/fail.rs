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
            return self.give_up(task, failure);
        }
        self.counters.retries += 1;
        let TaskState::Leased(rivals) = &mut slot.state else { return };
        rivals.retain(|other| *other != lease);
        if rivals.is_empty() {
            self.make_ready(task);
        }
        self.changes.push(Change::Retry { task, node, failure: failure.clone() });
    }

    fn give_up(&mut self, task: TaskId, failure: &Failure) {
        let layer_only = failure.class == FailureClass::NonFinite || failure.class.retryable();
        let verdict = self.slots[task.0].verdict(&self.label(task), failure);
        match self.table.split(task) {
            (Group::Reduce(layer), slice) if layer_only => self.give_up_readers(layer, slice, task, failure),
            (Group::Solve(layer), _) if layer_only => self.give_up_layer(layer, verdict),
            _ => {
                self.retire(task, TaskState::Failed, "the task is given up");
                self.stop(verdict);
            }
        }
    }

    /// Without their statistics no layer can be solved.
    fn give_up_readers(&mut self, layer: LayerId, slice: u32, task: TaskId, failure: &Failure) {
        for reader in self.layers[layer.index()].readers.clone() {
            if !self.layers[reader.index()].is_over() {
                let label = self.slice_label(reader, slice);
                let verdict = self.slots[task.0].verdict(&label, failure);
                self.give_up_layer(reader, verdict);
            }
        }
    }

    fn give_up_layer(&mut self, layer: LayerId, failure: Failure) {
        self.layers[layer.index()].given_up = true;
        let statistics = self.layers[layer.index()].statistics;
        let unread = (!self.is_read(statistics)).then_some(Group::Reduce(statistics));
        for group in unread.into_iter().chain([Group::Solve(layer)]) {
            for task in self.table.ids(group) {
                if !self.slots[task].is_done() {
                    self.retire(TaskId(task), TaskState::Failed, "its layer is given up");
                }
            }
        }
        self.failed_layers.insert(layer, failure);
        self.changes.push(Change::LayerFailed(layer));
        let segment = self.plan.layer(layer).stage;
        self.recount(segment);
        self.advance(self.plan.range_of(segment).index());
    }
}
