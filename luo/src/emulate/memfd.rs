//! Memfds: what the emulated LUO carries, and where they wait.
//!
//! Follows `mm/memfd_luo.c` of Linux 7.3. A file that is preserved can be resized here, which Linux
//! refuses; so its size is held against what it was when the switch comes, and the switch fails if
//! it differs. Contents are never copied from one generation to the next: the [`Store`] keeps a
//! reference to the file, and who retrieves it gets a new open file description of the same file:
//! for reading and writing, at the position that the old one had at the switch. Name, mode, owner,
//! seals and holes of the file stay as they were, which they do not on Linux.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{Mode, OFlags, SealFlags, SeekFrom, fcntl_get_seals, fstat, open, seek, tell};
use rustix::io::Errno;

use crate::builtin::tree::Handover;
use crate::builtin::{Compatible, Handle, Handler, OpenFile, Retrieval};
use crate::mutex::lock;

/// What a handle of this handler is: the number of a file in the store.
pub(super) const FORMAT: &str = "memfd-store-v1";

/// A file on its way to the next kernel.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) file: OpenFile,
    pub(super) size: u64,
    pub(super) position: u64,
    pub(super) seals: SealFlags,
    /// Permission bits.
    pub(super) mode: u32,
}

/// Another open file description of the same file.
pub(super) fn reopen(fd: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

impl Kept {
    /// Looks at a file of the program, which is at its position.
    fn look(file: &OpenFile) -> Result<Self, Errno> {
        let stat = fstat(file)?;
        Ok(Self {
            file: file.clone(),
            size: u64::try_from(stat.st_size).map_err(|_| Errno::INVAL)?,
            position: tell(file)?,
            seals: fcntl_get_seals(file)?,
            mode: stat.st_mode & 0o7777,
        })
    }
}

#[derive(Debug, Default)]
struct Shelves {
    last: u64,
    files: BTreeMap<u64, Kept>,
}

/// The files that are preserved or came in, each under its number. Clones are the same store.
#[derive(Debug, Clone, Default)]
pub(super) struct Store(Arc<Mutex<Shelves>>);

impl Store {
    /// A store with what a state directory had.
    pub(super) fn with(files: BTreeMap<u64, Kept>) -> Self {
        let last = files.keys().next_back().copied().unwrap_or_default();
        Self(Arc::new(Mutex::new(Shelves { last, files })))
    }

    fn lock(&self) -> MutexGuard<'_, Shelves> {
        lock(&self.0)
    }

    /// The file of a number.
    pub(super) fn get(&self, number: u64) -> Option<Kept> {
        self.lock().files.get(&number).cloned()
    }

    /// Drops all that is not in a tree: what was not finished is lost with its kernel.
    pub(super) fn keep_only(&self, tree: &Handover) {
        let wanted = numbers(tree).collect::<BTreeSet<u64>>();
        self.lock().files.retain(|number, _| wanted.contains(number));
    }
}

/// The numbers of the files in a tree.
pub(super) fn numbers(tree: &Handover) -> impl Iterator<Item = u64> {
    tree.sessions.iter().flat_map(|session| &session.files).map(|file| file.data)
}

/// Carries memfds.
#[derive(Debug)]
pub(super) struct MemfdHandler(pub(super) Store);

impl Handler<OpenFile> for MemfdHandler {
    fn compatible(&self) -> Compatible {
        Compatible::new(FORMAT).expect("it is a short text")
    }

    fn can_preserve(&self, file: &OpenFile) -> bool {
        file.is_memfd()
    }

    fn identity(&self, file: &OpenFile) -> Option<u128> {
        let stat = fstat(file).ok()?;
        Some(u128::from(stat.st_dev) << 64 | u128::from(stat.st_ino))
    }

    fn preserve(&mut self, file: &OpenFile) -> Result<Handle, Errno> {
        let kept = Kept::look(file)?;
        let mut shelves = self.0.lock();
        shelves.last += 1;
        let number = shelves.last;
        shelves.files.insert(number, kept);
        Ok(Handle(number))
    }

    /// EINVAL: the size is not what it was when the file was preserved.
    fn freeze(&mut self, file: &OpenFile, handle: Handle) -> Result<Handle, Errno> {
        let now = Kept::look(file)?;
        let mut shelves = self.0.lock();
        let kept = shelves.files.get_mut(&handle.0).ok_or(Errno::INVAL)?;
        if now.size != kept.size {
            return Err(Errno::INVAL);
        }
        kept.position = now.position;
        Ok(handle)
    }

    fn unpreserve(&mut self, _: &OpenFile, handle: Handle) {
        self.0.lock().files.remove(&handle.0);
    }

    fn retrieve(&mut self, handle: Handle) -> Result<OpenFile, Errno> {
        let kept = self.0.get(handle.0).ok_or(Errno::IO)?;
        let fd = reopen(&kept.file, OFlags::RDWR | OFlags::LARGEFILE)?;
        seek(&fd, SeekFrom::Start(kept.position))?;
        Ok(OpenFile::new(fd))
    }

    fn finish(&mut self, _: Retrieval<'_, OpenFile>, handle: Handle) {
        self.0.lock().files.remove(&handle.0);
    }
}
