//! So many clusters at a time and no more: with more than the machine bears, one would measure the machine, not the product.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Enough for two cores.
const PLACES: usize = 2;

struct Places {
    all: usize,
    taken: usize,
}

static STATE: Mutex<Places> = Mutex::new(Places { all: PLACES, taken: 0 });
static FREED: Condvar = Condvar::new();

fn state() -> MutexGuard<'static, Places> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to run a cluster, given back when dropped.
#[derive(Debug)]
pub struct Permit(usize);

impl Permit {
    /// Waits for a place.
    pub fn one() -> Self {
        Self::take(|_| 1)
    }

    /// Waits until nothing else runs: for measurements.
    pub fn alone() -> Self {
        Self::take(|all| all)
    }

    /// Takes no place: for what waits nearly all the time and does not mind company.
    pub fn none() -> Self {
        Self::take(|_| 0)
    }

    /// How many clusters may run at a time.
    pub fn places() -> usize {
        state().all
    }

    /// Lets so many clusters run at a time from now on, at least one. For a program that begins: places that are taken
    /// stay taken.
    pub fn allow(places: usize) {
        state().all = places.max(1);
        FREED.notify_all();
    }

    fn take(wanted: impl Fn(usize) -> usize) -> Self {
        let fits = |places: &Places| places.taken + wanted(places.all) <= places.all;
        let waited = FREED.wait_while(state(), |places| !fits(places));
        let mut places = waited.unwrap_or_else(PoisonError::into_inner);
        let count = wanted(places.all);
        places.taken += count;
        Self(count)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        state().taken -= self.0;
        FREED.notify_all();
    }
}
