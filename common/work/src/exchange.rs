//! What a coordinator and the nodes of a group say to each other: a group adds up statistics between its devices, so that
//! they need not be fetched.
//!
//! A group is a help, never a need: what it adds up is what fetching would have given, and whoever finds nothing there
//! fetches. Every word names the group's epoch; words of another epoch are of no account.
//! Not here: how a group adds (`compute`), when there is one (`coordinator::exchange`).

use crate::{JobId, LayerId, PeakRecord, ShardId};
use bytes::Bytes;

/// What a coordinator tells a node.
#[derive(Clone, Debug, PartialEq)]
pub enum GroupOrder {
    /// Make a name for the group; the node is its first member.
    Name,
    /// Join it.
    Join {
        /// What the first member made.
        id: Bytes,
        /// The node's place, from 0.
        rank: u32,
        /// Members.
        size: u32,
    },
    /// Add up a layer's sums, after the rounds before.
    Round(Round),
    /// The group is no more, or the node is not in it: whatever is under way is to be given up.
    Leave,
}

/// All members add up one layer's sums.
#[derive(Clone, Debug, PartialEq)]
pub struct Round {
    /// Of which job.
    pub job: JobId,
    /// From 0 in every group, without gaps.
    pub number: u64,
    /// The layer whose own statistics they are.
    pub layer: LayerId,
    /// The shards that this node gives: all that are in its sums; none if it has no sums.
    pub shards: Vec<ShardId>,
    /// What was agreed on for the layer's uses.
    pub peaks: Vec<PeakRecord>,
}

/// What a node answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupAnswer {
    /// The name, for all members.
    Named(Bytes),
    /// It has joined, and so have all others.
    Joined,
    /// It has the sums of this round.
    Added(u64),
    /// It is out of the group, in this state, for this reason.
    Failed(String),
}
