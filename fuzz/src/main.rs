//! The fuzzing driver: `cargo run --release -p halfstep-fuzz -- --seconds 60`.
//!
//! Exit codes: 0 nothing found, 1 an input broke a target (it is printed and saved) or the harness itself failed.

#![expect(clippy::print_stdout, reason = "a command-line tool")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use halfstep_fuzz::{Failure, Limited, Options, TARGETS, Target, execute, run};

#[global_allocator]
static ALLOCATOR: Limited = Limited;

/// Stack of the fuzzing thread, in bytes: what a worker thread of the library has, so that deep recursion shows.
const STACK_BYTES: usize = 2 << 20;

/// Most bytes of an input printed.
const DUMP_MAX: usize = 512;

/// Run parsers on mutated inputs until time is up or one breaks
#[derive(Parser)]
struct Arguments {
    /// Time for all targets together, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Run this target alone
    #[arg(long)]
    target: Option<String>,
    /// Key of all mutations; equal keys give equal inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for inputs that break a target
    #[arg(long, default_value_os_t = std::env::temp_dir().join("halfstep-fuzz"))]
    artifacts: PathBuf,
    /// Run this file once instead (needs --target)
    #[arg(long, requires = "target")]
    replay: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || fuzz(&arguments))?;
    thread.join().map_err(|_| anyhow::anyhow!("the driver itself panicked"))?
}

fn fuzz(arguments: &Arguments) -> Result<ExitCode> {
    let targets = chosen(arguments.target.as_deref())?;
    if let Some(file) = &arguments.replay {
        return replay(&targets[0], file);
    }
    let options = Options {
        time: Duration::from_secs(arguments.seconds),
        seed: arguments.seed,
        artifacts: arguments.artifacts.clone(),
    };
    let (tallies, failure) = run(&targets, &options)?;
    for tally in tallies {
        let rate = tally.executions as f64 / tally.time.as_secs_f64().max(1e-9);
        println!("{:>8} {:>10} executions {rate:>8.0}/s", tally.target, tally.executions);
    }
    Ok(failure.map_or(ExitCode::SUCCESS, |failure| {
        report(&failure, arguments.seed);
        ExitCode::FAILURE
    }))
}

fn chosen(name: Option<&str>) -> Result<Vec<Target>> {
    let wanted = |target: &&Target| name.is_none_or(|name| target.name == name);
    let targets: Vec<Target> = TARGETS.iter().filter(wanted).copied().collect();
    let known: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    ensure!(!targets.is_empty(), "no target `{}`, expected one of {known:?}", name.unwrap_or_default());
    Ok(targets)
}

fn replay(target: &Target, file: &PathBuf) -> Result<ExitCode> {
    let input = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    // The panic is printed by the default hook, with a backtrace if one is asked for.
    Ok(match execute(target, &input)? {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            println!("target {}: {cause}", target.name);
            ExitCode::FAILURE
        }
    })
}

fn report(failure: &Failure, seed: u64) {
    println!("\ntarget {}, seed {seed}, execution {}: {}", failure.target, failure.execution, failure.cause);
    for (line, bytes) in failure.input.chunks(16).take(DUMP_MAX / 16).enumerate() {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x} ")).collect();
        let text: String =
            bytes.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '.' }).collect();
        println!("{:06x}  {hex:<48} {text}", line * 16);
    }
    println!("{} bytes, saved as {}", failure.input.len(), failure.saved.display());
}
