//! What a coordinator must not forget: its incarnations, jobs, committed roundings, layers given up.
//!
//! One redb database, `state.redb`, in the state folder, and content-addressed files beside it (`artefacts`). A change
//! is acknowledged only after `Store::commit` has returned: it is on disk then, or an error said that it is not.
//! Not here: anything that can be recomputed (the plan, carries, statistics).

mod db;
mod error;
mod lock;
mod record;
mod stored;
#[cfg(test)]
mod tests;

pub use db::{Change, Committed, Store};
pub use error::StoreError;
pub use record::RecordError;
pub use stored::{FileRole, InputFile, JobCounts, JobRecord, JobStage, ResultFile};
