//! What becomes of memory that is freed.

/// Has the allocator keep memory that is freed for what is allocated next, as far as it can be told so (glibc). A pass frees
/// and allocates the same large buffers in every layer: given back in between, their pages would have to be made and
/// cleared again each time. Weights are not concerned, as they have pages of
/// their own.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: two parameters of the allocator are set to values that it documents: no block gets a mapping of its own, and
        // the end of the heap is never given back. If it refuses, all works as before.
        unsafe {
            libc::mallopt(libc::M_MMAP_MAX, 0);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        }
    }
}

/// Gives freed memory back to the system, as far as the allocator can be told so (glibc).
pub fn give_back_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: it may be called at any time, and touches only memory that nothing holds.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}
