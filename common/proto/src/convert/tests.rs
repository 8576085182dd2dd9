//! Round trips of every variant, and refusals.

use super::*;
use crate::data::PROBE_MAX;
use crate::{BlobHash, wire};
use halfstep_work::*;
use proptest::prelude::*;
use prost::Message;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;

/// Sends every row through bytes and back. `variant` numbers the variants without a wildcard, so that a new one does
/// not compile until it has a number, and fails here until it has a row.
fn check<T, W>(rows: &[T], variants: usize, variant: impl Fn(&T) -> usize, send: impl Fn(&T) -> W)
where
    T: TryFrom<W> + PartialEq + Debug,
    T::Error: Debug,
    W: Message + Default,
{
    let seen: BTreeSet<usize> = rows.iter().map(variant).collect();
    assert_eq!(seen, (0..variants).collect(), "every variant has a row");
    for row in rows {
        let bytes = send(row).encode_to_vec();
        let received = W::decode(bytes.as_slice()).unwrap();
        assert_eq!(&T::try_from(received).unwrap(), row);
    }
}

fn peak(layer: u32, value: f32) -> PeakRecord {
    PeakRecord {
        layer: LayerId(layer),
        use_index: 3,
        full_precision: value,
        quantized: -0.0,
        positions: u64::MAX,
    }
}

fn peaks() -> Vec<PeakRecord> {
    vec![peak(0, 1.5), peak(1, f32::NAN), peak(2, f32::INFINITY), peak(u32::MAX, f32::from_bits(0x7fc0_1234))]
}

fn shards() -> Vec<ShardId> {
    vec![ShardId(0), ShardId(2), ShardId(u32::MAX)]
}

fn tasks() -> Vec<Task> {
    vec![
        Task::Forward { range: RangeId(1), shard: ShardId(2) },
        Task::Capture { segment: SegmentId(3), shard: ShardId(4) },
        Task::Accumulate { segment: SegmentId(5), shard: ShardId(6), peaks: Arc::new(peaks()) },
        Task::Reduce { layer: LayerId(7), slice: SliceId(8) },
        Task::Solve { layer: LayerId(9), chunk: ChunkId(10) },
    ]
}

fn leases() -> Vec<Lease> {
    let lease =
        |(n, task)| Lease { id: LeaseId(u64::MAX - n), node: NodeId(12), attempt: 1 + n as u32, task };
    (0..).zip(tasks()).map(lease).collect()
}

fn held() -> Vec<Held> {
    vec![
        Held::Carry { range: RangeId(1), segment: SegmentId(2), shard: ShardId(3) },
        Held::Sums { segment: SegmentId(4), shards: shards() },
        Held::Means { layer: LayerId(5), slice: SliceId(6) },
    ]
}

fn wanted() -> Vec<Wanted> {
    vec![
        Wanted::Carry { range: RangeId(1), segment: SegmentId(2), shard: ShardId(3) },
        Wanted::SumsSlice { layer: LayerId(4), slice: SliceId(5), shards: shards() },
        Wanted::MeansSlice { layer: LayerId(6), slice: SliceId(7) },
        Wanted::Samples { layer: LayerId(8), shards: shards() },
    ]
}

fn dones() -> Vec<DoneRef> {
    vec![
        DoneRef::Forwarded,
        DoneRef::Captured { peaks: peaks() },
        DoneRef::Accumulated,
        DoneRef::Reduced,
        DoneRef::Solved(BlobHash::of(b"rounding")),
    ]
}

fn commits() -> Vec<Commit> {
    let failures =
        FailureClass::ALL.map(|class| Err(Failure { class, message: format!("{class:?} it was") }));
    let commit = |outcome| Commit {
        job: JobId([7; 16]),
        node: NodeId(1),
        epoch: 2,
        lease: LeaseId(3),
        attempt: 4,
        outcome,
        cost: Cost { seconds: 0.5, refine_seconds: 0.25, bytes_fetched: 9 },
    };
    dones().into_iter().map(Ok).chain(failures).map(commit).collect()
}

#[test]
fn tasks_come_back() {
    let variant = |task: &Task| match task {
        Task::Forward { .. } => 0,
        Task::Capture { .. } => 1,
        Task::Accumulate { .. } => 2,
        Task::Reduce { .. } => 3,
        Task::Solve { .. } => 4,
    };
    check(&tasks(), 5, variant, |task| wire::Task::from(task));
    check(&leases(), 5, |lease| variant(&lease.task), |lease| wire::Lease::from(lease));
}

#[test]
fn held_and_wanted_state_come_back() {
    let variant = |held: &Held| match held {
        Held::Carry { .. } => 0,
        Held::Sums { .. } => 1,
        Held::Means { .. } => 2,
    };
    check(&held(), 3, variant, |held| wire::Held::from(held));
    let variant = |wanted: &Wanted| match wanted {
        Wanted::Carry { .. } => 0,
        Wanted::SumsSlice { .. } => 1,
        Wanted::MeansSlice { .. } => 2,
        Wanted::Samples { .. } => 3,
    };
    check(&wanted(), 4, variant, |wanted| wire::Wanted::from(wanted));
}

#[test]
fn grants_and_inventories_come_back() {
    let holding = |(n, held)| Holding { node: NodeId(n), address: format!("host-{n}:{}", 7000 + n), held };
    let grant = Grant { lease: leases().remove(2), holdings: (0..).zip(held()).map(holding).collect() };
    let job = JobId([3; 16]);
    check(&[grant], 1, |_| 0, |grant| wire::Grant::from((job, grant)));
    let captured = vec![(SegmentId(1), ShardId(2), peaks()), (SegmentId(1), ShardId(3), vec![])];
    let inventory = Inventory { held: held(), captured, leases: leases() };
    check(&[inventory, Inventory::default()], 1, |_| 0, |inventory| wire::Inventory::from(inventory));
}

#[test]
fn nodes_come_back() {
    let node = NodeDescription {
        name: "näme".into(),
        slots: 4,
        device: "cpu x86-64-v4".into(),
        engine: "rten".into(),
        flops_per_second: 1.5e11,
        memory_bytes: u64::MAX,
        exchange: "nccl 2.27.3".into(),
    };
    check(std::slice::from_ref(&node), 1, |_| 0, |node| wire::NodeDescription::from(node));
    for (change, message) in [
        (|n: &mut wire::NodeDescription| n.slots = 0, "slots of a node: expected 1 to 4096, found 0"),
        (|n: &mut wire::NodeDescription| n.slots = 5000, "slots of a node: expected 1 to 4096, found 5000"),
        (
            |n: &mut wire::NodeDescription| n.flops_per_second = f64::NAN,
            "speed of a node: expected a finite number from 0, found NaN",
        ),
        (
            |n: &mut wire::NodeDescription| n.device = "x".repeat(5000),
            "device of a node, in bytes: expected at most 4096, found 5000",
        ),
    ] as [(fn(&mut wire::NodeDescription), &str); 4]
    {
        let mut sent = wire::NodeDescription::from(&node);
        change(&mut sent);
        assert_eq!(NodeDescription::try_from(sent).unwrap_err().to_string(), message);
    }
}

#[test]
fn words_of_groups_come_back() {
    let round = |shards: &[u32]| {
        GroupOrder::Round(Round {
            job: JobId([7; 16]),
            number: u64::MAX,
            layer: LayerId(4),
            shards: shards.iter().map(|shard| ShardId(*shard)).collect(),
            peaks: peaks(),
        })
    };
    let id = bytes::Bytes::from_static(&[1, 2, 3]);
    let join = GroupOrder::Join { id: id.clone(), rank: 1, size: 3 };
    let orders = [GroupOrder::Name, join.clone(), round(&[]), round(&[0, 5]), GroupOrder::Leave];
    let orders = orders.map(|order| (9, order));
    let variant = |(_, order): &(u64, GroupOrder)| match order {
        GroupOrder::Name => 0,
        GroupOrder::Join { .. } => 1,
        GroupOrder::Round(_) => 2,
        GroupOrder::Leave => 3,
    };
    check(&orders, 4, variant, |order| wire::GroupOrder::from(order.clone()));
    let failed = GroupAnswer::Failed("why".into());
    let answers = [GroupAnswer::Named(id), GroupAnswer::Joined, GroupAnswer::Added(3), failed];
    let answers = answers.map(|answer| (u64::MAX, answer));
    let variant = |(_, answer): &(u64, GroupAnswer)| match answer {
        GroupAnswer::Named(_) => 0,
        GroupAnswer::Joined => 1,
        GroupAnswer::Added(_) => 2,
        GroupAnswer::Failed(_) => 3,
    };
    check(&answers, 4, variant, |answer| wire::GroupAnswer::from(answer.clone()));

    let wrong = |order: GroupOrder| {
        <(u64, GroupOrder)>::try_from(wire::GroupOrder::from((1, order))).unwrap_err().to_string()
    };
    let place = |rank, size| GroupOrder::Join { id: bytes::Bytes::new(), rank, size };
    let expected = "rank in a group: expected less than the size, and that at most 65536, found 3 of 3";
    assert_eq!(wrong(place(3, 3)), expected);
    assert!(wrong(place(3, 70_000)).ends_with("found 3 of 70000"));
    let long = GroupOrder::Join { id: vec![0; 5000].into(), rank: 0, size: 1 };
    assert_eq!(wrong(long), "name of a group, in bytes: expected at most 4096, found 5000");
    assert_eq!(wrong(round(&[5, 5])), "list of shards: expected ascending numbers, found 5 before 5");
    let long = wire::GroupAnswer::from((1, GroupAnswer::Named(vec![0; 5000].into())));
    let error = <(u64, GroupAnswer)>::try_from(long).unwrap_err().to_string();
    assert_eq!(error, "name of a group, in bytes: expected at most 4096, found 5000");
}

#[test]
fn commits_with_every_result_and_every_failure_come_back() {
    let class = |class: &FailureClass| match class {
        FailureClass::BadInput => 0,
        FailureClass::NonFinite => 1,
        FailureClass::OutOfMemory => 2,
        FailureClass::Storage => 3,
        FailureClass::NodeLost => 4,
        FailureClass::PeerLost => 5,
        FailureClass::Hung => 6,
        FailureClass::Damaged => 7,
        FailureClass::HandedBack => 8,
        FailureClass::Nondeterminism => 9,
        FailureClass::Cancelled => 10,
        FailureClass::Internal => 11,
    };
    let variant = |commit: &Commit| match &commit.outcome {
        Ok(DoneRef::Forwarded) => 0,
        Ok(DoneRef::Captured { .. }) => 1,
        Ok(DoneRef::Accumulated) => 2,
        Ok(DoneRef::Reduced) => 3,
        Ok(DoneRef::Solved(_)) => 4,
        Err(failure) => 5 + class(&failure.class),
    };
    check(&commits(), 17, variant, |commit| wire::CommitRequest::from(commit.clone()));
}

#[test]
fn verdicts_come_back() {
    let variant = |verdict: &Verdict| match verdict {
        Verdict::Accepted => 0,
        Verdict::Duplicate => 1,
        Verdict::Stale => 2,
    };
    let rows = [Verdict::Accepted, Verdict::Duplicate, Verdict::Stale];
    check(&rows, 3, variant, |verdict| wire::CommitReply::from(*verdict));
    let missing = Verdict::try_from(wire::CommitReply { verdict: 0 }).unwrap_err();
    assert_eq!(missing.to_string(), "verdict: is missing");
    let newer = Verdict::try_from(wire::CommitReply { verdict: 77 }).unwrap_err();
    assert_eq!(newer.to_string(), "verdict: number 77 means nothing to this version");
}

#[test]
fn fetches_of_everything_come_back() {
    let names = wanted().into_iter().map(BlobName::Held).chain([
        BlobName::Artefact(BlobHash::of(b"a")),
        BlobName::Program,
        BlobName::Constant("conv.weight".into()),
        BlobName::Inputs(ShardId(0)),
        BlobName::Rounding { layer: LayerId(1), chunk: ChunkId(0) },
        BlobName::Probe(PROBE_MAX),
    ]);
    let variant = |fetch: &Fetch| match fetch.name {
        BlobName::Artefact(_) => 0,
        BlobName::Program => 1,
        BlobName::Constant(_) => 2,
        BlobName::Inputs(_) => 3,
        BlobName::Rounding { .. } => 4,
        BlobName::Held(_) => 5,
        BlobName::Probe(_) => 6,
    };
    let row = |(offset, name)| Fetch {
        job: JobId([9; 16]),
        name,
        offset,
        have: (offset % 2 == 0).then(|| BlobHash::of(b"have")),
    };
    let rows: Vec<Fetch> = (0..).zip(names).map(row).collect();
    check(&rows, 7, variant, |fetch| wire::FetchRequest::from(fetch.clone()));
    let large = Fetch::new(JobId([9; 16]), BlobName::Probe(PROBE_MAX + 1));
    let refused = Fetch::try_from(wire::FetchRequest::from(large)).unwrap_err();
    assert_eq!(refused.to_string(), "bytes of a probe: expected at most 4194304, found 4194305");
}

#[test]
fn results_are_named_and_resolved() {
    let encodings = halfstep_quant::Encodings {
        bits: 4,
        scheme: halfstep_quant::Scheme::Symmetric,
        granularity: halfstep_quant::Granularity::PerTensor,
        rows: 1,
        cols: 2,
        scale: vec![0.5],
        zero_point: vec![0],
    };
    let rounding = Arc::new(Rounding {
        layer: LayerId(0),
        chunk: ChunkId(0),
        encodings,
        q: vec![1, -8],
        report: ChunkReport::default(),
    });
    let done = Done::Solved(rounding.clone());
    let named =
        DoneRef::naming(done.clone(), |r| crate::rounding::encode(r).map(|b| BlobHash::of(&b))).unwrap();
    assert!(matches!(named, DoneRef::Solved(_)));
    assert_eq!(named.resolve(|_| Ok::<_, WireError>(rounding)).unwrap(), done);
}

#[test]
fn what_is_missing_or_absurd_is_named() {
    let refused = |error: WireError, message: &str| assert_eq!(error.to_string(), message);
    refused(Task::try_from(wire::Task { kind: None }).unwrap_err(), "kind of task: is missing");
    refused(job_from_wire(&[1; 15]).unwrap_err(), "job id: expected 16 bytes, found 15");
    let lease = wire::Lease { id: 5, node: 0, attempt: 1, task: None };
    refused(Lease::try_from(lease.clone()).unwrap_err(), "task of a lease: is missing");
    let zero = wire::Lease { attempt: 0, ..lease };
    refused(Lease::try_from(zero).unwrap_err(), "attempt of lease 5: expected at least 1, found 0");
    let sums = |shards| wire::Held { kind: Some(wire::held::Kind::Sums(wire::Sums { segment: 0, shards })) };
    let twice = Held::try_from(sums(vec![1, 4, 4])).unwrap_err();
    refused(twice, "list of shards: expected ascending numbers, found 4 before 4");
    let many = Held::try_from(sums((0..=COUNT_MAX as u32).collect())).unwrap_err();
    refused(many, "list of shards: expected at most 262144, found 262145");
    let done = wire::Done { kind: Some(wire::done::Kind::Solved(vec![0; 5])) };
    refused(DoneRef::try_from(done).unwrap_err(), "hash: expected 32 bytes, found 5");
    let failure = wire::Failure { class: 0, message: String::new() };
    refused(Failure::try_from(failure).unwrap_err(), "class of a failure: is missing");
    let cost = wire::Cost { seconds: -1.0, ..Default::default() };
    refused(
        Cost::try_from(cost).unwrap_err(),
        "seconds of a task: expected a finite number from 0, found -1",
    );
}

#[test]
fn long_explanations_are_cut_between_characters() {
    let failure = Failure { class: FailureClass::Hung, message: format!("x{}", "é".repeat(MESSAGE_MAX)) };
    let sent = wire::Failure::from(failure);
    assert_eq!(sent.message.len(), MESSAGE_MAX - 1);
}

fn read_as_everything(bytes: &[u8]) {
    fn read<W: Message + Default, T: TryFrom<W>>(bytes: &[u8]) {
        if let Ok(message) = W::decode(bytes) {
            let _ = T::try_from(message);
        }
    }
    read::<wire::Task, Task>(bytes);
    read::<wire::Lease, Lease>(bytes);
    read::<wire::Grant, Grant>(bytes);
    read::<wire::Held, Held>(bytes);
    read::<wire::Wanted, Wanted>(bytes);
    read::<wire::Inventory, Inventory>(bytes);
    read::<wire::CommitRequest, Commit>(bytes);
    read::<wire::CommitReply, Verdict>(bytes);
    read::<wire::FetchRequest, Fetch>(bytes);
    read::<wire::NodeDescription, NodeDescription>(bytes);
    let _ = wire::WatchEvent::decode(bytes).map(|event| crate::JobEvent::try_from(&event));
}

proptest! {
    #[test]
    fn foreign_messages_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        read_as_everything(&bytes);
    }

    #[test]
    fn changed_messages_never_panic(row in 0usize..17, at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut bytes = wire::CommitRequest::from(commits().swap_remove(row)).encode_to_vec();
        let at = at.index(bytes.len());
        bytes[at] = to;
        read_as_everything(&bytes);
        let inventory = Inventory { held: held(), captured: vec![], leases: leases() };
        let mut bytes = wire::Inventory::from(&inventory).encode_to_vec();
        let at = at % bytes.len();
        bytes[at] = to;
        read_as_everything(&bytes);
    }
}
