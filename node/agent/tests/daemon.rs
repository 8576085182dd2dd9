//! The daemon against a coordinator that does as it is told: attach, work, lose the stream, be fenced, drain.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

mod support;

use halfstep_agent::{DaemonEvent, LocalNode};
use halfstep_proto::wire::coordinator_message::Body as Say;
use halfstep_proto::wire::{self, node_message};
use halfstep_proto::{BlobName, Transport, job_to_wire};
use halfstep_work::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use support::coordinator::{Attached, Coordinator, JOB, expected, soon};
use support::driver::{Driver, peaks, start};
use support::{Settings, setup, small_model};
use tempfile::TempDir;

async fn coordinator() -> Coordinator {
    Coordinator::new(setup(small_model(), &Settings::default()), Transport::memory()).await
}

fn capture(shard: u32) -> Task {
    Task::Capture { segment: SegmentId(0), shard: ShardId(shard) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_introduces_itself_beats_and_drains() {
    let mut coordinator = coordinator().await;
    let mut running = start(&coordinator, "gpu-3");
    let mut attached = coordinator.welcome(4, 7, false).await;
    let DaemonEvent::Listening { address } = running.event().await else { panic!("no address") };
    assert_eq!(attached.introduction.address, address);
    let described = attached.introduction.description.clone().unwrap();
    assert_eq!((described.name.as_str(), described.slots), ("gpu-3", 2));
    assert!(described.flops_per_second > 0.0 && described.memory_bytes == 1 << 20);
    assert_eq!(attached.introduction.previous_node, None);
    let node = NodeId(4);
    let expected = DaemonEvent::Attached { coordinator: coordinator.address.clone(), node };
    assert_eq!(running.event().await, expected);
    for _ in 0..3 {
        attached.heartbeat().await;
    }
    let begun = Instant::now();
    running.drain.begin("SIGTERM");
    running.drain.begin("SIGTERM again");
    let reason = |body| match body {
        node_message::Body::Drain(drain) => Some(drain.reason),
        _ => None,
    };
    assert_eq!(attached.hears("drain", reason).await, "SIGTERM");
    attached.say(Say::Farewell(wire::Farewell { reason: "drained".into() })).await;
    assert_eq!(running.event().await, DaemonEvent::Draining);
    running.end().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_solve_a_job_as_one_does() {
    let expected = expected(setup(small_model(), &Settings::default()));
    let mut coordinator = coordinator().await;
    let mut nodes = Vec::new();
    for node in 0..2 {
        let running = start(&coordinator, "n");
        let (attached, inventory) = coordinator.take_in(node, 1).await;
        assert_eq!(inventory, Inventory::default());
        nodes.push((attached, running.left_to_itself()));
    }
    let stages = coordinator.plan().stages.len() as u32;
    // An odd number of tasks first, so that shards change hands between phases.
    let mut driver = Driver::new(coordinator, nodes);
    for segment in (0..stages).map(SegmentId) {
        driver.turn += 1;
        driver.stage(segment).await;
    }
    assert!(driver.roundings() == expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_stream_is_attached_again_with_what_is_held_and_results_arrive_once() {
    let mut coordinator = coordinator().await;
    let mut running = start(&coordinator, "n");
    let (attached, _) = coordinator.take_in(0, 1).await;
    let lease = coordinator.lease(0, capture(0));
    attached.grant(lease, vec![]).await;
    peaks(coordinator.outcome().await);
    // The answer to this one is lost with the coordinator.
    coordinator.state.refuse_commits.store(u32::MAX, Ordering::SeqCst);
    let lease = coordinator.lease(0, capture(1));
    attached.grant(lease.clone(), vec![]).await;
    let refused = async {
        while coordinator.state.refuse_commits.load(Ordering::SeqCst) == u32::MAX {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon("a refused commit", refused).await;
    coordinator.stop().await;
    drop(attached);
    running.event().await;
    running.event().await;
    assert!(matches!(running.event().await, DaemonEvent::Waiting { .. }));
    coordinator.state.refuse_commits.store(0, Ordering::SeqCst);
    coordinator.restart().await;
    let mut attached = coordinator.welcome(3, 2, false).await;
    assert_eq!(attached.introduction.previous_node, Some(0));
    assert_eq!(attached.introduction.previous_epoch, 1);
    attached.say(coordinator.open_job("")).await;
    let inventory: Inventory = attached.opened().await.inventory.unwrap().try_into().unwrap();
    assert_eq!((inventory.held.len(), inventory.captured.len()), (2, 2));
    assert_eq!(inventory.leases, std::slice::from_ref(&lease));
    // The outcome comes by itself, under the registration that named the lease.
    let commit = coordinator.outcome().await;
    assert_eq!((commit.lease, commit.node, commit.epoch), (lease.id, NodeId(3), 2));
    assert_eq!(coordinator.state.committed.lock().unwrap().len(), 2);
    // It goes on.
    let lease = coordinator.lease(3, capture(2));
    attached.grant(lease, vec![]).await;
    peaks(coordinator.outcome().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_in_hand_is_named_when_the_node_attaches_again() {
    let mut coordinator = coordinator().await;
    let _running = start(&coordinator, "n");
    let (attached, _) = coordinator.take_in(0, 1).await;
    coordinator.state.refuse_commits.store(u32::MAX, Ordering::SeqCst);
    let lease = coordinator.lease(0, capture(0));
    attached.grant(lease.clone(), vec![]).await;
    drop(attached);
    let (_attached, inventory) = coordinator.take_in(0, 1).await;
    assert_eq!(inventory.leases, [lease]);
}

async fn accumulated(coordinator: &mut Coordinator, attached: &Attached, node: u32, shard: u32) -> Lease {
    let lease = coordinator.lease(node, capture(shard));
    attached.grant(lease, vec![]).await;
    let peaks = Arc::new(peaks(coordinator.outcome().await));
    let task = Task::Accumulate { segment: SegmentId(0), shard: ShardId(shard), peaks };
    let lease = coordinator.lease(node, task);
    attached.grant(lease.clone(), vec![]).await;
    lease
}

fn sums(node: &LocalNode) -> Option<Held> {
    node.inventory().held.into_iter().find(|held| matches!(held, Held::Sums { .. }))
}

async fn until_summed(node: &LocalNode) {
    soon("sums", async {
        while sums(node).is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_node_forgets_sums_and_leases_and_keeps_carries() {
    let mut coordinator = coordinator().await;
    let running = start(&coordinator, "n");
    let (attached, _) = coordinator.take_in(0, 1).await;
    accumulated(&mut coordinator, &attached, 0, 0).await;
    coordinator.outcome().await;
    until_summed(&running.node).await;
    coordinator.state.refuse_commits.store(u32::MAX, Ordering::SeqCst);
    let lease = coordinator.lease(0, capture(1));
    attached.grant(lease, vec![]).await;
    drop(attached);
    let mut attached = coordinator.welcome(1, 1, true).await;
    attached.say(coordinator.open_job("")).await;
    let inventory: Inventory = attached.opened().await.inventory.unwrap().try_into().unwrap();
    assert_eq!(inventory.leases, []);
    assert!(!inventory.held.is_empty());
    assert!(inventory.held.iter().all(|held| matches!(held, Held::Carry { .. })), "{:?}", inventory.held);
    // What was in hand is not reported any more; new leases are.
    coordinator.state.refuse_commits.store(0, Ordering::SeqCst);
    let lease = coordinator.lease(1, capture(2));
    attached.grant(lease.clone(), vec![]).await;
    assert_eq!(coordinator.outcome().await.lease, lease.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn products_refused_as_stale_stay_out_of_the_sums() {
    let mut coordinator = coordinator().await;
    let running = start(&coordinator, "n");
    let (attached, _) = coordinator.take_in(0, 1).await;
    let next = LeaseId((1 << 32) + 2);
    coordinator.state.verdicts.lock().unwrap().insert(next, Verdict::Stale);
    let lease = accumulated(&mut coordinator, &attached, 0, 0).await;
    assert_eq!(lease.id, next);
    coordinator.outcome().await;
    accumulated(&mut coordinator, &attached, 0, 1).await;
    coordinator.outcome().await;
    until_summed(&running.node).await;
    assert_eq!(sums(&running.node), Some(Held::Sums { segment: SegmentId(0), shards: vec![ShardId(1)] }));
    attached.say(Say::DropSums(wire::DropSums { segment: 0 })).await;
    soon("sums dropped", async {
        while sums(&running.node).is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_node_hands_its_leases_back() {
    let mut coordinator = coordinator().await;
    let running = start(&coordinator, "n");
    let (attached, _) = coordinator.take_in(0, 1).await;
    // More than its two workers can have begun.
    let mut ids = Vec::new();
    for _ in 0..40 {
        for shard in 0..5 {
            let lease = coordinator.lease(0, capture(shard));
            ids.push(lease.id);
            attached.grant(lease, vec![]).await;
        }
    }
    let begun = Instant::now();
    running.drain.begin("SIGTERM");
    let mut handed_back = 0;
    for _ in 0..ids.len() {
        match coordinator.outcome().await.outcome {
            Ok(_) => {}
            Err(failure) => {
                assert_eq!(failure.class, FailureClass::HandedBack, "{failure}");
                assert!(failure.message.contains("SIGTERM"), "{failure}");
                handed_back += 1;
            }
        }
    }
    assert!(handed_back > 0);
    // Nobody says farewell: it leaves all the same.
    running.end().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_coordinator_waits_and_can_be_drained() {
    let mut coordinator = coordinator().await;
    coordinator.stop().await;
    let mut running = start(&coordinator, "n");
    running.event().await;
    let DaemonEvent::Waiting { why, .. } = running.event().await else { panic!("did not wait") };
    assert!(why.contains("cannot connect"), "{why}");
    running.drain.begin("SIGTERM");
    assert_eq!(running.event().await, DaemonEvent::Draining);
    running.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_ends_the_daemon_with_the_coordinators_words() {
    let mut coordinator = coordinator().await;
    let running = start(&coordinator, "n");
    let attached = soon("attachment", coordinator.attachments.recv()).await.unwrap();
    attached.say(Say::Refused(wire::Refused { reason: "another device".into(), job: vec![] })).await;
    let error = running.end().await.unwrap_err().to_string();
    assert!(error.ends_with("refused this node: another device"), "{error}");

    let running = start(&coordinator, "n");
    let attached = soon("attachment", coordinator.attachments.recv()).await.unwrap();
    let hello = Some(wire::Hello { protocol: 99, version: "9.9.9".into() });
    attached.say(Say::Welcome(wire::Welcome { hello, ..Default::default() })).await;
    let error = running.end().await.unwrap_err().to_string();
    assert!(error.contains("9.9.9 (protocol 99)"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_left_out_of_a_job_stays_for_the_next_one() {
    let mut coordinator = coordinator().await;
    let mut running = start(&coordinator, "n");
    let (mut attached, _) = coordinator.take_in(0, 1).await;
    let lease = coordinator.lease(0, capture(0));
    attached.grant(lease, vec![]).await;
    coordinator.outcome().await;
    let reason = "computes with another device".to_owned();
    attached.say(Say::Refused(wire::Refused { reason: reason.clone(), job: job_to_wire(JOB) })).await;
    let (_, _) = (running.event().await, running.event().await);
    assert_eq!(running.event().await, DaemonEvent::LeftOut { job: JOB, reason });
    attached.say(coordinator.open_job("")).await;
    let inventory: Inventory = attached.opened().await.inventory.unwrap().try_into().unwrap();
    assert_eq!(inventory, Inventory::default(), "what it had of the job is forgotten");
    let lease = coordinator.lease(0, capture(1));
    attached.grant(lease, vec![]).await;
    peaks(coordinator.outcome().await);
    assert!(!running.ended.is_finished());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_in_the_middle_is_tried_again_and_ends_the_daemon_when_it_is_the_first_word() {
    let mut coordinator = coordinator().await;
    let mut running = start(&coordinator, "n");
    let attached = coordinator.welcome(4, 7, false).await;
    let refusal = || Say::Refused(wire::Refused { reason: "not wanted".into(), job: vec![] });
    attached.say(refusal()).await;
    let (_, _) = (running.event().await, running.event().await);
    let DaemonEvent::Waiting { why, .. } = running.event().await else { panic!("did not wait") };
    assert_eq!(why, "it refused this node: not wanted");
    let attached = soon("attachment", coordinator.attachments.recv()).await.unwrap();
    assert_eq!(attached.introduction.previous_node, Some(4));
    attached.say(refusal()).await;
    assert!(running.end().await.unwrap_err().to_string().ends_with("refused this node: not wanted"));
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_make_no_sense_are_left_out_and_grants_given_back() {
    let mut coordinator = coordinator().await;
    let running = start(&coordinator, "n");
    let (mut attached, _) = coordinator.take_in(0, 1).await;
    attached.say_something_new().await;
    attached.say(Say::Welcome(wire::Welcome::default())).await;
    attached.say(Say::Close(wire::CloseJob { job: vec![1, 2, 3] })).await;
    attached.say(Say::Grant(wire::Grant::default())).await;
    let lease = wire::Lease { id: 77, node: 0, attempt: 2, task: None };
    let (job, lease) = (job_to_wire(JOB), Some(lease));
    attached.say(Say::Grant(wire::Grant { job, lease, holdings: vec![] })).await;
    let commit = coordinator.outcome().await;
    assert_eq!((commit.lease, commit.attempt, commit.node), (LeaseId(77), 2, NodeId(0)));
    let failure = commit.outcome.unwrap_err();
    assert_eq!(failure.class, FailureClass::Damaged);
    assert!(failure.message.starts_with("the grant cannot be read: "), "{failure}");
    // Nothing is lost, and it goes on over the same stream.
    attached.heartbeat().await;
    let lease = coordinator.lease(0, capture(1));
    attached.grant(lease, vec![]).await;
    peaks(coordinator.outcome().await);
    drop(running);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_measures_the_line_from_another_and_says_what_it_cannot_reach() {
    let mut coordinator = coordinator().await;
    let (mut first, mut second) = (start(&coordinator, "a"), start(&coordinator, "b"));
    let mut attached = coordinator.welcome(0, 1, false).await;
    let _other = coordinator.welcome(1, 1, false).await;
    let DaemonEvent::Listening { address: a } = first.event().await else { panic!("no address") };
    let DaemonEvent::Listening { address: b } = second.event().await else { panic!("no address") };
    let other = if attached.introduction.address == a { b } else { a };
    let measured = |body| match body {
        node_message::Body::Measured(measured) => Some(measured),
        _ => None,
    };
    // No job is open: a line is nobody's.
    attached.say(Say::Measure(wire::MeasureLine { number: 7, address: other })).await;
    let answer = attached.hears("figure", measured).await;
    let Some(wire::line_measured::Result::BytesPerSecond(rate)) = answer.result else { panic!("{answer:?}") };
    assert!(answer.number == 7 && rate > 1_000_000, "{rate} bytes a second of memory");
    let begun = Instant::now();
    attached.say(Say::Measure(wire::MeasureLine { number: 8, address: "nobody".into() })).await;
    let answer = attached.hears("figure", measured).await;
    let Some(wire::line_measured::Result::Failed(why)) = answer.result else { panic!("{answer:?}") };
    assert!(answer.number == 8 && why.contains("nobody"), "{why}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    attached.heartbeat().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn constants_come_from_a_shared_file_where_it_is_the_same() {
    let place = TempDir::new().unwrap();
    let path = place.path().join("model.onnx");
    let same = support::Graph::default()
        .input("x", &[None, Some(6)])
        .weight("w1", &[6, 5])
        .constant("w2", &[5, 4], vec![0.5; 20])
        .node("MatMul", &["x", "w1"], "a")
        .node("MatMul", &["a", "w2"], "y")
        .output("y");
    std::fs::write(&path, same.bytes()).unwrap();
    let mut coordinator = coordinator().await;
    let running = start(&coordinator, "n");
    let mut attached = coordinator.welcome(0, 1, false).await;
    attached.say(coordinator.open_job(path.to_str().unwrap())).await;
    assert_eq!(attached.opened().await.failure, None);
    // Segments 1 and 2 run the nodes of the first two layers.
    let task = Task::Capture { segment: SegmentId(2), shard: ShardId(0) };
    let mut roundings = Vec::new();
    for ((layer, chunk), rounding) in expected(setup(small_model(), &Settings::default())) {
        let blob = halfstep_proto::rounding::encode(&rounding).unwrap();
        let hash = halfstep_proto::BlobHash::of(&blob);
        coordinator.state.blobs.lock().unwrap().insert(hash, blob);
        roundings.push(((layer, chunk), hash));
    }
    coordinator.state.roundings.lock().unwrap().extend(roundings);
    let lease = coordinator.lease(0, task);
    attached.grant(lease, vec![]).await;
    assert_eq!(peaks(coordinator.outcome().await).len(), 1);
    let fetched = coordinator.state.fetched.lock().unwrap().clone();
    let asked = |name: &str| fetched.contains(&BlobName::Constant(name.into()));
    assert!(asked("w1") && asked("w2"), "{fetched:?}");
    assert_eq!(coordinator.state.same.lock().unwrap().iter().collect::<Vec<_>>(), ["w1"]);
    drop(running);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_job_is_forgotten_and_another_can_be_opened() {
    let mut coordinator = coordinator().await;
    let running = start(&coordinator, "n");
    let (mut attached, _) = coordinator.take_in(0, 1).await;
    let lease = coordinator.lease(0, capture(0));
    attached.grant(lease, vec![]).await;
    coordinator.outcome().await;
    attached.say(Say::Close(wire::CloseJob { job: job_to_wire(JobId([1; 16])) })).await;
    attached.say(coordinator.open_job("")).await;
    let inventory: Inventory = attached.opened().await.inventory.unwrap().try_into().unwrap();
    assert_eq!(inventory.held.len(), 1, "closing another job closes nothing");
    attached.say(Say::Close(wire::CloseJob { job: job_to_wire(JOB) })).await;
    attached.say(coordinator.open_job("")).await;
    let inventory: Inventory = attached.opened().await.inventory.unwrap().try_into().unwrap();
    assert_eq!(inventory, Inventory::default());
    drop(running);
}

/// The coordinator must not wait for a result that it has refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_rounding_that_the_coordinator_lost_is_uploaded_again() {
    let mut coordinator = coordinator().await;
    let running = start(&coordinator, "n");
    let (attached, _) = coordinator.take_in(0, 1).await;
    let mut driver = Driver::new(coordinator, vec![(attached, Arc::clone(&running.node))]);
    driver.coordinator.state.lose_blobs.store(1, Ordering::SeqCst);
    driver.stage(SegmentId(0)).await;
    assert_eq!(driver.coordinator.state.lose_blobs.load(Ordering::SeqCst), 0);
    let solved = driver.coordinator.state.roundings.lock().unwrap().len();
    assert_eq!(solved, driver.coordinator.plan().layers[0].chunks.len());
}
