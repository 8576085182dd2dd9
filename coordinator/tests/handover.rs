//! Carries of a node that drains go to those who get its shards, on a simulated fleet.

mod fleet;

use fleet::{Fleet, Shape};
use halfstep_coordinator::dispatch::{Action, Outcome};
use halfstep_work::{
    Failure, FailureClass, Held, Holding, NodeId, RangeId, SegmentId, ShardId, Task, TaskPhase,
};
use std::collections::BTreeSet;

/// All shards are captured at stage 0: each node has the carries of its own.
fn captured(nodes: usize, shards: usize) -> Fleet {
    let mut fleet = Fleet::with_nodes(&Shape::new(2, shards), nodes, 1);
    let phase = |fleet: &Fleet, node: NodeId| fleet.nodes[&node].hand.first().map(|g| g.lease.task.phase());
    while let Some(node) =
        (0..nodes as u32).map(NodeId).find(|node| phase(&fleet, *node) == Some(TaskPhase::Capture))
    {
        fleet.answer(node, 0, true);
    }
    fleet
}

fn orders(fleet: &mut Fleet) -> Vec<(NodeId, Vec<Holding>)> {
    let take_over = |action| match action {
        Action::TakeOver { node, carries } => Some((node, carries)),
        _ => None,
    };
    fleet.dispatch.actions().into_iter().filter_map(take_over).collect()
}

#[test]
fn what_a_draining_node_alone_has_is_taken_over_by_those_who_get_its_shards() {
    let mut fleet = captured(3, 9);
    let own: Vec<ShardId> = fleet.nodes[&NodeId(0)].carries.keys().map(|(_, shard)| *shard).collect();
    assert!(own.len() >= 2, "{own:?}");
    fleet.dispatch.drain(NodeId(0), 1_000);
    let orders = orders(&mut fleet);
    let told: Vec<&Holding> = orders.iter().flat_map(|(_, carries)| carries).collect();
    assert!(orders.iter().all(|(heir, _)| *heir != NodeId(0)));
    assert!(told.iter().all(|holding| holding.node == NodeId(0) && holding.address == "n0:1"));
    let mut shards: Vec<ShardId> = told
        .iter()
        .map(|holding| match holding.held {
            Held::Carry { range: RangeId(0), segment: SegmentId(0), shard } => shard,
            _ => panic!("{holding:?}"),
        })
        .collect();
    shards.sort_unstable();
    assert_eq!(shards, own, "each once, and nothing that others have");
    // Drained twice is drained once.
    fleet.dispatch.drain(NodeId(0), 1_100);
    assert!(self::orders(&mut fleet).is_empty());
    for (heir, carries) in &orders {
        for holding in carries {
            assert!(fleet.dispatch.is_handing_over(NodeId(0), 1_200));
            let Held::Carry { range, segment, shard } = holding.held else { panic!() };
            fleet.dispatch.taken_over(NodeId(7), (range, segment, shard), true);
            fleet.dispatch.taken_over(*heir, (range, segment, shard), true);
        }
    }
    assert!(!fleet.dispatch.is_handing_over(NodeId(0), 1_200), "nothing is left that it alone has");
}

#[test]
fn a_handover_ends_in_time_and_with_the_nodes_that_take_part_in_it() {
    let mut fleet = captured(2, 6);
    fleet.dispatch.drain(NodeId(0), 1_000);
    assert!(!orders(&mut fleet).is_empty());
    assert!(fleet.dispatch.is_handing_over(NodeId(0), 3_999));
    assert!(!fleet.dispatch.is_handing_over(NodeId(0), 4_000), "what is not there by then is replayed");
    fleet.dispatch.leave(NodeId(1), Failure::new(FailureClass::NodeLost, "gone"), 1_500);
    assert!(!fleet.dispatch.is_handing_over(NodeId(0), 1_500), "nobody takes anything over any more");
    let mut alone = captured(1, 3);
    alone.dispatch.drain(NodeId(0), 0);
    assert!(orders(&mut alone).is_empty() && !alone.dispatch.is_handing_over(NodeId(0), 0));
}

#[test]
fn a_carry_that_was_taken_over_is_at_home_where_its_shard_goes_on() {
    let mut fleet = captured(2, 4);
    let own: Vec<ShardId> = fleet.nodes[&NodeId(0)].carries.keys().map(|(_, shard)| *shard).collect();
    fleet.dispatch.drain(NodeId(0), 0);
    fleet.collect();
    assert_eq!(fleet.taken_over as usize, own.len());
    fleet.nodes.remove(&NodeId(0));
    fleet.dispatch.leave(NodeId(0), Failure::new(FailureClass::HandedBack, "drained"), 0);
    fleet.collect();
    let mut seen = BTreeSet::new();
    while fleet.dispatch.outcome() == Outcome::Running {
        let grant = fleet.nodes[&NodeId(1)].hand[0].clone();
        if let Task::Capture { segment: SegmentId(1), shard } | Task::Accumulate { shard, .. } =
            grant.lease.task
        {
            assert_eq!(grant.holdings[0].node, NodeId(1), "{grant:?}");
            seen.insert(shard);
        }
        fleet.answer(NodeId(1), 0, true);
    }
    assert!(own.iter().all(|shard| seen.contains(shard)), "{seen:?}");
}
