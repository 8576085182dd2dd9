//! Wall time, CPU and bytes moved by number of nodes and strategy, and whether the bytes that come out are the same.
//!
//! By hand; `--help` says how.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use faults::{Cost, Outputs, Workload, load};

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

fn main() -> ExitCode {
    match table(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all was the same.
fn table(arguments: &Arguments) -> Result<bool> {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let (threads, repeat) = (arguments.workload.threads, arguments.workload.repeat);
    say(&format!(
        "{cores} cores, load {:.1} before, {threads} threads a node, median of {repeat}",
        load().unwrap_or(0.0)
    ))?;
    say("partition   nodes  seconds  faster  nodes' CPU s  coordinator's  MB fetched   MB sent  outputs")?;
    let mut all_same = true;
    for partition in &arguments.partitions {
        let job = arguments.workload.job(&["--partition", partition]);
        let mut first: Option<(f64, Outputs)> = None;
        for nodes in &arguments.nodes {
            let cost = arguments.workload.measure(&job, &vec![100; usize::from(*nodes)])?;
            let (wall, outputs) = first.get_or_insert_with(|| (cost.wall, cost.outputs.clone()));
            let same = outputs.differences(&cost.outputs).is_empty();
            all_same &= same;
            say(&row(partition, *nodes, *wall, &cost, same))?;
        }
    }
    Ok(all_same)
}

fn row(partition: &str, nodes: u8, first: f64, cost: &Cost, same: bool) -> String {
    let mega = |bytes: u64| bytes as f64 / 1e6;
    format!(
        "{partition:<10} {nodes:>6} {:>8.1} {:>6.2}x {:>13.1} {:>14.1} {:>11.1} {:>9.1}  {}",
        cost.wall,
        first / cost.wall,
        cost.nodes_cpu,
        cost.coordinator_cpu,
        mega(cost.fetched),
        mega(cost.sent),
        if same { "identical" } else { "DIFFERENT" }
    )
}

fn say(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}
