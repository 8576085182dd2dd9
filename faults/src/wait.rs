//! Waiting for something to become true, never longer than stated.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Looks until `look` finds something or `limit` has passed; then it looks a last time.
///
/// # Errors
/// The first error of `look`.
pub fn until<T>(limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let end = Instant::now() + limit;
    loop {
        let late = Instant::now() >= end;
        let found = look()?;
        if found.is_some() || late {
            return Ok(found);
        }
        sleep(LOOK);
    }
}

/// Waits for the moment `at`, or until `done` is true; says whether it was.
///
/// # Errors
/// The first error of `done`.
pub fn now_or_by(at: Instant, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
    let limit = at.saturating_duration_since(Instant::now());
    Ok(until(limit, || Ok(done()?.then_some(())))?.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_what_was_found_or_at_its_deadline() {
        let mut looks = 0;
        let found = until(Duration::from_secs(5), || {
            looks += 1;
            Ok((looks == 3).then_some(looks))
        });
        assert_eq!(found.unwrap(), Some(3));
        assert_eq!(until(Duration::ZERO, || Ok(None::<u8>)).unwrap(), None);
    }
}
