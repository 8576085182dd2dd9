//! The fleet that is there: the nodes at work and how fast they reach each other, as a plan reckons with it.
//!
//! Not here: measuring (the nodes do, when the coordinator is asked), choosing by it (`survey`).

use halfstep_proto::hello;
use halfstep_proto::wire::{NodeStatus, NodesReply, NodesRequest};

use super::args::ConnectArgs;
use super::connect::Line;
use super::jobs::ask;
use crate::answers::LinkRow;
use crate::exit::CliError;
use crate::survey::FleetAsked;
use crate::values::LinkSpeed;

/// Asks for the nodes that there are; `measure`: and how fast they reach each other, which takes up to three seconds.
///
/// # Errors
/// If the coordinator cannot be asked.
pub(crate) async fn nodes_of(line: &Line, measure: bool) -> Result<NodesReply, CliError> {
    let reply = line.jobs.clone().nodes(NodesRequest { hello: Some(hello()), measure }).await;
    Ok(reply.map_err(|status| line.refused(&status))?.into_inner())
}

/// The fleet of a coordinator; its network is measured unless the user says how fast it is.
///
/// # Errors
/// If the coordinator cannot be asked or has no node.
pub(crate) fn present(connect: &ConnectArgs, said: Option<LinkSpeed>) -> Result<FleetAsked, CliError> {
    let nodes = ask(connect, async |line: &Line| nodes_of(line, said.is_none()).await)?.nodes;
    fleet_of(&nodes, said)
}

/// The nodes that work now, with the network as it was said to be, was measured or, failing that, is assumed.
///
/// # Errors
/// Usage if there are none.
pub(crate) fn fleet_of(nodes: &[NodeStatus], said: Option<LinkSpeed>) -> Result<FleetAsked, CliError> {
    let working: Vec<&NodeStatus> = nodes.iter().filter(|node| node.state == "working").collect();
    let described: Vec<_> = working.iter().filter_map(|node| node.description.as_ref()).collect();
    if described.is_empty() {
        let error = CliError::usage("no node is attached to choose a partition for");
        return Err(error.hint("start the nodes first, or name a partition: `--partition batches`"));
    }
    Ok(FleetAsked {
        nodes: described.len(),
        slots: described.iter().map(|node| node.slots as usize).min(),
        // 0: a node that does not know.
        memory_bytes: described.iter().map(|node| node.memory_bytes).filter(|bytes| *bytes > 0).min(),
        link: said.map_or_else(|| measured(&working), LinkRow::given),
    })
}

/// The slowest of the lines that were measured: a phase is over when its last node has what it needs.
fn measured(nodes: &[&NodeStatus]) -> LinkRow {
    if nodes.len() < 2 {
        return LinkRow::assumed("one node receives nothing from others");
    }
    let lines = || nodes.iter().filter_map(|node| Some((node, node.line.as_ref()?)));
    let with_figure = lines().filter(|(_, line)| line.bytes_per_second > 0);
    let count = with_figure.clone().count();
    if let Some((node, line)) = with_figure.min_by_key(|(_, line)| line.bytes_per_second) {
        let from = format!("{} from {}", name(node), line.from_name);
        return LinkRow {
            bytes_per_second: line.bytes_per_second as f64,
            origin: "measured",
            why: format!("the slowest of {count} lines between nodes, {from}"),
        };
    }
    let failed = lines().find(|(_, line)| !line.failed.is_empty());
    LinkRow::assumed(&failed.map_or_else(
        || "the coordinator has no figure".to_owned(),
        |(node, line)| format!("no figure of {} from {}: {}", name(node), line.from_name, line.failed),
    ))
}

fn name(node: &NodeStatus) -> &str {
    node.description.as_ref().map_or("", |description| description.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_proto::wire::{NodeDescription, NodeLine};

    fn node(name: &str, state: &str, rate: Option<u64>) -> NodeStatus {
        let description = NodeDescription {
            name: name.into(),
            slots: if name == "a" { 2 } else { 8 },
            ..NodeDescription::default()
        };
        let line = rate.map(|rate| NodeLine {
            from_name: "z".into(),
            bytes_per_second: rate,
            failed: if rate == 0 { "cut".into() } else { String::new() },
            ..NodeLine::default()
        });
        NodeStatus { description: Some(description), state: state.into(), line, ..NodeStatus::default() }
    }

    #[test]
    fn the_slowest_line_between_nodes_at_work_counts() {
        let nodes = [
            node("a", "working", Some(117_500_000)),
            node("b", "working", Some(12_500_000)),
            node("c", "working", Some(0)),
            node("d", "draining", Some(5)),
        ];
        let fleet = fleet_of(&nodes, None).unwrap();
        assert_eq!((fleet.nodes, fleet.slots, fleet.memory_bytes), (3, Some(2), None));
        assert_eq!(
            fleet.link.to_string(),
            "link 100 Mbit/s, measured: the slowest of 2 lines between nodes, b from z"
        );
        let said = fleet_of(&nodes, Some(LinkSpeed(125e6))).unwrap().link;
        assert_eq!(said.to_string(), "link 1 Gbit/s, given: --link says so");
    }

    #[test]
    fn without_a_figure_the_default_is_taken_and_said_to_be_one() {
        let text = |nodes: &[NodeStatus]| fleet_of(nodes, None).unwrap().link.to_string();
        assert_eq!(
            text(&[node("a", "working", Some(0)), node("b", "working", Some(0))]),
            "link 10 Gbit/s, assumed: no figure of a from z: cut"
        );
        assert_eq!(
            text(&[node("a", "working", None), node("b", "working", None)]),
            "link 10 Gbit/s, assumed: the coordinator has no figure"
        );
        assert_eq!(
            text(&[node("a", "working", None)]),
            "link 10 Gbit/s, assumed: one node receives nothing from others"
        );
    }

    #[test]
    fn nobody_at_work_is_an_error_that_says_what_to_do() {
        let error = fleet_of(&[node("a", "lost", None)], None).unwrap_err();
        assert!(error.message.contains("no node is attached"), "{}", error.message);
        assert!(error.hint.unwrap().contains("start the nodes first"));
    }
}
