//! Work through a list two items at a time: as many as clusters may run at once.

use std::sync::{Mutex, PoisonError};
use std::thread;

/// Does `work` for each item, in the order of the list, two at a time; results in that order.
pub fn in_pairs<T: Send, R: Send>(
    items: impl IntoIterator<Item = T, IntoIter: Send>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let items = Mutex::new(items.into_iter().enumerate());
    let results = Mutex::new(Vec::new());
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        while let Some((index, item)) = next() {
            let result = work(item);
            results.lock().unwrap_or_else(PoisonError::into_inner).push((index, result));
        }
    };
    thread::scope(|scope| {
        scope.spawn(run);
        scope.spawn(run);
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once_and_results_keep_their_order() {
        assert_eq!(in_pairs(0..101, |n| n * n), (0..101).map(|n| n * n).collect::<Vec<_>>());
        assert!(in_pairs(Vec::<u8>::new(), |n| n).is_empty());
    }
}
