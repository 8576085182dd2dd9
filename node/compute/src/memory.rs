//! What becomes of large blocks of memory that are freed.
//!
//! The C library of Linux keeps freed blocks of up to 32 MiB for later, in several heaps: a process whose threads make and
//! drop matrices of that size holds several times what it uses. Not here: allocating.

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
