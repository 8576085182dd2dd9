//! Large blocks of memory: the pages they are made of, and what becomes of them when they are freed.
//!
//! The C library of Linux keeps freed blocks of up to 32 MiB for later, in several heaps: a process whose threads make and
//! drop matrices of that size holds several times what it uses. Blocks that go back to the system at once come with new pages the next
//! time, and a fault for each: with huge pages there are few. On one machine a large block's forward passes, which bring activations from a device, took
//! 5.9 s without and 3.2 s with them.
//! Not here: who allocates what.

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, which asks for huge pages for large blocks. Where the system has none it is the system's allocator.
#[derive(Debug, Clone, Copy)]
pub struct LargePages;

#[expect(unsafe_code, reason = "an allocator")]
// SAFETY: every call is the system allocator's, with the same arguments; advice changes no contents and no address.
unsafe impl GlobalAlloc for LargePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those of the system's allocator.
        advised(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        advised(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        advised(unsafe { System.realloc(pointer, layout, size) }, size)
    }
}

/// The same block, whose whole pages may become huge ones if it is large.
#[inline]
fn advised(pointer: *mut u8, size: usize) -> *mut u8 {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    if size >= LARGE as usize && !pointer.is_null() {
        ask_for_huge_pages(pointer, size);
    }
    let _ = size;
    pointer
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "calls a function of the C library")]
#[cold]
fn ask_for_huge_pages(pointer: *mut u8, size: usize) {
    /// `MADV_HUGEPAGE` of mman.h.
    const HUGE_PAGES: std::ffi::c_int = 14;
    const PAGE: usize = 4096;
    // SAFETY: declared as in mman.h.
    unsafe extern "C" {
        fn madvise(address: *mut std::ffi::c_void, bytes: usize, advice: std::ffi::c_int) -> std::ffi::c_int;
    }
    let skipped = pointer.align_offset(PAGE).min(size);
    let bytes = (size - skipped) / PAGE * PAGE;
    // SAFETY: whole pages inside a block that was just allocated; the advice keeps what is in them. If it is refused, pages stay small.
    unsafe { madvise(pointer.wrapping_add(skipped).cast(), bytes, HUGE_PAGES) };
}

/// Blocks of at least this many bytes go back to the system at once. Smaller ones are used again, without new pages.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE: std::ffi::c_int = 4 << 20;

/// Has the allocator give large blocks back to the system when they are freed; once, where a process begins. Elsewhere
/// than on Linux with glibc it does nothing.
pub fn give_back_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    set_mmap_threshold(LARGE);
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "calls a function of the C library")]
fn set_mmap_threshold(bytes: std::ffi::c_int) {
    /// `M_MMAP_THRESHOLD` of malloc.h.
    const MMAP_THRESHOLD: std::ffi::c_int = -3;
    // SAFETY: declared as in glibc's malloc.h.
    unsafe extern "C" {
        fn mallopt(parameter: std::ffi::c_int, value: std::ffi::c_int) -> std::ffi::c_int;
    }
    // SAFETY: two integers, nothing is kept; glibc allows it at any time, from any thread. If it is refused (0), blocks are
    // kept as they were before.
    unsafe { mallopt(MMAP_THRESHOLD, bytes) };
}
