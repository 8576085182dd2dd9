//! Memory that tasks share: who does not fit beside the others waits.
//!
//! Not here: what is counted (`sums`), carries, which go to files instead (`exec`).

use crate::attempt::Attempt;
use crate::job::lock;
use halfstep_work::Failure;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How often whoever waits looks whether it should stop.
const LOOK: Duration = Duration::from_millis(100);

/// So many bytes. Whoever needs more gets them when nobody else has any.
#[derive(Debug)]
pub(crate) struct Room {
    bytes: usize,
    used: Mutex<usize>,
    freed: Condvar,
}

/// Bytes that somebody uses until it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    room: Arc<Room>,
    bytes: usize,
}

impl Room {
    pub(crate) fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self { bytes, used: Mutex::new(0), freed: Condvar::new() })
    }

    /// A share, as soon as there is room.
    ///
    /// # Errors
    /// `Cancelled` if the attempt should stop.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize, attempt: &Attempt<'_>) -> Result<Share, Failure> {
        let mut used = lock(&self.used);
        while *used > 0 && used.saturating_add(bytes) > self.bytes {
            attempt.step()?;
            used = self.freed.wait_timeout(used, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        *used = used.saturating_add(bytes);
        Ok(Share { room: Arc::clone(self), bytes })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut used = lock(&self.room.used);
        *used = used.saturating_sub(self.bytes);
        self.room.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_work::{Grant, Lease, LeaseId, NodeId, SegmentId, ShardId, Task, Watch};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    struct Stop(AtomicBool);

    impl Watch for Stop {
        fn progress(&self) {}
        fn cancelled(&self) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }

    fn grant() -> Grant {
        let task = Task::Capture { segment: SegmentId(0), shard: ShardId(0) };
        Grant { lease: Lease { id: LeaseId(1), node: NodeId(1), attempt: 1, task }, holdings: Vec::new() }
    }

    #[test]
    fn who_does_not_fit_waits_for_a_share_to_be_dropped_or_stops() {
        let (room, stop, grant) = (Room::new(10), Stop(AtomicBool::new(false)), grant());
        let attempt = Attempt::new(&grant, &stop);
        let first = room.take(4, &attempt).unwrap();
        let second = room.take(6, &attempt).unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| room.take(5, &attempt).is_ok());
            drop(first);
            thread::sleep(LOOK * 2);
            assert!(!waiting.is_finished(), "4 bytes are not 5");
            drop(second);
            assert!(waiting.join().unwrap());
        });
        let large = room.take(1000, &attempt).unwrap();
        stop.0.store(true, Ordering::SeqCst);
        assert!(
            room.take(1, &attempt).is_err(),
            "a larger share is had alone, and a revoked lease ends the wait"
        );
        drop(large);
        assert_eq!(*lock(&room.used), 0);
    }
}
