//! What can be wrong with a state folder.

use super::RecordError;
use std::path::PathBuf;

/// A state folder that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Somebody else has it.
    #[error("state folder `{}`: in use by another coordinator{}", folder.display(), process(*holder))]
    InUse {
        /// The folder.
        folder: PathBuf,
        /// Its process, if known.
        holder: Option<u32>,
    },
    /// A file or folder of it cannot be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The database does not hold together.
    #[error("state database `{}`: {problem}", path.display())]
    Database {
        /// Its file.
        path: PathBuf,
        /// What the database says.
        problem: String,
    },
    /// One record of it cannot be read.
    #[error("state database `{}`, {subject}: {source}", path.display())]
    Record {
        /// Its file.
        path: PathBuf,
        /// Whose record.
        subject: String,
        /// What is wrong.
        source: RecordError,
    },
}

fn process(holder: Option<u32>) -> String {
    holder.map(|id| format!(" (process {id})")).unwrap_or_default()
}
