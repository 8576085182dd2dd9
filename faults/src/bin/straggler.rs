//! What a slow node costs: the promise P11, measured with real processes.
//!
//! By hand; `--help` says how.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use faults::{Workload, load};

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

HALFSTEP_BIN names the binary to run; without it one is built.")]
struct Arguments {
    /// Run this many nodes
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=26))]
    nodes: u8,

    /// Let every node run for this percentage of the time
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100))]
    share: u32,

    /// Let the slow one run for these percentages of that; 0 freezes it
    #[arg(long, value_name = "PERCENT,..", value_delimiter = ',', default_value = "20,0")]
    straggler: Vec<u32>,

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

/// Whether the promise was kept.
fn table(arguments: &Arguments) -> Result<bool> {
    let Arguments { nodes, share, straggler, workload } = arguments;
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    say(&format!(
        "{cores} cores, load {:.1} before; {nodes} nodes at {share} %, {} threads each, median of {}",
        load().unwrap_or(0.0),
        workload.threads,
        workload.repeat
    ))?;
    say("the last node at   seconds   ratio  nodes' CPU s")?;
    let job = workload.job(&[]);
    let equal = vec![*share; usize::from(*nodes)];
    let undisturbed = workload.measure(&job, &equal)?;
    say(&format!("{:>14} % {:>9.1} {:>7} {:>13.1}", 100, undisturbed.wall, "1", undisturbed.nodes_cpu))?;
    let mut kept = true;
    for percent in straggler {
        let mut shares = equal.clone();
        if let Some(last) = shares.last_mut() {
            *last = share * percent / 100;
        }
        let cost = workload.measure(&job, &shares)?;
        let differences = undisturbed.outputs.differences(&cost.outputs);
        ensure!(differences.is_empty(), "other outputs at {percent} %: {}", differences.join("\n"));
        let ratio = cost.wall / undisturbed.wall;
        kept &= ratio <= RATIO_MAX;
        say(&format!("{percent:>14} % {:>9.1} {ratio:>7.2} {:>13.1}", cost.wall, cost.nodes_cpu))?;
    }
    Ok(kept)
}

fn say(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}
