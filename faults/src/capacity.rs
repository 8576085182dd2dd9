//! At most two clusters at a time: more would measure the machine, not the product.

use std::sync::{Condvar, Mutex, PoisonError};

const PLACES: usize = 2;

static FREE: Mutex<usize> = Mutex::new(PLACES);
static FREED: Condvar = Condvar::new();

/// The right to run a cluster, given back when dropped.
#[derive(Debug)]
pub struct Permit(usize);

impl Permit {
    /// Waits for a place.
    pub fn one() -> Self {
        Self::take(1)
    }

    /// Waits until nothing else runs: for measurements.
    pub fn alone() -> Self {
        Self::take(PLACES)
    }

    fn take(places: usize) -> Self {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = FREED.wait_while(free, |free| *free < places);
        *waited.unwrap_or_else(PoisonError::into_inner) -= places;
        Self(places)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *FREE.lock().unwrap_or_else(PoisonError::into_inner) += self.0;
        FREED.notify_all();
    }
}
