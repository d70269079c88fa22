//! The primitives of the parallel code: those of `std`, or, in a build with
//! `--cfg loom`, those of the model checker, which tries every order in which
//! threads may take their steps (`tests/loom`).

#[cfg(not(loom))]
pub use std::sync::{
    Condvar, Mutex, MutexGuard, RwLock,
    atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering, fence},
};

#[cfg(loom)]
pub use loom::sync::{
    Condvar, Mutex, MutexGuard, RwLock,
    atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering, fence},
};

/// Takes `mutex`, whether or not somebody has panicked while holding it: what the
/// crate's locks guard changes in steps that each leave it whole.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
