//! The log: text for people or JSON for machines, to stderr; and the lines that people are told besides.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

use crate::exit::CliError;

/// How records are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people: errors unless HALFSTEP_LOG says more
    #[default]
    Text,
    /// One JSON object a line: info unless HALFSTEP_LOG says otherwise
    Json,
}

/// Whether stderr is for machines. Set once, before anything is written.
static FOR_MACHINES: AtomicBool = AtomicBool::new(false);

/// Begins to log. Once per process.
pub(crate) fn begin(format: LogFormat) {
    let otherwise = match format {
        LogFormat::Text => "error",
        LogFormat::Json => "info",
    };
    let filter = EnvFilter::try_from_env("HALFSTEP_LOG").unwrap_or_else(|_| EnvFilter::new(otherwise));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => {
            FOR_MACHINES.store(true, Ordering::Relaxed);
            log.json().flatten_event(true).with_span_list(false).init();
            // What the usual hook prints would be no JSON.
            std::panic::set_hook(Box::new(|panic| tracing::error!(panic = %panic, "the process panicked")));
        }
    }
}

/// One line for people to stderr at once, or a record where that is for machines. A closed stderr is no reason to stop.
pub(crate) fn say(line: &str) {
    if FOR_MACHINES.load(Ordering::Relaxed) {
        tracing::info!("{line}");
        return;
    }
    let mut err = std::io::stderr();
    let _ = writeln!(err, "{line}").and_then(|()| err.flush());
}

/// What ended the process.
pub(crate) fn fail(error: &CliError) {
    if FOR_MACHINES.load(Ordering::Relaxed) {
        tracing::error!(exit = error.exit.code(), hint = error.hint, "{}", error.message);
        return;
    }
    let _ = writeln!(std::io::stderr(), "{error}");
}
