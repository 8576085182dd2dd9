//! Removing a job that is over: its folder, the artefacts that no other job uses, its records.
//!
//! Records go last: after a crash in the middle the job is still known, and forgetting it again finishes the work.
//! Not here: whether a job may be forgotten (`service`).

use super::JobFolder;
use super::orphans::uses;
use crate::CoordinatorError;
use crate::artefacts::Artefacts;
use crate::failpoints::visit;
use crate::store::{Change, JobRecord, Store};
use std::collections::BTreeSet;

/// Bytes of the files that were removed. Blocks; the caller lets no rounding be committed meanwhile.
///
/// # Errors
/// `Storage` or `Store`; the job is still known then.
pub(crate) fn forget(
    store: &Store,
    artefacts: &Artefacts,
    record: &JobRecord,
) -> Result<u64, CoordinatorError> {
    let mut used = BTreeSet::new();
    for other in store.jobs()?.iter().filter(|other| other.id != record.id) {
        used.append(&mut uses(store, other)?);
    }
    let folder = JobFolder::new(store.folder(), record.id);
    let mut bytes = folder.bytes();
    folder.remove()?;
    for hash in uses(store, record)?.difference(&used) {
        bytes += artefacts.remove(&blake3::Hash::from_bytes(*hash))?;
    }
    visit("job.forget").map_err(|e| CoordinatorError::storage(store.folder(), "forget a job in", e))?;
    store.commit(&[Change::ForgetJob(record.id)])?;
    Ok(bytes)
}
