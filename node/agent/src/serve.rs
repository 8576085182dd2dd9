//! What other nodes may ask of this one, and what it says it has.
//!
//! Not here: how bytes travel (`proto`), their layout (`carry_wire`, `exec`).

use crate::job::{Job, lock};
use crate::{carry_wire, failure};
use bytes::Bytes;
use halfstep_exec::{encode_means, encode_samples, encode_sums};
use halfstep_work::{Failure, Held, Inventory, LayerId, RangeId, SegmentId, ShardId, SliceId, Wanted};
use std::sync::Arc;

impl Job {
    /// # Errors
    /// `PeerLost` if it is not held, or not as asked for.
    pub(crate) fn serve(&self, wanted: &Wanted) -> Result<Bytes, Failure> {
        match wanted {
            Wanted::Carry { range, segment, shard } => self.serve_carry(*range, *segment, *shard),
            Wanted::SumsSlice { layer, slice, shards } => {
                self.own_sums(*layer, *slice, shards).map(|sums| encode_sums(sums.as_ref()))
            }
            Wanted::MeansSlice { layer, slice } => self.serve_means(*layer, *slice),
            Wanted::Samples { layer, shards } => {
                self.own_samples(*layer, shards).map(|uses| encode_samples(&uses))
            }
        }
    }

    fn serve_carry(&self, range: RangeId, segment: SegmentId, shard: ShardId) -> Result<Bytes, Failure> {
        let found = self.snapshot((range, shard)).filter(|(boundary, _)| *boundary == segment.index() + 1);
        let (_, live) =
            found.ok_or_else(|| failure::peer(format!("carry of {range}, {segment}, {shard}: not held")))?;
        carry_wire::encode((range, segment, shard), &live)
    }

    fn serve_means(&self, layer: LayerId, slice: SliceId) -> Result<Bytes, Failure> {
        let rows = self.rows(layer, slice)?;
        let held = lock(&self.means).get(&layer).cloned();
        let found = held.and_then(|held| lock(&held).own_slice(slice, rows));
        let found = found.ok_or_else(|| failure::peer(format!("means of {layer}, {slice}: not held")))?;
        Ok(encode_means(&found))
    }

    /// What is held, and the latest peaks; leases are the daemon's to add.
    pub(crate) fn inventory(&self) -> Inventory {
        let begun = |(lane, boundary): (&(RangeId, ShardId), &usize)| {
            let start = self.plan.ranges.get(lane.0.index())?.start.max(1);
            let segment = SegmentId((boundary.checked_sub(1)?) as u32);
            (*boundary >= start).then_some(Held::Carry { range: lane.0, segment, shard: lane.1 })
        };
        let mut held: Vec<Held> = self.lanes.all().iter().filter_map(begun).collect();
        held.extend(lock(&self.sums).held());
        let means: Vec<_> =
            lock(&self.means).iter().map(|(layer, held)| (*layer, Arc::clone(held))).collect();
        for (layer, means) in means {
            held.extend(lock(&means).own().map(|slice| Held::Means { layer, slice }));
        }
        let captured = lock(&self.captured);
        let captured =
            captured.iter().map(|((_, shard), (segment, peaks))| (*segment, *shard, peaks.clone())).collect();
        Inventory { held, captured, leases: Vec::new() }
    }

    /// Forgets what the coordinator no longer counts on; carries and peaks stay true.
    pub(crate) fn fence(&self) {
        lock(&self.sums).clear();
        lock(&self.means).clear();
        self.together.forget(|_| true);
        lock(&self.gathered).clear();
        lock(&self.problems).clear();
    }
}
