//! The keeper's file handlers: any regular file is preserved as its open fd.
//!
//! The successor gets the same open file, with its contents, position, seals and mode. So nothing
//! is saved or restored, and files may be written until the switch. A handle is the index of the fd
//! in the [`Handover`](super::Handover), with a digest of the file's identity: if fds were mixed
//! up, retrieving fails, and never returns the memory of another VM.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;

use super::super::open_file::{Look, OpenFile};
use super::super::{Compatible, Handle, Handler, Retrieval};
use crate::mutex::lock;

/// The fds from the previous keeper and for the next one.
#[derive(Debug, Clone, Default)]
pub(super) struct Carried(Arc<Mutex<Fds>>);

#[derive(Debug, Default)]
struct Fds {
    /// Fds for the next keeper, in the order in which files were frozen.
    outgoing: Vec<OwnedFd>,
    /// Fds from the previous keeper; `None` once retrieved or finished.
    incoming: Vec<Option<OwnedFd>>,
    /// Size in bytes of each preserved file when it was preserved, by inode.
    bytes: BTreeMap<u128, u64>,
}

impl Carried {
    pub(super) fn new(incoming: Vec<OwnedFd>) -> Self {
        let incoming = incoming.into_iter().map(Some).collect();
        Self(Arc::new(Mutex::new(Fds { incoming, ..Fds::default() })))
    }

    /// Removes and returns the fds of the files that were frozen since the last call.
    pub(super) fn take_outgoing(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds().outgoing)
    }

    fn fds(&self) -> MutexGuard<'_, Fds> {
        lock(&self.0)
    }
}

/// The kind of files that a handler preserves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    /// Memfds, which must have the same size at the switch as when they were preserved.
    Memfd,
    /// Any other regular file. The kernel's LUO preserves none of these.
    Regular,
}

impl FileKind {
    /// Both kinds, in the order in which their handlers are registered.
    pub(super) const ALL: [Self; 2] = [Self::Memfd, Self::Regular];

    /// The name of the format of the handles.
    pub(super) fn format(self) -> &'static str {
        match self {
            Self::Memfd => "memfd-keeper-v1",
            Self::Regular => "file-keeper-v1",
        }
    }
}

/// Preserves files of one kind.
#[derive(Debug)]
pub(super) struct FdHandler {
    pub(super) kind: FileKind,
    pub(super) carried: Carried,
    pub(super) compatible: Compatible,
}

impl FdHandler {
    /// Returns the digest in the file's handle: of the inode and, for a memfd, of the size. The
    /// size of another file may change.
    fn digest(&self, look: &Look) -> u32 {
        let bytes = if self.kind == FileKind::Memfd { look.bytes } else { 0 };
        let mut digest = crc32fast::Hasher::new();
        digest.update(&look.inode.to_u128().to_le_bytes());
        digest.update(&bytes.to_le_bytes());
        digest.finalize()
    }
}

fn handle(place: usize, digest: u32) -> Result<Handle, Errno> {
    let place = u32::try_from(place).map_err(|_| Errno::NOSPC)?;
    Ok(Handle(u64::from(digest) << 32 | u64::from(place)))
}

fn place(Handle(handle): Handle) -> usize {
    (handle & u64::from(u32::MAX)) as usize
}

impl Handler<OpenFile> for FdHandler {
    fn compatible(&self) -> Compatible {
        self.compatible
    }

    fn can_preserve(&self, file: &OpenFile) -> bool {
        match self.kind {
            FileKind::Memfd => file.is_memfd(),
            FileKind::Regular => file.look().is_ok_and(|look| look.is_regular),
        }
    }

    fn identity(&self, file: &OpenFile) -> Option<u128> {
        file.look().ok().map(|look| look.inode.to_u128())
    }

    fn preserve(&mut self, file: &OpenFile) -> Result<Handle, Errno> {
        let look = file.look()?;
        self.carried.fds().bytes.insert(look.inode.to_u128(), look.bytes);
        handle(0, self.digest(&look))
    }

    /// EINVAL if a memfd's size has changed since it was preserved. The kernel's LUO prevents such
    /// a change; the keeper can only detect it.
    fn freeze(&mut self, file: &OpenFile, _: Handle) -> Result<Handle, Errno> {
        let (look, fd) = (file.look()?, file.duplicate()?);
        let mut fds = self.carried.fds();
        let preserved = fds.bytes.get(&look.inode.to_u128());
        if self.kind == FileKind::Memfd && preserved != Some(&look.bytes) {
            return Err(Errno::INVAL);
        }
        fds.outgoing.push(fd);
        handle(fds.outgoing.len() - 1, self.digest(&look))
    }

    fn unpreserve(&mut self, file: &OpenFile, _: Handle) {
        if let Ok(look) = file.look() {
            self.carried.fds().bytes.remove(&look.inode.to_u128());
        }
    }

    /// ESTALE if there is no fd at the index in the handle, or the fd is of another file.
    fn retrieve(&mut self, taken: Handle) -> Result<OpenFile, Errno> {
        let mut fds = self.carried.fds();
        let slot = fds.incoming.get_mut(place(taken)).ok_or(Errno::STALE)?;
        let look = Look::at(slot.as_ref().ok_or(Errno::STALE)?)?;
        if handle(place(taken), self.digest(&look)) != Ok(taken) {
            return Err(Errno::STALE);
        }
        Ok(OpenFile::new(slot.take().ok_or(Errno::STALE)?))
    }

    fn keeps(&self, errno: Errno) -> bool {
        errno != Errno::STALE
    }

    fn finish(&mut self, _: Retrieval<'_, OpenFile>, handle: Handle) {
        if let Some(fd) = self.carried.fds().incoming.get_mut(place(handle)) {
            fd.take();
        }
    }
}
