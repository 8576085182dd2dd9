//! What time alone brings about: lost nodes, hung devices, stragglers, waits that end.

use super::grants::SLOW;
use super::pace::Times;
use super::{Action, Dispatch, News, Outcome, Peer, Running};
use halfstep_work::{Failure, FailureClass, LeaseId, NodeId, SegmentId, TaskPhase, TaskState};
use std::collections::BTreeMap;

/// A task is a straggler's if it takes this many times the median of its phase.
const STRAGGLER_FACTOR: u64 = 2;
/// And at least this long: below, a second copy costs more than it saves.
const STRAGGLER_MS_MIN: u64 = 50;
/// Nodes' speeds, and stragglers while nodes finish tasks, are looked at this often at most.
const LOOK_MS: u64 = 20;

impl Dispatch {
    /// Lets time pass; to be called a few times per heartbeat.
    pub fn tick(&mut self, now_ms: u64) {
        if self.outcome() != Outcome::Running {
            return;
        }
        self.expire_nodes(now_ms);
        self.expire_hung(now_ms);
        self.wake_delayed(now_ms);
        self.look_at_paces(now_ms);
        // Who was held back looks again: what was expected of others may not have come.
        self.look_again |= std::mem::take(&mut self.held_back);
        self.raced_ms = None;
        self.settle(now_ms, &[]);
        self.wait_for_nodes(now_ms);
    }

    /// Who is slow, who crawls.
    pub(super) fn look_at_paces(&mut self, now_ms: u64) {
        self.paced_ms = Some(now_ms);
        let slots = self.peers.iter().filter(|(_, peer)| peer.can_work()).map(|(node, p)| (*node, p.slots));
        let in_hand = self.running.values().filter_map(|running| {
            let (group, _) = self.state.table().split(running.task);
            let ratio = self.alike.get(&group)?.ratio(now_ms.saturating_sub(running.since_ms))?;
            Some((running.node, ratio))
        });
        let crawling = self.paces.look(slots, in_hand, now_ms);
        self.look_again |= self.scheduler.set_crawling(crawling);
        let late = self.late_leases(now_ms);
        // What waits for a node that may be held back must be there for others.
        let slow = late.iter().map(|(_, running)| running.node).chain(self.paces.slower(SLOW)).collect();
        self.look_again |= self.scheduler.set_slow(slow);
    }

    /// What nodes that find nothing to do can take over from slower ones.
    pub(super) fn race(&mut self, now_ms: u64) {
        let recently = |last: Option<u64>| last.is_some_and(|last| now_ms < last + LOOK_MS);
        if !recently(self.paced_ms) {
            self.look_at_paces(now_ms);
            self.fill(now_ms, &[]);
        }
        if self.limits.speculate && !self.free.is_empty() && !recently(self.raced_ms) {
            self.raced_ms = Some(now_ms);
            let late = self.late_leases(now_ms);
            self.speculate(&late, now_ms);
        }
    }

    fn expire_nodes(&mut self, now_ms: u64) {
        let limit = self.limits.lease_ms;
        let silent = |last: u64| now_ms.saturating_sub(last) >= limit;
        let lost: Vec<NodeId> =
            self.peers.iter().filter(|(_, peer)| silent(peer.last_beat_ms)).map(|(node, _)| *node).collect();
        for node in lost {
            let text = format!("no heartbeat for {:.1} s", limit as f64 / 1e3);
            self.leave(node, Failure::new(FailureClass::NodeLost, text), now_ms);
        }
    }

    fn expire_hung(&mut self, now_ms: u64) {
        let limit = self.limits.hung_ms;
        let stuck = |running: &Running| now_ms.saturating_sub(running.moved_ms) >= limit;
        let hung: Vec<(LeaseId, NodeId)> =
            self.running.iter().filter(|(_, r)| stuck(r)).map(|(lease, r)| (*lease, r.node)).collect();
        for (lease, node) in hung {
            let Some(peer) = self.peers.get_mut(&node) else { continue };
            peer.stuck = (peer.stuck + 1).min(peer.slots);
            let Peer { name, slots, stuck, .. } = peer;
            let (seconds, left) = (limit as f64 / 1e3, *slots - *stuck);
            let text = format!(
                "node `{name}`: no progress for {seconds:.1} s, its device hangs; {left} of its {slots} slots are left"
            );
            if left == 0 {
                // What it holds can be fetched; what waits for it is for others.
                self.scheduler.leave(node);
                self.look_again = true;
            }
            self.actions.push(Action::Revoke { node, lease, why: text.clone() });
            self.fail(node, lease, Failure::new(FailureClass::Hung, text), now_ms);
        }
    }

    fn wake_delayed(&mut self, now_ms: u64) {
        while let Some((until, task)) = self.delayed.first().copied()
            && until <= now_ms
        {
            self.delayed.pop_first();
            self.delayed_until.remove(&task);
            self.available(task);
        }
    }

    /// Leases that run far longer than others of their phase, once half of the phase is done, and those of nodes that
    /// crawl as far as others would be sooner; the oldest first.
    fn late_leases(&self, now_ms: u64) -> Vec<(LeaseId, Running)> {
        let mut limits: BTreeMap<(SegmentId, TaskPhase), Option<u64>> = BTreeMap::new();
        let mut late: Vec<(LeaseId, Running)> = Vec::new();
        for (lease, running) in &self.running {
            let (group, _) = self.state.table().split(running.task);
            let key = (self.state.segment_of(group), group.phase());
            let limit = *limits.entry(key).or_insert_with(|| {
                let progress = self.state.progress(group);
                let durations = self.durations.get(&key)?;
                (progress.done * 2 >= progress.total)
                    .then(|| (STRAGGLER_FACTOR * durations.median()).max(STRAGGLER_MS_MIN))
            });
            let since = now_ms.saturating_sub(running.since_ms);
            if limit.is_some_and(|limit| since > limit) || self.is_beaten(running, since) {
                late.push((*lease, *running));
            }
        }
        late.sort_by_key(|(lease, running)| (running.since_ms, *lease));
        late
    }

    /// Whether a node that does not crawl would finish a task that one that does has had for so long, from the start and
    /// with a median's time to spare.
    fn is_beaten(&self, running: &Running, since_ms: u64) -> bool {
        if !self.scheduler.crawls(running.node) {
            return false;
        }
        let (group, _) = self.state.table().split(running.task);
        let median = self.alike.get(&group).map_or(0, Times::median);
        let all = median as f64 * self.paces.slowness(running.node);
        median > 0 && all - since_ms as f64 > 2.0 * median as f64
    }

    /// Gives stragglers' tasks to idle nodes as well, the fastest first.
    fn speculate(&mut self, late: &[(LeaseId, Running)], now_ms: u64) {
        for (_, running) in late {
            let unrivalled =
                matches!(self.state.task_state(running.task), TaskState::Leased(all) if all.len() == 1);
            if !unrivalled || self.alone.contains(running.task) {
                continue;
            }
            let idle = self.free.iter().copied();
            let idle = idle.filter(|node| *node != running.node && !self.scheduler.crawls(*node));
            let speed = |node: &NodeId| self.peers.get(node).map_or(0.0, |peer| peer.speed);
            let Some(node) = idle.max_by(|a, b| speed(a).total_cmp(&speed(b)).then(b.cmp(a))) else {
                continue;
            };
            if self.grant(node, running.task, now_ms) {
                self.speculations += 1;
            }
        }
    }

    fn wait_for_nodes(&mut self, now_ms: u64) {
        if self.peers.values().any(Peer::can_work) {
            self.alone_since_ms = None;
        } else {
            let since = *self.alone_since_ms.get_or_insert(now_ms);
            let limit = self.limits.no_nodes_ms;
            if now_ms.saturating_sub(since) >= limit {
                let text = format!(
                    "no node took part for {:.0} s, expected at least one; what is solved is kept, the job goes on \
                     from there when it is submitted again",
                    limit as f64 / 1e3
                );
                return self.stop(Failure::new(FailureClass::NodeLost, text), now_ms);
            }
        }
        let waits = self.running.is_empty() && self.outcome() == Outcome::Running;
        if waits && !self.said_waiting {
            let why = self.explain(now_ms);
            self.actions.push(Action::News(News::Waiting { why }));
        }
        self.said_waiting = waits;
    }

    /// Why the job stands still, or what it works on: one sentence.
    pub fn explain(&self, now_ms: u64) -> String {
        match self.outcome() {
            Outcome::Finished => return "every layer is committed or given up".into(),
            Outcome::Failed(failure) => return failure.message,
            Outcome::Running => {}
        }
        if !self.running.is_empty() {
            let (leases, nodes) = (self.running.len(), self.peers.len());
            return format!("{leases} tasks are being worked on by {nodes} nodes");
        }
        if !self.peers.values().any(Peer::can_work) {
            let waited = now_ms.saturating_sub(self.alone_since_ms.unwrap_or(now_ms));
            let left = self.limits.no_nodes_ms.saturating_sub(waited) as f64 / 1e3;
            let leaving = if self.peers.is_empty() { "" } else { ", those that do are leaving or hang" };
            return format!("no node takes part{leaving}: the job fails in {left:.0} s unless one attaches");
        }
        if let Some((until, task)) = self.delayed.first() {
            let wait = until.saturating_sub(now_ms) as f64 / 1e3;
            let (count, first) = (self.delayed.len(), self.state.label(*task));
            return format!("{count} tasks are tried again after a pause, the first in {wait:.1} s: {first}");
        }
        let waiting = self.scheduler.waiting() + self.alone.waiting();
        format!("{waiting} tasks wait for free slots of {} nodes", self.peers.len())
    }
}
