//! One function per command: resolve options, ask the backend, render.
//!
//! Data goes to stdout, progress to stderr. Not here: what the commands compute (`backend`).

use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;

use serde::Serialize;

use crate::answers::{EvalRequest, LinkRow, QuantizeOutcome};
use crate::args::{
    Cli, Command, DevicesArgs, EvalArgs, InspectArgs, PlanArgs, QuantizeArgs, ShowArgs, VerifyArgs,
};
use crate::config::{DataConfig, RunConfig};
use crate::exit::{CliError, Exit};
use crate::fleet::args::ConnectArgs;
use crate::job_file;
use crate::observe::{Observed, describe};
use crate::options::JobOptions;
use crate::render::progress::{Mode, Renderer};
use crate::{devices, eval, fleet, manual, perplexity, quantize, render, survey, verify};

/// Runs a command.
///
/// # Errors
/// What stopped it, with its exit code.
pub(crate) fn run(cli: Cli) -> Result<Exit, CliError> {
    match cli.command {
        Command::Quantize(args) => run_quantize(args),
        Command::Plan(args) => plan(args),
        Command::Inspect(args) => inspect(&args),
        Command::Eval(args) => run_eval(args),
        Command::Verify(args) => check(&args),
        Command::Devices(args) => show_devices(&args),
        Command::Coordinator(args) => fleet::coordinator(&args),
        Command::Node(args) => fleet::node(args),
        Command::Pod(args) => fleet::pod(args),
        Command::Submit(args) => fleet::submit(args),
        Command::Status(args) => fleet::status(args),
        Command::Watch(args) => fleet::watch(args),
        Command::Cancel(args) => fleet::cancel(args),
        Command::Fetch(args) => fleet::fetch(args),
        Command::Forget(args) => fleet::forget(args),
        Command::Nodes(args) => fleet::nodes(args),
        Command::Explain(args) => fleet::explain(&args),
        Command::Drain(args) => fleet::drain(&args),
        Command::Certs(args) => fleet::certs(&args),
        Command::Completions(args) => manual::completions(args.shell),
        Command::Man(args) => manual::pages(&args.dir),
    }
}

fn run_quantize(args: QuantizeArgs) -> Result<Exit, CliError> {
    let config = RunConfig::resolve(with_file(args.job, args.config.as_deref())?, args.force)?;
    config.require_output()?;
    let _observed = observe_quantize(args.metrics, &config)?;
    let renderer = Renderer::new(mode(args.show));
    let result = quantize::quantize(&config, &|event| renderer.event(&event));
    renderer.finish();
    let outcome = result?;
    show_outcome(&outcome, args.show)?;
    Ok(exit_of(&outcome))
}

/// Counts of a coordinator and a node in one.
fn observe_quantize(address: Option<SocketAddr>, config: &RunConfig) -> Result<Observed, CliError> {
    let spill = config.resources.spill_dir.clone().unwrap_or_else(std::env::temp_dir);
    let folders = vec![("state", config.to_job().output), ("spill", spill)];
    let observed = Observed::open(None, address, folders)?;
    describe("quantize", "", "");
    halfstep_coordinator::service::describe_metrics();
    halfstep_agent::describe_metrics();
    Ok(observed)
}

/// What became of a job, on stdout.
///
/// # Errors
/// Internal if stdout cannot be written.
pub(crate) fn show_outcome(outcome: &QuantizeOutcome, how: ShowArgs) -> Result<(), CliError> {
    if how.json {
        #[derive(Serialize)]
        struct Line<'a> {
            event: &'static str,
            outcome: &'a QuantizeOutcome,
        }
        // One line like the events before it, not indented.
        let text = serde_json::to_string(&Line { event: "outcome", outcome });
        print(&format!("{}\n", text.map_err(CliError::internal)?))?;
    } else if !how.quiet {
        print(&render::outcome(outcome))?;
    }
    Ok(())
}

/// Failures outrank layers kept against the user's wish; `--skip` is the user's wish.
pub(crate) fn exit_of(outcome: &QuantizeOutcome) -> Exit {
    if !outcome.failed.is_empty() {
        Exit::SomeFailed
    } else if outcome.kept.iter().any(|layer| !layer.requested) {
        Exit::SomeKept
    } else {
        Exit::Solved
    }
}

fn plan(args: PlanArgs) -> Result<Exit, CliError> {
    let config = RunConfig::resolve(with_file(args.job, args.config.as_deref())?, false)?;
    if args.nodes == Some(0) {
        return Err(CliError::usage("nodes is 0, expected 1 or more"));
    }
    let fleet = match (args.nodes, args.coordinator) {
        (Some(nodes), _) => Some(survey::FleetAsked {
            nodes,
            slots: None,
            memory_bytes: args.node_memory.map(|size| size.0),
            link: args.link.map_or_else(|| LinkRow::assumed("no coordinator was asked"), LinkRow::given),
        }),
        (None, Some(coordinator)) => {
            let connect = ConnectArgs { coordinator: Some(coordinator), security: args.security };
            Some(fleet::present(&connect, args.link)?)
        }
        (None, None) => None,
    };
    let report = survey::plan(&config, fleet)?;
    show(args.json, &report, render::plan)
}

fn inspect(args: &InspectArgs) -> Result<Exit, CliError> {
    let report = survey::inspect(&args.model, !args.no_fold_batch_norm)?;
    show(args.json, &report, render::inspect)
}

fn run_eval(args: EvalArgs) -> Result<Exit, CliError> {
    if args.batch == 0 {
        return Err(CliError::usage("batch is 0, expected 1 or more"));
    }
    let request = EvalRequest {
        models: args.models,
        reference: args.reference,
        data: DataConfig::resolve(args.data, "--data")?,
        text: args.text,
        seed: args.seed,
        batch: args.batch,
        threads: args.threads,
        device: args.device,
        cuda_libraries: args.cuda_libraries,
        onnxruntime: args.onnxruntime,
    };
    if perplexity::is_asked(&request)? {
        let report = perplexity::perplexity(&request)?;
        return show(args.json, &report.rows, |_| render::perplexity(&report));
    }
    let rows = eval::eval(&request)?;
    show(args.json, rows.as_slice(), render::eval)
}

fn check(args: &VerifyArgs) -> Result<Exit, CliError> {
    let done = verify::verify(&args.manifest)?;
    show(args.json, &done, render::verified)
}

fn show_devices(args: &DevicesArgs) -> Result<Exit, CliError> {
    let report = devices::report(&args.cuda_libraries)?;
    show(args.json, &report, devices::text)
}

pub(crate) fn with_file(flags: JobOptions, file: Option<&std::path::Path>) -> Result<JobOptions, CliError> {
    Ok(match file {
        Some(path) => flags.over(job_file::read(path)?),
        None => flags,
    })
}

pub(crate) fn mode(show: ShowArgs) -> Mode {
    match show {
        ShowArgs { json: true, .. } => Mode::Json,
        ShowArgs { quiet: true, .. } => Mode::Quiet,
        _ if io::stderr().is_terminal() => Mode::Terminal,
        _ => Mode::Plain,
    }
}

pub(crate) fn show<T: Serialize + ?Sized>(
    json: bool,
    report: &T,
    text: impl Fn(&T) -> String,
) -> Result<Exit, CliError> {
    if json {
        print(&format!("{}\n", serde_json::to_string_pretty(report).map_err(CliError::internal)?))?;
    } else {
        print(&text(report))?;
    }
    Ok(Exit::Solved)
}

/// Writes data to stdout; a reader that has seen enough (`| head`) is no error.
pub(crate) fn print(text: &str) -> Result<(), CliError> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| CliError::internal(format!("stdout: cannot be written: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answers::{FailedLayer, Kept};

    #[test]
    fn the_exit_code_tells_the_worst_thing_that_happened_unasked() {
        let kept = |requested| Kept { name: "a".into(), op: "LSTM".into(), reason: "x".into(), requested };
        let failed = FailedLayer { name: "b".into(), cause: "x".into() };
        let of = |kept: Vec<Kept>, failed: Vec<FailedLayer>| {
            exit_of(&QuantizeOutcome {
                solved: 1,
                kept,
                failed,
                rows: vec![],
                phases: vec![],
                peak_resident_bytes: None,
                files: vec![],
                notes: vec![],
            })
        };
        assert_eq!(of(vec![], vec![]), Exit::Solved);
        assert_eq!(of(vec![kept(true)], vec![]), Exit::Solved);
        assert_eq!(of(vec![kept(true), kept(false)], vec![]), Exit::SomeKept);
        assert_eq!(of(vec![kept(false)], vec![failed]), Exit::SomeFailed);
    }
}
