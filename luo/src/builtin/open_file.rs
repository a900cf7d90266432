//! Open files of this process, as values for the state machine.
//!
//! An [`OpenFile`] owns an fd, which its clones share: the file stays open after the fd that it was
//! made from is closed. Attributes of the file are not stored; each use asks the kernel. Only the
//! identity of a file, its [`Inode`], is kept as a value. How files are preserved is left to
//! handlers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::File;

/// `f_type` of tmpfs and of the kernel's internal shmem mount (`include/uapi/linux/magic.h`).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A reference to an open file of this process.
///
/// Two `OpenFile`s that were made from two fds of one open file have different numbers: handlers of
/// real files compare inodes.
#[derive(Debug, Clone)]
pub struct OpenFile {
    fd: Arc<OwnedFd>,
    number: u64,
}

impl File for OpenFile {
    fn description(&self) -> u64 {
        self.number
    }
}

impl OpenFile {
    /// Takes ownership of an fd.
    pub fn new(fd: OwnedFd) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self { fd: Arc::new(fd), number: LAST.fetch_add(1, Ordering::Relaxed) }
    }

    /// Duplicates `fd`. Returns `None` if it was opened with O_PATH: for the kernel's LUO such an
    /// fd is not open. EMFILE if this process has no free fd.
    pub fn of(fd: BorrowedFd<'_>) -> Result<Option<Self>, Errno> {
        if rustix::fs::fcntl_getfl(fd)?.contains(OFlags::PATH) {
            return Ok(None);
        }
        Ok(Some(Self::new(duplicate(fd)?)))
    }

    /// A new fd of the same open file, with O_CLOEXEC.
    pub fn duplicate(&self) -> Result<OwnedFd, Errno> {
        duplicate(self.as_fd())
    }

    /// Asks the kernel for the file's current attributes.
    pub(super) fn look(&self) -> Result<Look, Errno> {
        Look::at(self.as_fd())
    }

    /// Whether the file is a memfd by the kernel handler's rule: a regular file in shared memory
    /// without a name in any directory (`mm/memfd_luo.c`, `memfd_luo_can_preserve`). A memfd of
    /// hugetlb pages is not: it is on hugetlbfs.
    pub(crate) fn is_memfd(&self) -> bool {
        let shmem = rustix::fs::fstatfs(self).is_ok_and(|fs| fs.f_type as u64 == TMPFS_MAGIC);
        shmem && self.look().is_ok_and(|look| look.is_regular && look.links == 0)
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A new fd of the same open file, with O_CLOEXEC.
pub(super) fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    rustix::io::fcntl_dupfd_cloexec(fd, 0)
}

/// The identity of a file, valid while this kernel runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Inode {
    /// The filesystem's device number.
    pub(super) device: u64,
    /// The inode number on that filesystem.
    pub(super) number: u64,
}

impl Inode {
    /// The device and inode numbers as one number.
    pub(super) fn to_u128(self) -> u128 {
        u128::from(self.device) << 64 | u128::from(self.number)
    }
}

/// The attributes of a file, from fstat(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) inode: Inode,
    pub(super) is_regular: bool,
    pub(super) links: u64,
    pub(super) bytes: u64,
}

impl Look {
    pub(super) fn at(fd: impl AsFd) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(fd)?;
        Ok(Self {
            inode: Inode { device: stat.st_dev, number: stat.st_ino },
            is_regular: FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile,
            links: stat.st_nlink as u64,
            bytes: u64::try_from(stat.st_size).unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, Mode, memfd_create};

    use super::*;

    fn open(path: &str, flags: OFlags) -> OwnedFd {
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn a_file_stays_open_when_the_fd_that_it_came_from_is_closed() {
        let fd = memfd_create("a", MemfdFlags::CLOEXEC).unwrap();
        let file = OpenFile::of(fd.as_fd()).unwrap().unwrap();
        let inode = file.look().unwrap().inode;
        drop(fd);
        let again = file.duplicate().unwrap();
        assert_eq!(Look::at(&again).unwrap().inode, inode);
        assert_eq!(file.clone().description(), file.description());
        assert_ne!(OpenFile::new(again).description(), file.description());
    }

    #[test]
    fn an_o_path_fd_does_not_count_as_open() {
        assert!(OpenFile::of(open("/dev/null", OFlags::PATH).as_fd()).unwrap().is_none());
        assert!(OpenFile::of(open("/dev/null", OFlags::RDONLY).as_fd()).unwrap().is_some());
    }

    #[test]
    fn only_shared_memory_without_a_name_is_a_memfd() {
        let memfd = memfd_create("a", MemfdFlags::CLOEXEC).unwrap();
        assert!(OpenFile::new(memfd).is_memfd());
        assert!(!OpenFile::new(open("/dev/null", OFlags::RDONLY)).is_memfd());
        assert!(!OpenFile::new(open("/proc/self/status", OFlags::RDONLY)).is_memfd());
        if let Ok(named) = tempfile::NamedTempFile::new_in("/dev/shm") {
            let file = OpenFile::new(named.reopen().unwrap().into());
            assert!(!file.is_memfd(), "the file has a name");
            drop(named);
            assert!(file.is_memfd(), "the name was removed");
        }
    }
}
