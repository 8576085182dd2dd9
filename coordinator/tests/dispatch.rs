//! The dispatch's rules, one by one, on a simulated fleet.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fleet;

use fleet::{Fleet, Shape, description, done, limits, rounding};
use halfstep_coordinator::dispatch::{Action, AttemptEnd, Counts, Dispatch, News, Outcome};
use halfstep_work::{
    ChunkId, Cost, Done, Failure, FailureClass, Held, Inventory, LayerId, LeaseId, NodeId, Objective,
    Propagation, Receipt, SegmentId, ShardId, Task, TaskPhase, Verdict,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Answers until some node has a task of this phase in hand; returns the node and the place in its hand.
fn until(fleet: &mut Fleet, phase: TaskPhase) -> (NodeId, usize) {
    for _ in 0..1_000 {
        let found = fleet.nodes.iter().find_map(|(node, sim)| {
            let nth = sim.hand.iter().position(|grant| grant.lease.task.phase() == phase)?;
            Some((*node, nth))
        });
        if let Some(found) = found {
            return found;
        }
        let busy = fleet.nodes.iter().find(|(_, sim)| !sim.hand.is_empty()).map(|(node, _)| *node);
        fleet.answer(busy.expect("somebody works"), 0, true);
    }
    panic!("no {phase:?}");
}

fn task_in_hand(fleet: &Fleet, node: NodeId, nth: usize) -> Task {
    fleet.nodes[&node].hand[nth].lease.task.clone()
}

fn phases(fleet: &Fleet, node: NodeId) -> Vec<TaskPhase> {
    fleet.nodes[&node].hand.iter().map(|grant| grant.lease.task.phase()).collect()
}

fn failed_with(fleet: &Fleet) -> Failure {
    match fleet.dispatch.outcome() {
        Outcome::Failed(failure) => failure,
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_node_walks_every_phase_in_order() {
    let mut fleet = Fleet::with_nodes(&Shape::new(2, 3), 1, 1);
    let mut seen = Vec::new();
    while fleet.dispatch.outcome() == Outcome::Running {
        seen.extend(phases(&fleet, NodeId(0)));
        fleet.answer(NodeId(0), 0, true);
    }
    use TaskPhase::{Accumulate as A, Capture as C, Reduce as R, Solve as S};
    assert_eq!(seen, [[C, C, C, A, A, A, R, R, S, S]; 2].concat());
    assert_eq!((fleet.dispatch.outcome(), fleet.committed.len()), (Outcome::Finished, 4));
    let solved: Vec<f64> = fleet.news.iter().filter_map(solved_seconds).collect();
    assert_eq!(solved, [2.0, 2.0], "seconds of both chunks");
}

fn solved_seconds(news: &News) -> Option<f64> {
    if let News::Solved { seconds, .. } = news { Some(*seconds) } else { None }
}

/// By the clock, from the first chunk's beginning: its slots waited for each other, so it is more than they took.
#[test]
fn a_layers_seconds_are_those_from_its_first_chunk_to_its_last() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 1), 1, 1);
    until(&mut fleet, TaskPhase::Solve);
    for seconds in [7, 1] {
        assert_eq!(phases(&fleet, NodeId(0)), [TaskPhase::Solve]);
        (0..seconds).for_each(|_| fleet.pass(1_000));
        fleet.answer(NodeId(0), 0, true);
    }
    let solved: Vec<[f64; 2]> = fleet
        .news
        .iter()
        .filter_map(|news| match news {
            News::Solved { seconds, elapsed, .. } => Some([*seconds, *elapsed]),
            _ => None,
        })
        .collect();
    assert_eq!(solved, [[2.0, 8.0]]);
}

#[test]
fn any_number_of_nodes_does_every_task_once() {
    for propagation in [Propagation::Sequential, Propagation::Independent] {
        for objective in [Objective::Gram, Objective::Samples] {
            for ranges in [vec![4], vec![2, 2], vec![1, 2, 1]] {
                for nodes in [1, 2, 3, 5, 9] {
                    let forwards = (ranges.len() - 1) * 5;
                    let shape = Shape { ranges: ranges.clone(), propagation, objective, ..Shape::new(4, 5) };
                    let mut fleet = Fleet::with_nodes(&shape, nodes, 2);
                    assert_eq!(fleet.run(), forwards + 4 * (5 + 5 + 2 + 2), "{ranges:?}, {nodes} nodes");
                    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
                    assert_eq!(fleet.dispatch.counts(), Counts::default());
                }
            }
        }
    }
}

#[test]
fn accumulation_stays_with_the_node_that_captured() {
    let mut fleet = Fleet::with_nodes(&Shape::new(3, 8), 2, 1);
    let mut homes: BTreeMap<(SegmentId, ShardId), NodeId> = BTreeMap::new();
    let mut moved = 0;
    while fleet.dispatch.outcome() == Outcome::Running {
        for node in [NodeId(0), NodeId(1)] {
            if fleet.nodes[&node].hand.is_empty() {
                continue;
            }
            match task_in_hand(&fleet, node, 0) {
                Task::Capture { segment, shard } => drop(homes.insert((segment, shard), node)),
                Task::Accumulate { segment, shard, .. } => {
                    moved += u32::from(homes[&(segment, shard)] != node)
                }
                _ => {}
            }
            fleet.answer(node, 0, true);
        }
    }
    assert_eq!(moved, 0);
    let owner = |stage: u32, shard: u32| homes[&(SegmentId(stage), ShardId(shard))];
    assert!((0..8).all(|shard| owner(0, shard) == owner(2, shard)), "shards stay: {homes:?}");
    assert_eq!((0..8).filter(|shard| owner(0, *shard) == NodeId(0)).count(), 4);
}

#[test]
fn chunks_go_to_nodes_that_have_their_layer_already() {
    let shape = Shape { stages: vec![vec![(1, 6), (1, 6)]], ranges: vec![1], ..Shape::new(1, 2) };
    let mut fleet = Fleet::with_nodes(&shape, 2, 1);
    until(&mut fleet, TaskPhase::Solve);
    let mut layers: BTreeMap<NodeId, BTreeSet<LayerId>> = BTreeMap::new();
    for _ in 0..6 {
        for node in [NodeId(0), NodeId(1)] {
            if let Some(Task::Solve { layer, .. }) =
                fleet.nodes[&node].hand.first().map(|g| g.lease.task.clone())
            {
                layers.entry(node).or_default().insert(layer);
                fleet.answer(node, 0, true);
            }
        }
    }
    assert!(layers.values().all(|own| own.len() == 1), "each gathers one layer: {layers:?}");
}

#[test]
fn a_new_node_has_work_at_once() {
    let mut fleet = Fleet::with_nodes(&Shape::new(2, 12), 1, 2);
    fleet.answer(NodeId(0), 0, true);
    let new = fleet.join(2);
    assert_eq!(phases(&fleet, new), [TaskPhase::Capture; 2]);
}

#[test]
fn layers_are_not_waited_for_with_independent_propagation() {
    let shape = Shape { propagation: Propagation::Independent, ..Shape::new(3, 2) };
    let mut fleet = Fleet::with_nodes(&shape, 1, 8);
    until(&mut fleet, TaskPhase::Reduce);
    let ahead = |grant: &halfstep_work::Grant| matches!(grant.lease.task, Task::Capture { segment, .. } if segment == SegmentId(1));
    assert_eq!(fleet.nodes[&NodeId(0)].hand.iter().filter(|grant| ahead(grant)).count(), 2);
}

#[test]
fn ranges_are_solved_at_the_same_time_once_forward_runs_have_passed() {
    let shape = Shape { ranges: vec![2, 2], ..Shape::new(4, 3) };
    let mut fleet = Fleet::with_nodes(&shape, 2, 1);
    let mut both = false;
    for _ in 0..12 {
        for node in [NodeId(0), NodeId(1)] {
            if !fleet.nodes[&node].hand.is_empty() {
                fleet.answer(node, 0, true);
            }
        }
        let segments: BTreeSet<u32> = fleet
            .nodes
            .values()
            .flat_map(|sim| &sim.hand)
            .filter_map(|grant| match grant.lease.task {
                Task::Capture { segment, .. } | Task::Accumulate { segment, .. } => Some(segment.0 / 2),
                _ => None,
            })
            .collect();
        both |= segments.len() == 2;
    }
    assert!(both, "both ranges under way");
}

#[test]
fn a_lost_node_s_sums_are_made_again_while_slices_are_missing() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 4), 2, 1);
    until(&mut fleet, TaskPhase::Reduce);
    fleet.lose(NodeId(1));
    let left: Vec<TaskPhase> = fleet.nodes[&NodeId(0)].hand.iter().map(|g| g.lease.task.phase()).collect();
    assert_eq!(left, [TaskPhase::Reduce], "what runs goes on");
    fleet.answer(NodeId(0), 0, true);
    assert_eq!(phases(&fleet, NodeId(0)), [TaskPhase::Accumulate]);
    fleet.run();
    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
}

#[test]
fn nothing_is_made_again_that_no_unsolved_layer_needs() {
    let shape = Shape { stages: vec![vec![(2, 4)], vec![(2, 2)]], ranges: vec![2], ..Shape::new(2, 4) };
    let mut fleet = Fleet::with_nodes(&shape, 3, 1);
    until(&mut fleet, TaskPhase::Solve);
    // All slices are held: whoever made none of them takes only sums along.
    let maker = |node: NodeId| fleet.nodes[&node].means.is_empty();
    let idle = *fleet.nodes.keys().find(|node| maker(**node)).expect("three nodes, two slices");
    fleet.lose(idle);
    let solving = |sim: &fleet::SimNode| sim.hand.iter().all(|g| g.lease.task.phase() == TaskPhase::Solve);
    assert!(fleet.nodes.values().all(solving), "sums are not needed any more");
    // A lost slice needs them again, also those of the node lost before.
    let maker = *fleet.nodes.iter().find(|(_, sim)| !sim.means.is_empty()).expect("a holder").0;
    fleet.lose(maker);
    let node = *fleet.nodes.keys().next().unwrap();
    fleet.answer(node, 0, true);
    assert_eq!(phases(&fleet, node), [TaskPhase::Accumulate]);
    fleet.run();
    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
}

#[test]
fn sums_go_once_all_means_are_there_and_are_made_again_if_means_are_lost() {
    for (objective, kept) in [(Objective::Gram, false), (Objective::Samples, true)] {
        let mut fleet = Fleet::with_nodes(&Shape { objective, ..Shape::new(1, 4) }, 2, 1);
        until(&mut fleet, TaskPhase::Solve);
        assert_eq!(fleet.nodes.values().any(|sim| !sim.sums.is_empty()), kept, "{objective:?}");
        assert_eq!(fleet.dispatch.state().sums(SegmentId(0)).next().is_some(), kept, "{objective:?}");
        let maker = *fleet.nodes.iter().find(|(_, sim)| !sim.means.is_empty()).expect("a holder").0;
        fleet.lose(maker);
        fleet.run();
        assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
        assert!(fleet.dispatch.state().receipts(LayerId(0)).is_some());
    }
}

#[test]
fn layers_that_share_statistics_are_given_up_with_them() {
    let stages = vec![vec![(2, 2), (3, 1), (2, 1)]];
    let mut fleet = Fleet::with_nodes(&Shape { stages, shared: true, ..Shape::new(1, 2) }, 1, 1);
    let (node, nth) = until(&mut fleet, TaskPhase::Reduce);
    let task = task_in_hand(&fleet, node, nth);
    assert!(matches!(task, Task::Reduce { layer: LayerId(0), .. }), "{task:?}");
    fleet.fail(node, nth, FailureClass::NonFinite);
    assert_eq!(fleet.given_up.keys().copied().collect::<Vec<_>>(), [LayerId(0), LayerId(2)]);
    let message = &fleet.given_up[&LayerId(2)].message;
    assert!(message.starts_with("layer `layer2`: slice 0 of its statistics"), "{message}");
    fleet.run();
    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished, "the rest goes on");
    assert!(fleet.dispatch.state().receipts(LayerId(1)).is_some());
}

#[test]
fn a_repeated_answer_whose_acknowledgement_was_lost_is_accepted_again_and_counts_once() {
    for phase in [TaskPhase::Capture, TaskPhase::Accumulate, TaskPhase::Reduce, TaskPhase::Solve] {
        let mut fleet = Fleet::with_nodes(&Shape::new(1, 2), 1, 1);
        let (node, nth) = until(&mut fleet, phase);
        let grant = fleet.nodes[&node].hand[nth].clone();
        assert_eq!(fleet.answer(node, nth, false), Verdict::Accepted);
        // As text: a NaN in a report is not equal to itself.
        let before = format!("{:?}", fleet.dispatch.state());
        assert_eq!(fleet.commit(node, &grant), Verdict::Accepted, "{phase:?}");
        assert_eq!(format!("{:?}", fleet.dispatch.state()), before);
    }
}

#[test]
fn a_lost_node_s_late_results_are_fenced_and_counted() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 2), 2, 1);
    let (node, nth) = until(&mut fleet, TaskPhase::Accumulate);
    let grant = fleet.nodes[&node].hand[nth].clone();
    fleet.lose(node);
    assert_eq!(fleet.commit(node, &grant), Verdict::Stale);
    fleet.dispatch.fail(node, grant.lease.id, Failure::new(FailureClass::Internal, "late"), 0);
    assert_eq!(fleet.dispatch.counts().fenced, 2);
    assert_eq!(fleet.dispatch.outcome(), Outcome::Running);
    assert!(!fleet.dispatch.would_accept(LeaseId(7)), "never granted");
    fleet.run();
}

#[test]
fn wrong_holder_and_wrong_attempt_are_refused() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 2), 2, 1);
    let lease = fleet.nodes[&NodeId(0)].hand[0].lease.clone();
    let answer = |fleet: &mut Fleet, node, attempt| {
        let result = done(&fleet.plan, &lease.task);
        fleet.dispatch.complete(node, lease.id, attempt, result, Cost::default(), 0)
    };
    assert_eq!(answer(&mut fleet, NodeId(1), 1), Verdict::Stale);
    assert_eq!(answer(&mut fleet, NodeId(0), 2), Verdict::Stale);
    assert_eq!(answer(&mut fleet, NodeId(0), 1), Verdict::Accepted);
}

/// Two nodes have the same chunk in hand, the second by speculation.
fn rivals() -> (Fleet, halfstep_work::Grant, halfstep_work::Grant) {
    let shape = Shape { stages: vec![vec![(1, 4)]], ranges: vec![1], ..Shape::new(1, 1) };
    let mut fleet = Fleet::with_nodes(&shape, 2, 1);
    let slow = until(&mut fleet, TaskPhase::Solve).0;
    let fast = *fleet.nodes.keys().find(|node| **node != slow).unwrap();
    let first = fleet.nodes[&slow].hand[0].clone();
    while !fleet.nodes[&fast].hand.is_empty() {
        fleet.pass(10);
        fleet.answer(fast, 0, true);
    }
    fleet.pass(10);
    assert!(fleet.nodes[&fast].hand.is_empty(), "below the least time of a straggler");
    fleet.pass(400);
    let second = fleet.nodes[&fast].hand[0].clone();
    assert_eq!(second.lease.task, first.lease.task);
    assert_eq!((second.lease.attempt, fleet.dispatch.counts().speculations), (2, 1));
    (fleet, first, second)
}

#[test]
fn a_straggler_s_task_is_given_to_an_idle_node_and_the_first_result_wins() {
    let (mut fleet, first, second) = rivals();
    assert_eq!(fleet.answer(second.lease.node, 0, true), Verdict::Accepted);
    assert!(fleet.nodes[&first.lease.node].hand.is_empty(), "revoked");
    assert_eq!(fleet.commit(first.lease.node, &first), Verdict::Duplicate);
    assert_eq!((fleet.dispatch.outcome(), fleet.dispatch.counts().fenced), (Outcome::Finished, 0));
}

#[test]
fn two_different_results_of_one_task_stop_the_job() {
    let shape = Shape { stages: vec![vec![(1, 4)], vec![(1, 1)]], ranges: vec![2], ..Shape::new(2, 1) };
    let mut fleet = Fleet::with_nodes(&shape, 1, 1);
    let (node, nth) = until(&mut fleet, TaskPhase::Solve);
    let lease = fleet.nodes[&node].hand[nth].lease.clone();
    fleet.answer(node, nth, true);
    let mut other = rounding(LayerId(0), ChunkId(0)).as_ref().clone();
    other.q[0] += 1;
    let done = Done::Solved(Arc::new(other));
    let verdict = fleet.dispatch.complete(node, lease.id, lease.attempt, done, Cost::default(), 0);
    assert_eq!(verdict, Verdict::Stale);
    let failure = failed_with(&fleet);
    assert_eq!(failure.class, FailureClass::Nondeterminism);
    assert!(failure.message.starts_with("layer `layer0`: chunk 0"), "{failure}");
    fleet.collect();
    assert!(fleet.nodes[&node].hand.is_empty(), "everything is revoked");
}

#[test]
fn an_answer_to_another_task_ends_the_job() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 1), 1, 1);
    let lease = fleet.nodes[&NodeId(0)].hand[0].lease.clone();
    fleet.dispatch.complete(NodeId(0), lease.id, 1, Done::Reduced, Cost::default(), 0);
    assert_eq!(failed_with(&fleet).class, FailureClass::Internal);
}

/// What becomes of a task of each kind that fails with this class again and again: how many attempts there are.
fn attempts(phase: TaskPhase, class: FailureClass) -> (usize, Fleet) {
    let mut fleet = Fleet::with_nodes(&Shape::new(2, 1), 3, 1);
    let (node, nth) = until(&mut fleet, phase);
    let task = fleet.dispatch.state().table().find(&task_in_hand(&fleet, node, nth)).unwrap();
    let mut count = 0;
    while fleet.dispatch.outcome() == Outcome::Running && fleet.given_up.is_empty() && count < 50 {
        let state = fleet.dispatch.state();
        let held = |grant: &halfstep_work::Grant| state.table().find(&grant.lease.task) == Some(task);
        let found = fleet.nodes.iter().find_map(|(node, sim)| Some((*node, sim.hand.iter().position(held)?)));
        match found {
            Some((node, nth)) => {
                count += 1;
                fleet.fail(node, nth, class);
            }
            None => fleet.pass(1_000),
        }
    }
    (count, fleet)
}

fn check_class(class: FailureClass, expected: usize) {
    for phase in [TaskPhase::Capture, TaskPhase::Accumulate, TaskPhase::Reduce, TaskPhase::Solve] {
        let (count, mut fleet) = attempts(phase, class);
        assert_eq!(count, expected, "{class:?} in {phase:?}");
        let layer = matches!(phase, TaskPhase::Reduce | TaskPhase::Solve);
        if layer && (class.retryable() || class == FailureClass::NonFinite) {
            assert_eq!(fleet.given_up.keys().copied().collect::<Vec<_>>(), [LayerId(0)]);
            assert_eq!(fleet.given_up[&LayerId(0)].class, class);
            fleet.run();
            assert_eq!(fleet.dispatch.outcome(), Outcome::Finished, "the rest goes on");
            assert!(fleet.dispatch.state().receipts(LayerId(1)).is_some());
        } else {
            let failure = failed_with(&fleet);
            assert_eq!(failure.class, class);
            assert!(failure.message.contains("on purpose"), "{failure}");
        }
    }
}

#[test]
fn bad_input_is_never_tried_again() {
    check_class(FailureClass::BadInput, 1);
}

#[test]
fn non_finite_statistics_cost_their_layer_at_once() {
    check_class(FailureClass::NonFinite, 1);
}

#[test]
fn out_of_memory_is_tried_twice_more() {
    check_class(FailureClass::OutOfMemory, 3);
}

/// Time passes until a node has just one task in hand, this one; everybody answers all else.
fn until_alone(fleet: &mut Fleet, task: &Task) -> NodeId {
    for _ in 0..1_000 {
        let has = |sim: &fleet::SimNode| sim.hand.iter().any(|grant| grant.lease.task == *task);
        if let Some((node, sim)) = fleet.nodes.iter().find(|(_, sim)| has(sim)) {
            assert_eq!(sim.hand.len(), 1);
            return *node;
        }
        if let Some(node) = fleet.nodes.iter().find(|(_, sim)| !sim.hand.is_empty()).map(|(node, _)| *node) {
            fleet.answer(node, 0, true);
        }
        fleet.pass(50);
    }
    panic!("{task:?} is never tried again");
}

#[test]
fn a_task_short_of_memory_is_tried_again_alone_on_its_node_then_alone_elsewhere() {
    let mut fleet = Fleet::with_nodes(&Shape::new(2, 24), 2, 3);
    let (first, second) = (NodeId(0), NodeId(1));
    assert_eq!(fleet.nodes[&first].hand.len(), 3);
    let task = task_in_hand(&fleet, first, 1);
    fleet.fail(first, 1, FailureClass::OutOfMemory);
    // That nothing comes beside it is checked with every grant.
    assert_eq!(until_alone(&mut fleet, &task), first);
    for _ in 0..4 {
        fleet.answer(second, 0, true);
        assert_eq!((fleet.nodes[&first].hand.len(), fleet.nodes[&second].hand.len()), (1, 3));
    }
    fleet.fail(first, 0, FailureClass::OutOfMemory);
    assert_eq!(until_alone(&mut fleet, &task), second);
    fleet.answer(second, 0, true);
    assert_eq!(fleet.nodes[&second].hand.len(), 3, "its node is everybody's again");
    fleet.run();
    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
    assert!(fleet.given_up.is_empty());
}

#[test]
fn a_node_kept_free_for_a_task_that_cannot_be_done_yet_does_what_it_waits_for() {
    let shape = Shape { stages: vec![vec![(4, 4)]], ranges: vec![1], ..Shape::new(1, 4) };
    let mut fleet = Fleet::with_nodes(&shape, 2, 2);
    until(&mut fleet, TaskPhase::Solve);
    let (node, nth) = until(&mut fleet, TaskPhase::Solve);
    let other = if node == NodeId(0) { NodeId(1) } else { NodeId(0) };
    fleet.fail(node, nth, FailureClass::OutOfMemory);
    // With the other node go the means that the task needs, and whoever could make them again but this one.
    fleet.pass(200);
    fleet.lose(other);
    fleet.run();
    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
}

#[test]
fn a_full_disk_does_not_count_but_is_not_tried_for_ever() {
    check_class(FailureClass::Storage, 20);
}

#[test]
fn a_task_that_lost_three_nodes_is_given_up() {
    check_class(FailureClass::NodeLost, 3);
}

#[test]
fn a_missing_peer_does_not_count_but_is_not_tried_for_ever() {
    check_class(FailureClass::PeerLost, 20);
}

#[test]
fn a_task_that_hung_three_devices_is_given_up() {
    check_class(FailureClass::Hung, 3);
}

#[test]
fn damaged_data_does_not_count_but_is_not_fetched_for_ever() {
    check_class(FailureClass::Damaged, 20);
}

#[test]
fn a_task_handed_back_does_not_count_but_is_not_handed_out_for_ever() {
    check_class(FailureClass::HandedBack, 20);
}

#[test]
fn nondeterminism_stops_the_job() {
    check_class(FailureClass::Nondeterminism, 1);
}

#[test]
fn a_cancelled_task_is_a_cancelled_job() {
    check_class(FailureClass::Cancelled, 1);
}

#[test]
fn an_internal_error_stops_the_job() {
    check_class(FailureClass::Internal, 1);
}

#[test]
fn a_poison_task_is_named_with_how_often_it_was_tried() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 1), 4, 1);
    for _ in 0..3 {
        let holder = fleet.nodes.iter().find(|(_, sim)| !sim.hand.is_empty()).map(|(node, _)| *node);
        fleet.lose(holder.expect("given to the next"));
    }
    let failure = failed_with(&fleet);
    let expected = "capture of shard 0 at stage 0: given up after 3 attempts that count against it; last: connection closed";
    assert_eq!((failure.class, failure.message.as_str()), (FailureClass::NodeLost, expected));
}

#[test]
fn failures_that_need_time_are_tried_again_later_and_elsewhere() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 1), 2, 1);
    let (node, nth) = until(&mut fleet, TaskPhase::Capture);
    fleet.fail(node, nth, FailureClass::PeerLost);
    assert!(fleet.nodes.values().all(|sim| sim.hand.is_empty()), "not at once");
    let why = fleet.dispatch.explain(fleet.now_ms);
    assert_eq!(
        why,
        "1 tasks are tried again after a pause, the first in 0.1 s: capture of shard 0 at stage 0"
    );
    fleet.pass(100);
    let other = *fleet.nodes.keys().find(|other| **other != node).unwrap();
    assert_eq!(
        (phases(&fleet, other), fleet.nodes[&other].hand[0].lease.attempt),
        (vec![TaskPhase::Capture], 2)
    );
    fleet.fail(other, 0, FailureClass::HandedBack);
    let held: usize = fleet.nodes.values().map(|sim| sim.hand.len()).sum();
    assert_eq!(held, 1, "handed back is tried at once");
    assert_eq!(fleet.dispatch.counts().retries, 2);
}

#[test]
fn a_silent_node_is_lost_after_its_lease_and_its_tasks_move() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 2), 2, 1);
    assert!(fleet.dispatch.beat(NodeId(1), &[], 9_000));
    fleet.dispatch.tick(9_999);
    assert!(fleet.dispatch.has_node(NodeId(0)));
    fleet.dispatch.tick(10_000);
    assert!(!fleet.dispatch.has_node(NodeId(0)));
    assert!(!fleet.dispatch.beat(NodeId(0), &[], 10_001), "has to attach anew");
    fleet.nodes.remove(&NodeId(0));
    fleet.now_ms = 10_000;
    fleet.collect();
    let lost = News::NodeLost { node: NodeId(0), name: "n0".into(), why: "no heartbeat for 10.0 s".into() };
    assert!(fleet.news.contains(&lost), "{:?}", fleet.news);
    fleet.run();
    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
}

#[test]
fn a_lease_without_progress_is_taken_from_its_node() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 1), 2, 1);
    let (node, nth) = until(&mut fleet, TaskPhase::Capture);
    let lease = fleet.nodes[&node].hand[nth].lease.id;
    for second in 1..=70 {
        let now = second * 1_000;
        let moves = [(lease, second.min(10))];
        fleet.dispatch.beat(node, &moves, now);
        for node in fleet.nodes.keys() {
            fleet.dispatch.beat(*node, &[], now);
        }
        fleet.dispatch.tick(now);
        fleet.now_ms = now;
        fleet.collect();
        let has = fleet.nodes[&node].hand.iter().any(|grant| grant.lease.id == lease);
        assert_eq!(has, second < 70, "60 s after the last progress at 10 s, not at {second} s");
    }
    assert_eq!(fleet.dispatch.counts().retries, 1);
    let other = *fleet.nodes.keys().find(|other| **other != node).unwrap();
    assert_eq!(phases(&fleet, other), [TaskPhase::Capture]);
}

#[test]
fn a_job_without_nodes_waits_says_why_and_fails_in_the_end() {
    let mut fleet = Fleet::new(&Shape::new(1, 1), limits());
    fleet.pass(0);
    let why = "no node takes part: the job fails in 600 s unless one attaches";
    assert_eq!(fleet.news, [News::Waiting { why: why.into() }]);
    fleet.pass(500_000);
    assert!(fleet.dispatch.explain(fleet.now_ms).contains("fails in 100 s"));
    let node = fleet.join(1);
    fleet.lose(node);
    fleet.pass(0);
    fleet.pass(599_999);
    assert_eq!(fleet.dispatch.outcome(), Outcome::Running, "counted from the last node on");
    fleet.pass(1);
    let failure = failed_with(&fleet);
    assert!(failure.message.starts_with("no node took part for 600 s, expected at least one"), "{failure}");
}

#[test]
fn a_draining_node_gets_nothing_new_and_leaves_without_blame() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 4), 2, 1);
    fleet.dispatch.drain(NodeId(0), 0);
    fleet.collect();
    assert_eq!(fleet.answer(NodeId(0), 0, true), Verdict::Accepted, "what is in hand still counts");
    assert!(fleet.nodes[&NodeId(0)].hand.is_empty());
    fleet.nodes.remove(&NodeId(0));
    fleet.dispatch.leave(NodeId(0), Failure::new(FailureClass::HandedBack, "drained"), 0);
    fleet.run();
    assert_eq!((fleet.dispatch.outcome(), fleet.dispatch.counts().retries), (Outcome::Finished, 0));
}

#[test]
fn a_restarted_coordinator_takes_up_what_its_nodes_still_have() {
    let mut fleet = Fleet::with_nodes(&Shape::new(2, 6), 2, 1);
    until(&mut fleet, TaskPhase::Reduce);
    let in_hand: Vec<LeaseId> = fleet.nodes.values().flat_map(|sim| &sim.hand).map(|g| g.lease.id).collect();
    fleet.restart();
    let now: Vec<LeaseId> = fleet.nodes.values().flat_map(|sim| &sim.hand).map(|g| g.lease.id).collect();
    assert!(in_hand.iter().all(|lease| now.contains(lease)), "leases go on: {in_hand:?}, {now:?}");
    let summed: usize = fleet.dispatch.state().sums(SegmentId(0)).map(|(_, shards)| shards.len()).sum();
    assert_eq!(summed, 6, "sums are adopted");
    fleet.run();
    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
}

#[test]
fn a_resumed_job_begins_at_the_first_stage_that_misses_anything() {
    let shape = Shape { ranges: vec![2, 1], ..Shape::new(3, 2) };
    let chunks = [(0, 0), (0, 1), (1, 1)];
    let committed =
        chunks.map(|(layer, chunk)| Receipt::of(&rounding(LayerId(layer), ChunkId(chunk)))).to_vec();
    let given_up = BTreeMap::from([(LayerId(2), Failure::new(FailureClass::NonFinite, "x"))]);
    let mut dispatch = Dispatch::new(shape.plan(), limits(), committed, given_up);
    dispatch.join(NodeId(0), &description("n", 16), "n:1", Inventory::default(), 0);
    let tasks: Vec<Task> = dispatch
        .actions()
        .into_iter()
        .filter_map(
            |action| if let Action::Grant { grant, .. } = action { Some(grant.lease.task) } else { None },
        )
        .collect();
    let capture = |shard| Task::Capture { segment: SegmentId(1), shard: ShardId(shard) };
    assert_eq!(tasks, [capture(0), capture(1)], "no forward run for a range that is over");
}

#[test]
fn sums_that_overlap_others_are_dropped_whole() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 4), 2, 1);
    until(&mut fleet, TaskPhase::Reduce);
    let counted: Vec<ShardId> = fleet.nodes[&NodeId(1)].sums[&SegmentId(0)].iter().copied().collect();
    let held = vec![Held::Sums { segment: SegmentId(0), shards: counted }];
    let inventory = Inventory { held, ..Inventory::default() };
    let reply = fleet.dispatch.join(NodeId(9), &description("n9", 1), "n9:1", inventory, 0);
    assert_eq!(reply.drop_sums, [SegmentId(0)]);
    let stages: Vec<NodeId> = fleet.dispatch.state().sums(SegmentId(0)).map(|(node, _)| node).collect();
    assert_eq!(stages, [NodeId(0), NodeId(1)]);
}

#[test]
fn a_node_that_comes_back_without_a_grant_gets_it_again() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 1), 1, 1);
    let mut sim = fleet.nodes.remove(&NodeId(0)).unwrap();
    let lost = sim.hand.pop().unwrap();
    fleet.reattach(NodeId(0), sim);
    let again = fleet.nodes[&NodeId(0)].hand[0].clone();
    assert_eq!(again.lease.task, lost.lease.task);
    assert_ne!(again.lease.id, lost.lease.id);
    assert_eq!(fleet.dispatch.counts().retries, 0, "nothing failed");
}

#[test]
fn a_grant_that_never_arrived_makes_no_slot_look_hung() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 1), 1, 1);
    let mut sim = fleet.nodes.remove(&NodeId(0)).unwrap();
    let lost = sim.hand.pop().unwrap().lease;
    fleet.reattach(NodeId(0), sim);
    // The node is there and moves with what it has.
    (0..8).for_each(|_| fleet.pass(limits().hung_ms / 8));
    assert!(!fleet.dispatch.is_stuck(NodeId(0)));
    assert_eq!(fleet.run(), 1 + 1 + 2 + 2);
    let ended = fleet.dispatch.take_ended();
    let of = |lease: LeaseId| ended.iter().find(|attempt| attempt.lease == lease).unwrap();
    assert_eq!(of(lost.id).end.as_ref().unwrap().1, AttemptEnd::NotReceived);
}

/// How many leases ended in each way.
fn ends(fleet: &mut Fleet) -> BTreeMap<&'static str, usize> {
    let mut ends = BTreeMap::new();
    let mut leases = BTreeSet::new();
    for attempt in fleet.dispatch.take_ended() {
        *ends.entry(attempt.end.as_ref().unwrap().1.name()).or_default() += 1;
        assert!(leases.insert(attempt.lease), "{} ended twice", attempt.lease);
    }
    ends
}

#[test]
fn every_lease_ends_once_and_is_counted_as_what_it_was() {
    let mut fleet = Fleet::with_nodes(&Shape::new(2, 6), 3, 1);
    fleet.fail(NodeId(0), 0, FailureClass::HandedBack);
    until(&mut fleet, TaskPhase::Solve);
    let held = fleet.nodes[&NodeId(1)].hand.len();
    fleet.lose(NodeId(1));
    fleet.run();
    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
    let ends = ends(&mut fleet);
    assert_eq!((ends["handed_back"], ends.get("node_lost").copied().unwrap_or(0)), (1, held));
    let done = fleet.dispatch.state().census().done;
    assert!(ends["ok"] >= done, "{ends:?}: what the lost node held was done again, {done} tasks");
    assert_eq!(ends.get("revoked"), None, "nobody raced");
    fleet.dispatch.cancel(fleet.now_ms);
    assert!(fleet.dispatch.take_ended().is_empty(), "nothing is left under way");
}

#[test]
fn a_task_is_found_by_its_name_and_accounted_for() {
    let mut fleet = Fleet::with_nodes(&Shape::new(2, 3), 1, 1);
    let first = fleet.dispatch.find_task("capture:0:0").unwrap();
    let account = fleet.dispatch.account(first, 3_000);
    assert_eq!((account.name.as_str(), account.state), ("capture:0:0", "leased"));
    assert_eq!(account.why, "worked on by node-0 `n0` for 3.0 s, attempt 1");
    fleet.fail(NodeId(0), 0, FailureClass::Storage);
    let account = fleet.dispatch.account(first, fleet.now_ms);
    assert_eq!((account.state, account.why.as_str()), ("ready", "it failed, and is tried again in 0.1 s"));
    let (at, end) = account.attempts[0].end.clone().unwrap();
    assert_eq!((at, end.name(), end.message()), (0, "storage", "Storage on purpose"));
    for (name, state, why) in [
        ("capture:0:2", "ready", "tasks wait for free slots of 1 nodes"),
        ("accumulate:0:1", "ready", "0 of 3 shards are captured at stage 0"),
        ("solve:layer0:1", "ready", "0 of 3 shards are captured at stage 0"),
        ("solve:1:0", "waiting", "stage 1 is not open: its range is at stage 0"),
    ] {
        let task = fleet.dispatch.find_task(name).unwrap();
        let account = fleet.dispatch.account(task, fleet.now_ms);
        assert!(account.state == state && account.why.ends_with(why), "{name}: {account:?}");
    }
    assert_eq!(fleet.dispatch.notable()[..], [fleet.dispatch.find_task("capture:0:1").unwrap(), first]);
    fleet.run();
    let account = fleet.dispatch.account(first, fleet.now_ms);
    assert_eq!((account.state, account.attempts.len()), ("done", 2));
    assert!(fleet.dispatch.notable().is_empty(), "nothing is under way or in trouble");
}

#[test]
fn what_names_no_task_is_refused_with_what_there_is() {
    let fleet = Fleet::with_nodes(&Shape::new(2, 3), 1, 1);
    for text in ["", "capture", "capture:0", "capture:x:0", "capture:0:-1", "solve:nothing:0", "chop:0:0"] {
        let refused = fleet.dispatch.find_task(text).unwrap_err();
        assert!(refused.contains("expected PHASE:OF:PLACE"), "{text}: {refused}");
    }
    for text in ["capture:2:0", "capture:0:3", "solve:9:0", "reduce:0:2", "forward:0:0", "solve:4294967295:0"]
    {
        let refused = fleet.dispatch.find_task(text).unwrap_err();
        assert!(refused.contains("no such task; it has 1 ranges, 2 stages, 3 shards"), "{text}: {refused}");
    }
}

#[test]
fn cancelling_ends_the_job_and_revokes_what_runs() {
    let mut fleet = Fleet::with_nodes(&Shape::new(1, 3), 2, 1);
    fleet.dispatch.cancel(0);
    fleet.collect();
    assert!(fleet.nodes.values().all(|sim| sim.hand.is_empty()));
    assert_eq!(failed_with(&fleet).class, FailureClass::Cancelled);
    assert_eq!(fleet.dispatch.explain(0), "cancelled");
}

#[test]
fn the_same_calls_give_the_same_actions() {
    let run = || {
        let shape = Shape { ranges: vec![2, 2], ..Shape::new(4, 7) };
        let mut dispatch = Dispatch::new(shape.plan(), limits(), vec![], BTreeMap::new());
        let mut all = Vec::new();
        for node in 0..5 {
            dispatch.join(NodeId(node), &description("n", 2), "n:1", Inventory::default(), u64::from(node));
            all.extend(dispatch.actions());
        }
        for step in 0..40 {
            if let Some(Action::Grant { node, grant }) =
                all.iter().filter(|a| matches!(a, Action::Grant { .. })).nth(step)
            {
                let (node, lease) = (*node, grant.lease.clone());
                let result = done(&shape.plan(), &lease.task);
                dispatch.complete(node, lease.id, lease.attempt, result, Cost::default(), step as u64);
                all.extend(dispatch.actions());
            }
        }
        format!("{all:?}")
    };
    assert_eq!(run(), run());
}

#[test]
fn after_a_restart_nobody_gets_the_work_of_a_node_that_is_about_to_come_back() {
    let shape = Shape::new(1, 4);
    let mut dispatch = Dispatch::new(shape.plan(), limits(), vec![], BTreeMap::new());
    dispatch.hold_until(1_000);
    dispatch.join(NodeId(0), &description("first", 2), "n:0", Inventory::default(), 100);
    let granted = |dispatch: &mut Dispatch| {
        let grants = dispatch.actions().into_iter().filter(|action| matches!(action, Action::Grant { .. }));
        grants.count()
    };
    dispatch.tick(999);
    assert_eq!(granted(&mut dispatch), 0);
    dispatch.tick(1_000);
    assert_eq!(granted(&mut dispatch), 2);
}

#[test]
fn a_node_whose_every_slot_hangs_gets_nothing_and_others_take_what_was_its_own() {
    let mut fleet = Fleet::with_nodes(&Shape::new(4, 8), 2, 1);
    let (hung, other) = (NodeId(0), NodeId(1));
    fleet.now_ms += limits().hung_ms;
    let moving = fleet.nodes[&other].hand[0].lease.id;
    fleet.dispatch.beat(hung, &[], fleet.now_ms);
    fleet.dispatch.beat(other, &[(moving, 1)], fleet.now_ms);
    fleet.dispatch.tick(fleet.now_ms);
    fleet.collect();
    assert!(fleet.dispatch.is_stuck(hung) && !fleet.dispatch.is_stuck(other));
    let named =
        |news: &News| matches!(news, News::Retry { why, .. } if why.contains("node `n0`: no progress"));
    assert!(fleet.news.iter().any(named), "{:?}", fleet.news);
    assert_eq!(fleet.run(), 4 * (8 + 8 + 2 + 2), "all of it by the other node");
    assert!(fleet.nodes[&hung].hand.is_empty());
    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
}
