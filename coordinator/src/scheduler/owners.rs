//! Which node each shard of a lane belongs to: shares by speed, moved as little as possible.
//!
//! A shard's owner runs all its stages, so its carry stays where it is. Shares follow the nodes' weights; a shard is
//! moved only if its owner is gone or has clearly more than its share. Depends on weights and registrations alone.

use super::queue::NOBODY;
use halfstep_work::NodeId;
use std::collections::BTreeMap;

/// An owner may exceed its share by this part of it before shards are taken from it.
const SLACK: usize = 4;

/// Splits `total` by weight: largest remainders get what is left over, the earlier of equals first.
pub(super) fn shares(total: usize, weights: &[(NodeId, f64)]) -> BTreeMap<NodeId, usize> {
    let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let exact = |weight: f64| total as f64 * weight / sum;
    let mut shares: BTreeMap<NodeId, usize> =
        weights.iter().map(|(node, weight)| (*node, exact(*weight) as usize)).collect();
    let mut order: Vec<(NodeId, f64)> =
        weights.iter().map(|(node, weight)| (*node, exact(*weight).fract())).collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let left = total.saturating_sub(shares.values().sum());
    for (node, _) in order.iter().cycle().take(if order.is_empty() { 0 } else { left }) {
        *shares.entry(*node).or_default() += 1;
    }
    shares
}

/// New owners for the shards that have to move: `(shard, owner)`.
///
/// `owners`: of every shard now. `may_move`: shards that may be taken from an owner with more than its share; those
/// of nobody always move.
pub(super) fn rebalance(
    owners: &[NodeId],
    weights: &[(NodeId, f64)],
    exact: bool,
    may_move: impl Fn(usize) -> bool,
) -> Vec<(usize, NodeId)> {
    if weights.is_empty() {
        return owners.iter().enumerate().filter(|(_, o)| **o != NOBODY).map(|(s, _)| (s, NOBODY)).collect();
    }
    let shares = shares(owners.len(), weights);
    let mut counts: BTreeMap<NodeId, usize> = shares.keys().map(|node| (*node, 0)).collect();
    owners.iter().filter_map(|owner| counts.get_mut(owner).map(|count| *count += 1)).for_each(drop);
    let mut free: Vec<usize> = Vec::new();
    // From the end, so that what an owner keeps stays together.
    for (shard, owner) in owners.iter().enumerate().rev() {
        match counts.get_mut(owner) {
            Some(count) => {
                let share = shares[owner];
                let allowed = if exact { share } else { share + share / SLACK };
                if *count > allowed && may_move(shard) {
                    *count -= 1;
                    free.push(shard);
                }
            }
            None => free.push(shard),
        }
    }
    free.reverse();
    hand_out(free, &shares, counts)
}

fn hand_out(
    free: Vec<usize>,
    shares: &BTreeMap<NodeId, usize>,
    mut counts: BTreeMap<NodeId, usize>,
) -> Vec<(usize, NodeId)> {
    let mut moves = Vec::with_capacity(free.len());
    let mut free = free.into_iter();
    for (node, share) in shares {
        let missing = share.saturating_sub(counts[node]);
        for shard in free.by_ref().take(missing) {
            moves.push((shard, *node));
            *counts.entry(*node).or_default() += 1;
        }
    }
    // Owners within their slack leave others short of a share, never the other way round; what is left goes evenly.
    for shard in free {
        if let Some((node, count)) = counts.iter_mut().min_by_key(|(node, count)| (**count, **node)) {
            moves.push((shard, *node));
            *count += 1;
        }
    }
    moves
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(all: &[f64]) -> Vec<(NodeId, f64)> {
        all.iter().enumerate().map(|(node, weight)| (NodeId(node as u32), *weight)).collect()
    }

    fn apply(owners: &mut [NodeId], moves: &[(usize, NodeId)]) {
        moves.iter().for_each(|(shard, node)| owners[*shard] = *node);
    }

    #[test]
    fn shards_are_split_by_speed_in_contiguous_runs() {
        let mut owners = vec![NOBODY; 10];
        let moves = rebalance(&owners, &weights(&[1.0, 3.0, 1.0]), true, |_| true);
        apply(&mut owners, &moves);
        let expected = [0, 0, 1, 1, 1, 1, 1, 1, 2, 2].map(NodeId);
        assert_eq!(owners, expected);
        assert!(rebalance(&owners, &weights(&[1.0, 3.0, 1.0]), true, |_| true).is_empty(), "stable");
    }

    #[test]
    fn a_lost_owner_moves_only_its_own_shards_and_a_new_one_gets_just_its_share() {
        let mut owners: Vec<NodeId> = (0..12).map(|shard| NodeId(shard / 4)).collect();
        let two = [(NodeId(0), 1.0), (NodeId(2), 1.0)];
        let moves = rebalance(&owners, &two, true, |_| true);
        assert_eq!(moves.iter().map(|m| m.0).collect::<Vec<_>>(), [4, 5, 6, 7]);
        apply(&mut owners, &moves);
        let three = [(NodeId(0), 1.0), (NodeId(2), 1.0), (NodeId(9), 1.0)];
        let moves = rebalance(&owners, &three, true, |_| true);
        assert_eq!(moves.len(), 4);
        assert!(moves.iter().all(|(_, node)| *node == NodeId(9)));
    }

    #[test]
    fn every_shard_has_an_owner_even_with_more_nodes_than_shards() {
        let moves = rebalance(&[NOBODY; 3], &weights(&[1.0; 7]), true, |_| true);
        assert_eq!(moves.len(), 3);
        assert!(rebalance(&[NodeId(5); 2], &[], true, |_| true).iter().all(|(_, node)| *node == NOBODY));
    }
}
