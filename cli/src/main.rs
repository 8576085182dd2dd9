//! The `halfstep` binary: parses the command line, runs a command, returns its exit code.
//!
//! Not here: anything about networks; that is behind `quantize`, `survey` and `eval`.

mod answers;
mod args;
mod cluster;
mod commands;
mod config;
mod devices;
#[cfg(test)]
#[path = "../tests/support/drive.rs"]
mod drive;
mod engine;
mod eval;
mod exit;
mod fleet;
mod job;
mod job_file;
mod observe;
mod options;
mod perplexity;
mod quantize;
mod render;
mod results;
mod subject;
mod survey;
mod values;
mod verify;

use std::io::Write;
use std::panic::catch_unwind;
use std::process::ExitCode;

use clap::Parser;
use exit::Exit;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    halfstep_agent::give_back_large_blocks();
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            let wrong = error.use_stderr();
            return ExitCode::from(if wrong { Exit::Usage.code() } else { Exit::Solved.code() });
        }
    };
    halfstep_coordinator::failpoints::setup();
    let filter = EnvFilter::try_from_env("HALFSTEP_LOG").unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    // A panic is our mistake: the hook has printed it, the code says so.
    let exit = match catch_unwind(|| commands::run(cli)) {
        Ok(Ok(exit)) => exit,
        Ok(Err(error)) => {
            let _ = writeln!(std::io::stderr(), "{error}");
            error.exit
        }
        Err(_) => Exit::Internal,
    };
    ExitCode::from(exit.code())
}
