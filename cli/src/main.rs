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
mod in_place;
mod job;
mod job_file;
mod manual;
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

use std::panic::catch_unwind;
use std::process::ExitCode;

use clap::Parser;
use exit::Exit;

/// Matrices and activations come and go in large blocks.
#[global_allocator]
static ALLOCATOR: halfstep_agent::LargePages = halfstep_agent::LargePages;

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
    observe::begin_log(cli.command.log_format());
    // A panic is our mistake: the hook has printed it, the code says so.
    let exit = match catch_unwind(|| commands::run(cli)) {
        Ok(Ok(exit)) => exit,
        Ok(Err(error)) => {
            observe::fail(&error);
            error.exit
        }
        Err(_) => Exit::Internal,
    };
    ExitCode::from(exit.code())
}
