//! Random numbers, for names that must differ between processes. They are no secrets.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::Instant;

/// Returns a random number.
pub fn random() -> u64 {
    // A `RandomState` has random keys. The first ones of a process are from getrandom(2).
    RandomState::new().hash_one(Instant::now())
}
