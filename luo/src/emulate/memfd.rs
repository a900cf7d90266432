//! The handler of memfds, the only files that the emulated LUO preserves, and their store.
//!
//! Follows `mm/memfd_luo.c` of Linux 7.3. Linux refuses to resize a preserved file; the emulator
//! cannot, so the switch fails if a file's size is not that at preservation. Contents are not
//! copied between generations of one run: the [`Store`] keeps a reference to the file, and
//! retrieving gives a new open file description of the same file, for reading and writing, at the
//! position that the old description had at the switch. Unlike on Linux, the file keeps its name,
//! mode, owner, seals and holes.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{Mode, OFlags, SealFlags, SeekFrom, fcntl_get_seals, fstat, open, seek, tell};
use rustix::io::Errno;

use crate::builtin::tree::Handover;
use crate::builtin::{Compatible, Handle, Handler, OpenFile, Retrieval};
use crate::mutex::lock;

/// The format of this handler's files. A handle is the number of a file in the store.
pub(super) const FORMAT: &str = "memfd-store-v1";

/// A preserved file, with its properties at preservation.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) file: OpenFile,
    /// In bytes.
    pub(super) size: u64,
    /// The file position, in bytes. Updated at the switch.
    pub(super) position: u64,
    pub(super) seals: SealFlags,
    /// Permission bits.
    pub(super) mode: u32,
}

/// Opens the file again. Returns a new open file description.
pub(super) fn reopen(fd: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

impl Kept {
    /// Reads the properties of a file of the program.
    fn of(file: &OpenFile) -> Result<Self, Errno> {
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

/// The contents of a [`Store`].
#[derive(Debug, Default)]
struct Files {
    /// The number given to the newest file.
    last: u64,
    files: BTreeMap<u64, Kept>,
}

/// All preserved and incoming files, each under its number. Clones share the same files.
#[derive(Debug, Clone, Default)]
pub(super) struct Store(Arc<Mutex<Files>>);

impl Store {
    /// A store with the files of a state directory.
    pub(super) fn with(files: BTreeMap<u64, Kept>) -> Self {
        let last = files.keys().next_back().copied().unwrap_or_default();
        Self(Arc::new(Mutex::new(Files { last, files })))
    }

    fn lock(&self) -> MutexGuard<'_, Files> {
        lock(&self.0)
    }

    /// Returns the file with this number.
    pub(super) fn get(&self, number: u64) -> Option<Kept> {
        self.lock().files.get(&number).cloned()
    }

    /// Drops all files that are not in the tree: sessions that were not finished are lost at a
    /// switch.
    pub(super) fn keep_only(&self, tree: &Handover) {
        let wanted = numbers(tree).collect::<BTreeSet<u64>>();
        self.lock().files.retain(|number, _| wanted.contains(number));
    }
}

/// The numbers of the files in a tree.
pub(super) fn numbers(tree: &Handover) -> impl Iterator<Item = u64> {
    tree.sessions.iter().flat_map(|session| &session.files).map(|file| file.data)
}

/// The handler of memfds.
#[derive(Debug)]
pub(super) struct MemfdHandler(pub(super) Store);

impl Handler<OpenFile> for MemfdHandler {
    fn compatible(&self) -> Compatible {
        Compatible::new(FORMAT).expect("the format is a valid name")
    }

    fn can_preserve(&self, file: &OpenFile) -> bool {
        file.is_memfd()
    }

    fn identity(&self, file: &OpenFile) -> Option<u128> {
        let stat = fstat(file).ok()?;
        Some(u128::from(stat.st_dev) << 64 | u128::from(stat.st_ino))
    }

    fn preserve(&mut self, file: &OpenFile) -> Result<Handle, Errno> {
        let kept = Kept::of(file)?;
        let mut store = self.0.lock();
        store.last += 1;
        let number = store.last;
        store.files.insert(number, kept);
        Ok(Handle(number))
    }

    /// EINVAL: the size of the file has changed since it was preserved.
    fn freeze(&mut self, file: &OpenFile, handle: Handle) -> Result<Handle, Errno> {
        let now = Kept::of(file)?;
        let mut store = self.0.lock();
        let kept = store.files.get_mut(&handle.0).ok_or(Errno::INVAL)?;
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
