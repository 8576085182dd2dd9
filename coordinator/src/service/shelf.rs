//! The job that nodes may fetch from now: set by the engine, read by the data plane without asking it.

use crate::JobSource;
use halfstep_work::{JobId, Plan};
use std::sync::{Arc, PoisonError, RwLock};

/// What is on the shelf.
#[derive(Clone)]
pub(super) struct Current {
    pub(super) job: JobId,
    pub(super) plan: Arc<Plan>,
    pub(super) source: Arc<JobSource>,
}

/// Clones are the same shelf.
#[derive(Clone, Default)]
pub(super) struct Shelf {
    current: Arc<RwLock<Option<Current>>>,
}

impl Shelf {
    pub(super) fn set(&self, current: Option<Current>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = current;
    }

    /// The running job, if it is this one.
    pub(super) fn get(&self, job: JobId) -> Option<Current> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().filter(|current| current.job == job).cloned()
    }
}
