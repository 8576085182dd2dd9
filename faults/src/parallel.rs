//! Work through a list, as many items at a time as clusters may run.

use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::capacity::Permit;

/// Does `work` for each item, in the order of the list; results in that order. An item is taken from the list when there
/// is a thread for it, so a list may end early.
pub fn in_parallel<T: Send, R: Send>(
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
        for _ in 0..Permit::places() {
            scope.spawn(run);
        }
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
        assert_eq!(in_parallel(0..101, |n| n * n), (0..101).map(|n| n * n).collect::<Vec<_>>());
        assert!(in_parallel(Vec::<u8>::new(), |n| n).is_empty());
    }

    #[test]
    fn a_list_that_ends_early_is_not_worked_through() {
        let late = Mutex::new(false);
        let in_time = (0..101).take_while(|_| !*late.lock().unwrap());
        let done = in_parallel(in_time, |n| {
            *late.lock().unwrap() |= n >= 9;
            n
        });
        assert!((10..=9 + Permit::places()).contains(&done.len()), "{done:?}");
    }
}
