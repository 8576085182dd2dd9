//! From what somebody submits to results: what a job is, where its inputs lie, its life on disk.
//!
//! Not here: who computes and when (`dispatch`, `service`), how files travel (`service`).

mod active;
mod collect;
mod folder;
mod forget;
mod names;
mod orphans;
mod spec;
#[cfg(test)]
mod tests;

pub use active::{ActiveJob, Finished, Resumed};
pub use collect::{Collected, collect};
pub use folder::JobFolder;
pub(crate) use folder::{check_files, missing};
pub(crate) use forget::forget;
pub(crate) use orphans::{Orphans, remove_orphans};
pub use spec::{JobSpec, job_id};
