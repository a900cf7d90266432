//! Writes a small file of the guest's disk in place, as GRUB's `save_env` does: the blocks that the file has get
//! other contents, and the file system does not notice.
//!
//! Which blocks these are, no reader of file systems says. So it is found out by a trial. The file is read through a
//! probe, which notes what is read of the disk. Each place where the file's contents were read is a candidate: it is
//! the file's if a view that shows other bytes there shows another file. A copy in the journal is no
//! candidate, because the next replay would undo a write to its place.

use std::io;
use std::rc::Rc;

use super::file_system::{FileSystem, FileSystemError};
use super::view::{Probe, View};

/// Where a file can begin: at a multiple of a sector.
const SECTOR: u64 = 512;
/// Most places that are tried.
const CANDIDATES: usize = 16;
/// Most bytes of a file that is written.
const MOST: usize = 64 << 10;

/// A file cannot be written in place.
#[derive(Debug, thiserror::Error)]
pub(super) enum RewriteError {
    #[error(transparent)]
    FileSystem(#[from] FileSystemError),
    #[error("it cannot be told where on the disk the file is, or its blocks are in the journal")]
    Nowhere,
    #[error("it is no environment block of GRUB, is damaged, or has no room")]
    NoRoom,
    #[error("the disk cannot be written")]
    Write(#[source] io::Error),
}

/// Gives the file at `path` of the file system in `view`, which is `old`, the contents `new`, which are as long.
/// Returns when they are durable.
pub(super) fn rewrite(view: &View, path: &str, old: &[u8], new: &[u8]) -> Result<(), RewriteError> {
    if old == new {
        return Ok(());
    }
    if old.len() != new.len() || old.len() > MOST {
        return Err(RewriteError::Nowhere);
    }
    let probe = Rc::new(Probe::default());
    if contents(view.again().probed(probe.clone()), path)? != old {
        return Err(RewriteError::Nowhere);
    }
    let base = view.start();
    for position in candidates(view, &probe, old)? {
        // Any other bytes would do.
        let change = Some((position, new.to_vec()));
        let probe = Rc::new(Probe { change, ..Probe::default() });
        // A change of something else may make the file system unreadable.
        if contents(view.again().probed(probe), path).is_ok_and(|changed| changed == new) {
            return view.write_at(position - base, new).map_err(RewriteError::Write);
        }
    }
    Err(RewriteError::Nowhere)
}

fn contents(view: View, path: &str) -> Result<Vec<u8>, FileSystemError> {
    FileSystem::open(view)?.contents(path, MOST as u64)
}

/// The positions on the disk where the probe saw `contents`.
fn candidates(view: &View, probe: &Probe, contents: &[u8]) -> Result<Vec<u64>, FileSystemError> {
    let mut found = Vec::new();
    let mut plain = view.again();
    let mut bytes = vec![0; contents.len()];
    for (start, length) in probe.served.borrow().iter() {
        let end = start.saturating_add(*length as u64);
        let mut position = start.next_multiple_of(SECTOR);
        while position < end && found.len() < CANDIDATES {
            let at = position.saturating_sub(view.start());
            let is_it = plain.read_exact_at(at, &mut bytes).is_ok() && bytes == contents;
            if is_it && !found.contains(&position) {
                found.push(position);
            }
            position += SECTOR;
        }
    }
    Ok(found)
}
