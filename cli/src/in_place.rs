//! Results that are in their place already: a process can be killed between placing them and saying so, and the same
//! command given again.
//!
//! Only the very job's complete and undamaged results count, with nothing beside them; anything else in the folder stays
//! refused. Not here: going on with a job that has no results yet (`quantize`).

use std::fs;
use std::path::Path;

use halfstep_coordinator::jobs::collect;
use halfstep_coordinator::store::Store;
use halfstep_coordinator::{JobConfig, check_target};
use halfstep_work::JobId;

use crate::answers::{Progress, QuantizeOutcome};
use crate::exit::CliError;
use crate::{results, verify};

/// Whether results may be placed, or are there: then what became of the job, and its id. Reads all inputs only where the
/// folder says that it holds results.
///
/// # Errors
/// As `check_target` for a folder that holds anything else.
pub(crate) fn look(
    job: &JobConfig,
    show: &dyn Fn(Progress),
) -> Result<Option<(JobId, QuantizeOutcome)>, CliError> {
    let Err(taken) = check_target(&job.output, job.force) else { return Ok(None) };
    let found = job.output.join(verify::MANIFEST).is_file().then(|| collect(job).ok()).flatten();
    match found.filter(|collected| verify::holds(&job.output, collected.id)) {
        Some(collected) => {
            show(Progress::InPlace { output: job.output.clone() });
            Ok(Some((collected.id, results::read(&job.output)?)))
        }
        None => Err(taken.into()),
    }
}

/// Removes the state that a run of this job left, unless somebody uses it or it is of another job.
pub(crate) fn remove_state(folder: &Path, job: JobId) {
    if !folder.is_dir() {
        return;
    }
    // Open, it is locked: nobody takes it up while it goes.
    let Ok(store) = Store::open(folder) else { return };
    if store.jobs().is_ok_and(|jobs| jobs.iter().all(|known| known.id == job)) {
        // What cannot be removed does no harm.
        let _ = fs::remove_dir_all(folder);
    }
}
