//! Carries of a node that leaves in good order go to others before it goes.
//!
//! Method: when a node drains, the new owners of its shards are told to fetch the carries that it alone has; it stays until
//! they have said what became of each, three seconds at most. What is not taken over in time is replayed, as after a
//! loss: a carry is a function of the plan and the committed roundings, so nothing else follows from it.
//! Not here: who inherits (`scheduler`), fetching (`agent`). Sums stay behind: they are made again from the carries.

use super::{Action, Dispatch};
use crate::scheduler::Place;
use halfstep_work::{Held, Holding, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// A draining node waits so long at most: it has to be gone five seconds after it was told to leave.
const HANDOVER_MS: u64 = 3_000;

/// What is under way, by the node that leaves.
#[derive(Debug, Default)]
pub(super) struct Handovers {
    leaving: BTreeMap<NodeId, Handover>,
}

#[derive(Debug)]
struct Handover {
    until_ms: u64,
    open: BTreeSet<(NodeId, Place)>,
}

impl Handovers {
    /// A node is gone, be it one that leaves or one that takes over.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.leaving.remove(&node);
        self.leaving.values_mut().for_each(|handover| handover.open.retain(|(heir, _)| *heir != node));
    }
}

impl Dispatch {
    /// Tells others to take over what a node alone has, once.
    pub(super) fn hand_over(&mut self, node: NodeId, now_ms: u64) {
        let Some(address) = self.addresses.get(&node).cloned() else { return };
        if self.handovers.leaving.contains_key(&node) {
            return;
        }
        let mut orders: BTreeMap<NodeId, Vec<Holding>> = BTreeMap::new();
        let mut open = BTreeSet::new();
        for (heir, held) in self.scheduler.heirs(&self.state, node) {
            if let Held::Carry { range, segment, shard } = held {
                open.insert((heir, (range, segment, shard)));
                let address = address.clone();
                orders.entry(heir).or_default().push(Holding { node, address, held });
            }
        }
        let orders = orders.into_iter().map(|(node, carries)| Action::TakeOver { node, carries });
        self.actions.extend(orders);
        self.handovers.leaving.insert(node, Handover { until_ms: now_ms + HANDOVER_MS, open });
    }

    /// A node has taken over a carry, or could not. Of no effect if it was not told to.
    pub fn taken_over(&mut self, heir: NodeId, carry: Place, taken: bool) {
        let mut leaving = self.handovers.leaving.values_mut();
        if leaving.any(|handover| handover.open.remove(&(heir, carry))) && taken {
            self.scheduler.took_over(heir, carry);
        }
    }

    /// Whether others still fetch from a node that leaves.
    pub fn is_handing_over(&self, node: NodeId, now_ms: u64) -> bool {
        let handover = self.handovers.leaving.get(&node);
        handover.is_some_and(|handover| !handover.open.is_empty() && now_ms < handover.until_ms)
    }
}
