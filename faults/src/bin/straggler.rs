//! What a slow node costs: the promise P11, measured with real processes.
//!
//! By hand; `--help` says how.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use faults::{Cell, Cost, Sheet, Workload, in_time};
use serde_json::json;

/// The promise.
const RATIO_MAX: f64 = 1.5;

/// Run one job on equal nodes, then with one of them slow, and print how many times longer it takes
///
/// Nodes are slowed by SIGSTOP and SIGCONT in turn, the last one for the whole of every slow run. On a machine with fewer
/// cores than nodes, slow all of them down (--share), so that each has what it is given: 3 nodes at 30 % need 0.9 cores, and
/// a straggler at 20 % of that runs 6 % of the time. CPU that is much less in total than undisturbed, or a load above the
/// number of cores, says that the machine was busy with something else. Exit code 1 if outputs differ or a slow run takes more
/// than 1.5 times as long.
#[derive(Debug, Parser)]
#[command(after_help = "Examples:
  cargo run --release -p halfstep-faults --bin straggler -- --repeat 3
  HALFSTEP_BIN=./halfstep ./straggler --nodes 8 --model model.onnx --calibration calibration.npz -- --bits 4

HALFSTEP_BIN names the binary to run; without it one is built. With it, --model and --calibration, neither this program \
nor that one needs anything else on the machine. TMPDIR says where the processes keep their files.")]
struct Arguments {
    /// Run this many nodes
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=26))]
    nodes: u8,

    /// Let every node run for this percentage of the time
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100))]
    share: u32,

    /// Let the slow one run for these percentages of that; 0 freezes it
    #[arg(long, value_name = "PERCENT,..", value_delimiter = ',', default_value = "20,0", value_parser = clap::value_parser!(u32).range(0..=100))]
    straggler: Vec<u32>,

    #[command(flatten)]
    workload: Workload,
}

const COLUMNS: &[(&str, usize)] =
    &[("the last node at", 0), ("seconds", 8), ("ratio", 6), ("nodes' CPU s", 0), ("outputs", 9)];

fn main() -> ExitCode {
    faults::end(table(&Arguments::parse()))
}

/// Whether the promise was kept.
fn table(arguments: &Arguments) -> Result<bool> {
    let Arguments { nodes, share, straggler, workload } = arguments;
    let (end, mut left_out, mut kept) = (workload.bounds.end(), 0, true);
    let facts = [
        ("nodes", json!(nodes)),
        ("share_percent", json!(share)),
        ("threads_per_node", json!(workload.threads)),
        ("median_of", json!(workload.repeat)),
    ];
    let mut sheet = Sheet::begin(COLUMNS, &facts)?;
    let job = workload.job(&[]);
    let equal = vec![*share; usize::from(*nodes)];
    let undisturbed = workload.measure(&job, &equal)?;
    sheet.row(&row(100, 1.0, &undisturbed))?;
    for percent in straggler {
        if !in_time(end) {
            left_out += 1;
            continue;
        }
        let mut shares = equal.clone();
        if let Some(last) = shares.last_mut() {
            *last = share * percent / 100;
        }
        let cost = workload.measure(&job, &shares)?;
        let differences = undisturbed.outputs.differences(&cost.outputs);
        ensure!(differences.is_empty(), "other outputs at {percent} %: {}", differences.join("\n"));
        let ratio = cost.wall / undisturbed.wall;
        kept &= ratio <= RATIO_MAX;
        sheet.row(&row(*percent, ratio, &cost))?;
    }
    sheet.finish(&workload.bounds, left_out)?;
    Ok(kept)
}

fn row(percent: u32, ratio: f64, cost: &Cost) -> [Cell; 5] {
    [
        Cell::Number(percent.into(), 0, " %"),
        Cell::Number(cost.wall, 1, ""),
        Cell::Number(ratio, 2, "x"),
        Cell::Number(cost.nodes_cpu, 1, ""),
        Cell::Text("identical".into()),
    ]
}
