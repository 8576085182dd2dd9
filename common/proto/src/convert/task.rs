//! Tasks, leases and peaks.

use super::{PEAKS_MAX, all, present};
use crate::{WireError, wire};
use halfstep_work::{
    ChunkId, LayerId, Lease, LeaseId, NodeId, PeakRecord, RangeId, SegmentId, ShardId, SliceId, Task,
};
use std::sync::Arc;
use wire::task::Kind;

pub(super) fn peaks_to_wire(peaks: &[PeakRecord]) -> Vec<wire::Peak> {
    peaks.iter().map(|peak| (*peak).into()).collect()
}

pub(super) fn peaks_from_wire(peaks: Vec<wire::Peak>) -> Result<Vec<PeakRecord>, WireError> {
    super::at_most("list of peaks", peaks.len(), PEAKS_MAX)?;
    Ok(peaks.into_iter().map(PeakRecord::from).collect())
}

impl From<PeakRecord> for wire::Peak {
    fn from(peak: PeakRecord) -> Self {
        Self {
            layer: peak.layer.0,
            use_index: peak.use_index,
            full_precision_bits: peak.full_precision.to_bits(),
            quantized_bits: peak.quantized.to_bits(),
            positions: peak.positions,
        }
    }
}

/// Every peak is a possible one: NaN and infinity fail the layer later, with their cause.
impl From<wire::Peak> for PeakRecord {
    fn from(peak: wire::Peak) -> Self {
        Self {
            layer: LayerId(peak.layer),
            use_index: peak.use_index,
            full_precision: f32::from_bits(peak.full_precision_bits),
            quantized: f32::from_bits(peak.quantized_bits),
            positions: peak.positions,
        }
    }
}

impl From<&Task> for wire::Task {
    fn from(task: &Task) -> Self {
        let kind = match task {
            Task::Forward { range, shard } => Kind::Forward(wire::Forward { range: range.0, shard: shard.0 }),
            Task::Capture { segment, shard } => {
                Kind::Capture(wire::Capture { segment: segment.0, shard: shard.0 })
            }
            Task::Accumulate { segment, shard, peaks } => Kind::Accumulate(wire::Accumulate {
                segment: segment.0,
                shard: shard.0,
                peaks: peaks_to_wire(peaks),
            }),
            Task::Reduce { layer, slice } => Kind::Reduce(wire::Reduce { layer: layer.0, slice: slice.0 }),
            Task::Solve { layer, chunk } => Kind::Solve(wire::Solve { layer: layer.0, chunk: chunk.0 }),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::Task> for Task {
    type Error = WireError;

    fn try_from(task: wire::Task) -> Result<Self, WireError> {
        Ok(match present(task.kind, "kind of task")? {
            Kind::Forward(t) => Self::Forward { range: RangeId(t.range), shard: ShardId(t.shard) },
            Kind::Capture(t) => Self::Capture { segment: SegmentId(t.segment), shard: ShardId(t.shard) },
            Kind::Accumulate(t) => Self::Accumulate {
                segment: SegmentId(t.segment),
                shard: ShardId(t.shard),
                peaks: Arc::new(peaks_from_wire(t.peaks)?),
            },
            Kind::Reduce(t) => Self::Reduce { layer: LayerId(t.layer), slice: SliceId(t.slice) },
            Kind::Solve(t) => Self::Solve { layer: LayerId(t.layer), chunk: ChunkId(t.chunk) },
        })
    }
}

impl From<&Lease> for wire::Lease {
    fn from(lease: &Lease) -> Self {
        Self {
            id: lease.id.0,
            node: lease.node.0,
            attempt: lease.attempt,
            task: Some(wire::Task::from(&lease.task)),
        }
    }
}

impl TryFrom<wire::Lease> for Lease {
    type Error = WireError;

    fn try_from(lease: wire::Lease) -> Result<Self, WireError> {
        if lease.attempt == 0 {
            return Err(WireError::new(
                format!("attempt of lease {}", lease.id),
                "expected at least 1, found 0",
            ));
        }
        Ok(Self {
            id: LeaseId(lease.id),
            node: NodeId(lease.node),
            attempt: lease.attempt,
            task: present(lease.task, "task of a lease")?.try_into()?,
        })
    }
}

pub(super) fn leases_from_wire(leases: Vec<wire::Lease>) -> Result<Vec<Lease>, WireError> {
    all(leases, "list of leases", super::COUNT_MAX)
}
