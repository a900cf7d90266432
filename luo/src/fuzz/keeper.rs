//! The handover between keepers: a tree, and memfds in the order in which the tree refers to them.
//!
//! The first byte of the input, modulo 8, is the number of fds; the rest is the tree.

use std::os::fd::OwnedFd;

use perennial_fuzz::Script;

use super::with_digest;
use crate::builtin::keeper::{Handover, Keeper};
use crate::builtin::tree::v1;
use crate::{Error, Orchestrator, SessionName, memory};

/// Offset of the digest in bytes; see [`super::trees`].
const DIGEST_AT: usize = 40 + 16 + 8 + 20 + 20 + 12;

/// Starts a keeper with a handover, and retrieves all sessions and files from it.
pub fn keeper(input: &[u8]) {
    let mut script = Script::new(input);
    let count = usize::from(script.u8() % 8);
    for tree in with_digest(script.rest(), DIGEST_AT) {
        let fds: Vec<OwnedFd> =
            (0..count).map(|index| memory::memfd("fuzz", index as u64).unwrap()).collect();
        match Keeper::arrive(Handover { tree: tree.clone(), fds }) {
            Ok(keeper) => ask(&keeper, &tree, count),
            Err(error) => {
                assert_eq!((error.handover.tree, error.handover.fds.len()), (tree, count))
            }
        }
    }
}

fn ask(keeper: &Keeper, tree: &[u8], fds: usize) {
    let handover = v1::decode(tree).unwrap();
    assert!(fds <= handover.file_count(), "there are more fds than files");
    assert_eq!(keeper.liveupdate_number(), handover.number);
    for record in &handover.sessions {
        let Ok(name) = SessionName::from_array(&record.name.to_field()) else { continue };
        let session = match keeper.retrieve_session(&name) {
            Ok(session) => session,
            // A file has a format that no keeper has, or two sessions have one name.
            Err(error) => return assert!(matches!(error, Error::Unreadable { .. }), "{error}"),
        };
        for file in &record.files {
            // Usually an error: the fds are new files, not the ones that the tree describes.
            let _ = session.retrieve(file.token);
        }
        session.finish().unwrap();
    }
    let next = keeper.clone().switch().unwrap();
    assert_eq!(v1::decode(&next.tree).unwrap().sessions, []);
}
