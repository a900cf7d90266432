//! Random numbers, for names that must not have been used before.
//!
//! They come from the seeds of the standard library's hash maps, which come from the kernel. They
//! differ from each other, but are not secret.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// Returns a random number other than 0.
pub(super) fn random() -> u64 {
    loop {
        let number = RandomState::new().hash_one(0);
        if number != 0 {
            return number;
        }
    }
}

/// Returns 16 random bytes.
pub(super) fn random_bytes() -> [u8; 16] {
    (u128::from(random()) << 64 | u128::from(random())).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_differ() {
        let mut numbers: Vec<u64> = (0..1000).map(|_| random()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 1000);
        assert_ne!(random_bytes(), random_bytes());
    }
}
