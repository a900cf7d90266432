//! Fuzz targets: functions of any bytes, which panic if the crate does not keep what it promises.
//!
//! They are there for tests and fuzzers only. `luo/fuzz` runs them under libFuzzer (`make fuzz`); here
//! each is a test over its seeds (`luo/fuzz/seeds`) and inputs made from them.
#![expect(clippy::unwrap_used, reason = "a panic is how a target says that it found something")]

mod ioctl;
mod keeper;
mod records;
mod trees;

pub use ioctl::ioctl;
pub use keeper::keeper;
pub use records::{pool_tree, state_index};
pub use trees::{tree_seed, tree_v1, tree_v5};

/// The bytes, and the bytes with a right CRC-32 at `at`, which is of all of them with it as zero: a
/// digest keeps most inputs out, and what lies behind it is to be tried, too.
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
    fn no_request_of_a_process_confuses_the_machine() {
        replay(seeds("ioctl"), ioctl);
    }

    #[test]
    fn whatever_a_keeper_is_handed_it_takes_or_hands_back() {
        replay(seeds("keeper"), keeper);
    }

    #[test]
    fn a_tree_of_the_built_in_luo_is_refused_or_can_be_lived_with() {
        replay(seeds("tree_v1"), tree_v1);
    }

    #[test]
    fn a_tree_of_the_first_luo_is_refused_or_means_something() {
        replay(seeds("tree_seed"), tree_seed);
    }

    #[test]
    fn a_tree_of_linux_is_refused_or_means_something() {
        replay(seeds("tree_v5"), tree_v5);
    }

    #[test]
    fn a_tree_of_a_pool_is_refused_or_means_something() {
        replay(seeds("pool_tree"), pool_tree);
    }

    #[test]
    fn an_index_of_a_state_directory_is_refused_or_means_something() {
        replay(seeds("state_index"), state_index);
    }
}
