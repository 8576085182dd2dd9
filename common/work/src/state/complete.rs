//! Results: accepted under a current lease, compared or refused under any other.

use super::{Change, Group, JobState, LeaseRecord, TaskId, TaskState};
use crate::{
    ChunkId, Done, Failure, FailureClass, LayerId, LeaseId, NodeId, PeakRecord, Receipt, SegmentId, ShardId,
    SliceId, Verdict, agree_peaks,
};
use std::sync::Arc;

impl JobState {
    pub(super) fn completed(&mut self, lease: LeaseId, done: Done) -> Verdict {
        if self.fatal.is_some() {
            return Verdict::Stale;
        }
        let Some(record) = self.leases.get(&lease).copied() else { return self.late(lease, &done) };
        let task = self.table.task(record.task, &self.no_peaks);
        if !done.answers(&task) {
            let failure = Failure::new(FailureClass::Internal, "the node answered another task");
            self.attempt_failed(lease, record, &failure);
            return Verdict::Stale;
        }
        self.revoke_others(record.task, Some(lease), "another node was first");
        let peaks = if let Done::Captured { peaks } = &done { peaks.as_slice() } else { &[] };
        let receipt = if let Done::Solved(rounding) = &done { Some(Receipt::of(rounding)) } else { None };
        self.finish(record.task, Some(lease), record.node, peaks, receipt);
        Verdict::Accepted
    }

    /// Marks a task as finished by a node and draws the consequences.
    pub(super) fn finish(
        &mut self,
        task: TaskId,
        lease: Option<LeaseId>,
        node: NodeId,
        peaks: &[PeakRecord],
        receipt: Option<Receipt>,
    ) {
        self.slots[task.0].state = TaskState::Done { lease, node: Some(node) };
        self.changes.push(Change::Finished { task, node });
        let (group, place) = self.table.split(task);
        match group {
            Group::Forward(range) => self.forwarded(range, ShardId(place)),
            Group::Capture(segment) => self.captured(segment, peaks),
            Group::Accumulate(segment) => self.summed(segment, ShardId(place), node),
            Group::Reduce(layer) => self.reduced(layer, SliceId(place), node),
            Group::Solve(layer) => self.solved(layer, ChunkId(place), receipt),
        }
        if !matches!(group, Group::Forward(_)) {
            let segment = self.segment_of(group);
            self.recount(segment);
            self.release_sums(segment);
            self.advance(self.plan.range_of(segment).index());
        }
    }

    fn captured(&mut self, segment: SegmentId, peaks: &[PeakRecord]) {
        let stage = &mut self.stages[segment.index()];
        agree_peaks(&mut stage.peaks, peaks);
        stage.captured += 1;
        if stage.captured == self.plan.shards.len() {
            stage.agreed = Some(Arc::new(stage.peaks.clone()));
            self.changes.push(Change::Opened);
        }
    }

    fn summed(&mut self, segment: SegmentId, shard: ShardId, node: NodeId) {
        self.stages[segment.index()].summed += 1;
        if let Some(member) = self.nodes.get_mut(&node) {
            member.sums.entry(segment).or_default().insert(shard);
        }
        if self.stages[segment.index()].summed == self.plan.shards.len() {
            self.changes.push(Change::Opened);
        }
    }

    fn reduced(&mut self, layer: LayerId, slice: SliceId, node: NodeId) {
        self.layers[layer.index()].means += 1;
        if let Some(member) = self.nodes.get_mut(&node) {
            member.means.insert((layer, slice));
        }
        if self.layers[layer.index()].readers.iter().any(|reader| self.can_solve(*reader)) {
            self.changes.push(Change::Opened);
        }
    }

    fn solved(&mut self, layer: LayerId, chunk: ChunkId, receipt: Option<Receipt>) {
        let entry = &mut self.layers[layer.index()];
        entry.receipts[chunk.index()] = receipt;
        entry.solved += 1;
        if entry.solved == entry.receipts.len() {
            self.changes.push(Change::LayerSolved(layer));
        }
    }

    /// A result under a lease that is not current: said twice, beaten by a rival, or a zombie's.
    fn late(&mut self, lease: LeaseId, done: &Done) -> Verdict {
        let record = self.ended.get(&lease).copied();
        if let Some(record) = record
            && self.is_answered(lease, record)
        {
            return self.again(record, done);
        }
        let Done::Solved(rounding) = done else { return Verdict::Stale };
        let Some(committed) = self.committed(rounding.layer, rounding.chunk) else { return Verdict::Stale };
        if committed == Receipt::of(rounding) {
            return Verdict::Duplicate;
        }
        let task = self.table.id(Group::Solve(rounding.layer), rounding.chunk.0);
        if record.is_some_and(|record| record.task == task) {
            self.differing(task);
        }
        Verdict::Stale
    }

    /// Whether the task was finished under this very lease, by a node that is still there: its acknowledgement was lost.
    fn is_answered(&self, lease: LeaseId, record: LeaseRecord) -> bool {
        let (lease, node) = (Some(lease), Some(record.node));
        self.slots[record.task.0].state == TaskState::Done { lease, node }
    }

    fn again(&mut self, record: LeaseRecord, done: &Done) -> Verdict {
        let Done::Solved(rounding) = done else { return Verdict::Accepted };
        match self.committed(rounding.layer, rounding.chunk) {
            Some(committed) if committed == Receipt::of(rounding) => Verdict::Accepted,
            _ => {
                self.differing(record.task);
                Verdict::Stale
            }
        }
    }

    fn committed(&self, layer: LayerId, chunk: ChunkId) -> Option<Receipt> {
        *self.layers.get(layer.index())?.receipts.get(chunk.index())?
    }

    fn differing(&mut self, task: TaskId) {
        let label = self.label(task);
        self.stop(Failure::new(
            FailureClass::Nondeterminism,
            format!("{label}: two nodes returned different results, expected equal bytes"),
        ));
    }
}
