//! Wall time and bytes moved by number of nodes and strategy, and whether the bytes that come out are the same.
//!
//! By hand: `cargo run --release -p halfstep-faults --bin scaling -- --model M --calibration C -- --bits 4`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use faults::{Cluster, Job, Launch, Outputs, Permit, Settings, example};

const LIMIT: Duration = Duration::from_secs(1800);

/// Run one job on several numbers of nodes
#[derive(Debug, Parser)]
struct Arguments {
    /// Quantize this network [default: the example]
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,

    /// Calibrate with this data [default: the example's]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,

    /// Try these numbers of nodes
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,2,3,5")]
    nodes: Vec<u8>,

    /// Try these strategies
    #[arg(long, value_name = "HOW,..", value_delimiter = ',', default_value = "batches,layers:3,grid:2x2")]
    partitions: Vec<String>,

    /// Give each node this many threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,

    /// More options of the job
    #[arg(last = true)]
    options: Vec<String>,
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
    let mut all_same = true;
    say("partition   nodes  seconds  MB moved  outputs")?;
    for partition in &arguments.partitions {
        let mut first: Option<Outputs> = None;
        for nodes in &arguments.nodes {
            let (seconds, bytes, outputs) = run(arguments, partition, *nodes)?;
            let same = first.get_or_insert_with(|| outputs.clone()).differences(&outputs).is_empty();
            all_same &= same;
            let word = if same { "identical" } else { "DIFFERENT" };
            say(&format!("{partition:<10} {nodes:>6} {seconds:>8.1} {:>9.1}  {word}", bytes as f64 / 1e6))?;
        }
    }
    Ok(all_same)
}

fn say(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

fn run(arguments: &Arguments, partition: &str, nodes: u8) -> Result<(f64, u64, Outputs)> {
    let ours = |given: &Option<PathBuf>, name: &str| given.clone().unwrap_or_else(|| example(name));
    let (model, data) =
        (ours(&arguments.model, "model.onnx"), ours(&arguments.calibration, "calibration.npz"));
    let options: Vec<&str> = arguments.options.iter().map(String::as_str).collect();
    let job = Job::on(&model, &data).with(&["--partition", partition]).with(&options);
    // Real times: nothing is to fail.
    let settings = Settings {
        heartbeat: Duration::from_secs(1),
        lease: Duration::from_secs(10),
        threads: arguments.threads,
        ..Settings::default()
    };
    let mut cluster = Cluster::launched(settings, Launch::default(), Permit::alone())?;
    cluster.start_nodes(nodes)?;
    for name in cluster.node_names() {
        cluster.wait_attached(&name, 1)?;
    }
    let submission = cluster.submit(&job)?;
    let end = cluster.end(submission, LIMIT)?;
    anyhow::ensure!(matches!(end.exit, 0 | 3), "exit {}: {}", end.exit, end.stderr);
    let fetched = |node: &serde_json::Value| node["bytes_fetched"].as_u64().unwrap_or(0);
    let bytes = cluster.nodes()?.iter().map(fetched).sum();
    Ok((end.took.as_secs_f64(), bytes, Outputs::of(&end.output)?))
}
