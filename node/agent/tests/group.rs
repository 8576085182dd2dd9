//! Nodes that add up statistics in a group, against a coordinator that does as it is told; the library stands in for NCCL
//! (`compute/tests/nccl/fake_nccl.c`, built here) and adds in host memory.
//!
//! Not here: who is in a group and when (`coordinator::exchange`), real processes (`faults`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

mod support;

use halfstep_agent::Exchange;
use halfstep_agent::cuda::Nccl;
use halfstep_proto::Transport;
use halfstep_work::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use support::coordinator::{Coordinator, JOB, expected};
use support::driver::{Driver, start_exchanging};
use support::{Settings, branched_model, setup, shared_model, small_model};
use tempfile::TempDir;

/// A library built with these faults, which meets with others of the same folder.
fn exchange(folder: &TempDir, flags: &[&str]) -> Exchange {
    let library = folder.path().join(format!("lib{}.so", flags.concat()));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../compute/tests/nccl/fake_nccl.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-pthread", "-O1", "-o"]).arg(&library).arg(source);
    compiler.args(flags.iter().map(|flag| format!("-DFAKE_{flag}")));
    compiler.arg(format!("-DFAKE_FOLDER=\"{}\"", folder.path().display()));
    assert!(compiler.status().unwrap().success(), "{compiler:?}");
    Exchange::in_host_memory(Nccl::open(&library).unwrap())
}

/// Nodes with these libraries, in a group of epoch 1 with no round behind it.
async fn in_a_group(setup: support::Setup, exchanges: Vec<Exchange>) -> Driver {
    let mut driver = apart(setup, exchanges).await;
    join(&mut driver, 1).await;
    driver
}

async fn apart(setup: support::Setup, exchanges: Vec<Exchange>) -> Driver {
    let mut coordinator = Coordinator::new(setup, Transport::memory()).await;
    let mut nodes = Vec::new();
    for (node, exchange) in (0..).zip(exchanges) {
        let running = start_exchanging(&coordinator, "n", Some(exchange));
        let (attached, _) = coordinator.take_in(node, 1).await;
        let described = attached.introduction.description.as_ref().unwrap();
        assert_eq!(described.exchange, "NCCL 2.27.3, host memory");
        nodes.push((attached, running.left_to_itself()));
    }
    Driver::new(coordinator, nodes)
}

async fn join(driver: &mut Driver, epoch: u64) {
    driver.nodes[0].0.order(epoch, GroupOrder::Name).await;
    let GroupAnswer::Named(id) = driver.nodes[0].0.answer(epoch).await else { panic!("no name") };
    let size = driver.nodes.len() as u32;
    for ((attached, _), rank) in driver.nodes.iter().zip(0..) {
        attached.order(epoch, GroupOrder::Join { id: id.clone(), rank, size }).await;
    }
    for (attached, _) in &mut driver.nodes {
        assert_eq!(attached.answer(epoch).await, GroupAnswer::Joined);
    }
    driver.group = Some((epoch, 0));
}

/// All stages; what they give must be what one node gives alone.
async fn run(driver: &mut Driver, expected: &BTreeMap<(LayerId, ChunkId), Rounding>) {
    let stages = driver.coordinator.plan().stages.len() as u32;
    for segment in (0..stages).map(SegmentId) {
        driver.turn += 1;
        driver.stage(segment).await;
    }
    assert!(driver.roundings() == *expected, "other roundings than those of one node");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_gives_the_same_roundings_and_nobody_fetches_statistics() {
    for name in ["small", "shared", "branched"] {
        let make = || match name {
            "small" => small_model(),
            "shared" => shared_model(),
            _ => branched_model(),
        };
        let settings = match name {
            "shared" => Settings { sample: vec![2, 5, 5], ..Settings::default() },
            _ => Settings::default(),
        };
        let expected = expected(setup(make(), &settings));
        let folder = TempDir::new().unwrap();
        // More nodes than shards: some give zeros.
        for nodes in [2, 3, setup(make(), &settings).plan.shards.len() + 1] {
            let exchanges = vec![exchange(&folder, &[]); nodes];
            let mut driver = in_a_group(setup(make(), &settings), exchanges).await;
            run(&mut driver, &expected).await;
            assert_eq!(driver.fetched, 0, "{name}, {nodes} nodes");
            let (epoch, rounds) = driver.group.unwrap();
            assert!(rounds > 0);
            for (attached, _) in &mut driver.nodes {
                for round in 0..rounds {
                    assert_eq!(attached.answer(epoch).await, GroupAnswer::Added(round));
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_group_statistics_are_fetched() {
    let expected = expected(setup(small_model(), &Settings::default()));
    let folder = TempDir::new().unwrap();
    let mut driver = apart(setup(small_model(), &Settings::default()), vec![exchange(&folder, &[]); 2]).await;
    run(&mut driver, &expected).await;
    assert!(driver.fetched > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_library_that_fails_in_the_middle_costs_the_group_and_no_result() {
    let expected = expected(setup(small_model(), &Settings::default()));
    let folder = TempDir::new().unwrap();
    let exchanges = vec![exchange(&folder, &[]), exchange(&folder, &["ERROR_AFTER=3"])];
    let mut driver = in_a_group(setup(small_model(), &Settings::default()), exchanges).await;
    // Rounds are ordered as if nothing had happened: each must end at once, by an answer.
    run(&mut driver, &expected).await;
    assert!(driver.fetched > 0);
    for (attached, _) in &mut driver.nodes {
        let failed = loop {
            match attached.answer(1).await {
                GroupAnswer::Added(_) => {}
                GroupAnswer::Failed(why) => break why,
                other => panic!("{other:?}"),
            }
        };
        assert!(failed.starts_with("NCCL group: all-reduce failed: "), "{failed}");
    }
    // Another one can be made.
    join(&mut driver, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_stuck_group_goes_on_when_it_is_told_to_leave() {
    let expected = expected(setup(small_model(), &Settings::default()));
    let folder = TempDir::new().unwrap();
    let exchanges = vec![exchange(&folder, &["SILENT"]), exchange(&folder, &["SILENT", "STUCK_AFTER=0"])];
    let mut driver = in_a_group(setup(small_model(), &Settings::default()), exchanges).await;
    let leave = tokio::spawn({
        let says = [driver.nodes[0].0.speaker(), driver.nodes[1].0.speaker()];
        async move {
            tokio::time::sleep(std::time::Duration::from_secs(2)).await;
            for say in says {
                say.order(1, GroupOrder::Leave).await;
            }
        }
    });
    run(&mut driver, &expected).await;
    leave.await.unwrap();
    assert!(driver.fetched > 0);
    join(&mut driver, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_that_are_not_at_the_same_find_out_and_add_nothing() {
    let folder = TempDir::new().unwrap();
    let plan = setup(small_model(), &Settings::default()).plan;
    let peak = |layer| PeakRecord { layer, use_index: 0, full_precision: 1.0, quantized: 1.0, positions: 4 };
    let round = |number, layer: u32, peaks: Vec<PeakRecord>, job| {
        GroupOrder::Round(Round { job, number, layer: LayerId(layer), shards: Vec::new(), peaks })
    };
    let own = |layer: u32| vec![peak(LayerId(layer))];
    let beyond = plan.layers.len() as u32;
    let wider = vec![PeakRecord { full_precision: 1e9, quantized: 1e9, ..peak(LayerId(0)) }];
    let not_the_same = "round 0: the members are not at the same layer with the same peaks";
    let gone = "NCCL group: all-reduce failed: a member is gone (result 6)";
    // What the second is told; the first is at layer 0.
    let cases = [
        (round(0, 1, own(1), JOB), [not_the_same, not_the_same]),
        (round(0, 0, wider, JOB), [not_the_same, not_the_same]),
        (round(1, 0, own(0), JOB), [gone, "round 1: expected round 0"]),
        (round(0, 0, Vec::new(), JOB), [gone, "round 0: 0 peaks, expected those of 1 uses"]),
        (round(0, 0, own(1), JOB), [gone, "round 0: 1 peaks, expected those of 1 uses"]),
        (round(0, 0, own(0), JobId([8; 16])), [gone, "is not open here"]),
        (round(0, beyond, own(beyond), JOB), [gone, "not in the plan"]),
    ];
    let exchanges = vec![exchange(&folder, &[]); 2];
    let mut driver = apart(setup(small_model(), &Settings::default()), exchanges).await;
    for ((told, expected), epoch) in cases.into_iter().zip(1..) {
        join(&mut driver, epoch).await;
        driver.nodes[0].0.order(epoch, round(0, 0, own(0), JOB)).await;
        driver.nodes[1].0.order(epoch, told.clone()).await;
        for ((attached, _), expected) in driver.nodes.iter_mut().zip(expected) {
            let GroupAnswer::Failed(why) = attached.answer(epoch).await else {
                panic!("{told:?}: it did not fail")
            };
            assert!(why.contains(expected), "{told:?}: {why}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_make_no_sense_are_answered_and_cost_nothing_else() {
    let folder = TempDir::new().unwrap();
    let exchanges = vec![exchange(&folder, &[]), exchange(&folder, &["INIT_REFUSED"])];
    let mut driver = apart(setup(small_model(), &Settings::default()), exchanges).await;
    let failed = |answer| match answer {
        GroupAnswer::Failed(why) => why,
        other => panic!("{other:?}"),
    };
    let node = &mut driver.nodes[0].0;
    node.order(3, GroupOrder::Join { id: vec![1; 5].into(), rank: 0, size: 1 }).await;
    assert_eq!(failed(node.answer(3).await), "NCCL group: length of an id is 5, expected 128");
    node.order(3, GroupOrder::Join { id: vec![1; 128].into(), rank: 0, size: 1 }).await;
    assert!(failed(node.answer(3).await).contains("invalid usage"), "nobody meets there");
    let round = Round { job: JOB, number: 0, layer: LayerId(0), shards: vec![], peaks: vec![] };
    node.order(4, GroupOrder::Round(round)).await;
    assert_eq!(failed(node.answer(4).await), "a round without a group");
    let node = &mut driver.nodes[1].0;
    node.order(5, GroupOrder::Join { id: vec![1; 128].into(), rank: 0, size: 1 }).await;
    assert!(failed(node.answer(5).await).contains("ncclCommInitRankConfig"));
    node.order(5, GroupOrder::Leave).await;
    let expected = expected(setup(small_model(), &Settings::default()));
    run(&mut driver, &expected).await;
}
