//! What the pool and the emulator write down beside a handover tree.

use super::with_digest;
use crate::builtin::pool::record;
use crate::emulate::state::index::Index;

/// The pool that the seeds are of.
const POOL: [u8; 16] = [0x5a; 16];
/// Where the digest is in every pool's tree that is right: behind the header, an empty list of
/// reservations, the root's beginning, and two properties.
const DIGEST_AT: usize = 40 + 16 + 8 + 24 + 28 + 12;

/// Reads a pool's tree, which has one form.
pub fn pool_tree(input: &[u8]) {
    for bytes in with_digest(input, DIGEST_AT) {
        if let Ok(tree) = record::decode(&bytes, POOL) {
            assert_eq!(record::encode(&tree).unwrap(), bytes);
            let files = record::pool_files(&tree.luo).count();
            assert_eq!(files, tree.files.len(), "each file has its record");
        }
    }
}

/// Reads the index of a state directory, which has one form; also with a right last line.
pub fn state_index(input: &[u8]) {
    let last = input.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
    let before = input[..last].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let mut right = input[..before].to_vec();
    right.extend(format!("end sum {:08x}\n", crc32fast::hash(&input[..before])).bytes());
    for bytes in [input, &right] {
        if let Ok(index) = Index::parse(bytes) {
            assert_eq!(index.to_string().as_bytes(), bytes);
        }
    }
}
