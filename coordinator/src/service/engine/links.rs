//! Somebody wants to know how fast nodes reach each other: they are asked, and the list of nodes waits for the answers.
//!
//! Not here: who measures what, and for how long a figure stands (`crate::links`).

use super::Engine;
use crate::service::request::{Line, Reply};
use halfstep_proto::wire::coordinator_message::Body;
use halfstep_proto::wire::{self, NodeLine};
use halfstep_work::NodeId;

impl Engine {
    /// Answers with the list of nodes, at once or when their lines are measured.
    pub(super) fn list_nodes(&mut self, measure: bool, reply: Reply<wire::NodesReply>) {
        if !measure {
            // An answer that nobody waits for any more is no error.
            let _ = reply.send(Ok(self.nodes()));
            return;
        }
        let now = self.now_ms();
        let told = self.seats.iter().filter(|(_, seat)| seat.is_connected() && !seat.draining);
        let nodes: Vec<(NodeId, &str)> = told.map(|(node, seat)| (*node, seat.address.as_str())).collect();
        for question in self.links.begin(&nodes, now) {
            let measure = wire::MeasureLine { number: question.number, address: question.address };
            self.say(question.node, Body::Measure(measure));
        }
        self.wait_for_lines.push(reply);
        self.look_at_lines();
    }

    pub(super) fn line_measured(&mut self, line: Line, number: u64, rate: Result<u64, String>) {
        if self.heard(line) {
            let now = self.now_ms();
            self.links.hear(line.node, number, rate, now);
            self.look_at_lines();
        }
    }

    /// Answers those who wait once nothing is measured any more.
    pub(super) fn look_at_lines(&mut self) {
        let now = self.now_ms();
        if self.wait_for_lines.is_empty() || !self.links.is_over(now) {
            return;
        }
        for reply in std::mem::take(&mut self.wait_for_lines) {
            let _ = reply.send(Ok(self.nodes()));
        }
    }

    /// What is known of the line to a node, for the list of nodes.
    pub(super) fn line_of(&self, node: NodeId) -> Option<NodeLine> {
        let figure = self.links.figure(node)?;
        let from = self.seats.get(&figure.from).map(|seat| seat.description.name.clone());
        Some(NodeLine {
            from: figure.from.0,
            from_name: from.unwrap_or_default(),
            bytes_per_second: figure.rate.as_ref().map_or(0, |rate| *rate),
            failed: figure.rate.as_ref().err().cloned().unwrap_or_default(),
            age_ms: self.now_ms().saturating_sub(figure.at_ms),
        })
    }
}
