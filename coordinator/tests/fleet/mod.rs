//! A fleet without threads or sockets: simulated nodes that keep what real nodes keep, and check what they are asked.
//!
//! A node's sums are the set of shards whose accumulation was accepted; a slice can only be reduced from sums that tile
//! all shards; a chunk only be solved from all means. Time is a number.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use halfstep_coordinator::dispatch::{Action, Dispatch, Limits, Outcome};
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme};
use halfstep_work::{
    ChunkId, ChunkReport, Cost, Done, Failure, FailureClass, Grant, Held, Holding, Inventory, LayerId,
    LayerPlan, Lease, LeaseId, NodeDescription, NodeId, Objective, PeakRecord, Plan, Propagation, RangeId,
    Receipt, Rounding, SegmentId, ShardId, SliceId, SolverSettings, StagePlan, StartPoint, Task, TaskId,
    TaskState, Verdict,
};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// What a small plan is made of.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Layers of each stage: slices and chunks of each.
    pub stages: Vec<Vec<(usize, usize)>>,
    /// Stages of each range.
    pub ranges: Vec<usize>,
    pub shards: usize,
    pub propagation: Propagation,
    pub objective: Objective,
    /// Whether layers of a stage that have as many slices share them.
    pub shared: bool,
}

impl Shape {
    pub fn new(stages: usize, shards: usize) -> Self {
        Self {
            stages: vec![vec![(2, 2)]; stages],
            ranges: vec![stages],
            shards,
            propagation: Propagation::Sequential,
            objective: Objective::Gram,
            shared: false,
        }
    }

    pub fn plan(&self) -> Arc<Plan> {
        let mut layers = Vec::new();
        let mut stages = Vec::new();
        for (stage, entries) in self.stages.iter().enumerate() {
            let first = layers.len() as u32;
            layers.extend(entries.iter().enumerate().map(|(place, (slices, chunks))| {
                layer(first + place as u32, stage as u32, *slices, *chunks)
            }));
            if self.shared {
                share_statistics(&mut layers[first as usize..]);
            }
            stages.push(StagePlan { solve: (first..layers.len() as u32).map(LayerId).collect() });
        }
        let mut next = 0;
        let ranges = self.ranges.iter().map(|len| {
            next += len;
            next - len..next
        });
        let plan = Plan {
            layers,
            kept: vec![],
            stages,
            shards: units(self.shards),
            batch: 1,
            propagation: self.propagation,
            solver: solver(self.objective),
            ranges: ranges.collect(),
        };
        plan.validate().expect("a valid plan");
        Arc::new(plan)
    }
}

fn share_statistics(stage: &mut [LayerPlan]) {
    for at in 1..stage.len() {
        let (before, rest) = stage.split_at_mut(at);
        let lends = |one: &&LayerPlan| one.statistics_of.is_none() && one.cols == rest[0].cols;
        if let Some(lender) = before.iter().find(lends) {
            rest[0].statistics_of = Some(lender.id);
            rest[0].slices.clear();
        }
    }
}

fn units(count: usize) -> Vec<Range<usize>> {
    (0..count).map(|at| at..at + 1).collect()
}

fn layer(id: u32, stage: u32, slices: usize, chunks: usize) -> LayerPlan {
    let (scheme, granularity) = (Scheme::Symmetric, Granularity::PerTensor);
    LayerPlan {
        id: LayerId(id),
        name: format!("layer{id}"),
        op_type: "Conv".into(),
        rows: chunks,
        cols: slices,
        groups: 1,
        grid: GridSpec { bits: 4, scheme, granularity, range: RangeEstimator::MinMax },
        chunks: units(chunks),
        statistics_of: None,
        slices: units(slices),
        stage: SegmentId(stage),
    }
}

fn solver(objective: Objective) -> SolverSettings {
    SolverSettings {
        objective,
        iterations: 1,
        learning_rate: 0.1,
        beta: (20.0, 2.0),
        warm_start: 0.2,
        lambda: 1.0,
        batch: 1,
        damping: 0.0,
        start: StartPoint::Nearest,
        refine_sweeps: 1,
        scale_fits: 0,
        seed: 0,
        positions_per_shard: 1,
        positions_fraction: 1.0,
    }
}

/// The one right result of a chunk.
pub fn rounding(layer: LayerId, chunk: ChunkId) -> Arc<Rounding> {
    let encodings = Encodings {
        bits: 4,
        scheme: Scheme::Symmetric,
        granularity: Granularity::PerTensor,
        rows: 1,
        cols: 1,
        scale: vec![1.0],
        zero_point: vec![0],
    };
    let q = vec![layer.0 as i32 * 100 + chunk.0 as i32];
    // A figure that is not equal to itself must not make equal results differ.
    let report = ChunkReport { objective: f64::NAN, ..ChunkReport::default() };
    Arc::new(Rounding { layer, chunk, encodings, q, report })
}

/// The one right peak of a shard.
pub fn peaks(plan: &Plan, segment: SegmentId, shard: ShardId) -> Vec<PeakRecord> {
    let record = |layer: &LayerId| PeakRecord {
        layer: *layer,
        use_index: 0,
        full_precision: 1.0 + shard.0 as f32,
        quantized: 1.0,
        positions: 10,
    };
    plan.stages[segment.index()].solve.iter().map(record).collect()
}

pub fn done(plan: &Plan, task: &Task) -> Done {
    match task {
        Task::Forward { .. } => Done::Forwarded,
        Task::Capture { segment, shard } => Done::Captured { peaks: peaks(plan, *segment, *shard) },
        Task::Accumulate { .. } => Done::Accumulated,
        Task::Reduce { .. } => Done::Reduced,
        Task::Solve { layer, chunk } => Done::Solved(rounding(*layer, *chunk)),
    }
}

pub fn limits() -> Limits {
    Limits {
        heartbeat_ms: 1_000,
        lease_ms: 10_000,
        hung_ms: 60_000,
        no_nodes_ms: 600_000,
        first_lease_id: 1 << 32,
        speculate: true,
    }
}

pub fn description(name: &str, slots: usize) -> NodeDescription {
    NodeDescription {
        name: name.into(),
        slots,
        device: "cpu".into(),
        engine: "rten".into(),
        flops_per_second: 0.0,
        memory_bytes: 0,
        exchange: String::new(),
    }
}

/// What a real node would hold.
#[derive(Clone, Debug, Default)]
pub struct SimNode {
    pub slots: usize,
    /// Grants not answered yet.
    pub hand: Vec<Grant>,
    /// Answered, the verdict never came back.
    pub unsettled: Vec<Grant>,
    pub sums: BTreeMap<SegmentId, BTreeSet<ShardId>>,
    pub means: BTreeSet<(LayerId, SliceId)>,
    pub carries: BTreeMap<(RangeId, ShardId), SegmentId>,
    pub captured: BTreeMap<(SegmentId, ShardId), Vec<PeakRecord>>,
}

impl SimNode {
    pub fn new(slots: usize) -> Self {
        Self { slots, ..Self::default() }
    }

    pub fn inventory(&self) -> Inventory {
        let carry = |((range, shard), segment): (&(RangeId, ShardId), &SegmentId)| Held::Carry {
            range: *range,
            segment: *segment,
            shard: *shard,
        };
        let sums = |(segment, shards): (&SegmentId, &BTreeSet<ShardId>)| Held::Sums {
            segment: *segment,
            shards: shards.iter().copied().collect(),
        };
        let means = |(layer, slice): &(LayerId, SliceId)| Held::Means { layer: *layer, slice: *slice };
        let held = self.carries.iter().map(carry).chain(self.sums.iter().map(sums));
        Inventory {
            held: held.chain(self.means.iter().map(means)).collect(),
            captured: self.captured.iter().map(|((s, h), p)| (*s, *h, p.clone())).collect(),
            leases: self.hand.iter().chain(&self.unsettled).map(|grant| grant.lease.clone()).collect(),
        }
    }

    /// A verdict arrives.
    pub fn settle(&mut self, plan: &Plan, lease: &Lease, verdict: Verdict) {
        if verdict != Verdict::Accepted {
            return;
        }
        match &lease.task {
            Task::Forward { range, shard } => {
                let segment = SegmentId(plan.ranges[range.index()].end as u32 - 1);
                self.carries.insert((RangeId(range.0 + 1), *shard), segment);
            }
            Task::Capture { segment, shard } => {
                self.carries.insert((plan.range_of(*segment), *shard), *segment);
                self.captured.insert((*segment, *shard), peaks(plan, *segment, *shard));
            }
            Task::Accumulate { segment, shard, .. } => {
                self.sums.entry(*segment).or_default().insert(*shard);
            }
            Task::Reduce { layer, slice } => drop(self.means.insert((*layer, *slice))),
            Task::Solve { .. } => {}
        }
    }
}

/// The coordinator's side of a simulated fleet: dispatch, durable store, nodes by registration.
pub struct Fleet {
    pub plan: Arc<Plan>,
    pub dispatch: Dispatch,
    pub limits: Limits,
    pub nodes: BTreeMap<NodeId, SimNode>,
    /// Lost to the coordinator, but still running.
    pub zombies: Vec<(NodeId, Grant)>,
    /// Processes that the coordinator has given up and that have not come back yet.
    pub away: Vec<SimNode>,
    /// The store.
    pub committed: BTreeMap<(LayerId, ChunkId), Arc<Rounding>>,
    pub given_up: BTreeMap<LayerId, Failure>,
    /// Every accepted result, to see that each counts once.
    pub accepted_solves: BTreeMap<(LayerId, ChunkId), u32>,
    /// Tasks for which the memory did not suffice under this dispatch: granted alone from then on.
    pub short: BTreeSet<TaskId>,
    pub now_ms: u64,
    pub next_node: u32,
    /// Carries that went to others when their node drained.
    pub taken_over: u32,
    pub news: Vec<halfstep_coordinator::dispatch::News>,
}

impl Fleet {
    pub fn new(shape: &Shape, limits: Limits) -> Self {
        let plan = shape.plan();
        Self {
            dispatch: Dispatch::new(Arc::clone(&plan), limits, vec![], BTreeMap::new()),
            plan,
            limits,
            nodes: BTreeMap::new(),
            zombies: Vec::new(),
            away: Vec::new(),
            committed: BTreeMap::new(),
            given_up: BTreeMap::new(),
            accepted_solves: BTreeMap::new(),
            short: BTreeSet::new(),
            now_ms: 0,
            next_node: 0,
            taken_over: 0,
            news: Vec::new(),
        }
    }

    pub fn with_nodes(shape: &Shape, nodes: usize, slots: usize) -> Self {
        let mut fleet = Self::new(shape, limits());
        for _ in 0..nodes {
            fleet.join(slots);
        }
        fleet
    }

    /// A new process attaches.
    pub fn join(&mut self, slots: usize) -> NodeId {
        self.attach(SimNode::new(slots))
    }

    /// A process with something in hand registers anew.
    pub fn attach(&mut self, sim: SimNode) -> NodeId {
        let node = NodeId(self.next_node);
        self.next_node += 1;
        self.reattach(node, sim);
        node
    }

    pub fn reattach(&mut self, node: NodeId, mut sim: SimNode) {
        let name = format!("n{}", node.0);
        let address = format!("{name}:1");
        let now = self.now_ms;
        let reply = self.dispatch.join(node, &description(&name, sim.slots), &address, sim.inventory(), now);
        let adopted: BTreeSet<LeaseId> = reply.adopted.iter().copied().collect();
        sim.hand.retain(|grant| adopted.contains(&grant.lease.id));
        for segment in reply.drop_sums {
            sim.sums.remove(&segment);
        }
        for grant in &mut sim.hand {
            grant.lease.node = node;
        }
        self.nodes.insert(node, sim);
        self.collect();
    }

    /// Carries out the actions and checks every grant.
    pub fn collect(&mut self) {
        let state = self.dispatch.state();
        self.short.retain(|task| !matches!(state.task_state(*task), TaskState::Done { .. }));
        for action in self.dispatch.actions() {
            match action {
                Action::Grant { node, grant } => {
                    self.check(&grant);
                    self.check_alone(node, &grant);
                    self.nodes.get_mut(&node).expect("grants go to known nodes").hand.push(grant);
                }
                Action::Revoke { node, lease, .. } => {
                    if let Some(sim) = self.nodes.get_mut(&node) {
                        sim.hand.retain(|grant| grant.lease.id != lease);
                    }
                }
                Action::DropSums { node, segment } => {
                    if let Some(sim) = self.nodes.get_mut(&node) {
                        sim.sums.remove(&segment);
                    }
                }
                Action::TakeOver { node, carries } => {
                    carries.into_iter().for_each(|holding| self.take_over(node, &holding));
                }
                Action::News(news) => {
                    if let halfstep_coordinator::dispatch::News::Failed { layer, failure } = &news {
                        self.given_up.insert(*layer, failure.clone());
                    }
                    self.news.push(news);
                }
            }
        }
        for (node, sim) in &self.nodes {
            let slots = sim.slots;
            assert!(sim.hand.len() <= slots, "{node}: {} leases in {slots} slots", sim.hand.len());
        }
    }

    /// Some do not make it: every fifth shard's, and those of holders that moved on.
    fn take_over(&mut self, heir: NodeId, holding: &Holding) {
        let carry = match holding.held {
            Held::Carry { range, segment, shard } => Some((range, segment, shard)),
            _ => None,
        };
        let (range, segment, shard) = carry.expect("only carries are taken over");
        let holder = &self.nodes[&holding.node];
        let taken = holder.carries.get(&(range, shard)) == Some(&segment) && shard.0 % 5 != 4;
        let sim = self.nodes.get_mut(&heir).expect("heirs are there");
        if taken && sim.carries.get(&(range, shard)).is_none_or(|has| *has < segment) {
            sim.carries.insert((range, shard), segment);
        }
        self.dispatch.taken_over(heir, (range, segment, shard), taken);
        self.taken_over += u32::from(taken);
    }

    /// What every grant promises.
    fn check(&self, grant: &Grant) {
        let plan = &self.plan;
        match &grant.lease.task {
            Task::Capture { segment, .. } => self.check_order(*segment),
            Task::Accumulate { segment, peaks, .. } => {
                self.check_order(*segment);
                let largest = plan.shards.len() as f32;
                assert!(peaks.iter().all(|peak| peak.full_precision == largest), "peaks of all shards");
                assert_eq!(peaks.len(), plan.stages[segment.index()].solve.len());
            }
            Task::Reduce { layer, .. } => self.check_sums(grant, plan.layer(*layer).stage),
            Task::Solve { layer, .. } => {
                let statistics = plan.statistics_of(*layer);
                let slices: BTreeSet<SliceId> =
                    grant.holdings.iter().filter_map(|h| self.means_of(h, statistics)).collect();
                let all = plan.slice_ids(statistics).collect();
                assert_eq!(slices, all, "every slice of {statistics} for {layer}: {grant:?}");
                if plan.solver.objective == Objective::Samples {
                    self.check_sums(grant, plan.layer(*layer).stage);
                }
            }
            Task::Forward { .. } => {}
        }
    }

    fn is_short(&self, grant: &Grant) -> bool {
        let task = self.dispatch.state().table().find(&grant.lease.task);
        task.is_some_and(|task| self.short.contains(&task))
    }

    /// A task that was short of memory has no other beside it.
    fn check_alone(&self, node: NodeId, grant: &Grant) {
        let hand = &self.nodes[&node].hand;
        assert!(hand.is_empty() || !self.is_short(grant), "{node}: {grant:?} in company of {hand:?}");
        assert!(!hand.iter().any(|other| self.is_short(other)), "{node}: {grant:?} beside one that is alone");
    }

    /// A stage of a range is not begun before those before it are done.
    fn check_order(&self, segment: SegmentId) {
        let range = &self.plan.ranges[self.plan.range_of(segment).index()];
        if self.plan.propagation == Propagation::Sequential {
            for layer in self.plan.stages[range.start..segment.index()].iter().flat_map(|stage| &stage.solve)
            {
                let solved = self.plan.chunk_ids(*layer).all(|c| self.committed.contains_key(&(*layer, c)));
                assert!(
                    solved || self.given_up.contains_key(layer),
                    "{layer} undecided, yet {segment} begun"
                );
            }
        }
    }

    /// Sums of a grant tile all shards, and the holders really have them.
    fn check_sums(&self, grant: &Grant, stage: SegmentId) {
        let mut all = Vec::new();
        for holding in &grant.holdings {
            if let Held::Sums { segment, shards } = &holding.held {
                assert_eq!(*segment, stage);
                let sim = self.nodes.get(&holding.node).expect("holders are there");
                let has: Vec<ShardId> = sim.sums.get(segment).into_iter().flatten().copied().collect();
                let unsettled = sim.unsettled.iter().filter_map(|grant| match &grant.lease.task {
                    Task::Accumulate { segment: at, shard, .. } if at == segment => Some(*shard),
                    _ => None,
                });
                let soon: BTreeSet<ShardId> = has.into_iter().chain(unsettled).collect();
                let named: BTreeSet<ShardId> = shards.iter().copied().collect();
                assert!(named.is_subset(&soon), "{}: {named:?} named, {soon:?} held", holding.node);
                all.extend(shards.iter().copied());
            }
        }
        all.sort_unstable();
        assert_eq!(all, self.plan.shard_ids().collect::<Vec<_>>(), "every shard once: {grant:?}");
    }

    fn means_of(&self, holding: &Holding, wanted: LayerId) -> Option<SliceId> {
        let Held::Means { layer, slice } = &holding.held else { return None };
        assert_eq!(*layer, wanted);
        assert!(self.nodes.contains_key(&holding.node), "holders are there");
        Some(*slice)
    }

    /// A node answers its n-th grant rightly. `heard`: whether the verdict gets back to it.
    pub fn answer(&mut self, node: NodeId, nth: usize, heard: bool) -> Verdict {
        let grant = self.nodes.get_mut(&node).expect("known").hand.remove(nth);
        let verdict = self.commit(node, &grant);
        let sim = self.nodes.get_mut(&node).expect("known");
        match heard {
            true => sim.settle(&self.plan, &grant.lease, verdict),
            false => sim.unsettled.push(grant),
        }
        self.collect();
        verdict
    }

    /// A node says again what it got no verdict for.
    pub fn repeat(&mut self, node: NodeId) {
        while let Some(grant) = self.nodes.get_mut(&node).and_then(|sim| sim.unsettled.pop()) {
            let verdict = self.commit(node, &grant);
            self.nodes.get_mut(&node).expect("known").settle(&self.plan, &grant.lease, verdict);
            self.collect();
        }
    }

    /// Store first, then the dispatch.
    pub fn commit(&mut self, node: NodeId, grant: &Grant) -> Verdict {
        let lease = &grant.lease;
        let result = done(&self.plan, &lease.task);
        let was = self.dispatch.state().lease(lease.id).is_some();
        if let Task::Solve { layer, chunk } = lease.task
            && self.dispatch.state().lease(lease.id).is_some_and(|(_, holder, _)| holder == node)
        {
            assert!(self.dispatch.would_accept(lease.id));
            self.committed.insert((layer, chunk), rounding(layer, chunk));
        }
        let cost = Cost { seconds: 1.0, ..Cost::default() };
        let verdict = self.dispatch.complete(node, lease.id, lease.attempt, result, cost, self.now_ms);
        if let Task::Solve { layer, chunk } = lease.task
            && verdict == Verdict::Accepted
            && was
        {
            let count = self.accepted_solves.entry((layer, chunk)).or_default();
            *count += 1;
            assert_eq!(*count, 1, "one committed result per task");
        }
        verdict
    }

    pub fn fail(&mut self, node: NodeId, nth: usize, class: FailureClass) {
        let grant = self.nodes.get_mut(&node).expect("known").hand.remove(nth);
        let failure = Failure::new(class, format!("{class:?} on purpose"));
        let current = self.dispatch.state().lease(grant.lease.id).filter(|(_, holder, _)| *holder == node);
        if let Some((task, _, _)) = current.filter(|_| class == FailureClass::OutOfMemory) {
            self.short.insert(task);
        }
        self.dispatch.fail(node, grant.lease.id, failure, self.now_ms);
        self.collect();
    }

    /// The coordinator gives a node up; the process may live on.
    pub fn lose(&mut self, node: NodeId) -> Option<SimNode> {
        let sim = self.nodes.remove(&node)?;
        self.zombies.extend(sim.hand.iter().map(|grant| (node, grant.clone())));
        self.dispatch.leave(node, Failure::new(FailureClass::NodeLost, "connection closed"), self.now_ms);
        self.collect();
        Some(sim)
    }

    /// The coordinator dies and comes back with what the store has; nodes attach one after the other.
    pub fn restart(&mut self) {
        self.limits.first_lease_id += 1 << 32;
        self.short.clear();
        let committed = self.committed.values().map(|rounding| Receipt::of(rounding)).collect();
        self.dispatch = Dispatch::new(Arc::clone(&self.plan), self.limits, committed, self.given_up.clone());
        for (_, sim) in std::mem::take(&mut self.nodes) {
            self.attach(sim);
        }
    }

    /// Time passes; every node says that it is there and moves.
    pub fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        for (node, sim) in &self.nodes {
            let moved: Vec<(LeaseId, u64)> =
                sim.hand.iter().map(|grant| (grant.lease.id, self.now_ms)).collect();
            self.dispatch.beat(*node, &moved, self.now_ms);
        }
        self.dispatch.tick(self.now_ms);
        self.collect();
    }

    /// Nodes answer in turn until nothing is left to do. Returns the number of answers.
    pub fn run(&mut self) -> usize {
        let mut answers = 0;
        let mut idle = 0;
        while self.dispatch.outcome() == Outcome::Running {
            let busy: Vec<NodeId> =
                self.nodes.iter().filter(|(_, sim)| !sim.hand.is_empty()).map(|(node, _)| *node).collect();
            for node in &busy {
                if !self.nodes[node].hand.is_empty() {
                    self.answer(*node, 0, true);
                    answers += 1;
                }
            }
            self.pass(10);
            idle = if busy.is_empty() { idle + 1 } else { 0 };
            assert!(idle < 20_000, "stands still: {}", self.dispatch.explain(self.now_ms));
            assert!(answers < 100_000, "never ends");
        }
        answers
    }
}
