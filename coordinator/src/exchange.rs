//! The group of nodes that adds up statistics between its devices: who is in it, and what it adds next.
//!
//! ```text
//!            two or more nodes, the same ones for a while
//!   Apart -------------------------------------------------> Naming -> Joining -> Ready -> round, round, ...
//!     ^                                                         |         |         |
//!     +---- a node comes, goes or fails; it takes too long -----+---------+---------+
//! ```
//! A group is never mended: whoever comes or goes ends it, and another one with another epoch and name takes its place;
//! after a failure with the same members only after a pause that doubles. A round is announced to all members in one order,
//! before the first grant of a task that needs its result, and never again for the same sums.
//! Pure: calls with a time in milliseconds in, orders out. Not here: nodes and their lines (`service`).

use bytes::Bytes;
use halfstep_work::{
    Grant, GroupAnswer, GroupOrder, Held, JobId, LayerId, NodeId, PeakRecord, Round, ShardId, Task,
};
use std::collections::{BTreeMap, BTreeSet};

/// Members must be the same for so long before they are a group: nodes come together, one after the other.
const SETTLE_MS: u64 = 500;
/// Time for a name, and for all to join; nodes give up by themselves a little earlier.
const BEGIN_MS: u64 = 40_000;
/// Pause after a failure, doubled with each, and at most.
const REST_MS: u64 = 1_000;
const REST_MAX_MS: u64 = 120_000;

/// A node that can be in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Member {
    /// Its registration.
    pub(crate) node: NodeId,
    /// Its connection: over another one it may have missed orders.
    pub(crate) line: u64,
}

/// What is to be said to whom, in this order.
pub(crate) type Orders = Vec<(NodeId, u64, GroupOrder)>;

/// Whose sums a round adds up.
type Sums = BTreeMap<NodeId, Vec<ShardId>>;

#[derive(Debug)]
enum State {
    Apart,
    Naming { until_ms: u64 },
    Joining { missing: BTreeSet<NodeId>, until_ms: u64 },
    Ready { rounds: u64, announced: BTreeMap<LayerId, Sums>, proved: BTreeSet<NodeId> },
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// Of the latest group.
    epoch: u64,
    job: Option<JobId>,
    /// Ascending: a member's place is its rank.
    members: Vec<Member>,
    state: State,
    /// No group before.
    not_before_ms: u64,
    failures: u32,
}

impl Exchange {
    /// No group yet. Epochs begin after this one.
    pub(crate) fn new(epoch: u64) -> Self {
        Self { epoch, job: None, members: Vec::new(), state: State::Apart, not_before_ms: 0, failures: 0 }
    }

    /// Looks who is there, and at the time; to be called a few times a second. `members` are ascending.
    pub(crate) fn look(&mut self, job: Option<JobId>, members: &[Member], now_ms: u64) -> Orders {
        let mut orders = Orders::new();
        if (self.job, self.members.as_slice()) != (job, members) {
            orders = self.dissolve();
            (self.job, self.members, self.failures) = (job, members.to_vec(), 0);
            self.not_before_ms = now_ms + SETTLE_MS;
        }
        match &self.state {
            State::Apart if self.members.len() > 1 && now_ms >= self.not_before_ms => {
                self.epoch += 1;
                self.state = State::Naming { until_ms: now_ms + BEGIN_MS };
                orders.push((self.members[0].node, self.epoch, GroupOrder::Name));
            }
            State::Naming { until_ms } | State::Joining { until_ms, .. } if now_ms >= *until_ms => {
                orders.extend(self.fail("it took too long", now_ms));
            }
            _ => {}
        }
        orders
    }

    /// What a node says of a group.
    pub(crate) fn hear(&mut self, member: Member, epoch: u64, answer: GroupAnswer, now_ms: u64) -> Orders {
        let apart = matches!(self.state, State::Apart);
        if apart || epoch != self.epoch || !self.members.contains(&member) {
            return Orders::new();
        }
        match answer {
            GroupAnswer::Named(id) => self.named(member, &id, now_ms),
            GroupAnswer::Joined => self.joined(member.node, now_ms),
            GroupAnswer::Added(_) => self.added(member.node, now_ms),
            GroupAnswer::Failed(why) => self.fail(&format!("{}: {why}", member.node), now_ms),
        }
    }

    fn named(&mut self, member: Member, id: &Bytes, now_ms: u64) -> Orders {
        let first = self.members.first() == Some(&member);
        if !first || !matches!(self.state, State::Naming { .. }) {
            return self.nonsense(member.node, now_ms);
        }
        let missing = self.members.iter().map(|member| member.node).collect();
        self.state = State::Joining { missing, until_ms: now_ms + BEGIN_MS };
        let size = self.members.len() as u32;
        let join = |rank: u32| GroupOrder::Join { id: id.clone(), rank, size };
        let ranks = self.members.iter().zip(0..);
        ranks.map(|(member, rank)| (member.node, self.epoch, join(rank))).collect()
    }

    fn joined(&mut self, node: NodeId, now_ms: u64) -> Orders {
        let State::Joining { missing, .. } = &mut self.state else { return self.nonsense(node, now_ms) };
        missing.remove(&node);
        if missing.is_empty() {
            tracing::info!(
                epoch = self.epoch,
                members = self.members.len(),
                "nodes add up statistics together"
            );
            let (announced, proved) = (BTreeMap::new(), BTreeSet::new());
            self.state = State::Ready { rounds: 0, announced, proved };
        }
        Orders::new()
    }

    /// A group that has added up something, everywhere, was worth its while.
    fn added(&mut self, node: NodeId, now_ms: u64) -> Orders {
        let State::Ready { proved, .. } = &mut self.state else { return self.nonsense(node, now_ms) };
        proved.insert(node);
        if proved.len() == self.members.len() {
            self.failures = 0;
        }
        Orders::new()
    }

    /// The answer is not shown: it may be a name, which is secret.
    fn nonsense(&mut self, node: NodeId, now_ms: u64) -> Orders {
        self.fail(&format!("{node}: its answer means nothing now"), now_ms)
    }

    /// What members must hear before this grant is given, whoever gets it: the sums it needs are added up from now on.
    /// `peaks` are those agreed on for the layer.
    pub(crate) fn before(&mut self, grant: &Grant, peaks: impl FnOnce(LayerId) -> Vec<PeakRecord>) -> Orders {
        let (Task::Reduce { layer, .. }, Some(job)) = (&grant.lease.task, self.job) else {
            return Orders::new();
        };
        let State::Ready { rounds, announced, .. } = &mut self.state else { return Orders::new() };
        let Some(sums) = sums_of(grant) else { return Orders::new() };
        let all_here = sums.keys().all(|node| self.members.iter().any(|member| member.node == *node));
        if !all_here || announced.get(layer) == Some(&sums) {
            return Orders::new();
        }
        let (number, peaks) = (*rounds, peaks(*layer));
        *rounds += 1;
        let round = |node: NodeId| {
            let shards = sums.get(&node).cloned().unwrap_or_default();
            GroupOrder::Round(Round { job, number, layer: *layer, shards, peaks: peaks.clone() })
        };
        let orders =
            self.members.iter().map(|member| (member.node, self.epoch, round(member.node))).collect();
        announced.insert(*layer, sums);
        orders
    }

    fn fail(&mut self, why: &str, now_ms: u64) -> Orders {
        let pause = (REST_MS << self.failures.min(16)).min(REST_MAX_MS);
        tracing::warn!(epoch = self.epoch, why, pause_ms = pause, "the nodes' group is over");
        self.failures += 1;
        self.not_before_ms = now_ms + pause;
        self.dissolve()
    }

    /// Tells all members that it is over, if there is something.
    fn dissolve(&mut self) -> Orders {
        match std::mem::replace(&mut self.state, State::Apart) {
            State::Apart => Orders::new(),
            _ => self.members.iter().map(|member| (member.node, self.epoch, GroupOrder::Leave)).collect(),
        }
    }
}

/// Whose sums a grant names; none if somebody is named twice.
fn sums_of(grant: &Grant) -> Option<Sums> {
    let mut sums = Sums::new();
    for holding in &grant.holdings {
        if let Held::Sums { shards, .. } = &holding.held
            && sums.insert(holding.node, shards.clone()).is_some()
        {
            return None;
        }
    }
    Some(sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_work::{Holding, Lease, LeaseId, SegmentId, SliceId};

    const JOB: Option<JobId> = Some(JobId([1; 16]));

    fn member(node: u32) -> Member {
        Member { node: NodeId(node), line: u64::from(node) + 100 }
    }

    fn members(nodes: &[u32]) -> Vec<Member> {
        nodes.iter().map(|node| member(*node)).collect()
    }

    fn grant(task: Task, sums: &[(u32, &[u32])]) -> Grant {
        let holding = |(node, shards): &(u32, &[u32])| Holding {
            node: NodeId(*node),
            address: String::new(),
            held: Held::Sums {
                segment: SegmentId(0),
                shards: shards.iter().map(|shard| ShardId(*shard)).collect(),
            },
        };
        let lease = Lease { id: LeaseId(1), node: NodeId(1), attempt: 1, task };
        Grant { lease, holdings: sums.iter().map(holding).collect() }
    }

    fn reduce(layer: u32, sums: &[(u32, &[u32])]) -> Grant {
        grant(Task::Reduce { layer: LayerId(layer), slice: SliceId(0) }, sums)
    }

    /// Nodes and kinds of orders, all of one epoch.
    fn kinds(orders: &Orders, epoch: u64) -> Vec<(u32, String)> {
        assert!(orders.iter().all(|(_, of, _)| *of == epoch), "{orders:?}");
        let kind = |order: &GroupOrder| match order {
            GroupOrder::Name => "name".into(),
            GroupOrder::Join { rank, size, .. } => format!("join {rank} of {size}"),
            GroupOrder::Round(round) => {
                let shards: Vec<u32> = round.shards.iter().map(|shard| shard.0).collect();
                format!("round {} of layer {} with {shards:?}", round.number, round.layer.0)
            }
            GroupOrder::Leave => "leave".into(),
        };
        orders.iter().map(|(node, _, order)| (node.0, kind(order))).collect()
    }

    fn told(words: &[(u32, &str)]) -> Vec<(u32, String)> {
        words.iter().map(|(node, word)| (*node, (*word).to_owned())).collect()
    }

    /// A group of these nodes, ready at `now_ms`.
    fn ready(exchange: &mut Exchange, nodes: &[u32], now_ms: u64) {
        let members = members(nodes);
        exchange.look(JOB, &members, now_ms - SETTLE_MS);
        exchange.look(JOB, &members, now_ms);
        let epoch = exchange.epoch;
        exchange.hear(members[0], epoch, GroupAnswer::Named(Bytes::from_static(b"id")), now_ms);
        for member in members {
            assert!(exchange.hear(member, epoch, GroupAnswer::Joined, now_ms).is_empty());
        }
        assert!(matches!(exchange.state, State::Ready { .. }));
    }

    #[test]
    fn nodes_that_stay_together_are_named_and_joined() {
        let mut exchange = Exchange::new(40);
        let all = members(&[1, 2, 5]);
        assert!(exchange.look(JOB, &all[..2], 0).is_empty());
        assert!(exchange.look(JOB, &all, SETTLE_MS).is_empty(), "another one has just come");
        assert!(exchange.look(JOB, &all, 2 * SETTLE_MS - 1).is_empty());
        let orders = exchange.look(JOB, &all, 2 * SETTLE_MS);
        assert_eq!(kinds(&orders, 41), told(&[(1, "name")]));
        let id = GroupAnswer::Named(Bytes::from_static(b"id"));
        assert!(exchange.hear(all[0], 40, id.clone(), 2000).is_empty(), "another epoch");
        let orders = exchange.hear(all[0], 41, id, 2000);
        assert_eq!(kinds(&orders, 41), told(&[(1, "join 0 of 3"), (2, "join 1 of 3"), (5, "join 2 of 3")]));
        assert!(exchange.before(&reduce(0, &[(1, &[0])]), |_| Vec::new()).is_empty(), "not all have joined");
        assert!(exchange.look(JOB, &all, 3000).is_empty());
    }

    #[test]
    fn one_node_alone_or_no_job_is_no_group() {
        let mut exchange = Exchange::new(0);
        for now in 0..10 {
            assert!(exchange.look(JOB, &members(&[1]), now * SETTLE_MS).is_empty());
            assert!(exchange.look(None, &[], now * SETTLE_MS + 1).is_empty());
        }
    }

    #[test]
    fn a_layer_is_added_up_once_for_the_same_sums_in_one_order_everywhere() {
        let mut exchange = Exchange::new(0);
        ready(&mut exchange, &[1, 2, 3], 1000);
        let sums: &[(u32, &[u32])] = &[(1, &[0, 2]), (3, &[1])];
        let peaks = |layer| {
            vec![PeakRecord { layer, use_index: 0, full_precision: 1.0, quantized: 1.0, positions: 1 }]
        };
        let orders = exchange.before(&reduce(7, sums), peaks);
        let expected = [
            (1, "round 0 of layer 7 with [0, 2]"),
            (2, "round 0 of layer 7 with []"),
            (3, "round 0 of layer 7 with [1]"),
        ];
        assert_eq!(kinds(&orders, 1), told(&expected));
        let of_layer =
            |order: &GroupOrder| matches!(order, GroupOrder::Round(r) if r.peaks == peaks(LayerId(7)));
        assert!(orders.iter().all(|(_, _, order)| of_layer(order)));
        assert!(exchange.before(&reduce(7, sums), peaks).is_empty());
        let orders = exchange.before(&reduce(8, sums), peaks);
        assert_eq!(kinds(&orders, 1)[0], told(&[(1, "round 1 of layer 8 with [0, 2]")])[0]);
        // Made again elsewhere: other sums.
        let orders = exchange.before(&reduce(7, &[(2, &[0, 1, 2])]), peaks);
        assert_eq!(kinds(&orders, 1)[1], told(&[(2, "round 2 of layer 7 with [0, 1, 2]")])[0]);
    }

    #[test]
    fn sums_of_a_stranger_and_other_tasks_are_no_round() {
        let mut exchange = Exchange::new(0);
        ready(&mut exchange, &[1, 2], 1000);
        let none = |exchange: &mut Exchange, grant: &Grant| exchange.before(grant, |_| Vec::new()).is_empty();
        assert!(none(&mut exchange, &reduce(0, &[(1, &[0]), (9, &[1])])));
        assert!(none(&mut exchange, &reduce(0, &[(1, &[0]), (1, &[1])])));
        let solve = Task::Solve { layer: LayerId(0), chunk: halfstep_work::ChunkId(0) };
        assert!(none(&mut exchange, &grant(solve, &[(1, &[0]), (2, &[1])])));
        assert!(!none(&mut exchange, &reduce(0, &[(1, &[0]), (2, &[1])])));
    }

    #[test]
    fn whoever_comes_goes_or_reconnects_ends_the_group_and_the_next_has_another_epoch() {
        let mut exchange = Exchange::new(0);
        ready(&mut exchange, &[1, 2, 3], 1000);
        let orders = exchange.look(JOB, &members(&[1, 3]), 2000);
        assert_eq!(kinds(&orders, 1), told(&[(1, "leave"), (2, "leave"), (3, "leave")]));
        assert!(exchange.before(&reduce(0, &[(1, &[0])]), |_| Vec::new()).is_empty());
        let orders = exchange.look(JOB, &members(&[1, 3]), 2000 + SETTLE_MS);
        assert_eq!(kinds(&orders, 2), told(&[(1, "name")]));
        let again = [member(1), Member { line: 999, ..member(3) }];
        let orders = exchange.look(JOB, &again, 3000);
        assert_eq!(kinds(&orders, 2), told(&[(1, "leave"), (3, "leave")]));
        ready(&mut exchange, &[1, 3], 5000);
        let orders = exchange.look(Some(JobId([2; 16])), &members(&[1, 3]), 6000);
        assert_eq!(kinds(&orders, 3), told(&[(1, "leave"), (3, "leave")]));
    }

    #[test]
    fn a_failure_ends_it_for_all_and_the_same_nodes_rest_longer_each_time() {
        let mut exchange = Exchange::new(0);
        let all = members(&[1, 2]);
        let mut now = SETTLE_MS;
        exchange.look(JOB, &all, 0);
        let mut pauses = Vec::new();
        for epoch in 1..=9 {
            while exchange.look(JOB, &all, now).is_empty() {
                now += 100;
            }
            assert_eq!(exchange.epoch, epoch);
            let orders = exchange.hear(all[1], epoch, GroupAnswer::Failed("it broke".into()), now);
            assert_eq!(kinds(&orders, epoch), told(&[(1, "leave"), (2, "leave")]));
            assert!(exchange.hear(all[1], epoch, GroupAnswer::Failed("again".into()), now).is_empty());
            pauses.push(exchange.not_before_ms - now);
        }
        assert_eq!(pauses, [1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 120_000, 120_000]);
        // A round that all have makes up for it.
        ready_again(&mut exchange, &all);
        for member in &all {
            exchange.hear(*member, exchange.epoch, GroupAnswer::Added(0), 0);
        }
        assert_eq!(exchange.failures, 0);
    }

    fn ready_again(exchange: &mut Exchange, all: &[Member]) {
        let now = exchange.not_before_ms;
        exchange.look(JOB, all, now);
        exchange.hear(all[0], exchange.epoch, GroupAnswer::Named(Bytes::new()), now);
        all.iter().for_each(|member| drop(exchange.hear(*member, exchange.epoch, GroupAnswer::Joined, now)));
    }

    #[test]
    fn a_group_that_is_not_made_in_time_is_given_up() {
        let mut exchange = Exchange::new(0);
        let all = members(&[1, 2]);
        exchange.look(JOB, &all, 0);
        exchange.look(JOB, &all, SETTLE_MS);
        assert!(exchange.look(JOB, &all, SETTLE_MS + BEGIN_MS - 1).is_empty());
        let orders = exchange.look(JOB, &all, SETTLE_MS + BEGIN_MS);
        assert_eq!(kinds(&orders, 1), told(&[(1, "leave"), (2, "leave")]));
    }

    #[test]
    fn answers_that_mean_nothing_end_the_group_and_strangers_are_not_heard() {
        let mut exchange = Exchange::new(0);
        ready(&mut exchange, &[1, 2], 1000);
        let stranger = Member { line: 5, ..member(1) };
        assert!(exchange.hear(stranger, 1, GroupAnswer::Failed("no".into()), 1000).is_empty());
        assert!(matches!(exchange.state, State::Ready { .. }));
        assert_eq!(exchange.hear(member(2), 1, GroupAnswer::Joined, 1000).len(), 2);
    }
}
