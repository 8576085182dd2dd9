//! Stages open and end; lanes advance.

use super::lane::{OPEN_MAX, StageState};
use super::{Change, Group, JobState, TaskId, TaskState};
use crate::{LayerId, Propagation, RangeId, SegmentId, ShardId};

impl JobState {
    fn shards(&self) -> usize {
        self.plan.shards.len()
    }

    /// Leading stages of each lane whose layers are all over; stages without layers count only on the way to others.
    pub(super) fn skip_finished_stages(&mut self) {
        for lane in &mut self.lanes {
            let over = |stage: &usize| {
                let layers = &self.stages[*stage].layers;
                layers.iter().all(|layer| self.layers[layer.index()].is_over())
            };
            let begun =
                |stage: usize| self.stages[stage].layers.iter().any(|l| self.layers[l.index()].is_over());
            let finished = lane.stages.clone().take_while(over).count();
            // With nothing decided nothing was finished: stages without layers still run their course.
            if (lane.stages.start..lane.stages.start + finished).any(begun) {
                lane.first = lane.stages.start + finished;
                lane.next = lane.first;
            }
        }
        for lane in &self.lanes {
            (lane.stages.start..lane.first).for_each(|stage| self.stages[stage].state = StageState::Over);
        }
    }

    /// Forward runs that some lane still has to start from.
    pub(super) fn begin_forwards(&mut self) {
        let fresh = |lane: &super::Lane| lane.first == lane.stages.start;
        let needed = self.lanes.iter().rposition(fresh).unwrap_or(0);
        for range in 0..self.lanes.len().saturating_sub(1) {
            for task in self.table.ids(Group::Forward(RangeId(range as u32))) {
                if range >= needed {
                    self.slots[task].state = TaskState::Done { lease: None, node: None };
                } else if range == 0 {
                    self.make_ready(TaskId(task));
                }
            }
        }
    }

    /// A shard has run through a range: the next forward run and the next lane's first capture can start from there.
    pub(super) fn forwarded(&mut self, range: RangeId, shard: ShardId) {
        let next = RangeId(range.0 + 1);
        let mut waiting = Vec::new();
        if next.index() + 1 < self.lanes.len() {
            waiting.push(self.table.id(Group::Forward(next), shard.0));
        }
        if let Some(lane) = self.lanes.get(next.index()) {
            let first = SegmentId(lane.stages.start as u32);
            if self.stages[first.index()].is_open() {
                waiting.push(self.table.id(Group::Capture(first), shard.0));
            }
        }
        for task in waiting {
            if self.slots[task.0].state == TaskState::Waiting {
                self.make_ready(task);
            }
        }
    }

    /// Ends stages that are complete and opens those that may begin.
    pub(super) fn advance(&mut self, lane: usize) {
        if self.fatal.is_some() {
            return;
        }
        loop {
            let Some(over) = self.complete_stage(lane) else {
                if !self.may_open(lane) {
                    return;
                }
                self.open_stage(lane);
                continue;
            };
            self.close_stage(over);
            let stages = &self.stages;
            let entry = &mut self.lanes[lane];
            while entry.first < entry.next && stages[entry.first].state == StageState::Over {
                entry.first += 1;
            }
        }
    }

    fn complete_stage(&self, lane: usize) -> Option<usize> {
        let entry = &self.lanes[lane];
        (entry.first..entry.next).find(|stage| {
            let stage = &self.stages[*stage];
            let layers_over = stage.layers.iter().all(|layer| self.layers[layer.index()].is_over());
            stage.is_open() && layers_over && (!stage.layers.is_empty() || stage.summed == self.shards())
        })
    }

    fn may_open(&self, lane: usize) -> bool {
        let entry = &self.lanes[lane];
        let open = entry.next - entry.first;
        if entry.next == entry.stages.end || open >= OPEN_MAX {
            return false;
        }
        let ahead = self.plan.propagation == Propagation::Independent;
        let summed =
            |stage: usize| self.stages[stage].summed == self.shards() || !self.stages[stage].needs_sums;
        open == 0 || (ahead && (entry.first..entry.next).all(summed))
    }

    fn open_stage(&mut self, lane: usize) {
        let index = self.lanes[lane].next;
        let segment = SegmentId(index as u32);
        self.lanes[lane].next += 1;
        self.stages[index].state = StageState::Open;
        self.changes.push(Change::StageOpened(segment));
        let mut groups = vec![Group::Capture(segment), Group::Accumulate(segment)];
        for layer in self.stages[index].layers.clone() {
            let entry = &self.layers[layer.index()];
            if !entry.is_over() {
                // Named by each of its readers; the tasks of a group wait only once.
                groups.extend([Group::Reduce(entry.statistics), Group::Solve(layer)]);
            }
        }
        let from_forward = lane > 0 && index == self.lanes[lane].stages.start;
        for group in groups {
            for (place, task) in self.table.ids(group).enumerate() {
                let gated = from_forward && matches!(group, Group::Capture(_));
                let free = !gated || self.is_forwarded(lane, place as u32);
                if free && self.slots[task].state == TaskState::Waiting {
                    self.make_ready(TaskId(task));
                }
            }
        }
        self.recount(segment);
        self.changes.push(Change::Opened);
    }

    fn is_forwarded(&self, lane: usize, shard: u32) -> bool {
        let task = self.table.id(Group::Forward(RangeId(lane as u32 - 1)), shard);
        self.slots[task.0].is_done()
    }

    fn close_stage(&mut self, index: usize) {
        let segment = SegmentId(index as u32);
        self.stages[index].state = StageState::Over;
        for group in [Group::Capture(segment), Group::Accumulate(segment)] {
            for task in self.table.ids(group) {
                if !self.slots[task].is_done() {
                    let done = TaskState::Done { lease: None, node: None };
                    self.retire(TaskId(task), done, "the stage is over");
                }
            }
        }
        let layers = self.stages[index].layers.clone();
        for group in layers.iter().map(|layer| Group::Reduce(*layer)) {
            for task in self.table.ids(group) {
                if !self.slots[task].is_done() {
                    self.retire(TaskId(task), TaskState::Failed, "the stage is over");
                }
            }
        }
        for (node, member) in &mut self.nodes {
            let sums = member.sums.remove(&segment).is_some();
            let before = member.means.len();
            member.means.retain(|(layer, _)| !layers.contains(layer));
            if sums || member.means.len() < before {
                self.changes.push(Change::DropSums { node: *node, segment });
            }
        }
        self.changes.push(Change::StageOver(segment));
    }

    /// `samples`: solving needs the sums' sample rows besides the means.
    fn needs_sums(&self, layer: LayerId, samples: bool) -> bool {
        let entry = &self.layers[layer.index()];
        !entry.is_over() && (samples || !self.layers[entry.statistics.index()].has_means())
    }

    /// Whether a layer that is not over is to be solved with these statistics.
    pub(super) fn is_read(&self, statistics: LayerId) -> bool {
        self.layers[statistics.index()].readers.iter().any(|reader| !self.layers[reader.index()].is_over())
    }

    /// Brings what follows from the counts up to date; says if something became possible.
    pub(super) fn recount(&mut self, segment: SegmentId) {
        let (samples, shards) = (self.wants_samples(), self.shards());
        let stage = &self.stages[segment.index()];
        let needs = match stage.layers.is_empty() {
            true => stage.summed < shards,
            false => stage.layers.iter().any(|layer| self.needs_sums(*layer, samples)),
        };
        let before = stage.gates(shards);
        let stage = &mut self.stages[segment.index()];
        stage.needs_sums = needs;
        let now = stage.gates(shards);
        if (0..3).any(|gate| now[gate] && !before[gate]) {
            self.changes.push(Change::Opened);
        }
    }
}
