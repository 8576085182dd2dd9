//! The log files of everything a cluster started, to be shown when something goes wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Lines shown of each log.
const TAIL: usize = 25;
/// Newest logs shown: a killer run starts dozens of processes.
const SHOWN: usize = 24;

/// Named log files, in the order they were opened. Shared by all processes of a cluster.
#[derive(Clone, Debug, Default)]
pub struct Logs(Arc<Mutex<Vec<(String, PathBuf)>>>);

impl Logs {
    /// Adds a file.
    pub fn add(&self, name: &str, path: &Path) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((name.into(), path.into()));
    }

    /// The last lines of the newest logs, each under its name; empty ones are left out.
    pub fn tails(&self) -> String {
        let logs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let from = logs.len().saturating_sub(SHOWN);
        let parts = logs[from..].iter().filter_map(|(name, path)| {
            let text = String::from_utf8_lossy(&fs::read(path).ok()?).into_owned();
            (!text.trim().is_empty()).then(|| format!("--- {name}\n{}", tail(&text)))
        });
        parts.collect::<Vec<_>>().join("\n")
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}
