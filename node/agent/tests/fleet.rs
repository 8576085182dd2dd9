//! The same roundings from any fleet: any number of nodes, any placement, nodes lost on the way.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

mod support;

use halfstep_work::{
    Done, FailureClass, Grant, Held, LayerId, Lease, LeaseId, Node, NodeId, Objective, Propagation, RangeId,
    SegmentId, ShardId, Source, Task, Verdict, Wanted, Watch,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{Fleet, Settings, alone, branched_model, fashion_mnist, setup, shared_model, small_model};

/// One seed per fleet: sizes 1, 2, 3 and 5, undisturbed, with nodes dropped, with carries withheld.
fn check_all_fleets(make: impl Fn() -> support::Setup, seeds: u64) {
    let expected = alone(make());
    for seed in 1..=seeds {
        for nodes in [1, 2, 3, 5] {
            for (drop_once_in, withhold_once_in) in [(0, 0), (6, 3)] {
                let mut fleet = Fleet::new(make(), nodes, seed);
                (fleet.drop_once_in, fleet.withhold_once_in) = (drop_once_in, withhold_once_in);
                let found = fleet.run();
                assert!(found == expected, "seed {seed}, {nodes} nodes, dropped once in {drop_once_in}");
            }
        }
    }
}

#[test]
fn any_fleet_gives_the_same_roundings_for_any_number_of_ranges() {
    for ranges in [1, 2, 3] {
        let settings = Settings { ranges, ..Settings::default() };
        check_all_fleets(|| setup(small_model(), &settings), 3);
    }
}

#[test]
fn the_samples_objective_gives_the_same_roundings_in_any_fleet() {
    let settings = Settings { objective: Objective::Samples, ..Settings::default() };
    check_all_fleets(|| setup(small_model(), &settings), 3);
}

#[test]
fn shared_and_grouped_weights_give_the_same_roundings_in_any_fleet() {
    for objective in [Objective::Gram, Objective::Samples] {
        for ranges in [1, 2] {
            let settings = Settings { objective, ranges, sample: vec![2, 5, 5], ..Settings::default() };
            check_all_fleets(|| setup(shared_model(), &settings), 2);
        }
    }
}

#[test]
fn statistics_that_layers_share_are_those_that_each_would_have() {
    for propagation in [Propagation::Sequential, Propagation::Independent] {
        let settings = Settings { propagation, ..Settings::default() };
        let make = || setup(branched_model(), &settings);
        let lenders: Vec<Option<u32>> =
            make().plan.layers.iter().map(|layer| Some(layer.statistics_of?.0)).collect();
        assert_eq!(lenders, [None, Some(0), Some(0), None, Some(3), None]);
        let apart = alone(setup(branched_model(), &Settings { shared: false, ..settings.clone() }));
        assert!(alone(make()) == apart, "{propagation:?}");
        if propagation == Propagation::Sequential {
            check_all_fleets(make, 3);
        }
    }
}

#[test]
fn a_plan_that_shares_the_statistics_of_other_rows_is_refused() {
    let model = support::Graph::default()
        .input("x", &[None, Some(6)])
        .weight("w1", &[6, 5])
        .weight("w2", &[6, 4])
        .node("MatMul", &["x", "w1"], "a")
        .node("Sigmoid", &["x"], "b")
        .node("MatMul", &["b", "w2"], "c")
        .output("a")
        .output("c")
        .model();
    let fleet = Fleet::new(setup(model, &Settings::default()), 1, 0);
    let mut plan = (*fleet.setup.plan).clone();
    assert_eq!(plan.layers[1].statistics_of, None);
    (plan.layers[1].statistics_of, plan.layers[1].slices) = (Some(LayerId(0)), Vec::new());
    plan.validate().unwrap();
    let source = Arc::clone(&fleet.source) as Arc<dyn Source>;
    let refused = fleet.nodes()[0].1.open(plan.into(), source).unwrap_err();
    assert_eq!(refused.class, FailureClass::Internal);
    assert!(refused.message.contains("`node_c`") && refused.message.contains("`node_a`"), "{refused}");
}

#[test]
fn a_real_model_gives_the_same_roundings_in_any_fleet() {
    let settings = Settings {
        shards: 3,
        samples_per_shard: 2,
        sample: vec![1, 28, 28],
        ranges: 2,
        ..Settings::default()
    };
    let expected = alone(setup(fashion_mnist(), &settings));
    let mut fleet = Fleet::new(setup(fashion_mnist(), &settings), 3, 1);
    (fleet.drop_once_in, fleet.withhold_once_in) = (12, 3);
    assert!(fleet.run() == expected);
    let fetched = fleet.source.fetched.lock().unwrap();
    for kind in ["carry", "sums", "means"] {
        assert!(fetched.get(kind).is_some_and(|count| *count > 0), "no {kind} moved: {fetched:?}");
    }
}

/// Independent propagation: several stages are summed before the first is solved.
#[test]
fn stages_that_do_not_wait_for_each_other_can_be_summed_ahead() {
    let settings = Settings { propagation: Propagation::Independent, ..Settings::default() };
    let expected = alone(setup(small_model(), &settings));
    let mut fleet = Fleet::new(setup(small_model(), &settings), 3, 5);
    let stages = fleet.setup.plan.stages.len() as u32;
    for segment in (0..4).map(SegmentId) {
        fleet.capture(segment);
        fleet.accumulate(segment);
    }
    fleet.drop_once_in = 6;
    (0..4).for_each(|segment| fleet.finish_stage(SegmentId(segment)));
    fleet.capture(SegmentId(4));
    fleet.finish_stage(SegmentId(4));
    assert_eq!(stages, 5);
    assert!(*fleet.source.roundings.lock().unwrap() == expected);
}

#[test]
fn ranges_change_the_result_and_nodes_do_not_hide_it() {
    let of = |ranges| alone(setup(small_model(), &Settings { ranges, ..Settings::default() }));
    assert!(of(1) != of(2));
}

#[test]
fn a_layer_whose_inputs_are_not_finite_fails_alone_in_any_fleet() {
    let broken = || {
        let model = support::Graph::default()
            .input("x", &[None, Some(6)])
            .weight("w1", &[6, 5])
            .constant("nothing", &[1], vec![f32::INFINITY])
            .weight("w2", &[5, 4])
            .weight("w3", &[5, 3])
            .node("MatMul", &["x", "w1"], "a")
            .node("Mul", &["a", "nothing"], "b")
            .node("MatMul", &["b", "w2"], "c")
            .node("MatMul", &["a", "w3"], "d")
            .output("c")
            .output("d")
            .model();
        setup(model, &Settings::default())
    };
    let expected = alone(broken());
    assert_eq!(expected.keys().map(|(layer, _)| layer.0).collect::<Vec<_>>(), [0, 2]);
    check_all_fleets(broken, 1);
}

/// Undisturbed, on one node: the last layer's own node never runs, all others once per stream.
#[test]
fn every_operator_runs_at_most_once_per_sample_and_stream() {
    let mut fleet = Fleet::new(setup(small_model(), &Settings::default()), 1, 0);
    // A capture that is repeated must not run anything either: the loop repeats one in four.
    fleet.run();
    let n = 15;
    let counts = fleet.counts[0].lock().unwrap().clone();
    let expected = ["a", "b", "c", "d", "e", "f", "g", "h"].map(|name| (name.to_owned(), 2 * n));
    assert_eq!(counts, BTreeMap::from(expected));
}

#[test]
fn a_small_memory_budget_changes_nothing() {
    let settings = Settings { ranges: 2, ..Settings::default() };
    let expected = alone(setup(small_model(), &settings));
    let mut fleet = Fleet::new(setup(small_model(), &settings), 0, 3);
    fleet.memory_budget = 50;
    (0..2).for_each(|_| fleet.join());
    assert!(fleet.run() == expected);
    assert!(
        fleet.nodes().iter().all(|(_, node)| node.carry_use().spilled > 0 && node.carry_use().peak <= 50)
    );
}

fn grant(node: u32, lease: u64, task: Task) -> Grant {
    let lease = Lease { id: LeaseId(lease), node: NodeId(node), attempt: 1, task };
    Grant { lease, holdings: Vec::new() }
}

#[test]
fn only_accepted_products_are_in_the_sums_and_a_fence_forgets_them() {
    let mut fleet = Fleet::new(setup(small_model(), &Settings::default()), 1, 0);
    fleet.capture(SegmentId(0));
    let peaks = fleet.agreed(SegmentId(0));
    let (_, node) = fleet.nodes().remove(0);
    let sums = |node: &halfstep_agent::LocalNode| {
        node.inventory().held.into_iter().find(|held| matches!(held, Held::Sums { .. }))
    };
    for (lease, shard, verdict) in [
        (1, 0, Verdict::Accepted),
        (2, 1, Verdict::Stale),
        (3, 2, Verdict::Duplicate),
        (4, 3, Verdict::Accepted),
    ] {
        let task = Task::Accumulate { segment: SegmentId(0), shard: ShardId(shard), peaks: peaks.clone() };
        node.execute(&grant(0, lease, task), &halfstep_work::Unwatched).unwrap();
        let before = sums(&node);
        node.settle(LeaseId(lease + 100), Verdict::Accepted);
        assert_eq!(sums(&node), before, "a verdict on another lease");
        node.settle(LeaseId(lease), verdict);
    }
    let shards = vec![ShardId(0), ShardId(3)];
    assert_eq!(sums(&node), Some(Held::Sums { segment: SegmentId(0), shards: shards.clone() }));
    let wanted = |shards| Wanted::SumsSlice {
        layer: halfstep_work::LayerId(0),
        slice: halfstep_work::SliceId(0),
        shards,
    };
    assert!(node.serve(&wanted(shards.clone())).is_ok());
    let refused = node.serve(&wanted(vec![ShardId(0)])).unwrap_err();
    assert_eq!(refused.class, FailureClass::PeerLost);
    node.fence();
    assert_eq!(sums(&node), None);
    assert!(node.inventory().held.iter().any(|held| matches!(held, Held::Carry { .. })));
    assert_eq!(node.serve(&wanted(shards)).unwrap_err().class, FailureClass::PeerLost);
}

/// Products that were made before a stage's sums were dropped must not bring back what had been in them.
#[test]
fn a_verdict_after_sums_were_dropped_counts_its_own_shard_only() {
    let sums_of_shard_one = |dropped: bool| {
        let mut fleet = Fleet::new(setup(small_model(), &Settings::default()), 1, 0);
        fleet.capture(SegmentId(0));
        let peaks = fleet.agreed(SegmentId(0));
        let (_, node) = fleet.nodes().remove(0);
        let accumulate = |lease, shard| {
            let task =
                Task::Accumulate { segment: SegmentId(0), shard: ShardId(shard), peaks: peaks.clone() };
            node.execute(&grant(0, lease, task), &halfstep_work::Unwatched).unwrap();
        };
        if dropped {
            accumulate(1, 0);
            accumulate(2, 1);
            node.settle(LeaseId(1), Verdict::Accepted);
            node.drop_sums(SegmentId(0));
        } else {
            accumulate(2, 1);
        }
        node.settle(LeaseId(2), Verdict::Accepted);
        let (layer, slice) = (halfstep_work::LayerId(0), halfstep_work::SliceId(0));
        node.serve(&Wanted::SumsSlice { layer, slice, shards: vec![ShardId(1)] }).unwrap()
    };
    assert!(sums_of_shard_one(true) == sums_of_shard_one(false));
}

/// The coordinator may tell another node of a verdict before this node hears of it.
#[test]
fn sums_that_wait_for_a_verdict_only_are_waited_for() {
    let mut fleet = Fleet::new(setup(small_model(), &Settings::default()), 1, 0);
    fleet.capture(SegmentId(0));
    let peaks = fleet.agreed(SegmentId(0));
    let (_, node) = fleet.nodes().remove(0);
    let task = Task::Accumulate { segment: SegmentId(0), shard: ShardId(1), peaks };
    node.execute(&grant(0, 1, task), &halfstep_work::Unwatched).unwrap();
    let (layer, slice) = (halfstep_work::LayerId(0), halfstep_work::SliceId(0));
    let asked = |shards: &[u32]| {
        let shards = shards.iter().copied().map(ShardId).collect();
        node.serve(&Wanted::SumsSlice { layer, slice, shards })
    };
    std::thread::scope(|scope| {
        let served = scope.spawn(|| asked(&[1]));
        // Others are refused at once, and nobody is let in before the verdict.
        assert!(asked(&[2]).is_err() && asked(&[1, 2]).is_err() && !served.is_finished());
        node.settle(LeaseId(1), Verdict::Accepted);
        assert!(served.join().unwrap().is_ok());
    });
}

#[test]
fn opening_the_open_job_keeps_what_is_held_and_closing_forgets_it() {
    let mut fleet = Fleet::new(setup(small_model(), &Settings::default()), 1, 0);
    fleet.capture(SegmentId(0));
    let (_, node) = fleet.nodes().remove(0);
    let before = node.inventory();
    assert_eq!((before.held.len(), before.captured.len()), (5, 5));
    let source = || std::sync::Arc::clone(&fleet.source) as std::sync::Arc<dyn halfstep_work::Source>;
    node.open(fleet.setup.plan.clone(), source()).unwrap();
    assert_eq!(node.inventory(), before);
    node.close();
    assert_eq!(node.inventory(), Default::default());
    let task = Task::Capture { segment: SegmentId(0), shard: ShardId(0) };
    let failure = node.execute(&grant(0, 1, task), &halfstep_work::Unwatched).unwrap_err();
    assert_eq!(failure.message, "node: no job is open");
}

#[test]
fn ids_that_are_not_in_the_plan_are_refused() {
    let fleet = Fleet::new(setup(small_model(), &Settings::default()), 1, 0);
    let (_, node) = fleet.nodes().remove(0);
    let (range, segment, shard) = (RangeId(9), SegmentId(9), ShardId(99));
    let (layer, slice) = (halfstep_work::LayerId(9), halfstep_work::SliceId(9));
    let tasks = [
        Task::Forward { range, shard: ShardId(0) },
        Task::Capture { segment, shard: ShardId(0) },
        Task::Capture { segment: SegmentId(0), shard },
        Task::Accumulate { segment, shard, peaks: Default::default() },
        Task::Reduce { layer, slice },
        Task::Reduce { layer: halfstep_work::LayerId(0), slice },
        Task::Solve { layer, chunk: halfstep_work::ChunkId(0) },
        Task::Solve { layer: halfstep_work::LayerId(0), chunk: halfstep_work::ChunkId(9) },
    ];
    for task in tasks {
        assert!(node.execute(&grant(0, 1, task.clone()), &halfstep_work::Unwatched).is_err(), "{task:?}");
    }
    let wanted = [
        Wanted::Carry { range, segment, shard },
        Wanted::Carry { range, segment: SegmentId(u32::MAX), shard },
        Wanted::SumsSlice { layer, slice, shards: vec![] },
        Wanted::MeansSlice { layer, slice },
        Wanted::Samples { layer, shards: vec![shard] },
    ];
    for wanted in wanted {
        assert!(node.serve(&wanted).is_err(), "{wanted:?}");
    }
}

struct StopAfter(AtomicUsize);

impl Watch for StopAfter {
    fn progress(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= 3
    }
}

#[test]
fn a_replay_moves_its_watch_on_and_stops_when_told() {
    let mut fleet = Fleet::new(setup(small_model(), &Settings::default()), 1, 0);
    fleet.run();
    fleet.join();
    let (id, node) = fleet.nodes().remove(1);
    let task = Task::Capture { segment: SegmentId(4), shard: ShardId(0) };
    let watch = StopAfter(AtomicUsize::new(0));
    let failure = node.execute(&grant(id.0, 1, task.clone()), &watch).unwrap_err();
    assert_eq!(failure.class, FailureClass::Cancelled);
    // What had been done stays; the rest is done by the next attempt.
    let done = node.execute(&grant(id.0, 2, task), &halfstep_work::Unwatched).unwrap().0;
    assert!(matches!(done, Done::Captured { peaks } if peaks.len() == 1));
}

#[test]
fn tasks_on_one_shard_at_once_give_what_each_gives_alone() {
    let mut fleet = Fleet::new(setup(small_model(), &Settings { ranges: 2, ..Settings::default() }), 1, 0);
    fleet.run();
    fleet.join();
    let (id, node) = fleet.nodes().remove(1);
    let tasks = |shard: u32| {
        let capture = move |segment| Task::Capture { segment: SegmentId(segment), shard: ShardId(shard) };
        [capture(0), capture(2), capture(4), Task::Forward { range: RangeId(0), shard: ShardId(shard) }]
    };
    let expected: Vec<Done> =
        tasks(0).map(|t| node.execute(&grant(id.0, 1, t), &halfstep_work::Unwatched).unwrap().0).into();
    let node = &node;
    std::thread::scope(|scope| {
        for turn in 0..8 {
            let expected = &expected;
            scope.spawn(move || {
                for at in 0..4 {
                    let at = (at + turn) % 4;
                    let task = tasks(0)[at].clone();
                    let done = node.execute(&grant(id.0, 1, task), &halfstep_work::Unwatched).unwrap().0;
                    assert_eq!(done, expected[at]);
                }
            });
        }
    });
}
