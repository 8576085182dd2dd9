//! Which range each node works for first: as even as the nodes' weights allow, moved as little as possible.

use halfstep_work::NodeId;
use std::collections::BTreeMap;

/// Homes of nodes.
#[derive(Debug)]
pub(super) struct Homes {
    open: Vec<bool>,
    lane_of: BTreeMap<NodeId, (usize, f64)>,
}

impl Homes {
    pub(super) fn new(lanes: usize) -> Self {
        Self { open: vec![true; lanes], lane_of: BTreeMap::new() }
    }

    pub(super) fn of(&self, node: NodeId) -> Option<usize> {
        self.lane_of.get(&node).map(|(lane, _)| *lane)
    }

    pub(super) fn members(&self, lane: usize) -> impl Iterator<Item = NodeId> + '_ {
        self.lane_of.iter().filter(move |(_, (home, _))| *home == lane).map(|(node, _)| *node)
    }

    fn weight(&self, lane: usize) -> f64 {
        self.lane_of.values().filter(|(home, _)| *home == lane).map(|(_, weight)| weight).sum()
    }

    /// The open lane with the least weight, the first of equals; the last lane if none is open.
    fn lightest(&self) -> usize {
        let open = (0..self.open.len()).filter(|lane| self.open[*lane]);
        let lightest = open.min_by(|a, b| self.weight(*a).total_cmp(&self.weight(*b)).then(a.cmp(b)));
        lightest.unwrap_or(self.open.len().saturating_sub(1))
    }

    /// Gives a new node a home. Returns the lanes whose members changed.
    pub(super) fn join(&mut self, node: NodeId, weight: f64) -> Vec<usize> {
        let lane = self.lightest();
        self.lane_of.insert(node, (lane, weight));
        vec![lane]
    }

    /// A node is gone; a lane left empty gets a node from one that has several. Returns the lanes whose members changed.
    pub(super) fn leave(&mut self, node: NodeId) -> Vec<usize> {
        let Some((lane, _)) = self.lane_of.remove(&node) else { return Vec::new() };
        let mut changed = vec![lane];
        if self.open[lane] && self.members(lane).next().is_none() {
            let heaviest = (0..self.open.len())
                .filter(|other| self.members(*other).nth(1).is_some())
                .max_by(|a, b| self.weight(*a).total_cmp(&self.weight(*b)).then(b.cmp(a)));
            if let Some(from) = heaviest
                && let Some(moved) = self.members(from).last()
                && let Some((home, _)) = self.lane_of.get_mut(&moved)
            {
                *home = lane;
                changed.push(from);
            }
        }
        changed
    }

    /// A lane is over: its nodes go to those that are not. Returns the lanes whose members changed.
    pub(super) fn close(&mut self, lane: usize, weights: &BTreeMap<NodeId, f64>) -> Vec<usize> {
        self.open[lane] = false;
        if !self.open.contains(&true) {
            return Vec::new();
        }
        let members: Vec<NodeId> = self.members(lane).collect();
        let mut changed = vec![lane];
        for node in members {
            self.lane_of.remove(&node);
            changed.extend(self.join(node, weights.get(&node).copied().unwrap_or(1.0)));
        }
        changed.sort_unstable();
        changed.dedup();
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn homes(nodes: u32, lanes: usize) -> Homes {
        let mut homes = Homes::new(lanes);
        (0..nodes).for_each(|node| drop(homes.join(NodeId(node), 1.0)));
        homes
    }

    fn lanes(homes: &Homes, nodes: u32) -> Vec<Option<usize>> {
        (0..nodes).map(|node| homes.of(NodeId(node))).collect()
    }

    #[test]
    fn nodes_spread_evenly_over_ranges_by_weight() {
        assert_eq!(lanes(&homes(5, 3), 5), [0, 1, 2, 0, 1].map(Some));
        let mut mixed = Homes::new(2);
        [8.0, 1.0, 1.0].iter().enumerate().for_each(|(n, w)| drop(mixed.join(NodeId(n as u32), *w)));
        assert_eq!(lanes(&mixed, 3), [0, 1, 1].map(Some));
    }

    #[test]
    fn a_range_left_alone_gets_a_node_from_a_crowded_one() {
        let mut homes = homes(3, 2);
        assert_eq!(homes.leave(NodeId(1)), [1, 0]);
        assert_eq!(lanes(&homes, 3), [Some(0), None, Some(1)]);
        assert_eq!(homes.leave(NodeId(2)), [1], "nobody to spare");
    }

    #[test]
    fn nodes_of_a_finished_range_go_to_the_others() {
        let mut homes = homes(4, 2);
        let weights = (0..4).map(|n| (NodeId(n), 1.0)).collect();
        assert_eq!(homes.close(0, &weights), [0, 1]);
        assert_eq!(lanes(&homes, 4), [1, 1, 1, 1].map(Some));
        assert!(homes.close(1, &weights).is_empty());
    }
}
