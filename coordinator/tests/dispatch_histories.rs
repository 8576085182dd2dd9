//! Random histories of a fleet: joins, losses, zombies, failures, lost messages, restarts of the coordinator.
//!
//! Checked at every step (in `fleet`): what grants promise, one accepted result per task, no slot filled twice.
//! Checked at the end: the job is over as soon as one healthy node stays, with every layer decided.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fleet;

use fleet::{Fleet, Shape, SimNode, limits};
use halfstep_coordinator::dispatch::Outcome;
use halfstep_work::{Failure, FailureClass, NodeId, Objective, Propagation, Verdict};
use proptest::prelude::*;

/// Histories in all, split over the tests of this file; fewer where each takes ten times as long.
const HISTORIES: u32 = if cfg!(debug_assertions) { 1_500 } else { 12_000 };

#[derive(Clone, Debug)]
enum Step {
    Join { slots: usize },
    Answer { node: usize, nth: usize, heard: bool },
    AnswerAll { times: usize },
    Repeat { node: usize },
    Fail { node: usize, class: FailureClass },
    Lose { node: usize, returns: Option<bool> },
    Return,
    Zombie { which: usize },
    Reconnect { node: usize, grants_lost: usize, forgets: bool },
    Drain { node: usize },
    Silence { node: usize, ms: u64 },
    Pass { ms: u64 },
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let node = 0usize..8;
    prop_oneof![
        2 => (1usize..4).prop_map(|slots| Step::Join { slots }),
        10 => (node.clone(), 0usize..3, prop::bool::weighted(0.9))
            .prop_map(|(node, nth, heard)| Step::Answer { node, nth, heard }),
        6 => (1usize..6).prop_map(|times| Step::AnswerAll { times }),
        1 => node.clone().prop_map(|node| Step::Repeat { node }),
        2 => (node.clone(), prop::sample::select(classes())).prop_map(|(node, class)| Step::Fail { node, class }),
        1 => (node.clone(), prop::option::of(any::<bool>())).prop_map(|(node, returns)| Step::Lose { node, returns }),
        1 => Just(Step::Return),
        2 => (0usize..8).prop_map(|which| Step::Zombie { which }),
        1 => (node.clone(), 0usize..2, prop::bool::weighted(0.2))
            .prop_map(|(node, grants_lost, forgets)| Step::Reconnect { node, grants_lost, forgets }),
        1 => node.clone().prop_map(|node| Step::Drain { node }),
        1 => (node, 1_000u64..30_000).prop_map(|(node, ms)| Step::Silence { node, ms }),
        2 => (10u64..4_000).prop_map(|ms| Step::Pass { ms }),
        1 => Just(Step::Restart),
    ]
}

/// Classes after which a job can still finish.
fn classes() -> Vec<FailureClass> {
    FailureClass::ALL.into_iter().filter(|class| class.retryable()).collect()
}

fn shape() -> impl Strategy<Value = Shape> {
    let layer = (1usize..4, 1usize..4);
    let stage = prop::collection::vec(layer, 0..3);
    let stages =
        prop::collection::vec(stage, 1..5).prop_filter("a layer", |all| all.iter().any(|s| !s.is_empty()));
    (stages, 1usize..6, any::<bool>(), any::<bool>(), any::<bool>(), 1usize..4).prop_map(
        |(stages, shards, independent, samples, shared, ranges)| {
            let count = stages.len();
            let ranges = ranges.min(count);
            let mut lengths = vec![count / ranges; ranges];
            lengths[0] += count % ranges;
            Shape {
                stages,
                ranges: lengths,
                shards,
                propagation: if independent { Propagation::Independent } else { Propagation::Sequential },
                objective: if samples { Objective::Samples } else { Objective::Gram },
                shared,
            }
        },
    )
}

fn nth_node(fleet: &Fleet, nth: usize) -> Option<NodeId> {
    let count = fleet.nodes.len();
    (count > 0).then(|| *fleet.nodes.keys().nth(nth % count).unwrap())
}

fn busy_node(fleet: &Fleet, nth: usize) -> Option<NodeId> {
    let busy: Vec<NodeId> =
        fleet.nodes.iter().filter(|(_, sim)| !sim.hand.is_empty()).map(|(n, _)| *n).collect();
    (!busy.is_empty()).then(|| busy[nth % busy.len()])
}

fn take(fleet: &mut Fleet, step: Step) {
    match step {
        Step::Join { slots } => {
            fleet.join(slots);
        }
        Step::Answer { node, nth, heard } => {
            if let Some(node) = busy_node(fleet, node) {
                let hand = fleet.nodes[&node].hand.len();
                let verdict = fleet.answer(node, nth % hand, heard);
                assert_ne!(verdict, Verdict::Stale, "a current lease");
            }
        }
        Step::AnswerAll { times } => {
            for _ in 0..times {
                for node in fleet.nodes.keys().copied().collect::<Vec<_>>() {
                    if !fleet.nodes[&node].hand.is_empty() {
                        fleet.answer(node, 0, true);
                    }
                }
            }
        }
        Step::Repeat { node } => nth_node(fleet, node).into_iter().for_each(|node| fleet.repeat(node)),
        Step::Fail { node, class } => {
            busy_node(fleet, node).into_iter().for_each(|node| fleet.fail(node, 0, class));
        }
        Step::Lose { node, returns } => lose(fleet, node, returns),
        Step::Return => {
            if let Some(sim) = fleet.away.pop() {
                fleet.attach(sim);
            }
        }
        Step::Zombie { which } => zombie(fleet, which),
        Step::Reconnect { node, grants_lost, forgets } => reconnect(fleet, node, grants_lost, forgets),
        Step::Drain { node } => drain(fleet, node),
        Step::Silence { node, ms } => silence(fleet, node, ms),
        Step::Pass { ms } => fleet.pass(ms),
        Step::Restart => fleet.restart(),
    }
}

/// `returns`: whether the process attaches again at once (else perhaps later, see `Step::Return`), and then whether it was told to forget sums and means.
fn lose(fleet: &mut Fleet, node: usize, returns: Option<bool>) {
    let Some(mut sim) = nth_node(fleet, node).and_then(|node| fleet.lose(node)) else { return };
    let Some(fenced) = returns else { return fleet.away.push(sim) };
    if fenced {
        sim = SimNode { sums: Default::default(), means: Default::default(), ..sim };
        sim.hand.clear();
        sim.unsettled.clear();
    }
    fleet.attach(sim);
}

fn zombie(fleet: &mut Fleet, which: usize) {
    if fleet.zombies.is_empty() {
        return;
    }
    let (node, grant) = fleet.zombies.swap_remove(which % fleet.zombies.len());
    let verdict = fleet.commit(node, &grant);
    assert_ne!(verdict, Verdict::Accepted, "a lost node's result");
    fleet.collect();
}

/// The connection breaks and comes back under the same registration; grants on the way are lost.
fn reconnect(fleet: &mut Fleet, node: usize, grants_lost: usize, forgets: bool) {
    let Some(node) = nth_node(fleet, node) else { return };
    let mut sim = fleet.nodes.remove(&node).unwrap();
    let kept = sim.hand.len().saturating_sub(grants_lost);
    sim.hand.truncate(kept);
    if forgets {
        sim = SimNode { slots: sim.slots, ..SimNode::default() };
    }
    fleet.reattach(node, sim);
}

fn drain(fleet: &mut Fleet, node: usize) {
    let Some(node) = nth_node(fleet, node) else { return };
    fleet.dispatch.drain(node, fleet.now_ms);
    fleet.collect();
    while !fleet.nodes[&node].hand.is_empty() {
        fleet.fail(node, 0, FailureClass::HandedBack);
    }
    fleet.nodes.remove(&node);
    fleet.dispatch.leave(node, Failure::new(FailureClass::HandedBack, "drained"), fleet.now_ms);
    fleet.collect();
}

/// One node falls silent for a while; the coordinator may give it up.
fn silence(fleet: &mut Fleet, node: usize, ms: u64) {
    let Some(node) = nth_node(fleet, node) else { return };
    let sim = fleet.nodes[&node].clone();
    let until = fleet.now_ms + ms;
    while fleet.now_ms < until {
        fleet.now_ms += 1_000;
        for other in fleet.nodes.keys().copied().filter(|other| *other != node).collect::<Vec<_>>() {
            let hand = fleet.nodes[&other]
                .hand
                .iter()
                .map(|grant| (grant.lease.id, fleet.now_ms))
                .collect::<Vec<_>>();
            fleet.dispatch.beat(other, &hand, fleet.now_ms);
        }
        fleet.dispatch.tick(fleet.now_ms);
        if !fleet.dispatch.has_node(node) && fleet.nodes.remove(&node).is_some() {
            fleet.zombies.extend(sim.hand.iter().map(|grant| (node, grant.clone())));
        }
        fleet.collect();
    }
}

fn check_end(fleet: &Fleet) {
    match fleet.dispatch.outcome() {
        Outcome::Running => panic!("still running: {}", fleet.dispatch.explain(fleet.now_ms)),
        Outcome::Failed(failure) => {
            assert!(failure.class.retryable(), "{failure:?}");
            assert!(failure.message.contains("given up"), "{failure:?}");
        }
        Outcome::Finished => {
            for layer in &fleet.plan.layers {
                let solved = fleet.dispatch.state().receipts(layer.id).is_some();
                assert!(
                    solved != fleet.dispatch.state().failed_layers().contains_key(&layer.id),
                    "{}",
                    layer.name
                );
                let stored =
                    fleet.plan.chunk_ids(layer.id).all(|c| fleet.committed.contains_key(&(layer.id, c)));
                assert!(!solved || stored, "{}: not durable", layer.name);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: HISTORIES, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_ends_well_with_one_healthy_node(
        shape in shape(),
        nodes in 0usize..4,
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let mut fleet = Fleet::new(&shape, limits());
        for node in 0..nodes {
            fleet.join(1 + node % 2);
        }
        for step in steps {
            take(&mut fleet, step);
        }
        fleet.join(2);
        for node in fleet.nodes.keys().copied().collect::<Vec<_>>() {
            fleet.repeat(node);
        }
        fleet.run();
        check_end(&fleet);
    }
}
