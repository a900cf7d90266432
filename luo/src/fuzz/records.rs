//! The records that the pool and the emulator write beside a handover tree.

use super::with_digest;
use crate::builtin::pool::record;
use crate::emulate::state::index::Index;

/// The identifier of the pool in the seeds.
const POOL: [u8; 16] = [0x5a; 16];
/// Offset of the digest in every valid tree of a pool, in bytes: after the header, an empty list of
/// reservations, the start of the root node, and two properties.
const DIGEST_AT: usize = 40 + 16 + 8 + 24 + 28 + 12;

/// Decodes a tree of a pool. Encoding it again must give the same bytes.
pub fn pool_tree(input: &[u8]) {
    for bytes in with_digest(input, DIGEST_AT) {
        if let Ok(tree) = record::decode(&bytes, POOL) {
            assert_eq!(record::encode(&tree).unwrap(), bytes);
            let files = record::pool_files(&tree.luo.sessions).count();
            assert_eq!(files, tree.files.len(), "records and files differ in number");
        }
    }
}

/// Parses the index of a state directory, also with a correct checksum in its last line. Formatting
/// it again must give the same bytes.
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
