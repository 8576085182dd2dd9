//! Long campaigns of the killer, by hand; `--help` says how.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use faults::{Bounds, Campaign, Inputs, Job, Permit, Run, Settings, Verdict, figures, say, summary, word};

/// Kill, freeze and restart processes of real jobs at random times and compare what they produce
///
/// A seed fixes what is done and when, not how the processes interleave. Exit code 1 if a run gave other bytes, lost a
/// rounding that had been acknowledged, hung or failed; its seed and the tails of all its logs are shown.
#[derive(Debug, Parser)]
#[command(after_help = "Examples:
  cargo run --release -p halfstep-faults -- --seeds 500 --from 1000
  HALFSTEP_BIN=./halfstep ./faults --model model.onnx --calibration calibration.npz --seeds 500 --jobs 16 --minutes 9

HALFSTEP_BIN names the binary to run, which must have been built with `--features failpoints`; without it one is built. With \
it, --model and --calibration, neither this program nor that one needs anything else on the machine. TMPDIR says where the \
processes keep their files; each run has up to eight of them and keeps about one core busy.")]
struct Arguments {
    /// Run this many seeds
    #[arg(long, value_name = "N", default_value_t = 50)]
    seeds: u64,

    /// Begin with this seed
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    from: u64,

    /// Run so many seeds at a time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: u16,

    /// Declare nodes lost after this silence
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    lease_ms: u64,

    #[command(flatten)]
    inputs: Inputs,

    #[command(flatten)]
    bounds: Bounds,
}

fn main() -> ExitCode {
    faults::end(run(&Arguments::parse()))
}

/// Whether all was as it should be.
fn run(arguments: &Arguments) -> Result<bool> {
    Permit::allow(arguments.jobs.into());
    let settings = Settings { lease: Duration::from_millis(arguments.lease_ms), ..Settings::default() };
    let job = arguments.inputs.of(Job::medium());
    let campaign = Campaign { settings, job, end: arguments.bounds.end() };
    let seeds = arguments.from..arguments.from.saturating_add(arguments.seeds);
    let runs = campaign.run(seeds, tell);
    say(summary(&runs).trim_end())?;
    if (runs.len() as u64) < arguments.seeds {
        say(format!("{} of {} seeds were begun: the time was over", runs.len(), arguments.seeds))?;
    }
    arguments.bounds.keep(&figures(&runs))?;
    Ok(!runs.is_empty() && runs.iter().all(|run| run.verdict == Verdict::Identical))
}

fn tell(run: &Run) {
    let (word, seconds) = (word(&run.verdict), run.took.as_secs_f64());
    let faults: usize = run.faults.values().sum();
    let _ =
        writeln!(std::io::stderr(), "seed {:>6}  {word:<9} {faults:>2} faults  {seconds:>5.1} s", run.seed);
}
