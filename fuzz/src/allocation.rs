//! An allocator that refuses any single allocation above a limit, and remembers that it did.
//!
//! It finds lengths that are believed before they are checked: a few bytes of input should never ask for gigabytes.
//! A refused `try_reserve` returns an error and is reported after the execution; any other request ends the process,
//! as running out of memory does. Not here: a limit on the sum of allocations.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Largest single allocation that is granted, in bytes: 1 GiB.
pub const SINGLE_ALLOCATION_MAX: usize = 1 << 30;

/// The largest request refused since the last look; 0 if there was none.
static REFUSED: AtomicUsize = AtomicUsize::new(0);

/// The system allocator with [`SINGLE_ALLOCATION_MAX`].
pub struct Limited;

/// The largest request refused since the last call, in bytes.
pub(crate) fn take_refused() -> Option<usize> {
    Some(REFUSED.swap(0, Ordering::Relaxed)).filter(|bytes| *bytes > 0)
}

fn granted(bytes: usize) -> bool {
    let granted = bytes <= SINGLE_ALLOCATION_MAX;
    if !granted {
        REFUSED.fetch_max(bytes, Ordering::Relaxed);
    }
    granted
}

#[expect(unsafe_code, reason = "GlobalAlloc cannot be implemented otherwise")]
// SAFETY: every call is passed on to `System` unchanged, or answered with null, which the trait allows as failure.
unsafe impl GlobalAlloc for Limited {
    // SAFETY: the contract is the trait's.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is `System`'s.
        if granted(layout.size()) { unsafe { System.alloc(layout) } } else { null_mut() }
    }

    // SAFETY: the contract is the trait's.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        if granted(layout.size()) { unsafe { System.alloc_zeroed(layout) } } else { null_mut() }
    }

    // SAFETY: the contract is the trait's.
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: `pointer` came from `System`, since nothing else here returns one; the rest as in `alloc`.
        if granted(size) { unsafe { System.realloc(pointer, layout, size) } } else { null_mut() }
    }

    // SAFETY: the contract is the trait's.
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as in `realloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}
