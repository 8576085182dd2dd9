//! Work on layers side by side, as many at once as memory allows; what comes of it is taken one by one.
//!
//! Not here: what is done with a layer (`export`, `gguf`).

use crate::CoordinatorError;
use crate::memory::available_bytes;
use std::sync::mpsc::sync_channel;
use std::sync::{Condvar, Mutex, PoisonError};

/// Memory of a weight on its way: its integer, its value, its bits, its bytes as they were read.
const WEIGHT_BYTES: u64 = 13;
/// One part in so many of the memory that is available may be layers on their way.
const SHARE: u64 = 4;
/// Where the system does not say what is available.
const AVAILABLE: u64 = 4 << 30;

/// What may be done at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    threads: usize,
    /// Weights of layers in work; one layer always has room.
    weights: u64,
}

impl Room {
    /// Every core, and a share of the memory that is available now.
    pub(super) fn now() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let weights = available_bytes().unwrap_or(AVAILABLE) / SHARE / WEIGHT_BYTES;
        Self { threads, weights }
    }

    /// `work` on each layer, given by its weights; its results go to `take`, in any order, on this thread.
    ///
    /// # Errors
    /// What `work` or `take` says of the first layer that either refuses, among those that were begun.
    pub(super) fn each<T: Send>(
        self,
        layers: &[u64],
        work: impl Fn(usize) -> Result<T, CoordinatorError> + Sync,
        mut take: impl FnMut(usize, T) -> Result<(), CoordinatorError>,
    ) -> Result<(), CoordinatorError> {
        let (queue, freed) = (Mutex::new(Queue::default()), Condvar::new());
        let lock = || queue.lock().unwrap_or_else(PoisonError::into_inner);
        let next = || {
            let mut queue = lock();
            loop {
                let weights = *layers.get(queue.next)?;
                if queue.stopped {
                    return None;
                }
                if queue.in_work == 0 || queue.in_work.saturating_add(weights) <= self.weights {
                    queue.in_work = queue.in_work.saturating_add(weights);
                    queue.next += 1;
                    return Some(queue.next - 1);
                }
                queue = freed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let over = |index: usize, stopped: bool| {
            let mut queue = lock();
            queue.in_work = queue.in_work.saturating_sub(layers[index]);
            queue.stopped |= stopped;
            freed.notify_all();
        };
        let mut refused: Option<(usize, CoordinatorError)> = None;
        std::thread::scope(|scope| {
            let (tell, told) = sync_channel(0);
            for _ in 0..self.threads.min(layers.len()) {
                let (tell, next, work) = (tell.clone(), &next, &work);
                scope.spawn(move || {
                    while let Some(index) = next() {
                        // Whoever is told stays until nobody tells any more.
                        let _ = tell.send((index, work(index)));
                    }
                });
            }
            drop(tell);
            for (index, done) in told {
                let taken = done.and_then(|done| take(index, done));
                over(index, taken.is_err());
                if let Err(error) = taken
                    && refused.as_ref().is_none_or(|(first, _)| index < *first)
                {
                    refused = Some((index, error));
                }
            }
        });
        refused.map_or(Ok(()), |(_, error)| Err(error))
    }
}

#[derive(Default)]
struct Queue {
    /// The first layer that nobody works on.
    next: usize,
    /// Weights of those in work.
    in_work: u64,
    stopped: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn refusal(index: usize) -> CoordinatorError {
        CoordinatorError::BadInput(format!("layer {index}"))
    }

    #[test]
    fn every_layer_is_done_once_and_no_more_at_once_than_there_is_room_for() {
        let layers: Vec<u64> = (0..40).map(|index| 1 + index % 7).collect();
        for (threads, weights) in [(1, 100), (4, 9), (8, 0), (3, u64::MAX)] {
            let (in_work, most, mut seen) = (AtomicU64::new(0), AtomicU64::new(0), BTreeSet::new());
            let work = |index: usize| {
                let now = in_work.fetch_add(layers[index], Ordering::SeqCst) + layers[index];
                most.fetch_max(now, Ordering::SeqCst);
                std::thread::yield_now();
                Ok(index * 2)
            };
            let take = |index: usize, done: usize| {
                in_work.fetch_sub(layers[index], Ordering::SeqCst);
                assert!(done == index * 2 && seen.insert(index));
                Ok(())
            };
            Room { threads, weights }.each(&layers, work, take).unwrap();
            assert_eq!(seen.len(), layers.len());
            assert!(most.into_inner() <= weights.max(7), "{threads} threads, room for {weights}");
        }
        Room::now().each(&[], |_| Ok(()), |_, ()| Ok(())).unwrap();
    }

    #[test]
    fn a_refusal_ends_the_work_and_the_first_layers_is_told() {
        let begun = AtomicU64::new(0);
        for threads in [1, 4] {
            let work = |index: usize| {
                begun.fetch_add(1, Ordering::SeqCst);
                if index >= 5 { Err(refusal(index)) } else { Ok(()) }
            };
            let error = Room { threads, weights: 8 }.each(&[1; 1000], work, |_, ()| Ok(())).unwrap_err();
            assert_eq!(error.to_string(), refusal(5).to_string());
            let error = Room { threads, weights: 8 }.each(
                &[1; 1000],
                |_| Ok(()),
                |index, ()| match index {
                    3 => Err(refusal(3)),
                    _ => Ok(()),
                },
            );
            assert_eq!(error.unwrap_err().to_string(), refusal(3).to_string());
        }
        assert!(begun.into_inner() < 100);
    }
}
