//! What one keeper hands to the next: a tree, and memfds in the order of their places.
//!
//! The script starts with the number of fds; the rest is the tree.

use std::os::fd::OwnedFd;

use perennial_fuzz::Script;

use super::with_digest;
use crate::builtin::keeper::{Handover, Keeper};
use crate::builtin::tree::v1;
use crate::{Error, Orchestrator, SessionName, memory};

/// Where the digest is; see [`super::trees`].
const DIGEST_AT: usize = 40 + 16 + 8 + 20 + 20 + 12;

/// Has a keeper arrive, and asks it for everything.
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
    assert!(fds <= handover.file_count(), "an fd for each file, and no more");
    assert_eq!(keeper.liveupdate_number(), handover.number);
    for record in &handover.sessions {
        let Ok(name) = SessionName::from_array(&record.name.to_field()) else { continue };
        let session = match keeper.retrieve_session(&name) {
            Ok(session) => session,
            // A file of a format that no keeper has, or two sessions of one name.
            Err(error) => return assert!(matches!(error, Error::Unreadable { .. }), "{error}"),
        };
        for file in &record.files {
            // The fds are new: what is in their place is hardly ever the file that was meant.
            let _ = session.retrieve(file.token);
        }
        session.finish().unwrap();
    }
    let next = keeper.clone().switch().unwrap();
    assert_eq!(v1::decode(&next.tree).unwrap().sessions, []);
}
