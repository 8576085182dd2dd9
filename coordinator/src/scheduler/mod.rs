//! Who does what next: data first, then speed, then whoever is idle.
//!
//! Method: each range has home nodes. Shards of a range are owned by its home nodes (`owners`), so captures and
//! accumulations stay with the carry; a node with nothing to do takes from the longest queue of another. Slices go to
//! whoever is free, chunks first to nodes that have the layer's means already. Ready tasks are kept in queues (`queue`),
//! so that a choice costs a logarithm. The same calls in the same order give the same choices.
//! Not here: whether a task may be given out (`JobState`), time, leases (`dispatch`).

mod carries;
mod homes;
mod owners;
mod queue;

use carries::Carries;
use halfstep_work::{
    Group, Held, Holding, Inventory, JobState, LayerId, NodeId, Objective, RangeId, SegmentId, ShardId, Task,
    TaskId, TaskTable,
};
use homes::Homes;
use queue::{NOBODY, Queue, ShardQueue};
use std::collections::{BTreeMap, BTreeSet};

/// Share of shards that a node that crawls is given, as a part of what it would get: none, unless all crawl.
const CRAWLERS_PART: f64 = 1e-6;

/// A carry: whose lane, after which segment, of which shard.
pub(crate) type Place = (RangeId, SegmentId, ShardId);

/// Order of groups within a lane: forward runs first (others wait for them), then stages in order.
type Rank = (u32, Group);

fn rank(state: &JobState, group: Group) -> Rank {
    match group {
        Group::Forward(_) => (0, group),
        _ => (state.segment_of(group).0 + 1, group),
    }
}

/// Whether the results of a group's tasks stay with their nodes, for others to fetch.
fn is_fetched_from(group: Group) -> bool {
    !matches!(group, Group::Solve(_))
}

struct Worker {
    weight: f64,
    slots: usize,
    /// Layers whose means it has gathered or was asked to gather.
    gathered: BTreeSet<LayerId>,
}

/// See the module.
pub(crate) struct Scheduler {
    table: TaskTable,
    workers: BTreeMap<NodeId, Worker>,
    homes: Homes,
    /// By lane and shard.
    owners: Vec<Vec<NodeId>>,
    queues: Vec<BTreeMap<Rank, Queue>>,
    carries: Carries,
    ready: usize,
    /// Nodes that are far behind: what waits for them may be taken by others.
    slow: BTreeSet<NodeId>,
    /// Nodes so slow that whoever fetched from them would wait: they make nothing that others need from them.
    crawling: BTreeSet<NodeId>,
    /// Nodes that just failed at a task, so that another is tried first.
    avoid: BTreeMap<TaskId, NodeId>,
}

impl Scheduler {
    pub(crate) fn new(state: &JobState) -> Self {
        let plan = state.plan();
        let (lanes, shards) = (plan.ranges.len(), plan.shards.len());
        Self {
            table: state.table().clone(),
            workers: BTreeMap::new(),
            homes: Homes::new(lanes),
            owners: vec![vec![NOBODY; shards]; lanes],
            queues: (0..lanes).map(|_| BTreeMap::new()).collect(),
            carries: Carries::new(lanes, shards),
            ready: 0,
            slow: BTreeSet::new(),
            crawling: BTreeSet::new(),
            avoid: BTreeMap::new(),
        }
    }

    /// A node takes part. `speed`: of one slot, in any unit that all nodes share.
    pub(crate) fn join(&mut self, node: NodeId, speed: f64, slots: usize, inventory: &Inventory) {
        let speed = if speed.is_finite() && speed > 0.0 { speed } else { 1.0 };
        let worker = Worker { weight: speed * slots as f64, slots, gathered: BTreeSet::new() };
        let weight = worker.weight;
        self.workers.insert(node, worker);
        for held in &inventory.held {
            if let Held::Carry { range, segment, shard } = held {
                self.carries.put(*range, *segment, *shard, node);
            }
        }
        if self.homes.of(node).is_none() {
            let moved = self.homes.join(node, weight);
            self.rehome(&moved);
        }
    }

    /// A node gets nothing any more; what it holds can still be fetched until `forget`.
    pub(crate) fn leave(&mut self, node: NodeId) {
        self.workers.remove(&node);
        self.slow.remove(&node);
        self.crawling.remove(&node);
        let moved = self.homes.leave(node);
        self.rehome(&moved);
    }

    /// A node's carries are gone.
    pub(crate) fn forget(&mut self, node: NodeId) {
        self.carries.forget(node);
    }

    /// Who should take over the carries that a node alone has and that are still of use: the shards' new owners, or
    /// anybody. Asked after `leave` and before `forget`.
    pub(crate) fn heirs(&self, state: &JobState, node: NodeId) -> Vec<(NodeId, Held)> {
        let mut anybody = self.workers.keys().copied().cycle();
        let wanted =
            self.carries.only_at(node).into_iter().filter(|(range, ..)| !state.is_range_over(*range));
        let inherit = |(range, segment, shard): (RangeId, SegmentId, ShardId)| {
            let owner = self.owners.get(range.index())?.get(shard.index()).copied();
            let heir = owner.filter(|owner| self.workers.contains_key(owner)).or_else(|| anybody.next())?;
            Some((heir, Held::Carry { range, segment, shard }))
        };
        wanted.filter_map(inherit).collect()
    }

    /// A node has fetched a carry from another.
    pub(crate) fn took_over(&mut self, node: NodeId, (range, segment, shard): Place) {
        // What was said before it ran on came later than what it made.
        let further = self.carries.at(range, shard, node).is_some_and(|has| has > segment);
        if !further && self.workers.contains_key(&node) {
            self.carries.put(range, segment, shard, node);
        }
    }

    fn rehome(&mut self, lanes: &[usize]) {
        // A plan without stages has no lane for its nodes.
        let known = lanes.iter().filter(|lane| **lane < self.owners.len()).copied().collect::<Vec<_>>();
        known.into_iter().for_each(|lane| self.rebalance(lane, false));
    }

    /// Shares of a lane's shards; between stages all may move, within one those that nobody has run anything on.
    fn rebalance(&mut self, lane: usize, between_stages: bool) {
        let weight = |node: NodeId| {
            let part = if self.crawling.contains(&node) { CRAWLERS_PART } else { 1.0 };
            (node, self.workers[&node].weight * part)
        };
        let weights: Vec<(NodeId, f64)> = self.homes.members(lane).map(weight).collect();
        let carries = &self.carries;
        let may_move = |shard: usize| between_stages || carries.is_untouched(lane, shard);
        let moves = owners::rebalance(&self.owners[lane], &weights, !between_stages, may_move);
        for (shard, node) in moves {
            self.set_owner(lane, shard, node);
        }
    }

    fn set_owner(&mut self, lane: usize, shard: usize, node: NodeId) {
        let before = std::mem::replace(&mut self.owners[lane][shard], node);
        if before == node {
            return;
        }
        for queue in self.queues[lane].values_mut() {
            if let Queue::Shards(queue) = queue
                && queue.remove(before, shard as u32)
            {
                queue.insert(node, shard as u32);
            }
        }
    }

    /// A task can be given out once its group is open.
    pub(crate) fn ready(&mut self, state: &JobState, task: TaskId) {
        let (group, place) = self.table.split(task);
        let lane = state.range_of(group).index();
        let empty = || match group.is_by_shard() {
            true => Queue::Shards(ShardQueue::default()),
            false => Queue::Places(BTreeSet::new()),
        };
        match self.queues[lane].entry(rank(state, group)).or_insert_with(empty) {
            Queue::Shards(queue) => queue.insert(self.owners[lane][place as usize], place),
            Queue::Places(places) => {
                places.insert(place);
            }
        }
        self.ready += 1;
    }

    /// A task cannot be given out any more.
    pub(crate) fn unready(&mut self, state: &JobState, task: TaskId) {
        let (group, place) = self.table.split(task);
        let lane = state.range_of(group).index();
        let key = rank(state, group);
        let Some(queue) = self.queues[lane].get_mut(&key) else { return };
        let found = match queue {
            Queue::Shards(queue) => queue.remove(self.owners[lane][place as usize], place),
            Queue::Places(places) => places.remove(&place),
        };
        self.ready -= usize::from(found);
        if queue.is_empty() {
            self.queues[lane].remove(&key);
        }
    }

    /// A task was finished by a node.
    pub(crate) fn finished(&mut self, state: &JobState, task: TaskId, node: NodeId) {
        self.avoid.remove(&task);
        let (group, place) = self.table.split(task);
        let shard = ShardId(place);
        match group {
            Group::Forward(range) => {
                self.carries.put(RangeId(range.0 + 1), state.segment_of(group), shard, node);
            }
            Group::Capture(segment) | Group::Accumulate(segment) => {
                let range = state.range_of(group);
                self.carries.put(range, segment, shard, node);
                if self.homes.of(node) == Some(range.index()) {
                    self.set_owner(range.index(), shard.index(), node);
                }
            }
            Group::Reduce(_) | Group::Solve(_) => {}
        }
    }

    /// A stage begins: a good moment to move shards.
    pub(crate) fn stage_opened(&mut self, state: &JobState, segment: SegmentId) {
        self.rebalance(state.plan().range_of(segment).index(), true);
    }

    /// A stage is over; with the last one of its lane, the lane's nodes are free for others.
    pub(crate) fn stage_over(&mut self, state: &JobState, segment: SegmentId) {
        let layers = &state.plan().stages[segment.index()].solve;
        for worker in self.workers.values_mut() {
            worker.gathered.retain(|layer| !layers.contains(layer));
        }
        let lane = state.plan().range_of(segment);
        if state.is_range_over(lane) {
            let weights = self.workers.iter().map(|(node, worker)| (*node, worker.weight)).collect();
            let moved = self.homes.close(lane.index(), &weights);
            self.rehome(&moved);
        }
    }

    /// A node failed at a task: others come first, and a shard's queue is nobody's until somebody has run it.
    pub(crate) fn failed(&mut self, state: &JobState, task: TaskId, node: NodeId) {
        self.avoid.insert(task, node);
        let (group, place) = self.table.split(task);
        let lane = state.range_of(group).index();
        if group.is_by_shard() && self.owners[lane][place as usize] == node {
            self.set_owner(lane, place as usize, NOBODY);
        }
    }

    /// Which nodes are far behind.
    pub(crate) fn set_slow(&mut self, slow: BTreeSet<NodeId>) -> bool {
        let changed = self.slow != slow;
        self.slow = slow;
        changed
    }

    /// Which nodes crawl.
    pub(crate) fn set_crawling(&mut self, crawling: BTreeSet<NodeId>) -> bool {
        let changed = self.crawling != crawling;
        self.crawling = crawling;
        changed
    }

    /// Whether a node crawls.
    pub(crate) fn crawls(&self, node: NodeId) -> bool {
        self.crawling.contains(&node)
    }

    /// The node that failed at a task last, if others should come first.
    pub(crate) fn culprit(&self, task: TaskId) -> Option<NodeId> {
        self.avoid.get(&task).copied()
    }

    /// Whether a node failed at a task, so that any other may have to take it.
    pub(crate) fn is_avoided(&self, task: TaskId) -> bool {
        self.avoid.contains_key(&task)
    }

    /// Whether nothing at all waits to be given out.
    pub(crate) fn is_idle(&self) -> bool {
        self.ready == 0
    }

    /// How many tasks wait, whether their groups are open or not.
    pub(crate) fn waiting(&self) -> usize {
        self.ready
    }

    /// How many tasks of open groups wait.
    pub(crate) fn waiting_open(&self, state: &JobState) -> usize {
        let queues = self.queues.iter().flatten();
        queues.filter(|((_, group), _)| state.is_open(*group)).map(|(_, queue)| queue.len()).sum()
    }

    fn wants(&self, task: TaskId, node: NodeId) -> bool {
        match self.avoid.get(&task) {
            Some(culprit) => self.workers.len() < 2 || *culprit != node,
            None => !self.crawling.contains(&node) || !is_fetched_from(self.table.split(task).0),
        }
    }

    /// Whether a node may find something in a group without looking at each of its tasks.
    fn may_want(&self, group: Group, node: NodeId) -> bool {
        !self.avoid.is_empty() || !self.crawling.contains(&node) || !is_fetched_from(group)
    }

    /// What a node should do next. `steal`: also what waits for others, and other ranges' work.
    pub(crate) fn pick(&mut self, state: &JobState, node: NodeId, steal: bool) -> Option<TaskId> {
        let home = self.homes.of(node)?;
        let mut picked = self.own(state, home, node);
        if steal {
            picked = picked.or_else(|| self.steal(state, home, node));
            let others = (0..self.queues.len()).filter(|lane| *lane != home);
            picked = picked.or_else(|| {
                others
                    .into_iter()
                    .find_map(|lane| self.own(state, lane, node).or_else(|| self.steal(state, lane, node)))
            });
        }
        if let Some((Group::Solve(layer), _)) = picked.map(|task| self.table.split(task))
            && let Some(worker) = self.workers.get_mut(&node)
        {
            worker.gathered.insert(layer);
        }
        picked
    }

    /// The first task of a lane that is the node's own or anybody's.
    fn own(&self, state: &JobState, lane: usize, node: NodeId) -> Option<TaskId> {
        let gathered = &self.workers.get(&node)?.gathered;
        let statistics = |layer: &LayerId| state.plan().statistics_of(*layer);
        let mut solve: Option<(u32, (bool, usize), TaskId)> = None;
        for ((stage, group), queue) in &self.queues[lane] {
            if solve.is_some_and(|(at, _, _)| at < *stage) {
                break;
            }
            if !state.is_open(*group) || !self.may_want(*group, node) {
                continue;
            }
            let wanted = |place: u32| self.wants(self.table.id(*group, place), node);
            let task = |place: u32| self.table.id(*group, place);
            match (queue, group) {
                (Queue::Shards(queue), _) => {
                    if let Some(shard) = queue.first(node, wanted) {
                        return Some(task(shard));
                    }
                }
                (Queue::Places(places), Group::Solve(layer)) => {
                    let Some(place) = places.iter().copied().find(|place| wanted(*place)) else { continue };
                    if gathered.contains(layer) {
                        return Some(task(place));
                    }
                    let has_means = gathered.iter().any(|other| statistics(other) == statistics(layer));
                    let worth = (has_means, places.len());
                    if solve.is_none_or(|(_, most, _)| worth > most) {
                        solve = Some((*stage, worth, task(place)));
                    }
                }
                (Queue::Places(places), _) => {
                    if let Some(place) = places.iter().copied().find(|place| wanted(*place)) {
                        return Some(task(place));
                    }
                }
            }
        }
        solve.map(|(_, _, task)| task)
    }

    /// A shard that waits for another node longer than it should.
    fn steal(&self, state: &JobState, lane: usize, node: NodeId) -> Option<TaskId> {
        let open = self.queues[lane].iter().filter(|((_, group), _)| state.is_open(*group));
        for ((_, group), queue) in open {
            let Queue::Shards(queue) = queue else { continue };
            if !self.may_want(*group, node) {
                continue;
            }
            let wanted = |place: u32| self.wants(self.table.id(*group, place), node);
            let victims = [NOBODY].into_iter().chain(self.slow.union(&self.crawling).copied());
            let first = victims.filter(|owner| *owner != node && queue.len_of(*owner) > 0);
            let long = queue.longest().take_while(|(len, _)| *len > 1).map(|(_, owner)| owner);
            let mut long = long.filter(|owner| self.is_overloaded(*owner, queue.len_of(*owner)));
            let found = first.chain(long.by_ref()).find_map(|owner| queue.last(owner, wanted));
            let found = found.or_else(|| self.shunned(lane, *group, queue, node));
            if let Some(shard) = found {
                return Some(self.table.id(*group, shard));
            }
        }
        None
    }

    /// A shard whose owner is not to try it next.
    fn shunned(&self, lane: usize, group: Group, queue: &ShardQueue, node: NodeId) -> Option<u32> {
        let ids = self.table.ids(group);
        let shunned = self.avoid.range(TaskId(ids.start)..TaskId(ids.end));
        shunned.filter(|(_, culprit)| **culprit != node).map(|(task, _)| (task.0 - ids.start) as u32).find(
            |place| {
                let owner = self.owners[lane][*place as usize];
                !self.wants(self.table.id(group, *place), owner) && queue.contains(owner, *place)
            },
        )
    }

    fn is_overloaded(&self, owner: NodeId, len: usize) -> bool {
        self.workers.get(&owner).is_none_or(|worker| len > worker.slots)
    }

    /// Places of all that a task needs from other nodes; see `Grant`.
    pub(crate) fn holdings(
        &self,
        state: &JobState,
        task: &Task,
        addresses: &BTreeMap<NodeId, String>,
    ) -> Vec<Holding> {
        let at = |(node, held): (NodeId, Held)| {
            let address = addresses.get(&node)?.clone();
            Some(Holding { node, address, held })
        };
        let plan = state.plan();
        let before = |segment: SegmentId| segment.0.checked_sub(1).map(SegmentId);
        let sums = |segment: SegmentId| {
            let held = move |(node, shards)| (node, Held::Sums { segment, shards });
            state.sums(segment).map(held).collect::<Vec<_>>()
        };
        let places = match task {
            Task::Forward { range, shard } => {
                let start = SegmentId(plan.ranges[range.index()].start as u32);
                self.carries.nearest(*range, *shard, before(start))
            }
            Task::Capture { segment, shard } => {
                self.carries.nearest(plan.range_of(*segment), *shard, before(*segment))
            }
            Task::Accumulate { segment, shard, .. } => {
                self.carries.nearest(plan.range_of(*segment), *shard, Some(*segment))
            }
            Task::Reduce { layer, .. } => sums(plan.layer(*layer).stage),
            Task::Solve { layer, .. } => {
                let statistics = plan.statistics_of(*layer);
                let means = |(node, slice)| (node, Held::Means { layer: statistics, slice });
                let mut places: Vec<_> = state.means(statistics).map(means).collect();
                if plan.solver.objective == Objective::Samples {
                    places.extend(sums(plan.layer(*layer).stage));
                }
                places
            }
        };
        places.into_iter().filter_map(at).collect()
    }
}
