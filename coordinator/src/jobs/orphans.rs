//! Artefacts that no job refers to: roundings that came and were never committed (their node died, another was first),
//! inputs of jobs that were never submitted.
//!
//! Whoever still means to refer to one is told that it is not here, and uploads it again. Not here: artefacts of a job
//! that is forgotten (`forget`).

use crate::CoordinatorError;
use crate::artefacts::Artefacts;
use crate::store::{JobRecord, Store, StoreError};
use halfstep_proto::rounding;
use std::collections::BTreeSet;

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Orphans {
    /// Everything: nobody is connected.
    All,
    /// Roundings only: somebody may be about to submit a job whose inputs are here.
    Roundings,
}

/// Removes them; returns how many there were and their bytes. Blocks; the caller lets nothing be committed meanwhile.
///
/// # Errors
/// `Storage` or `Store`; what was not removed is found the next time.
pub(crate) fn remove_orphans(
    store: &Store,
    artefacts: &Artefacts,
    which: Orphans,
) -> Result<(usize, u64), CoordinatorError> {
    let mut used = BTreeSet::new();
    for record in store.jobs()? {
        used.append(&mut uses(store, &record)?);
    }
    let (mut count, mut bytes) = (0, 0);
    for hash in artefacts.list()? {
        let wanted = which == Orphans::All || artefacts.begins_with(&hash, rounding::MAGIC);
        if wanted && !used.contains(hash.as_bytes()) {
            bytes += artefacts.remove(&hash)?;
            count += 1;
        }
    }
    Ok((count, bytes))
}

/// Every artefact that a job may use.
pub(super) fn uses(store: &Store, record: &JobRecord) -> Result<BTreeSet<[u8; 32]>, StoreError> {
    let inputs = record.files.iter().map(|file| *file.hash.as_bytes());
    let roundings = store.committed(record.id)?.roundings.into_values().map(|hash| *hash.as_bytes());
    Ok(inputs.chain(roundings).collect())
}
