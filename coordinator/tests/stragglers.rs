//! How long jobs take on simulated fleets of which a node is slow: tasks cost time, and so does what is fetched from
//! a slow node (P11).

mod fleet;

use fleet::{Fleet, Shape};
use halfstep_coordinator::dispatch::Outcome;
use halfstep_work::{Grant, LeaseId, NodeId, Task};
use std::collections::BTreeMap;

/// The coordinator's tick.
const TICK_MS: u64 = 50;
/// What a node of full speed needs to answer a fetch.
const ANSWER_MS: f64 = 4.0;

/// Time at which leases in hand will be finished.
struct Clock<'a> {
    slowness: &'a [f64],
    due: BTreeMap<LeaseId, (u64, NodeId)>,
}

impl Clock<'_> {
    fn slowness(&self, node: NodeId) -> f64 {
        self.slowness[node.0 as usize]
    }

    /// A holder's answer takes as long as the holder is slow.
    fn cost_ms(&self, node: NodeId, grant: &Grant, unit: f64) -> u64 {
        let work = match grant.lease.task {
            Task::Forward { .. } | Task::Capture { .. } => 1.0,
            Task::Accumulate { .. } => 2.0,
            Task::Reduce { .. } => 0.5,
            Task::Solve { .. } => 8.0,
        };
        let holders = || grant.holdings.iter().map(|holding| holding.node);
        let answer = |holder: NodeId| ANSWER_MS * self.slowness(holder);
        let fetch = match grant.lease.task {
            Task::Reduce { .. } | Task::Solve { .. } => {
                holders().filter(|holder| *holder != node).map(answer).fold(0.0, f64::max)
            }
            // One carry of any holder will do.
            _ if holders().any(|holder| holder == node) => 0.0,
            _ => holders().next().map_or(0.0, answer),
        };
        (work * unit * self.slowness(node) + fetch).ceil() as u64
    }

    /// Takes up new grants, forgets what was revoked.
    fn look(&mut self, fleet: &Fleet, unit: f64) {
        let mut due = BTreeMap::new();
        for (node, sim) in &fleet.nodes {
            for grant in &sim.hand {
                let lease = grant.lease.id;
                let new = || (fleet.now_ms + self.cost_ms(*node, grant, unit), *node);
                due.insert(lease, self.due.get(&lease).copied().unwrap_or_else(new));
            }
        }
        self.due = due;
    }
}

/// Milliseconds until the job is done. `unit`: of a capture at full speed.
fn makespan(shape: &Shape, slowness: &[f64], slots: usize, unit: f64) -> u64 {
    let mut fleet = Fleet::with_nodes(shape, slowness.len(), slots);
    let mut clock = Clock { slowness, due: BTreeMap::new() };
    let mut tick = TICK_MS;
    while fleet.dispatch.outcome() == Outcome::Running {
        clock.look(&fleet, unit);
        let next = clock.due.iter().map(|(lease, (at, node))| (*at, *node, *lease)).min();
        match next.filter(|(at, _, _)| *at < tick) {
            Some((at, node, lease)) => {
                fleet.now_ms = at;
                let hand = &fleet.nodes[&node].hand;
                let nth = hand.iter().position(|grant| grant.lease.id == lease);
                fleet.answer(node, nth.expect("in hand"), true);
            }
            None => {
                fleet.pass(tick - fleet.now_ms);
                tick += TICK_MS;
            }
        }
        assert!(fleet.now_ms < 10_000_000, "stands still: {}", fleet.dispatch.explain(fleet.now_ms));
    }
    fleet.now_ms
}

/// Ten stages of one layer each.
fn shape(shards: usize, slices: usize, chunks: usize) -> Shape {
    Shape { stages: vec![vec![(slices, chunks)]; 10], ..Shape::new(10, shards) }
}

#[test]
fn a_node_at_a_fifth_of_its_speed_costs_less_than_half_as_much_again() {
    // (shards, slices, chunks, nodes, slots, milliseconds of a capture)
    let rows = [
        (16, 2, 8, 3, 1, 10.0),
        (16, 4, 16, 3, 1, 100.0),
        (64, 8, 32, 4, 2, 40.0),
        (64, 8, 32, 8, 1, 1_000.0),
        (256, 8, 64, 16, 1, 40.0),
    ];
    for (shards, slices, chunks, nodes, slots, unit) in rows {
        let shape = shape(shards, slices, chunks);
        let undisturbed = makespan(&shape, &vec![1.0; nodes], slots, unit);
        let mut largest: f64 = 1.0;
        for slow in 0..nodes {
            let mut slowness = vec![1.0; nodes];
            slowness[slow] = 5.0;
            let took = makespan(&shape, &slowness, slots, unit);
            let ratio = took as f64 / undisturbed as f64;
            let case = format!("{shards} shards, node {slow} of {nodes} slow");
            assert!(ratio <= 1.5, "{case}: {took} ms, undisturbed {undisturbed} ms");
            largest = largest.max(ratio);
        }
        eprintln!("P11: {nodes} nodes, {shards} shards, any one slow: at most {largest:.3} times");
    }
}

#[test]
fn slow_nodes_still_help() {
    let shape = shape(64, 4, 64);
    for slowness in [vec![1.0, 2.0, 2.0], vec![1.0, 1.4, 1.0, 1.6], vec![1.0, 3.0, 3.0, 3.0, 3.0]] {
        let together = makespan(&shape, &slowness, 1, 40.0);
        let alone = makespan(&shape, &[1.0], 1, 40.0);
        let best = alone as f64 / slowness.iter().map(|slowness| 1.0 / slowness).sum::<f64>();
        assert!((together as f64) < 1.4 * best, "{slowness:?}: {together} ms, at best {best:.0} ms");
    }
}

#[test]
fn where_all_are_slow_nobody_is() {
    let shape = shape(16, 2, 8);
    let (fast, slow) = (makespan(&shape, &[1.0; 3], 1, 40.0), makespan(&shape, &[5.0; 3], 1, 40.0));
    assert!(slow < 6 * fast, "{slow} ms, {fast} ms");
}
