//! Wall time, CPU and bytes moved by number of nodes and strategy, and whether the bytes that come out are the same.
//!
//! By hand; `--help` says how.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use faults::{Cell, Cost, Outputs, Sheet, Workload, in_time};
use serde_json::json;

/// Run one job on several numbers of nodes and print what it cost
///
/// For every strategy and number of nodes: seconds from submission to results, how many times faster than the first
/// number of nodes, seconds of CPU of all nodes together and of the coordinator, megabytes that nodes fetched and sent,
/// and whether the outputs are the same bytes as those of the first number of nodes. Nodes are processes of this machine:
/// with more of their threads than it has cores, times say nothing about a fleet. Exit code 1 if outputs differ.
#[derive(Debug, Parser)]
#[command(after_help = "Examples:
  cargo run --release -p halfstep-faults --bin scaling
  HALFSTEP_BIN=./halfstep ./scaling --model model.onnx --calibration calibration.npz --nodes 1,2,4,8,16 \\
      --partitions batches,layers:4,grid:4x4 --repeat 3 -- --bits 4

HALFSTEP_BIN names the binary to run; without it one is built. With it, --model and --calibration, neither this program \
nor that one needs anything else on the machine. TMPDIR says where the processes keep their files.")]
struct Arguments {
    /// Try these numbers of nodes
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,2,3", value_parser = clap::value_parser!(u8).range(1..=26))]
    nodes: Vec<u8>,

    /// Try these strategies
    #[arg(long, value_name = "HOW,..", value_delimiter = ',', default_value = "batches,layers:3,grid:2x2")]
    partitions: Vec<String>,

    #[command(flatten)]
    workload: Workload,
}

const COLUMNS: &[(&str, usize)] = &[
    ("partition", 10),
    ("nodes", 0),
    ("seconds", 8),
    ("times faster", 0),
    ("nodes' CPU s", 0),
    ("coordinator's CPU s", 0),
    ("MB fetched", 0),
    ("MB sent", 0),
    ("outputs", 9),
];

fn main() -> ExitCode {
    faults::end(table(&Arguments::parse()))
}

/// Whether all was the same.
fn table(arguments: &Arguments) -> Result<bool> {
    let Arguments { nodes, partitions, workload } = arguments;
    let (end, mut left_out, mut all_same) = (workload.bounds.end(), 0, true);
    let facts = [("threads_per_node", json!(workload.threads)), ("median_of", json!(workload.repeat))];
    let mut sheet = Sheet::begin(COLUMNS, &facts)?;
    for partition in partitions {
        let job = workload.job(&["--partition", partition]);
        let mut first: Option<(f64, Outputs)> = None;
        for nodes in nodes {
            if !in_time(end) {
                left_out += 1;
                continue;
            }
            let cost = workload.measure(&job, &vec![100; usize::from(*nodes)])?;
            let (wall, outputs) = first.get_or_insert_with(|| (cost.wall, cost.outputs.clone()));
            let same = outputs.differences(&cost.outputs).is_empty();
            all_same &= same;
            sheet.row(&row(partition, *nodes, *wall / cost.wall, &cost, same))?;
        }
    }
    sheet.finish(&workload.bounds, left_out)?;
    Ok(all_same)
}

fn row(partition: &str, nodes: u8, faster: f64, cost: &Cost, same: bool) -> [Cell; 9] {
    let mega = |bytes: u64| Cell::Number(bytes as f64 / 1e6, 1, "");
    [
        Cell::Text(partition.into()),
        Cell::Count(nodes.into()),
        Cell::Number(cost.wall, 1, ""),
        Cell::Number(faster, 2, "x"),
        Cell::Number(cost.nodes_cpu, 1, ""),
        Cell::Number(cost.coordinator_cpu, 1, ""),
        mega(cost.fetched),
        mega(cost.sent),
        Cell::Text(if same { "identical" } else { "DIFFERENT" }.into()),
    ]
}
