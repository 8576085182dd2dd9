//! Long campaigns of the killer, by hand: `cargo run --release -p halfstep-faults -- --seeds 500 --from 1000`.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use faults::{Run, Settings, Verdict, campaign, summary};

/// Kill, freeze and restart processes of real jobs at random times and compare what they produce
#[derive(Debug, Parser)]
struct Arguments {
    /// Run this many seeds
    #[arg(long, value_name = "N", default_value_t = 50)]
    seeds: u64,

    /// Begin with this seed
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    from: u64,

    /// Declare nodes lost after this silence
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    lease_ms: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let settings = Settings { lease: Duration::from_millis(arguments.lease_ms), ..Settings::default() };
    let seeds = arguments.from..arguments.from.saturating_add(arguments.seeds);
    let runs = campaign(seeds, &settings, tell);
    let _ = write!(std::io::stdout(), "{}", summary(&runs));
    let good = runs.iter().all(|run| run.verdict == Verdict::Identical);
    if good && !runs.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn tell(run: &Run) {
    let word = match run.verdict {
        Verdict::Identical => "identical",
        Verdict::Differs(_) => "DIFFERS",
        Verdict::Lost(_) => "LOST",
        Verdict::Hung(_) => "HUNG",
        Verdict::Failed(_) => "FAILED",
    };
    let faults: usize = run.faults.values().sum();
    let seconds = run.took.as_secs_f64();
    let _ =
        writeln!(std::io::stderr(), "seed {:>6}  {word:<9} {faults:>2} faults  {seconds:>5.1} s", run.seed);
}
