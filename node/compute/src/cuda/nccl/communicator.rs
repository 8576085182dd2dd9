//! One process's place in a group of devices that add integers together.
//!
//! ```text
//!   join -> (in progress) -> ready -> operation -> (in progress) -> ready -> ... -> leave
//!                |                                     |
//!                +---- error, deadline, given up ------+--> aborted: every later call is `Over`
//! ```
//! Method: the group is made without blocking, so every call returns at once and is asked for its state until it is done,
//! has failed, or the caller's patience ends. Integers wrap, so sums do not depend on the order of the members.
//! An abort may hang (the network, a device): it runs on a thread of its own, is waited for only so long, and what it may
//! still touch is then left to the end of the process.
//!
//! Not here: who is in a group (`coordinator`), what the integers are (`agent`).
#![expect(unsafe_code, reason = "NCCL's calls take handles and addresses")]

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use super::library::{Comm, IN_PROGRESS, SUCCESS};
use super::{Memory, Nccl, NcclError, UniqueId};

/// How long an abort is waited for.
const ABORT: Duration = Duration::from_secs(5);
/// Between two looks at the state of a group: the first, and at most.
const LOOK: Duration = Duration::from_micros(20);
const LOOK_MAX: Duration = Duration::from_millis(1);

/// How long a call may take.
#[derive(Clone, Copy)]
pub struct Patience<'a> {
    /// At most so long.
    pub limit: Duration,
    /// Whether nobody wants it any more; asked between two looks, at least every millisecond.
    pub given_up: &'a dyn Fn() -> bool,
}

/// A member's place in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// From 0.
    pub rank: usize,
    /// Members.
    pub size: usize,
}

impl Place {
    /// As NCCL takes it.
    fn numbers(self) -> Result<(c_int, c_int), NcclError> {
        let wrong = |subject, expected: String, actual| NcclError::Size { subject, expected, actual };
        let size = c_int::try_from(self.size).ok().filter(|size| *size > 0);
        let size = size.ok_or_else(|| wrong("size", "1 or more".into(), self.size))?;
        let rank = c_int::try_from(self.rank).ok().filter(|rank| *rank < size);
        let rank = rank.ok_or_else(|| wrong("rank", format!("less than {size}"), self.rank))?;
        Ok((rank, size))
    }
}

/// A group's handle. NCCL's groups belong to no thread.
struct Handle(Comm);

// SAFETY: a communicator may be used from any thread, by one at a time; `Communicator` is borrowed mutably for every call.
unsafe impl Send for Handle {}

/// See the module.
pub struct Communicator {
    library: Arc<Nccl>,
    place: Place,
    /// None once it has failed.
    handle: Option<Handle>,
    /// None if something may still write to it.
    memory: Option<Memory>,
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Communicator")
            .field("place", &self.place)
            .field("over", &self.handle.is_none())
            .finish()
    }
}

impl Communicator {
    /// Joins the group of this id; returns when all `place.size` members have.
    ///
    /// # Errors
    /// `Size` for a place that is none; `Memory`, `Refused`, `Failed`, `Deadline`, `GivenUp`.
    pub fn join(
        library: &Arc<Nccl>,
        id: UniqueId,
        place: Place,
        memory: Memory,
        patience: &Patience<'_>,
    ) -> Result<Self, NcclError> {
        let (rank, size) = place.numbers()?;
        memory.bind()?;
        let handle = Handle(library.init(id, rank, size)?);
        let (library, memory) = (Arc::clone(library), Some(memory));
        // From here on whatever goes wrong is aborted when it is dropped.
        let joined = Self { library, place, handle: Some(handle), memory };
        joined.wait("joining", patience, Instant::now(), || Ok(true))?;
        Ok(joined)
    }

    /// Its place.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Whether it can still be used.
    pub fn is_over(&self) -> bool {
        self.handle.is_none()
    }

    /// Replaces `values` by their sums over all members, who must give as many each. Sums wrap.
    ///
    /// # Errors
    /// `Over`, `Memory`, `Refused`, `Failed`, `Deadline`, `GivenUp`; the group is aborted then and `values` are as before.
    pub fn all_reduce(&mut self, values: &mut [i64], patience: &Patience<'_>) -> Result<(), NcclError> {
        let count = values.len();
        self.operate("all-reduce", patience, &*values, count, |library, comm, address, stream| {
            // SAFETY: the memory holds `count` integers and is left alone until the operation is over (`operate`).
            unsafe { library.all_reduce(comm, address, count, stream) }
        })?;
        self.read(0, values)
    }

    /// Adds `values` over all members and puts this member's part of the sums into `sums`: the `rank`-th of `size` parts.
    ///
    /// # Errors
    /// `Size` unless `values` are `size` times as many as `sums`; as `all_reduce`.
    pub fn reduce_scatter(
        &mut self,
        values: &[i64],
        sums: &mut [i64],
        patience: &Patience<'_>,
    ) -> Result<(), NcclError> {
        let count = sums.len();
        let expected = count.checked_mul(self.place.size);
        if expected != Some(values.len()) {
            let expected = format!("{} times {count}", self.place.size);
            return Err(NcclError::Size { subject: "length of the values", expected, actual: values.len() });
        }
        let len = values.len();
        self.operate("reduce-scatter", patience, values, len + count, |library, comm, address, stream| {
            let to = address + size_of_val(values) as u64;
            // SAFETY: the memory holds `size * count` integers and `count` more after them.
            unsafe { library.reduce_scatter(comm, address, to, count, stream) }
        })?;
        self.read(len, sums)
    }

    /// Replaces `bytes` by those of the member `root`; all must give as many.
    ///
    /// # Errors
    /// `Size` if there is no such member; as `all_reduce`.
    pub fn broadcast(
        &mut self,
        bytes: &mut [u8],
        root: usize,
        patience: &Patience<'_>,
    ) -> Result<(), NcclError> {
        let (root, _) = Place { rank: root, size: self.place.size }.numbers()?;
        let mut words: Vec<i64> = bytes.chunks(size_of::<i64>()).map(word).collect();
        let count = words.len();
        self.operate("broadcast", patience, &words, count, |library, comm, address, stream| {
            // SAFETY: as in `all_reduce`.
            unsafe { library.broadcast(comm, address, count, root, stream) }
        })?;
        self.read(0, &mut words)?;
        for (bytes, word) in bytes.chunks_mut(size_of::<i64>()).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
        }
        Ok(())
    }

    /// Leaves in good order: what is under way is finished first. Without it the group is aborted.
    ///
    /// # Errors
    /// `Over`, `Refused`, `Failed`, `Deadline`, `GivenUp`; it is aborted then.
    pub fn leave(mut self, patience: &Patience<'_>) -> Result<(), NcclError> {
        let comm = self.handle.as_ref().ok_or(NcclError::Over)?.0;
        self.memory.as_ref().ok_or(NcclError::Over)?.bind()?;
        // SAFETY: the group is neither destroyed nor aborted: `handle` still has it.
        let begun = unsafe { self.library.finalize(comm) };
        self.library.refused("ncclCommFinalize", begun)?;
        self.wait("leaving", patience, Instant::now(), || Ok(true))?;
        if self.handle.take().is_some() {
            // SAFETY: as above; it was taken out, so nobody uses it afterwards.
            unsafe { self.library.destroy(comm) };
        }
        Ok(())
    }

    /// Puts values into the memory, lets `call` begin, waits until all is done. Whatever fails ends the group.
    fn operate(
        &mut self,
        during: &'static str,
        patience: &Patience<'_>,
        values: &[i64],
        len: usize,
        call: impl Fn(&Nccl, Comm, u64, *mut c_void) -> c_int,
    ) -> Result<(), NcclError> {
        let done = self.attempt(during, patience, values, len, call);
        if done.is_err() {
            self.abort();
        }
        done
    }

    fn attempt(
        &mut self,
        during: &'static str,
        patience: &Patience<'_>,
        values: &[i64],
        len: usize,
        call: impl Fn(&Nccl, Comm, u64, *mut c_void) -> c_int,
    ) -> Result<(), NcclError> {
        let began = Instant::now();
        let comm = self.handle.as_ref().ok_or(NcclError::Over)?.0;
        let memory = self.memory.as_mut().ok_or(NcclError::Over)?;
        memory.bind()?;
        memory.fill(values, len)?;
        let (address, stream) = memory.place();
        self.library.refused(during, call(&self.library, comm, address, stream))?;
        // First it is queued, then it is done: the mark must come after all that was queued.
        self.wait(during, patience, began, || Ok(true))?;
        let mark = self.memory.as_ref().ok_or(NcclError::Over)?.mark()?;
        self.wait(during, patience, began, || mark.is_passed())
    }

    fn read(&mut self, at: usize, values: &mut [i64]) -> Result<(), NcclError> {
        let read = self.memory.as_mut().ok_or(NcclError::Over).and_then(|memory| memory.read(at, values));
        if read.is_err() {
            self.abort();
        }
        read
    }

    /// Looks until the group is at rest and `done` says so too.
    fn wait(
        &self,
        during: &'static str,
        patience: &Patience<'_>,
        began: Instant,
        done: impl Fn() -> Result<bool, NcclError>,
    ) -> Result<(), NcclError> {
        let mut pause = LOOK;
        loop {
            let comm = self.handle.as_ref().ok_or(NcclError::Over)?.0;
            // SAFETY: the group is neither destroyed nor aborted: `handle` still has it.
            match unsafe { self.library.state(comm) } {
                SUCCESS if done()? => return Ok(()),
                SUCCESS | IN_PROGRESS => {}
                error => return Err(NcclError::Failed { during, reason: self.library.words(error) }),
            }
            if (patience.given_up)() {
                return Err(NcclError::GivenUp { during });
            }
            if began.elapsed() >= patience.limit {
                return Err(NcclError::Deadline { during, limit: patience.limit });
            }
            sleep(pause);
            pause = LOOK_MAX.min(pause * 2);
        }
    }

    /// Ends the group, whatever it is at.
    fn abort(&mut self) {
        let Some(handle) = self.handle.take() else { return };
        let (done, aborted) = channel();
        let library = Arc::clone(&self.library);
        let abort = move || {
            // The whole handle moves here, not its pointer alone.
            let handle = handle;
            // SAFETY: it was taken out, so nobody else uses it, now or afterwards.
            unsafe { library.abort(handle.0) };
            let _ = done.send(());
        };
        let begun = thread::Builder::new().name("nccl-abort".into()).spawn(abort);
        if begun.is_err() || aborted.recv_timeout(ABORT).is_err() {
            // It may still be written to.
            std::mem::forget(self.memory.take());
        }
    }
}

/// Up to eight bytes as an integer.
fn word(bytes: &[u8]) -> i64 {
    let mut whole = [0; size_of::<i64>()];
    whole[..bytes.len()].copy_from_slice(bytes);
    i64::from_le_bytes(whole)
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}
