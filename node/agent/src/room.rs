//! Memory that tasks share: who does not fit beside the others waits.
//!
//! Not here: what is counted (`sums`), carries, which go to files instead (`exec`).

use crate::attempt::Attempt;
use crate::job::lock;
use halfstep_exec::SliceForm;
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

/// Memory of shards' products until they are counted: the host's, and that of all other devices together.
#[derive(Debug)]
pub(crate) struct ProductRooms {
    host: Arc<Room>,
    /// Of layers of so many columns and more.
    devices: Option<(usize, Arc<Room>)>,
}

impl ProductRooms {
    /// So many bytes of the host; of the devices, from so many columns on, so many.
    pub(crate) fn new(host: usize, devices: Option<(usize, usize)>) -> Self {
        Self { host: Room::new(host), devices: devices.map(|(cols, bytes)| (cols, Room::new(bytes))) }
    }

    /// Shares for one shard's products of these layers. The host's comes first, so that nobody who has one waits for
    /// somebody who waits for it.
    ///
    /// # Errors
    /// `Cancelled` if the attempt should stop.
    pub(crate) fn take(&self, forms: &[SliceForm], attempt: &Attempt<'_>) -> Result<Vec<Share>, Failure> {
        let (on_devices, on_host): (Vec<&SliceForm>, Vec<&SliceForm>) =
            forms.iter().partition(|form| self.devices.as_ref().is_some_and(|(cols, _)| form.cols >= *cols));
        let mut shares = Vec::new();
        if !on_host.is_empty() {
            let bytes = on_host.iter().map(|form| form.product_bytes()).sum();
            shares.push(self.host.take(bytes, attempt)?);
        }
        if let Some((_, room)) = self.devices.as_ref().filter(|_| !on_devices.is_empty()) {
            let bytes = on_devices.iter().map(|form| form.square_product_bytes()).sum();
            shares.push(room.take(bytes, attempt)?);
        }
        Ok(shares)
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
    fn products_take_room_where_they_will_lie() {
        let (stop, grant) = (Stop(AtomicBool::new(false)), grant());
        let attempt = Attempt::new(&grant, &stop);
        let form = |cols, differs| SliceForm { cols, groups: 2, uses: 1, differs };
        let forms = [form(3, false), form(3, true), form(5, true)];
        let used = |rooms: &ProductRooms| {
            let devices = rooms.devices.as_ref().map(|(_, room)| *lock(&room.used));
            (*lock(&rooms.host.used), devices)
        };
        // Two groups: triangles of 6 and 15, squares of 9 and 25 numbers.
        let (one, both, wide) = (2 * 6 * 4, 2 * (6 + 9 + 6) * 4, 2 * (15 + 25 + 15) * 4);
        let alone = ProductRooms::new(10_000, None);
        let shares = alone.take(&forms, &attempt).unwrap();
        assert_eq!(used(&alone), (one + both + wide, None));
        drop(shares);
        assert_eq!(used(&alone), (0, None));
        let beside = ProductRooms::new(10_000, Some((5, 10_000)));
        let _shares = beside.take(&forms, &attempt).unwrap();
        assert_eq!(used(&beside), (one + both, Some(2 * 3 * 25 * 4)));
        stop.0.store(true, Ordering::SeqCst);
        assert!(
            ProductRooms::new(0, None).take(&[], &attempt).unwrap().is_empty(),
            "nothing waits for nothing"
        );
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
