//! The pool's file handlers: files of the pool are preserved in place, small memfds as copies.
//!
//! Guest memory is a file of the pool; to preserve it is to record its number. A memfd is in memory
//! that the next kernel treats as free, so its contents are copied into the pool. Freeze copies
//! them, when they no longer change. Copying suits documents, not guest memory, so there is a
//! [limit](MOST_COPIED). The room for the copy is allocated when the memfd is preserved, because a
//! refusal then costs nothing. Where files are is left to [`super::files`].

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::super::open_file::{Look, OpenFile};
use super::super::{Compatible, Handle, Handler, Retrieval};
use super::directory;
use super::files::{PoolFiles, State};
use super::record::Entry;

/// Largest memfd that is copied, in bytes.
pub const MOST_COPIED: u64 = 16 << 20;

/// Preserves files of the pool, in place.
#[derive(Debug)]
pub(super) struct FileHandler {
    pub(super) files: PoolFiles,
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

    /// EINVAL if the file's size has changed since it was preserved.
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
            // So that a stale copy of a tree cannot find the file.
            let _ = state.renumber(handle.0, look.inode);
        }
    }

    /// Before it gives guest memory out, it marks the session on disk as taken, unless that is left to the end of the
    /// session.
    fn retrieve(&mut self, handle: Handle) -> Result<OpenFile, Errno> {
        let mut state = self.files.state();
        let (fd, entry) = state.open_owned(handle.0)?;
        directory::seek(&fd, entry.position)?;
        if state.gives_again() {
            return Ok(OpenFile::new(fd));
        }
        let inode = Look::at(&fd)?.inode;
        state.take(handle.0)?;
        // So that a stale copy of a tree cannot find the file. An error must not lose the guest,
        // and is ignored: the mark on disk already keeps the session from being given out again.
        let _ = state.renumber(handle.0, inode);
        state.owned.remove(&handle.0);
        Ok(OpenFile::new(fd))
    }

    fn keeps(&self, errno: Errno) -> bool {
        errno != Errno::STALE
    }

    fn can_finish(&mut self, _: Retrieval<'_, OpenFile>, handle: Handle) -> bool {
        self.files.state().take(handle.0).is_ok()
    }

    fn finish(&mut self, retrieval: Retrieval<'_, OpenFile>, handle: Handle) {
        match retrieval {
            // Its guest uses it from now on.
            Retrieval::Done(file) => self.unpreserve(file, handle),
            Retrieval::Never | Retrieval::Failed(_) => finish(&self.files, &retrieval, handle),
        }
    }
}

/// Preserves memfds, as copies in the pool.
#[derive(Debug)]
pub(super) struct CopyHandler {
    pub(super) files: PoolFiles,
    pub(super) compatible: Compatible,
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

    /// E2BIG if the memfd is larger than [`MOST_COPIED`].
    fn preserve(&mut self, file: &OpenFile) -> Result<Handle, Errno> {
        let bytes = file.look()?.bytes;
        if bytes > MOST_COPIED {
            return Err(Errno::TOOBIG);
        }
        let seals = rustix::fs::fcntl_get_seals(file)?.bits();
        let mut state = self.files.state();
        let (id, copy) = state.create_copy(bytes)?;
        let inode = Look::at(&copy)?.inode.number;
        state.owned.insert(id, Entry { inode, bytes, position: 0, seals, digest: 0 });
        state.copies.insert(id, copy);
        Ok(Handle(id))
    }

    /// EINVAL if the memfd's size has changed since it was preserved. The switch waits for the copies of all memfds
    /// together until they are on disk.
    fn freeze(&mut self, file: &OpenFile, handle: Handle) -> Result<Handle, Errno> {
        let mut state = self.files.state();
        let State { owned, copies, .. } = &mut *state;
        let entry = owned.get_mut(&handle.0).ok_or(Errno::STALE)?;
        let copy = copies.get(&handle.0).ok_or(Errno::STALE)?;
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
        let mut state = self.files.state();
        state.copies.remove(&handle.0);
        state.discard(handle.0);
    }

    /// ESTALE if the copy is missing or its contents have changed. The copy stays until its session is finished, so
    /// that a host that is started again can read it, too.
    fn retrieve(&mut self, handle: Handle) -> Result<OpenFile, Errno> {
        let state = self.files.state();
        let (copy, entry) = state.open_owned(handle.0)?;
        let contents = directory::read(&copy, entry.bytes)?;
        if crc32fast::hash(&contents) != entry.digest {
            return Err(Errno::STALE);
        }
        memfd(&contents, &entry).map(OpenFile::new)
    }

    fn keeps(&self, errno: Errno) -> bool {
        errno != Errno::STALE
    }

    fn can_finish(&mut self, _: Retrieval<'_, OpenFile>, handle: Handle) -> bool {
        self.files.state().take(handle.0).is_ok()
    }

    fn finish(&mut self, retrieval: Retrieval<'_, OpenFile>, handle: Handle) {
        finish(&self.files, &retrieval, handle);
    }
}

/// Ends the ownership of an incoming session's file, and removes the file if it was never
/// retrieved, or only copied. Retrieved guest memory is not owned any more. A file that could not be
/// retrieved may be another file, so it is not removed here: if it is not in use, it is a leftover.
fn finish(files: &PoolFiles, retrieval: &Retrieval<'_, OpenFile>, handle: Handle) {
    let mut state = files.state();
    match retrieval {
        Retrieval::Never | Retrieval::Done(_) if state.open_owned(handle.0).is_ok() => {
            state.discard(handle.0);
        }
        _ => drop(state.owned.remove(&handle.0)),
    }
}

/// Reads a memfd, also if this fd is write-only.
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

/// Makes a memfd with these contents, and with the position and the seals of the copied memfd.
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
