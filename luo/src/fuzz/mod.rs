//! Fuzz targets: functions that take any bytes and panic if the crate breaks a promise.
//!
//! They are compiled only for tests and fuzzers. `luo/fuzz` runs them under libFuzzer (`make
//! fuzz`). The tests below run each target on its seeds (`luo/fuzz/seeds`) and on inputs derived
//! from them.
#![expect(clippy::unwrap_used, reason = "a target reports a finding by a panic")]

mod ioctl;
mod keeper;
mod records;
mod trees;

pub use ioctl::ioctl;
pub use keeper::keeper;
pub use records::{pool_tree, state_index};
pub use trees::{tree_seed, tree_v1, tree_v5};

/// Returns the input as it is, and a copy with the correct CRC-32 at offset `at`. The CRC-32 covers
/// all bytes, with zeros in its own place. Without the copy, nearly all inputs would fail at the
/// checksum, and the code after it would not be tested.
fn with_digest(input: &[u8], at: usize) -> [Vec<u8>; 2] {
    let mut right = input.to_vec();
    if let Some(digest) = right.get_mut(at..at + 4) {
        digest.fill(0);
        let sum = crc32fast::hash(&right);
        right[at..at + 4].copy_from_slice(&sum.to_be_bytes());
    }
    [input.to_vec(), right]
}

#[cfg(test)]
mod tests {
    use perennial_fuzz::replay;

    use super::*;

    fn seeds(target: &str) -> String {
        format!("{}/fuzz/seeds/{target}", env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn any_requests_keep_the_state_machine_consistent() {
        replay(seeds("ioctl"), ioctl);
    }

    #[test]
    fn a_keeper_accepts_a_handover_or_hands_it_back() {
        replay(seeds("keeper"), keeper);
    }

    #[test]
    fn a_tree_of_the_built_in_luo_is_refused_or_starts_a_kernel() {
        replay(seeds("tree_v1"), tree_v1);
    }

    #[test]
    fn a_tree_of_the_seed_is_refused_or_survives_encoding() {
        replay(seeds("tree_seed"), tree_seed);
    }

    #[test]
    fn a_tree_of_linux_is_refused_or_survives_encoding() {
        replay(seeds("tree_v5"), tree_v5);
    }

    #[test]
    fn a_tree_of_a_pool_is_refused_or_survives_encoding() {
        replay(seeds("pool_tree"), pool_tree);
    }

    #[test]
    fn an_index_of_a_state_directory_is_refused_or_survives_formatting() {
        replay(seeds("state_index"), state_index);
    }
}
