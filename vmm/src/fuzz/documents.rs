//! Targets for state documents and manifests: a document that can be read must encode to the same
//! bytes.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::devices::{files_for, wires};
use crate::live_update::index::Index;
use crate::live_update::manifest::Manifest;
use crate::state::Schema;
use crate::state::document::{self, Detail};
use crate::vm::VmStateV1;
use crate::vm::board::Board;

/// Offset of the digest: after the header, an empty list of reservations, the root's begin token
/// and the property's header.
const DIGEST_AT: usize = 40 + 16 + 8 + 12;

/// Reads the state document of a machine and restores the devices, which need no KVM.
pub fn state_document(input: &[u8]) {
    for bytes in with_digest(input) {
        if let Some(state) = read::<VmStateV1>(&bytes) {
            restore(state);
        }
    }
}

/// Reads the manifest and the index, which the host writes for the next host.
pub fn manifest(input: &[u8]) {
    for bytes in with_digest(input) {
        let _ = read::<Manifest>(&bytes);
        let _ = read::<Index>(&bytes);
    }
}

/// Returns the bytes as they are and with a correct digest. With a wrong digest, an input does not
/// reach the parser behind the digest's check.
fn with_digest(input: &[u8]) -> [Vec<u8>; 2] {
    let mut right = input.to_vec();
    if let Some(digest) = right.get_mut(DIGEST_AT..DIGEST_AT + 4) {
        digest.fill(0);
        let sum = crc32fast::hash(&right);
        right[DIGEST_AT..DIGEST_AT + 4].copy_from_slice(&sum.to_be_bytes());
    }
    [input.to_vec(), right]
}

/// Reads a document, if it is valid, and checks that its tree and its value encode repeatably.
fn read<S: Schema>(bytes: &[u8]) -> Option<S> {
    let root = document::decode(bytes).ok()?;
    assert_eq!(document::encode(&root).unwrap(), bytes);
    assert!(!document::show(&root, Detail::Brief).is_empty());
    let value: S = document::read_document(bytes).ok()?;
    let again = document::write_document(&value).unwrap();
    let value = document::read_document::<S>(&again).unwrap();
    // Compared with `again`, not with `bytes`: `bytes` may have an older binding, `again` has the
    // newest.
    assert_eq!(document::write_document(&value).unwrap(), again);
    Some(value)
}

/// Restores the devices. If the restore accepts the state, a save must return the same state.
fn restore(state: VmStateV1) {
    let VmStateV1 { machine, devices, .. } = state;
    let ram = [(GuestAddress(0), 0x8_0000), (GuestAddress(0x10_0000), 0x1_0000)];
    let memory = GuestMemoryMmap::from_ranges(&ram).unwrap();
    let (wires, _) = wires(&memory);
    let Some((mut fds, _peers)) = files_for(&machine, Some(&devices)) else { return };
    if let Ok(board) = Board::restore(&machine, devices.clone(), &wires, &mut fds) {
        assert_eq!(board.save().unwrap(), devices);
    }
}
