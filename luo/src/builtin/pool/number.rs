//! Numbers that nobody can have written down before.
//!
//! They come from where the standard library seeds its hash maps, which is the kernel. They are
//! unlike each other, and not secret.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// A number that is not 0.
pub(super) fn random() -> u64 {
    loop {
        let number = RandomState::new().hash_one(0);
        if number != 0 {
            return number;
        }
    }
}

/// 16 bytes.
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
