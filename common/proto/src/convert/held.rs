//! Held state: what it is, who has it, what is asked of it, and grants that say where it is.

use super::task::{leases_from_wire, peaks_from_wire, peaks_to_wire};
use super::{COUNT_MAX, NAME_MAX, all, at_most, present, shards_from_wire, shards_to_wire};
use crate::{WireError, wire};
use halfstep_work::{
    Grant, Held, Holding, Inventory, LayerId, NodeId, PeakRecord, RangeId, SegmentId, ShardId, SliceId,
    Wanted,
};

impl From<&Held> for wire::Held {
    fn from(held: &Held) -> Self {
        use wire::held::Kind;
        let kind = match held {
            Held::Carry { range, segment, shard } => Kind::Carry(carry(*range, *segment, *shard)),
            Held::Sums { segment, shards } => {
                Kind::Sums(wire::Sums { segment: segment.0, shards: shards_to_wire(shards) })
            }
            Held::Means { layer, slice } => Kind::Means(wire::Means { layer: layer.0, slice: slice.0 }),
        };
        Self { kind: Some(kind) }
    }
}

fn carry(range: RangeId, segment: SegmentId, shard: ShardId) -> wire::Carry {
    wire::Carry { range: range.0, segment: segment.0, shard: shard.0 }
}

impl TryFrom<wire::Held> for Held {
    type Error = WireError;

    fn try_from(held: wire::Held) -> Result<Self, WireError> {
        use wire::held::Kind;
        Ok(match present(held.kind, "kind of held state")? {
            Kind::Carry(c) => Self::Carry {
                range: RangeId(c.range),
                segment: SegmentId(c.segment),
                shard: ShardId(c.shard),
            },
            Kind::Sums(s) => {
                Self::Sums { segment: SegmentId(s.segment), shards: shards_from_wire(s.shards)? }
            }
            Kind::Means(m) => Self::Means { layer: LayerId(m.layer), slice: SliceId(m.slice) },
        })
    }
}

impl From<&Wanted> for wire::Wanted {
    fn from(wanted: &Wanted) -> Self {
        use wire::wanted::Kind;
        let kind = match wanted {
            Wanted::Carry { range, segment, shard } => Kind::Carry(carry(*range, *segment, *shard)),
            Wanted::SumsSlice { layer, slice, shards } => {
                Kind::Sums(wire::SumsSlice { layer: layer.0, slice: slice.0, shards: shards_to_wire(shards) })
            }
            Wanted::MeansSlice { layer, slice } => {
                Kind::Means(wire::Means { layer: layer.0, slice: slice.0 })
            }
            Wanted::Samples { layer, shards } => {
                Kind::Samples(wire::Samples { layer: layer.0, shards: shards_to_wire(shards) })
            }
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::Wanted> for Wanted {
    type Error = WireError;

    fn try_from(wanted: wire::Wanted) -> Result<Self, WireError> {
        use wire::wanted::Kind;
        Ok(match present(wanted.kind, "kind of wanted state")? {
            Kind::Carry(c) => Self::Carry {
                range: RangeId(c.range),
                segment: SegmentId(c.segment),
                shard: ShardId(c.shard),
            },
            Kind::Sums(s) => Self::SumsSlice {
                layer: LayerId(s.layer),
                slice: SliceId(s.slice),
                shards: shards_from_wire(s.shards)?,
            },
            Kind::Means(m) => Self::MeansSlice { layer: LayerId(m.layer), slice: SliceId(m.slice) },
            Kind::Samples(s) => {
                Self::Samples { layer: LayerId(s.layer), shards: shards_from_wire(s.shards)? }
            }
        })
    }
}

impl From<&Holding> for wire::Holding {
    fn from(holding: &Holding) -> Self {
        Self {
            node: holding.node.0,
            address: holding.address.clone(),
            held: Some(wire::Held::from(&holding.held)),
        }
    }
}

impl TryFrom<wire::Holding> for Holding {
    type Error = WireError;

    fn try_from(holding: wire::Holding) -> Result<Self, WireError> {
        at_most("address of a holder, in bytes", holding.address.len(), NAME_MAX)?;
        Ok(Self {
            node: NodeId(holding.node),
            address: holding.address,
            held: present(holding.held, "held state of a holding")?.try_into()?,
        })
    }
}

/// Without its job, which the message around it names.
impl TryFrom<wire::Grant> for Grant {
    type Error = WireError;

    fn try_from(grant: wire::Grant) -> Result<Self, WireError> {
        Ok(Self {
            lease: present(grant.lease, "lease of a grant")?.try_into()?,
            holdings: all(grant.holdings, "list of holdings", COUNT_MAX)?,
        })
    }
}

/// Of one job.
impl From<(halfstep_work::JobId, &Grant)> for wire::Grant {
    fn from((job, grant): (halfstep_work::JobId, &Grant)) -> Self {
        Self {
            job: super::job_to_wire(job),
            lease: Some(wire::Lease::from(&grant.lease)),
            holdings: grant.holdings.iter().map(wire::Holding::from).collect(),
        }
    }
}

impl From<&Inventory> for wire::Inventory {
    fn from(inventory: &Inventory) -> Self {
        let captured = |(segment, shard, peaks): &(SegmentId, ShardId, Vec<PeakRecord>)| wire::Captured {
            segment: segment.0,
            shard: shard.0,
            peaks: peaks_to_wire(peaks),
        };
        Self {
            held: inventory.held.iter().map(wire::Held::from).collect(),
            captured: inventory.captured.iter().map(captured).collect(),
            leases: inventory.leases.iter().map(wire::Lease::from).collect(),
        }
    }
}

impl TryFrom<wire::Inventory> for Inventory {
    type Error = WireError;

    fn try_from(inventory: wire::Inventory) -> Result<Self, WireError> {
        at_most("list of captured shards", inventory.captured.len(), COUNT_MAX)?;
        let captured =
            |c: wire::Captured| Ok((SegmentId(c.segment), ShardId(c.shard), peaks_from_wire(c.peaks)?));
        Ok(Self {
            held: all(inventory.held, "list of held state", COUNT_MAX)?,
            captured: inventory.captured.into_iter().map(captured).collect::<Result<_, WireError>>()?,
            leases: leases_from_wire(inventory.leases)?,
        })
    }
}
