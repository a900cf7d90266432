//! What a pool carries: its own files as they are, and small memfds as copies.
//!
//! Guest memory is a file of the pool, and is preserved by writing down which one. A memfd lies in
//! memory that the next kernel takes for free, so its contents have to be written into the pool, at
//! the last moment, when nothing changes them any more. For documents that is right, for guest
//! memory it would not be: there is a [limit](MOST_COPIED). Room is taken when it is preserved, while
//! a refusal still costs nothing. Where files are is left to [`super::files`].

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::super::open_file::{Look, OpenFile};
use super::super::{Compatible, Handle, Handler, Retrieval};
use super::directory;
use super::files::Files;
use super::record::Entry;

/// Largest memfd that is copied, in bytes.
pub const MOST_COPIED: u64 = 16 << 20;

/// Carries files of the pool.
#[derive(Debug)]
pub(super) struct FileHandler {
    pub(super) files: Files,
    pub(super) compatible: Compatible,
}

impl Handler<OpenFile> for FileHandler {
    fn compatible(&self) -> Compatible {
        self.compatible
    }

    fn can_preserve(&self, file: &OpenFile) -> bool {
        let Ok(look) = file.look() else { return false };
        look.is_regular && look.links > 0 && self.files.state().number_of(look.inode).is_some()
    }

    fn identity(&self, file: &OpenFile) -> Option<u128> {
        file.look().ok().map(|look| look.inode.to_u128())
    }

    fn preserve(&mut self, file: &OpenFile) -> Result<Handle, Errno> {
        let Look { inode, bytes, .. } = file.look()?;
        let mut state = self.files.state();
        let id = state.number_of(inode).ok_or(Errno::NOENT)?;
        let id = state.renumber(id, inode)?;
        let entry = Entry { inode: inode.number, bytes, position: 0, seals: 0, digest: 0 };
        state.owned.insert(id, entry);
        Ok(Handle(id))
    }

    /// EINVAL: the file has not the size that it was preserved with.
    fn freeze(&mut self, file: &OpenFile, handle: Handle) -> Result<Handle, Errno> {
        let bytes = file.look()?.bytes;
        let position = rustix::fs::tell(file)?;
        let mut state = self.files.state();
        let entry = state.owned.get_mut(&handle.0).ok_or(Errno::STALE)?;
        if entry.bytes != bytes {
            return Err(Errno::INVAL);
        }
        entry.position = position;
        Ok(handle)
    }

    fn unpreserve(&mut self, file: &OpenFile, handle: Handle) {
        let mut state = self.files.state();
        state.owned.remove(&handle.0);
        if let Ok(look) = file.look() {
            // A tree that somebody kept should not find it.
            let _ = state.renumber(handle.0, look.inode);
        }
    }

    fn retrieve(&mut self, handle: Handle) -> Result<OpenFile, Errno> {
        let mut state = self.files.state();
        let (fd, entry) = state.open_owned(handle.0)?;
        directory::seek(&fd, entry.position)?;
        // That its session is taken is on disk already. This is one lock more, and no reason to
        // lose a guest.
        let _ = state.renumber(handle.0, Look::at(&fd)?.inode);
        state.owned.remove(&handle.0);
        Ok(OpenFile::new(fd))
    }

    fn finish(&mut self, retrieval: Retrieval<'_, OpenFile>, handle: Handle) {
        finish(&self.files, &retrieval, handle);
    }
}

/// Carries memfds.
#[derive(Debug)]
pub(super) struct CopyHandler {
    pub(super) files: Files,
    pub(super) compatible: Compatible,
    /// The copies of preserved memfds, open for writing.
    pub(super) copies: BTreeMap<u64, OwnedFd>,
}

impl Handler<OpenFile> for CopyHandler {
    fn compatible(&self) -> Compatible {
        self.compatible
    }

    fn can_preserve(&self, file: &OpenFile) -> bool {
        file.is_memfd()
    }

    fn identity(&self, file: &OpenFile) -> Option<u128> {
        file.look().ok().map(|look| look.inode.to_u128())
    }

    /// E2BIG: the memfd is larger than [`MOST_COPIED`].
    fn preserve(&mut self, file: &OpenFile) -> Result<Handle, Errno> {
        let bytes = file.look()?.bytes;
        if bytes > MOST_COPIED {
            return Err(Errno::TOOBIG);
        }
        let seals = rustix::fs::fcntl_get_seals(file)?.bits();
        let mut state = self.files.state();
        let (id, copy) = state.directory.create(bytes)?;
        let inode = Look::at(&copy)?.inode.number;
        state.owned.insert(id, Entry { inode, bytes, position: 0, seals, digest: 0 });
        self.copies.insert(id, copy);
        Ok(Handle(id))
    }

    /// EINVAL: the memfd has not the size that it was preserved with.
    fn freeze(&mut self, file: &OpenFile, handle: Handle) -> Result<Handle, Errno> {
        let mut state = self.files.state();
        let entry = state.owned.get_mut(&handle.0).ok_or(Errno::STALE)?;
        let copy = self.copies.get(&handle.0).ok_or(Errno::STALE)?;
        if file.look()?.bytes != entry.bytes {
            return Err(Errno::INVAL);
        }
        let contents = read_any(file, entry.bytes)?;
        directory::write(copy, &contents)?;
        entry.position = rustix::fs::tell(file)?;
        entry.digest = crc32fast::hash(&contents);
        Ok(handle)
    }

    fn unpreserve(&mut self, _: &OpenFile, handle: Handle) {
        self.copies.remove(&handle.0);
        self.files.state().discard(handle.0);
    }

    /// ESTALE: the copy is not what was written.
    fn retrieve(&mut self, handle: Handle) -> Result<OpenFile, Errno> {
        let mut state = self.files.state();
        let (copy, entry) = state.open_owned(handle.0)?;
        let contents = directory::read(&copy, entry.bytes)?;
        if crc32fast::hash(&contents) != entry.digest {
            return Err(Errno::STALE);
        }
        let memfd = memfd(&contents, &entry)?;
        state.discard(handle.0);
        Ok(OpenFile::new(memfd))
    }

    fn finish(&mut self, retrieval: Retrieval<'_, OpenFile>, handle: Handle) {
        finish(&self.files, &retrieval, handle);
    }
}

/// Ends what an incoming session owns. A file that could not be retrieved is perhaps another one, and
/// only let go: if nobody has it, it is a leftover.
fn finish(files: &Files, retrieval: &Retrieval<'_, OpenFile>, handle: Handle) {
    let mut state = files.state();
    match retrieval {
        Retrieval::Never if state.open_owned(handle.0).is_ok() => state.discard(handle.0),
        _ => drop(state.owned.remove(&handle.0)),
    }
}

/// Reads a memfd, also if this fd of it is for writing only.
fn read_any(file: &OpenFile, bytes: u64) -> Result<Vec<u8>, Errno> {
    match directory::read(file, bytes) {
        Err(Errno::BADF) => {
            use std::os::fd::AsRawFd;
            let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
            directory::read(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?, bytes)
        }
        contents => contents,
    }
}

/// A memfd with these contents, and with the position and the seals of the one that was copied.
fn memfd(contents: &[u8], entry: &Entry) -> Result<OwnedFd, Errno> {
    let seals = SealFlags::from_bits_retain(entry.seals);
    let sealed = seals.contains(SealFlags::EXEC);
    let execution = if sealed { MemfdFlags::NOEXEC_SEAL } else { MemfdFlags::EXEC };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match rustix::fs::memfd_create("luo", flags | execution) {
        // Linux before 6.3 knows neither flag.
        Err(Errno::INVAL) if !sealed => rustix::fs::memfd_create("luo", flags),
        made => made,
    }?;
    let mut written = 0;
    while written < contents.len() {
        match rustix::io::pwrite(&fd, &contents[written..], written as u64) {
            Ok(more) => written += more,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    directory::seek(&fd, entry.position)?;
    let rest = seals.difference(SealFlags::EXEC);
    if !rest.is_empty() {
        rustix::fs::fcntl_add_seals(&fd, rest)?;
    }
    Ok(fd)
}
