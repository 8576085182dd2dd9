//! Removing a job that is over: its folder, the artefacts that no other job uses, its records.
//!
//! Records go last: after a crash in the middle the job is still known, and forgetting it again finishes the work.
//! Not here: whether a job may be forgotten (`service`).

use super::JobFolder;
use crate::CoordinatorError;
use crate::artefacts::Artefacts;
use crate::failpoints::visit;
use crate::store::{Change, InputFile, JobRecord, Store, StoreError};
use halfstep_work::JobId;
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
        used.append(&mut of(store, other.id, &other.files)?);
    }
    let folder = JobFolder::new(store.folder(), record.id);
    let mut bytes = folder.bytes();
    folder.remove()?;
    for hash in of(store, record.id, &record.files)?.difference(&used) {
        bytes += artefacts.remove(&blake3::Hash::from_bytes(*hash))?;
    }
    visit("job.forget").map_err(|e| CoordinatorError::storage(store.folder(), "forget a job in", e))?;
    store.commit(&[Change::ForgetJob(record.id)])?;
    Ok(bytes)
}

/// Every artefact that a job may use.
fn of(store: &Store, job: JobId, files: &[InputFile]) -> Result<BTreeSet<[u8; 32]>, StoreError> {
    let inputs = files.iter().map(|file| *file.hash.as_bytes());
    let roundings = store.committed(job)?.roundings.into_values().map(|hash| *hash.as_bytes());
    Ok(inputs.chain(roundings).collect())
}
