//! Where the carries of each shard are: what a node fetches instead of running the model from its input.
//!
//! A hint, not a promise: a node that does not find a carry where it should be replays from one it finds.

use halfstep_work::{Held, NodeId, RangeId, SegmentId, ShardId};

/// Places remembered for one shard of one lane.
const PLACES_MAX: usize = 4;

/// Places of carries, by lane and shard.
#[derive(Debug)]
pub(super) struct Carries {
    lanes: Vec<Vec<Vec<(SegmentId, NodeId)>>>,
}

impl Carries {
    pub(super) fn new(lanes: usize, shards: usize) -> Self {
        Self { lanes: vec![vec![Vec::new(); shards]; lanes] }
    }

    fn places(&mut self, range: RangeId, shard: ShardId) -> Option<&mut Vec<(SegmentId, NodeId)>> {
        self.lanes.get_mut(range.index())?.get_mut(shard.index())
    }

    /// A node now has the carry after this segment, and no older one of that shard.
    pub(super) fn put(&mut self, range: RangeId, segment: SegmentId, shard: ShardId, node: NodeId) {
        let Some(places) = self.places(range, shard) else { return };
        places.retain(|(_, holder)| *holder != node);
        places.push((segment, node));
        places.sort_by_key(|(segment, node)| (std::cmp::Reverse(*segment), *node));
        places.truncate(PLACES_MAX);
    }

    /// A node is gone.
    pub(super) fn forget(&mut self, node: NodeId) {
        for places in self.lanes.iter_mut().flatten() {
            places.retain(|(_, holder)| *holder != node);
        }
    }

    /// Carries that are nearest of their shard and that this node alone has.
    pub(super) fn only_at(&self, node: NodeId) -> Vec<(RangeId, SegmentId, ShardId)> {
        let mut found = Vec::new();
        for (range, lane) in self.lanes.iter().enumerate() {
            for (shard, places) in lane.iter().enumerate() {
                let Some((nearest, _)) = places.first() else { continue };
                let mut holders = places.iter().take_while(|(segment, _)| segment == nearest);
                if holders.all(|(_, holder)| *holder == node) {
                    found.push((RangeId(range as u32), *nearest, ShardId(shard as u32)));
                }
            }
        }
        found
    }

    /// Which carry of a shard a node has.
    pub(super) fn at(&self, range: RangeId, shard: ShardId, node: NodeId) -> Option<SegmentId> {
        let places = self.lanes.get(range.index())?.get(shard.index())?;
        places.iter().find(|(_, holder)| *holder == node).map(|(segment, _)| *segment)
    }

    /// Whether nobody has run anything on this shard yet.
    pub(super) fn is_untouched(&self, range: usize, shard: usize) -> bool {
        self.lanes[range][shard].is_empty()
    }

    /// Carries that are of use for running a segment or what follows it, nearest first.
    ///
    /// `upto`: the last segment whose carry is of use; none if nothing precedes.
    pub(super) fn nearest(
        &self,
        range: RangeId,
        shard: ShardId,
        upto: Option<SegmentId>,
    ) -> Vec<(NodeId, Held)> {
        let places = &self.lanes[range.index()][shard.index()];
        let useful = places.iter().filter(|(segment, _)| upto.is_some_and(|upto| *segment <= upto));
        useful.map(|(segment, node)| (*node, Held::Carry { range, segment: *segment, shard })).collect()
    }
}
