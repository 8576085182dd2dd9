//! Ready tasks of one group, found in logarithmic time: by owner where tasks belong to shards, else in order.

use halfstep_work::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// Owner of shards that nobody owns.
pub(super) const NOBODY: NodeId = NodeId(u32::MAX);

/// Ready shards of one group, by who owns them.
#[derive(Debug, Default)]
pub(super) struct ShardQueue {
    by_owner: BTreeMap<NodeId, BTreeSet<u32>>,
    len: usize,
    lengths: BTreeSet<(usize, NodeId)>,
}

impl ShardQueue {
    pub(super) fn insert(&mut self, owner: NodeId, shard: u32) {
        let shards = self.by_owner.entry(owner).or_default();
        let before = shards.len();
        shards.insert(shard);
        let after = shards.len();
        self.len += after - before;
        self.relength(owner, before, after);
    }

    pub(super) fn remove(&mut self, owner: NodeId, shard: u32) -> bool {
        let Some(shards) = self.by_owner.get_mut(&owner) else { return false };
        let before = shards.len();
        let found = shards.remove(&shard);
        let after = shards.len();
        self.len -= before - after;
        if after == 0 {
            self.by_owner.remove(&owner);
        }
        self.relength(owner, before, after);
        found
    }

    fn relength(&mut self, owner: NodeId, before: usize, after: usize) {
        if before != after {
            self.lengths.remove(&(before, owner));
            if after > 0 {
                self.lengths.insert((after, owner));
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_owner.is_empty()
    }

    pub(super) fn contains(&self, owner: NodeId, shard: u32) -> bool {
        self.by_owner.get(&owner).is_some_and(|shards| shards.contains(&shard))
    }

    /// The first ready shard of an owner that is wanted.
    pub(super) fn first(&self, owner: NodeId, wanted: impl Fn(u32) -> bool) -> Option<u32> {
        self.by_owner.get(&owner)?.iter().copied().find(|shard| wanted(*shard))
    }

    /// The last ready shard of an owner that is wanted: the one it would come to last.
    pub(super) fn last(&self, owner: NodeId, wanted: impl Fn(u32) -> bool) -> Option<u32> {
        self.by_owner.get(&owner)?.iter().rev().copied().find(|shard| wanted(*shard))
    }

    /// How many ready shards an owner has.
    pub(super) fn len_of(&self, owner: NodeId) -> usize {
        self.by_owner.get(&owner).map_or(0, BTreeSet::len)
    }

    /// Owners by how much they have to do, the most first.
    pub(super) fn longest(&self) -> impl Iterator<Item = (usize, NodeId)> + '_ {
        self.lengths.iter().rev().copied()
    }
}

/// Ready tasks of one group.
#[derive(Debug)]
pub(super) enum Queue {
    /// One per shard.
    Shards(ShardQueue),
    /// Slices or chunks: whoever comes first.
    Places(BTreeSet<u32>),
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Shards(queue) => queue.len,
            Self::Places(places) => places.len(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Shards(queue) => queue.is_empty(),
            Self::Places(places) => places.is_empty(),
        }
    }
}
