//! Means that a group of nodes made together, and rounds that are announced and not over.
//!
//! Whoever needs a slice that is being added up waits for it, but not for long after the last sign of life: what is not here
//! then is fetched, with the same result. What is here is a pure function of plan and roundings, like the node's own means.
//! Not here: the additions (`round`).

use crate::attempt::Attempt;
use halfstep_exec::MeanSlice;
use halfstep_work::{Failure, LayerId, SliceId};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A task that waits says so often that it lives.
const PULSE: Duration = Duration::from_millis(50);

/// Epoch and number of a round.
pub(crate) type RoundKey = (u64, u64);

/// See the module.
#[derive(Default)]
pub(crate) struct Together {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    /// The latest round of a layer.
    expected: BTreeMap<LayerId, Expected>,
    means: BTreeMap<(LayerId, SliceId), Arc<MeanSlice>>,
}

struct Expected {
    round: RoundKey,
    /// How long its next slice is waited for, and until when.
    limit: Duration,
    until: Instant,
}

impl Together {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Both maps are whole at every step.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A round is announced: its layer's slices are waited for, each for so long at most.
    pub(crate) fn expect(&self, layer: LayerId, round: RoundKey, limit: Duration) {
        let until = Instant::now() + limit;
        self.lock().expected.insert(layer, Expected { round, limit, until });
    }

    /// A round is over, whatever came of it.
    pub(crate) fn over(&self, layer: LayerId, round: RoundKey) {
        let mut inner = self.lock();
        if inner.expected.get(&layer).is_some_and(|latest| latest.round == round) {
            inner.expected.remove(&layer);
        }
        drop(inner);
        self.changed.notify_all();
    }

    pub(super) fn put(&self, layer: LayerId, slice: SliceId, means: MeanSlice) {
        let mut inner = self.lock();
        inner.means.insert((layer, slice), Arc::new(means));
        if let Some(expected) = inner.expected.get_mut(&layer) {
            expected.until = Instant::now() + expected.limit;
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// A slice's means, after a wait while it is being added up; none if they have to be fetched.
    ///
    /// # Errors
    /// `Cancelled` if the task should stop.
    pub(crate) fn means(
        &self,
        attempt: &Attempt<'_>,
        layer: LayerId,
        slice: SliceId,
    ) -> Result<Option<Arc<MeanSlice>>, Failure> {
        loop {
            let inner = self.lock();
            if let Some(found) = inner.means.get(&(layer, slice)) {
                return Ok(Some(Arc::clone(found)));
            }
            let left = |expected: &Expected| expected.until.saturating_duration_since(Instant::now());
            let left = inner.expected.get(&layer).map(left).unwrap_or_default();
            if left.is_zero() {
                return Ok(None);
            }
            drop(self.changed.wait_timeout(inner, left.min(PULSE)).unwrap_or_else(PoisonError::into_inner));
            attempt.step()?;
        }
    }

    /// Forgets the means of layers.
    pub(crate) fn forget(&self, gone: impl Fn(LayerId) -> bool) {
        self.lock().means.retain(|(layer, _), _| !gone(*layer));
    }
}
