//! How fast nodes receive from each other: who is asked to measure which line, and what is known.
//!
//! Method: a few nodes in a ring, each measures the line from the next one, all at the same time, as when statistics are
//! exchanged. Figures are kept for five minutes and go with their nodes. Time comes from callers, in milliseconds.
//! Not here: measuring (`proto::data`), what follows from the figures (`partition`).

use halfstep_work::NodeId;
use std::collections::BTreeMap;

/// Nodes in the ring at most: of more, some that are spread evenly.
const RING_MAX: usize = 8;
/// A figure that is older is measured again when somebody asks.
const FRESH_MS: u64 = 300_000;
/// A node gives up after 1.8 s; this is for the way there and back.
const ANSWER_MS: u64 = 2_500;

/// What was found out about the line to one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Figure {
    /// The node at the other end.
    pub(crate) from: NodeId,
    /// Bytes per second, or why there is no figure.
    pub(crate) rate: Result<u64, String>,
    /// When.
    pub(crate) at_ms: u64,
}

/// What a node is to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    /// Whom.
    pub(crate) node: NodeId,
    /// Comes back with the answer.
    pub(crate) number: u64,
    /// Where the other end of the line is.
    pub(crate) address: String,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Links {
    figures: BTreeMap<NodeId, Figure>,
    /// Number, who was asked, the other end.
    open: BTreeMap<u64, (NodeId, NodeId)>,
    next: u64,
    ends_ms: u64,
}

impl Links {
    /// Begins to measure what is not known, unless that is under way already. `nodes`: those that can be told
    /// something, ascending, with their addresses.
    pub(crate) fn begin(&mut self, nodes: &[(NodeId, &str)], now_ms: u64) -> Vec<Question> {
        if !self.open.is_empty() {
            return Vec::new();
        }
        self.ends_ms = now_ms + ANSWER_MS;
        let count = nodes.len().min(RING_MAX);
        let ring: Vec<(NodeId, &str)> = (0..count).map(|i| nodes[i * nodes.len() / count]).collect();
        let pairs = ring.iter().zip(ring.iter().cycle().skip(1)).filter(|(to, from)| to.0 != from.0);
        let mut questions = Vec::new();
        for ((node, _), (from, address)) in pairs {
            if self.is_known(*node, *from, now_ms) {
                continue;
            }
            let number = self.next;
            self.next += 1;
            self.open.insert(number, (*node, *from));
            questions.push(Question { node: *node, number, address: (*address).to_owned() });
        }
        questions
    }

    fn is_known(&self, node: NodeId, from: NodeId, now_ms: u64) -> bool {
        self.figures.get(&node).is_some_and(|figure| {
            figure.from == from && figure.rate.is_ok() && now_ms.saturating_sub(figure.at_ms) < FRESH_MS
        })
    }

    /// An answer. Of no effect if that node was not asked this, or not any more.
    pub(crate) fn hear(&mut self, node: NodeId, number: u64, rate: Result<u64, String>, now_ms: u64) {
        if self.open.get(&number).is_some_and(|(asked, _)| *asked == node)
            && let Some((_, from)) = self.open.remove(&number)
        {
            let rate = rate.and_then(|rate| if rate > 0 { Ok(rate) } else { Err("no figure came".into()) });
            self.figures.insert(node, Figure { from, rate, at_ms: now_ms });
        }
    }

    /// A node is gone: so is what was known of it or asked about it.
    pub(crate) fn forget(&mut self, node: NodeId) {
        self.figures.retain(|to, figure| *to != node && figure.from != node);
        self.open.retain(|_, (to, from)| *to != node && *from != node);
    }

    /// Whether nothing is waited for any more: what is late has no figure.
    pub(crate) fn is_over(&mut self, now_ms: u64) -> bool {
        if now_ms >= self.ends_ms {
            for (node, from) in std::mem::take(&mut self.open).into_values() {
                let rate = Err(format!("no answer within {:.1} s", ANSWER_MS as f64 / 1e3));
                self.figures.insert(node, Figure { from, rate, at_ms: now_ms });
            }
        }
        self.open.is_empty()
    }

    /// What is known of the line to a node.
    pub(crate) fn figure(&self, node: NodeId) -> Option<&Figure> {
        self.figures.get(&node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(count: u32) -> Vec<(NodeId, &'static str)> {
        (0..count).map(|n| (NodeId(n), "a:1")).collect()
    }

    fn pairs(links: &Links) -> Vec<(u32, u32)> {
        links.open.values().map(|(to, from)| (to.0, from.0)).collect()
    }

    #[test]
    fn few_nodes_are_a_ring_and_many_are_thinned_out() {
        for (count, expect) in [(0, vec![]), (1, vec![]), (2, vec![(0, 1), (1, 0)])] {
            let mut links = Links::default();
            assert_eq!(links.begin(&nodes(count), 0).len(), expect.len());
            assert_eq!(pairs(&links), expect);
        }
        let mut links = Links::default();
        let questions = links.begin(&nodes(1000), 0);
        assert_eq!(questions.len(), RING_MAX);
        assert_eq!(pairs(&links)[..2], [(0, 125), (125, 250)]);
        assert_eq!(pairs(&links)[7], (875, 0));
        let mut numbers: Vec<u64> = questions.iter().map(|question| question.number).collect();
        numbers.dedup();
        assert_eq!(numbers.len(), RING_MAX);
    }

    #[test]
    fn a_figure_is_kept_until_it_is_old_or_its_node_leaves() {
        let mut links = Links::default();
        let two = nodes(2);
        for question in links.begin(&two, 0) {
            links.hear(question.node, question.number, Ok(7), 10);
        }
        assert!(links.is_over(10));
        assert!(links.begin(&two, 10 + FRESH_MS - 1).is_empty());
        assert_eq!(links.begin(&two, 10 + FRESH_MS).len(), 2);
        links.forget(NodeId(1));
        assert!(links.is_over(0) && links.figure(NodeId(0)).is_none(), "its other end is gone");
    }

    #[test]
    fn who_does_not_answer_has_no_figure_and_is_asked_again() {
        let mut links = Links::default();
        let questions = links.begin(&nodes(3), 100);
        links.hear(questions[0].node, questions[0].number, Ok(5), 200);
        links.hear(questions[1].node, questions[1].number, Err("cut".into()), 200);
        assert!(!links.is_over(100 + ANSWER_MS - 1));
        assert!(links.begin(&nodes(3), 300).is_empty(), "one at a time");
        assert!(links.is_over(100 + ANSWER_MS));
        assert_eq!(links.figure(NodeId(1)).unwrap().rate, Err("cut".into()));
        assert_eq!(links.figure(NodeId(2)).unwrap().rate, Err("no answer within 2.5 s".into()));
        assert_eq!(links.begin(&nodes(3), 9_000).len(), 2);
    }

    #[test]
    fn an_answer_counts_once_from_who_was_asked_and_zero_is_none() {
        let mut links = Links::default();
        let questions = links.begin(&nodes(2), 0);
        links.hear(NodeId(1), questions[0].number, Ok(9), 1);
        links.hear(NodeId(0), 77, Ok(9), 1);
        assert_eq!((links.figure(NodeId(0)), links.figure(NodeId(1))), (None, None));
        links.hear(NodeId(0), questions[0].number, Ok(0), 1);
        links.hear(NodeId(0), questions[0].number, Ok(9), 2);
        assert_eq!(links.figure(NodeId(0)).unwrap().rate, Err("no figure came".into()));
    }
}
