//! The fleet's targets: messages of other processes and the blobs that go with them.
//!
//! Whatever is read must be written as the same message or bytes again.

use anyhow::Result;
use bytes::Bytes;
use halfstep_proto::{BlobHash, BlobName, Commit, DoneRef, Fetch, JobEvent, rounding, tensors, wire};
use halfstep_quant::{Encodings, Granularity, Scheme};
use halfstep_work::{
    ChunkId, ChunkReport, Cost, Failure, FailureClass, Grant, GroupAnswer, GroupOrder, Held, Holding,
    InputTensor, Inventory, JobId, LayerId, Lease, LeaseId, NodeDescription, NodeId, PeakRecord, RangeId,
    Round, Rounding, ScalarKind, SegmentId, ShardId, SliceId, Task, Verdict, Wanted,
};
use prost::Message;
use std::fmt::Debug;
use std::sync::Arc;

/// Reads a rounding's blob: as it is, and under a correct checksum, which mutation does not find.
pub(crate) fn rounding(data: &[u8]) -> Result<()> {
    let body = data.split_last_chunk::<4>().map_or(data, |(body, _)| body);
    for blob in [data, &[body, &crc32c::crc32c(body).to_le_bytes()].concat()] {
        if let Ok(read) = rounding::decode(blob) {
            assert_eq!(rounding::encode(&read).expect("what was read can be written"), blob);
        }
    }
    Ok(())
}

/// Reads a blob of tensors.
pub(crate) fn tensors(data: &[u8]) -> Result<()> {
    let Ok(read) = tensors::decode(&Bytes::copy_from_slice(data)) else { return Ok(()) };
    let again = tensors::encode(&read).expect("what was read can be written");
    assert_eq!(tensors::decode(&again).expect("what was written can be read"), read);
    Ok(())
}

/// Reads a message; the first byte says of which kind.
pub(crate) fn message(data: &[u8]) -> Result<()> {
    let Some((kind, data)) = data.split_first() else { return Ok(()) };
    match kind % 10 {
        0 => again::<wire::Lease, Lease>(data, |lease| lease.into()),
        1 => again::<wire::Grant, Grant>(data, |grant| (JobId([0; 16]), grant).into()),
        2 => again::<wire::Inventory, Inventory>(data, |inventory| inventory.into()),
        3 => again::<wire::CommitRequest, Commit>(data, |commit| commit.clone().into()),
        4 => again::<wire::CommitReply, Verdict>(data, |verdict| (*verdict).into()),
        5 => again::<wire::FetchRequest, Fetch>(data, |fetch| fetch.clone().into()),
        6 => again::<wire::NodeDescription, NodeDescription>(data, |node| node.into()),
        7 => event(data),
        8 => again::<wire::GroupOrder, (u64, GroupOrder)>(data, |order| order.clone().into()),
        _ => again::<wire::GroupAnswer, (u64, GroupAnswer)>(data, |answer| answer.clone().into()),
    }
    Ok(())
}

fn again<W: Message + Default, T: TryFrom<W> + PartialEq + Debug>(data: &[u8], send: impl Fn(&T) -> W) {
    let Ok(message) = W::decode(data) else { return };
    let Ok(read) = T::try_from(message) else { return };
    let back = T::try_from(send(&read)).ok().expect("what was read can be sent and read");
    assert_eq!(back, read);
}

fn event(data: &[u8]) {
    let Ok(read) = JobEvent::try_from(&wire::WatchEvent { json: data.to_vec() }) else { return };
    wire::WatchEvent::try_from(&read).expect("what was read can be written");
}

pub(crate) fn roundings() -> Result<Vec<Vec<u8>>> {
    let grids = [
        (4, Scheme::Symmetric, Granularity::PerTensor, 1),
        (8, Scheme::Asymmetric, Granularity::PerChannel, 2),
        (16, Scheme::SymmetricStrict, Granularity::PerGroup { group_size: 2 }, 4),
    ];
    let blob = |(bits, scheme, granularity, entries)| {
        let encodings = Encodings {
            bits,
            scheme,
            granularity,
            rows: 2,
            cols: 3,
            scale: vec![0.5; entries],
            zero_point: vec![0; entries],
        };
        let (layer, chunk, report) = (LayerId(1), ChunkId(2), ChunkReport::default());
        Ok(rounding::encode(&Rounding { layer, chunk, encodings, q: vec![0, 1, 2, 3, 4, 5], report })?
            .to_vec())
    };
    grids.into_iter().map(blob).collect()
}

pub(crate) fn tensor_blobs() -> Result<Vec<Vec<u8>>> {
    let tensor = |name: &str, kind: ScalarKind, shape: &[usize]| InputTensor {
        name: name.into(),
        kind,
        shape: shape.to_vec(),
        bytes: vec![0; shape.iter().product::<usize>() * kind.size()].into(),
    };
    let all = [
        tensor("x", ScalarKind::F32, &[2, 3]),
        tensor("mask", ScalarKind::Bool, &[]),
        tensor("", ScalarKind::I64, &[0]),
    ];
    Ok(vec![tensors::encode(&all)?.to_vec(), tensors::encode(&[])?.to_vec()])
}

pub(crate) fn messages() -> Result<Vec<Vec<u8>>> {
    let peaks = vec![PeakRecord {
        layer: LayerId(1),
        use_index: 0,
        full_precision: 1.5,
        quantized: f32::NAN,
        positions: 9,
    }];
    let (segment, shard) = (SegmentId(1), ShardId(2));
    let task = Task::Accumulate { segment, shard, peaks: Arc::new(peaks.clone()) };
    let lease = Lease { id: LeaseId(1 << 32), node: NodeId(3), attempt: 2, task };
    let held = vec![
        Held::Carry { range: RangeId(0), segment, shard },
        Held::Sums { segment, shards: vec![ShardId(0), ShardId(4)] },
        Held::Means { layer: LayerId(1), slice: SliceId(2) },
    ];
    let holding = |held| Holding { node: NodeId(3), address: "host:7421".into(), held };
    let grant = Grant { lease: lease.clone(), holdings: held.iter().cloned().map(holding).collect() };
    let inventory =
        Inventory { held, captured: vec![(segment, shard, peaks.clone())], leases: vec![lease.clone()] };
    let job = JobId([7; 16]);
    let commit = |outcome| Commit {
        job,
        node: NodeId(3),
        epoch: 1,
        lease: LeaseId(5),
        attempt: 1,
        outcome,
        cost: Cost { seconds: 0.5, refine_seconds: 0.25, bytes_fetched: 10 },
    };
    let wanted = Wanted::SumsSlice { layer: LayerId(1), slice: SliceId(0), shards: vec![ShardId(1)] };
    let node = NodeDescription {
        name: "a".into(),
        slots: 2,
        device: "cpu".into(),
        engine: "rten".into(),
        flops_per_second: 1e9,
        memory_bytes: 1 << 30,
        exchange: "NCCL 2.27.3".into(),
    };
    let join = GroupOrder::Join { id: Bytes::from_static(&[5; 128]), rank: 1, size: 2 };
    let shards = vec![ShardId(0), ShardId(4)];
    let round = Round { job, number: 3, layer: LayerId(1), shards, peaks: peaks.clone() };
    let named = GroupAnswer::Named(Bytes::from_static(&[5; 128]));
    let failure = Failure { class: FailureClass::Damaged, message: "checksum".into() };
    Ok(vec![
        kind(0, &wire::Lease::from(&lease)),
        kind(1, &wire::Grant::from((job, &grant))),
        kind(2, &wire::Inventory::from(&inventory)),
        kind(3, &wire::CommitRequest::from(commit(Ok(DoneRef::Captured { peaks })))),
        kind(3, &wire::CommitRequest::from(commit(Ok(DoneRef::Solved(BlobHash::of(b"")))))),
        kind(3, &wire::CommitRequest::from(commit(Err(failure)))),
        kind(4, &wire::CommitReply::from(Verdict::Stale)),
        kind(5, &wire::FetchRequest::from(Fetch::new(job, BlobName::Held(wanted)))),
        kind(5, &wire::FetchRequest::from(Fetch::new(job, BlobName::Constant("w".into())))),
        kind(6, &wire::NodeDescription::from(&node)),
        kind(8, &wire::GroupOrder::from((1, join))),
        kind(8, &wire::GroupOrder::from((1, GroupOrder::Round(round)))),
        kind(9, &wire::GroupAnswer::from((1, named))),
        kind(9, &wire::GroupAnswer::from((1, GroupAnswer::Failed("why".into())))),
        [b"\x07".as_slice(), &wire::WatchEvent::try_from(&JobEvent::Writing)?.json].concat(),
    ])
}

fn kind(number: u8, message: &impl Message) -> Vec<u8> {
    [&[number], message.encode_to_vec().as_slice()].concat()
}
