//! How much memory a piece of code takes at most.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the bytes that are allocated, now and at most.
struct Counting {
    now: AtomicUsize,
    peak: AtomicUsize,
}

#[global_allocator]
static ALLOCATIONS: Counting = Counting {
    now: AtomicUsize::new(0),
    peak: AtomicUsize::new(0),
};

// SAFETY: memory is had from the system's allocator and given back to it unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = self.now.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        self.peak.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps the rules of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        self.now.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as for `alloc`.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// What `f` returns, and how many bytes it had allocated at most. No other thread
/// may allocate meanwhile.
pub fn peak<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = ALLOCATIONS.now.load(Ordering::Relaxed);
    ALLOCATIONS.peak.store(before, Ordering::Relaxed);
    let result = f();
    (result, ALLOCATIONS.peak.load(Ordering::Relaxed) - before)
}
