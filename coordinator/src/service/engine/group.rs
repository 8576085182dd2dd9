//! The nodes' group: who can be in it now, what is said to its members.
//!
//! Not here: when there is a group and what it adds up (`exchange`).

use super::Engine;
use super::job::Active;
use crate::exchange::{Member, Orders};
use crate::service::request::Line;
use halfstep_proto::wire;
use halfstep_proto::wire::coordinator_message::Body;
use halfstep_work::{Grant, GroupAnswer};
use std::collections::BTreeMap;

impl Engine {
    /// Looks who works on the job and can add up with others: of several ways, the one that most nodes have.
    pub(super) fn look_at_group(&mut self) {
        let running = self.active.as_ref().filter(|active| active.running().is_some());
        let job = running.map(|active| active.id);
        let mut ways: BTreeMap<&str, Vec<Member>> = BTreeMap::new();
        for (node, seat) in &self.seats {
            if let Some((way, line)) = job.and_then(|job| seat.in_group(job)) {
                ways.entry(way).or_default().push(Member { node: *node, line });
            }
        }
        let members = ways.into_values().rev().max_by_key(Vec::len).unwrap_or_default();
        let orders = self.exchange.look(job, &members, self.now_ms());
        self.order(orders);
    }

    pub(super) fn group_answer(&mut self, line: Line, epoch: u64, answer: GroupAnswer) {
        if self.heard(line) {
            let member = Member { node: line.node, line: line.number };
            let orders = self.exchange.hear(member, epoch, answer, self.now_ms());
            self.order(orders);
        }
    }

    /// Before a grant leaves: what it needs is added up from now on.
    pub(super) fn before_grant(&mut self, grant: &Grant) {
        let Some(dispatch) = self.active.as_ref().and_then(Active::dispatch) else { return };
        let orders = self.exchange.before(grant, |layer| dispatch.state().agreed_peaks(layer));
        self.order(orders);
    }

    fn order(&mut self, orders: Orders) {
        for (node, epoch, order) in orders {
            self.say(node, Body::Group(wire::GroupOrder::from((epoch, order))));
        }
    }
}
