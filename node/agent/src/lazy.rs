//! A value made once, by whoever needs it first; after a failure the next one tries again.
//!
//! Not here: when it is dropped.

use std::sync::{Arc, Mutex, PoisonError};

/// See the module. Those who come while it is made wait for it.
#[derive(Debug)]
pub(crate) struct Lazy<T: ?Sized>(Mutex<Option<Arc<T>>>);

impl<T: ?Sized> Default for Lazy<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: ?Sized> Lazy<T> {
    /// # Errors
    /// What `make` says; nothing is kept then.
    pub(crate) fn get_or_make<E>(&self, make: impl FnOnce() -> Result<Arc<T>, E>) -> Result<Arc<T>, E> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = slot.as_ref() {
            return Ok(Arc::clone(made));
        }
        let made = make()?;
        *slot = Some(Arc::clone(&made));
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_not_kept_and_a_success_is() {
        let lazy = Lazy::default();
        assert_eq!(lazy.get_or_make(|| Err::<Arc<i32>, _>("no")), Err("no"));
        assert_eq!(lazy.get_or_make(|| Ok::<_, &str>(Arc::new(1))), Ok(Arc::new(1)));
        assert_eq!(lazy.get_or_make(|| Err::<Arc<i32>, _>("not asked")), Ok(Arc::new(1)));
    }
}
