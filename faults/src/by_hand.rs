//! What the programs run by hand have in common: which job, for how long, where the figures go, how a program ends.

use std::fmt::Display;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use crate::job::Job;

/// The files that a job works on.
#[derive(Clone, Debug, Args)]
pub struct Inputs {
    /// Quantize this network [default: the example]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,

    /// Calibrate with this data [default: the example's]
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
}

impl Inputs {
    /// The same job on these files.
    pub fn of(&self, job: Job) -> Job {
        job.on_files(self.model.as_deref(), self.calibration.as_deref())
    }
}

/// When to stop, and where to write.
#[derive(Clone, Debug, Args)]
pub struct Bounds {
    /// Begin nothing after so many minutes, say what was left out, and end
    #[arg(long, value_name = "M", value_parser = minutes)]
    pub minutes: Option<Duration>,

    /// Write the figures into this file too
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl Bounds {
    /// The moment after which nothing begins.
    pub fn end(&self) -> Option<Instant> {
        self.minutes.map(|minutes| Instant::now() + minutes)
    }

    /// Writes the file that was asked for, if one was.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep(&self, figures: &Value) -> Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        let text = serde_json::to_string_pretty(figures)? + "\n";
        fs::write(path, text).with_context(|| format!("figures `{}`: cannot be written", path.display()))
    }
}

fn minutes(text: &str) -> Result<Duration, String> {
    let minutes: f64 = text.parse().map_err(|_| format!("`{text}` is no number of minutes"))?;
    Duration::try_from_secs_f64(minutes * 60.0).map_err(|_| format!("{text} minutes: expected 0 or more"))
}

/// Whether there is time to begin something.
pub fn in_time(end: Option<Instant>) -> bool {
    end.is_none_or(|end| Instant::now() < end)
}

/// A line of results.
///
/// # Errors
/// If nobody reads them.
pub fn say(line: impl Display) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

/// Ends a program: success only if all was well.
pub fn end(result: Result<bool>) -> ExitCode {
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minutes_may_be_parts_of_one_and_nothing_strange() {
        assert_eq!(minutes("0.5"), Ok(Duration::from_secs(30)));
        for text in ["-1", "NaN", "inf", "soon", "1e300"] {
            assert!(minutes(text).is_err(), "{text}");
        }
        assert!(in_time(None) && !in_time(Some(Instant::now())));
    }
}
