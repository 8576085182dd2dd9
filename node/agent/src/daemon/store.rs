//! Things fetched that are likely to be wanted again, least recently used dropped first beyond a number of bytes.
//!
//! Not here: fetching.

use std::sync::{Mutex, PoisonError};

/// See the module.
pub(super) struct Store<K, V> {
    limit: usize,
    /// Least recently used first.
    entries: Mutex<Vec<(K, V, usize)>>,
}

impl<K: PartialEq, V: Clone> Store<K, V> {
    /// Holds at most `limit` bytes, by what `put` says they are.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, entries: Mutex::default() }
    }

    pub(super) fn get(&self, key: &K) -> Option<V> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let at = entries.iter().position(|(known, _, _)| known == key)?;
        let entry = entries.remove(at);
        let value = entry.1.clone();
        entries.push(entry);
        Some(value)
    }

    pub(super) fn put(&self, key: K, value: V, bytes: usize) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|(known, _, _)| *known != key);
        entries.push((key, value, bytes));
        let mut total: usize = entries.iter().map(|(_, _, bytes)| bytes).sum();
        while total > self.limit && !entries.is_empty() {
            total -= entries.remove(0).2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_goes_first() {
        let store = Store::new(10);
        store.put("a", 1, 4);
        store.put("b", 2, 4);
        assert_eq!(store.get(&"a"), Some(1));
        store.put("c", 3, 4);
        assert_eq!((store.get(&"a"), store.get(&"b"), store.get(&"c")), (Some(1), None, Some(3)));
        store.put("large", 4, 11);
        assert_eq!(store.get(&"large"), None);
    }
}
