//! How fast nodes turn out to be, against each other.
//!
//! Method: a task's ratio is its time over the median of its group. A node's slowness is the running mean of its tasks'
//! ratios, 1 for a node nothing is known of; it fades, so that a node that was slow once is tried again. A lease in
//! hand that takes far longer than the median already counts at once. Nodes below half of the average speed crawl.
//! Not here: what follows from it (`grants`, `clock`, `scheduler`).

use halfstep_work::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// Part of the newest task in the running mean.
const NEWEST: f64 = 0.2;
/// One task says at most this.
const RATIO_MAX: f64 = 8.0;
/// Added to both sides of a ratio, milliseconds: tasks this short say little.
const SHORT_MS: f64 = 10.0;
/// Finished tasks of a group below which it has no median worth comparing with.
const FINISHED_MIN: usize = 2;
/// A lease that takes this many times the median already is behind.
const BEHIND: f64 = 4.0;
/// Half of what is known of a node that finishes nothing is forgotten after this long.
const FADES_MS: f64 = 30_000.0;
/// A node crawls below this part of the average speed of a slot.
const CRAWLS_BELOW: f64 = 0.5;

/// Times of finished tasks that are alike, and their median.
#[derive(Debug, Default)]
pub(super) struct Times {
    all: Vec<u64>,
    median: u64,
    /// The median is taken again when there are so many.
    again_at: usize,
}

impl Times {
    /// Amortized constant time: the median lags behind by a quarter at most.
    pub(super) fn push(&mut self, ms: u64) {
        self.all.push(ms);
        if self.all.len() >= self.again_at {
            let middle = self.all.len() / 2;
            self.median = *self.all.select_nth_unstable(middle).1;
            self.again_at = self.all.len() + self.all.len() / 4 + 1;
        }
    }

    /// Milliseconds; 0 if nothing was finished.
    pub(super) fn median(&self) -> u64 {
        self.median
    }

    /// How many times longer than the median this is; none while there is too little to compare with.
    pub(super) fn ratio(&self, ms: u64) -> Option<f64> {
        let known = self.all.len() >= FINISHED_MIN;
        known.then(|| (ms as f64 + SHORT_MS) / (self.median as f64 + SHORT_MS))
    }
}

#[derive(Clone, Copy, Debug)]
struct Pace {
    slowness: f64,
    at_ms: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Paces {
    of: BTreeMap<NodeId, Pace>,
    /// As of the last look at all nodes: leases in hand are in it.
    now: BTreeMap<NodeId, f64>,
    /// Tasks of median length that all slots finish in the time of one.
    capacity: f64,
}

impl Paces {
    /// A node finished a task that took `ratio` times the median.
    pub(super) fn finished(&mut self, node: NodeId, ratio: f64, now_ms: u64) {
        let before = self.faded(node, now_ms);
        let slowness = before + NEWEST * (ratio.min(RATIO_MAX) - before);
        self.of.insert(node, Pace { slowness, at_ms: now_ms });
    }

    pub(super) fn forget(&mut self, node: NodeId) {
        self.of.remove(&node);
        self.now.remove(&node);
    }

    fn faded(&self, node: NodeId, now_ms: u64) -> f64 {
        let fade = |pace: &Pace| {
            let since = now_ms.saturating_sub(pace.at_ms) as f64;
            1.0 + (pace.slowness - 1.0) * 0.5f64.powf(since / FADES_MS)
        };
        self.of.get(&node).map_or(1.0, fade)
    }

    /// Looks at all nodes that can work: slots of each, and ratios of the leases in hand. Returns those that crawl;
    /// never all of them.
    pub(super) fn look(
        &mut self,
        slots: impl Iterator<Item = (NodeId, usize)>,
        in_hand: impl Iterator<Item = (NodeId, f64)>,
        now_ms: u64,
    ) -> BTreeSet<NodeId> {
        let slots: BTreeMap<NodeId, usize> = slots.collect();
        self.now = slots.keys().map(|node| (*node, self.faded(*node, now_ms))).collect();
        for (node, ratio) in in_hand.filter(|(_, ratio)| *ratio > BEHIND) {
            if let Some(slowness) = self.now.get_mut(&node) {
                *slowness = slowness.max(ratio);
            }
        }
        self.capacity = slots.iter().map(|(node, slots)| *slots as f64 / self.now[node]).sum();
        let average = self.capacity / slots.values().sum::<usize>().max(1) as f64;
        let crawls = |slowness: f64| 1.0 / slowness < CRAWLS_BELOW * average;
        self.now.iter().filter(|(_, slowness)| crawls(**slowness)).map(|(node, _)| *node).collect()
    }

    /// Nodes that need at least this many times longer than others.
    pub(super) fn slower(&self, than: f64) -> impl Iterator<Item = NodeId> + '_ {
        self.now.iter().filter(move |(_, slowness)| **slowness >= than).map(|(node, _)| *node)
    }

    /// How many times longer than others a node needs, as of the last look.
    pub(super) fn slowness(&self, node: NodeId) -> f64 {
        self.now.get(&node).copied().unwrap_or(1.0)
    }

    /// Tasks that all other nodes finish in the time of one.
    pub(super) fn capacity_without(&self, node: NodeId, slots: usize) -> f64 {
        self.capacity - slots as f64 / self.slowness(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODES: [NodeId; 3] = [NodeId(0), NodeId(1), NodeId(2)];

    fn look(paces: &mut Paces, in_hand: &[(NodeId, f64)], now_ms: u64) -> Vec<NodeId> {
        let slots = NODES.into_iter().map(|node| (node, 1));
        paces.look(slots, in_hand.iter().copied(), now_ms).into_iter().collect()
    }

    #[test]
    fn one_late_task_says_little_several_say_that_a_node_crawls_and_time_forgets_it() {
        let mut paces = Paces::default();
        paces.finished(NODES[0], 100.0, 0);
        assert_eq!(look(&mut paces, &[], 0), []);
        (0..3).for_each(|_| paces.finished(NODES[0], 5.0, 0));
        assert_eq!(look(&mut paces, &[], 0), [NODES[0]]);
        assert_eq!(look(&mut paces, &[], 180_000), []);
    }

    #[test]
    fn a_lease_far_behind_counts_at_once() {
        let mut paces = Paces::default();
        assert_eq!(look(&mut paces, &[(NODES[1], 3.9), (NODES[2], 6.0)], 0), [NODES[2]]);
        assert!((paces.slowness(NODES[2]) - 6.0).abs() < 1e-9);
        assert!((paces.capacity_without(NODES[2], 1) - 2.0).abs() < 1e-9);
        assert_eq!(look(&mut paces, &[], 0), [], "finished: it is as good as before");
    }

    #[test]
    fn some_node_never_crawls() {
        let mut paces = Paces::default();
        NODES.iter().for_each(|node| (0..9).for_each(|_| paces.finished(*node, 8.0, 0)));
        assert_eq!(look(&mut paces, &[], 0), []);
    }

    #[test]
    fn medians_follow_what_is_finished() {
        let mut times = Times::default();
        assert_eq!((times.median(), times.ratio(5)), (0, None));
        [40, 1_000, 40, 40, 40].into_iter().for_each(|ms| times.push(ms));
        assert_eq!(times.median(), 40);
        assert!(times.ratio(240).is_some_and(|ratio| (ratio - 5.0).abs() < 1e-9));
    }
}
