//! Why a task waits, and what became of its attempts, for people.
//!
//! Not here: why the job as a whole stands still (`clock`).

use super::history::Attempt;
use super::{Dispatch, Peer};
use halfstep_work::{
    ChunkId, Group, LayerId, LeaseId, RangeId, SegmentId, ShardId, SliceId, Task, TaskId, TaskPhase,
    TaskState,
};
use std::sync::Arc;

/// What there is to say about one task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskAccount {
    /// As people name it: `solve:12:0`.
    pub name: String,
    /// In words.
    pub label: String,
    /// Where it stands, in one word.
    pub state: &'static str,
    /// Why it is there: half a sentence.
    pub why: String,
    /// Those that are remembered, in order.
    pub attempts: Vec<Attempt>,
}

impl Dispatch {
    /// The task of this name. Layers go by number or by name.
    ///
    /// # Errors
    /// A sentence, for a text that is no name or names no task of the plan.
    pub fn find_task(&self, text: &str) -> Result<TaskId, String> {
        let shown: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
        let parsed = self.parse_task(text).ok_or_else(|| {
            let phases = TaskPhase::ALL.map(TaskPhase::name).join(", ");
            format!(
                "task `{shown}`: expected PHASE:OF:PLACE, such as capture:0:3 or solve:LAYER:0; phases are {phases}; \
                 a layer goes by its number or its name"
            )
        })?;
        let plan = self.state.plan();
        self.state.table().find(&parsed).ok_or_else(|| {
            format!(
                "task `{shown}`: the job has no such task; it has {} ranges, {} stages, {} shards and {} layers, all \
                 counted from 0",
                plan.ranges.len(),
                plan.stages.len(),
                plan.shards.len(),
                plan.layers.len()
            )
        })
    }

    fn parse_task(&self, text: &str) -> Option<Task> {
        let (phase, rest) = text.split_once(':')?;
        // Layers' names may have colons.
        let (of, place) = rest.rsplit_once(':')?;
        let place: u32 = place.parse().ok()?;
        let phase = TaskPhase::ALL.into_iter().find(|known| known.name() == phase)?;
        let number = of.parse::<u32>().ok();
        let layer = || {
            let mut layers = self.state.plan().layers.iter();
            layers.find(|layer| layer.name == of).map(|layer| layer.id).or(number.map(LayerId))
        };
        let shard = ShardId(place);
        Some(match phase {
            TaskPhase::Forward => Task::Forward { range: RangeId(number?), shard },
            TaskPhase::Capture => Task::Capture { segment: SegmentId(number?), shard },
            TaskPhase::Accumulate => {
                Task::Accumulate { segment: SegmentId(number?), shard, peaks: Arc::default() }
            }
            TaskPhase::Reduce => Task::Reduce { layer: layer()?, slice: SliceId(place) },
            TaskPhase::Solve => Task::Solve { layer: layer()?, chunk: ChunkId(place) },
        })
    }

    /// Everything there is to say about a task.
    pub fn account(&self, task: TaskId, now_ms: u64) -> TaskAccount {
        let state = self.state.task_state(task);
        let (word, why) = match state {
            TaskState::Waiting => ("waiting", self.why_not_open(task)),
            TaskState::Ready => ("ready", self.why_ready(task, now_ms)),
            TaskState::Leased(leases) => ("leased", self.who_works(task, leases, now_ms)),
            TaskState::Done { node: Some(node), .. } => ("done", format!("what it made is held by {node}")),
            TaskState::Done { node: None, .. } => {
                ("done", "what it made is kept, or not needed any more".into())
            }
            TaskState::Failed => ("failed", self.why_failed(task)),
        };
        TaskAccount {
            name: self.task_name(task),
            label: self.state.label(task),
            state: word,
            why,
            attempts: self.history.of(task).to_vec(),
        }
    }

    /// As people name it.
    pub fn task_name(&self, task: TaskId) -> String {
        self.state.table().task(task, &Arc::default()).to_string()
    }

    /// Tasks that somebody who looks for trouble wants to see: those under way, the oldest first, then those that failed
    /// before and are not done.
    pub fn notable(&self) -> Vec<TaskId> {
        let mut running: Vec<(u64, TaskId)> =
            self.running.values().map(|running| (running.since_ms, running.task)).collect();
        running.sort_unstable();
        let mut seen: Vec<TaskId> = Vec::new();
        let open = |task: &TaskId| {
            !matches!(self.state.task_state(*task), TaskState::Leased(_) | TaskState::Done { .. })
        };
        let tried = self.history.tasks().map(|(task, _)| task).filter(open);
        for task in running.into_iter().map(|(_, task)| task).chain(tried) {
            if seen.last() != Some(&task) {
                seen.push(task);
            }
        }
        seen
    }

    /// Attempts that ended since this was asked last.
    pub fn take_ended(&mut self) -> Vec<Attempt> {
        self.history.take_ended()
    }

    fn why_not_open(&self, task: TaskId) -> String {
        self.state.waits_for(task).unwrap_or_else(|| "what it starts from is not there yet".into())
    }

    fn why_ready(&self, task: TaskId, now_ms: u64) -> String {
        if let Some(why) = self.state.waits_for(task) {
            return why;
        }
        if let Some(until) = self.delayed_until.get(&task) {
            return format!(
                "it failed, and is tried again in {:.1} s",
                seconds(until.saturating_sub(now_ms))
            );
        }
        if !self.peers.values().any(Peer::can_work) {
            return "no node takes part".into();
        }
        if now_ms < self.held_until_ms {
            let left = seconds(self.held_until_ms - now_ms);
            return format!("nodes of before the restart may have it: it is given out in {left:.1} s");
        }
        if self.alone.contains(task) {
            let on = self.alone.place(task).map_or("a node".into(), |node| self.known_as(node));
            return format!("its memory did not suffice: it waits until {on} has nothing else in hand");
        }
        let waiting = self.scheduler.waiting();
        format!("{waiting} tasks wait for free slots of {} nodes", self.peers.len())
    }

    fn who_works(&self, task: TaskId, leases: &[LeaseId], now_ms: u64) -> String {
        let one = |lease: &LeaseId| {
            let (_, node, attempt) = self.state.lease(*lease)?;
            let for_ms = self.running.get(lease).map_or(0, |running| now_ms.saturating_sub(running.since_ms));
            Some(format!("{} for {:.1} s, attempt {attempt}", self.known_as(node), seconds(for_ms)))
        };
        let all: Vec<String> = leases.iter().filter_map(one).collect();
        debug_assert!(!all.is_empty(), "{task:?} is leased to nobody");
        format!("worked on by {}", all.join("; and by "))
    }

    fn why_failed(&self, task: TaskId) -> String {
        let (Group::Reduce(layer) | Group::Solve(layer)) = self.state.table().split(task).0 else {
            return self.state.fatal().map(|failure| failure.message.clone()).unwrap_or_default();
        };
        let given_up = self.state.failed_layers().get(&layer).or(self.state.fatal());
        given_up.map(|failure| failure.message.clone()).unwrap_or_default()
    }

    /// Number and name of a node.
    fn known_as(&self, node: halfstep_work::NodeId) -> String {
        match self.peers.get(&node) {
            Some(peer) => format!("{node} `{}`", peer.name),
            None => node.to_string(),
        }
    }
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1e3
}
