//! Locks that stay usable after a panic: a test that fails must not hide the failures of others.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, even if a thread panicked while it held the lock. This is correct because the
/// data behind this crate's mutexes is consistent whenever code that can panic runs.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
