//! The pool's directory: all reads and changes of its files.
//!
//! ```text
//! pool        the version of this layout, and the identity of the pool
//! lock        locked by the host that uses the pool
//! handover    the tree for the next generation; exists from the switch to the start of the next
//! incoming    the tree of the previous generation
//! files/ID    preserved files, and memory in use; ID: 16 hexadecimal digits
//! taken/...   one empty file (a mark) for each session of `incoming` that was taken
//! ```
//!
//! A tree is either complete or absent: it is written under another name, and renamed once it is on
//! disk. An open file in `files` has a shared lock until the last fd and the last mapping of it, in
//! any process, are gone. So a file that can be locked exclusively is not in use. How the files are
//! used is left to [`super::files`].

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, SeekFrom};
use rustix::io::Errno;

use super::super::open_file::Look;
use super::{Options, PoolError, fault, number};
use crate::Copies;

const IDENTITY: &str = "pool";
/// The first line of the file `pool`.
const VERSION: &str = "luo-pool-v1";
const FILES: &str = "files";
const TAKEN: &str = "taken";
/// Largest tree that is read, in bytes: about 10 000 sessions of 50 files.
const MOST_TREE: u64 = 64 << 20;

/// The two trees that a pool can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Handover,
    Incoming,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Self::Handover => "handover",
            Self::Incoming => "incoming",
        }
    }
}

/// A pool's directory, which only this process uses.
#[derive(Debug)]
pub(super) struct Directory {
    root: OwnedFd,
    files: OwnedFd,
    taken: OwnedFd,
    _lock: OwnedFd,
    /// The filesystem's device number.
    pub(super) device: u64,
    /// The identity of the pool: a random number from its creation.
    pub(super) identity: [u8; 16],
    reserve_bytes: u64,
}

impl Directory {
    /// Opens a pool. Makes one in a directory that has no file `pool` yet.
    pub(super) fn open(path: &Path, options: &Options) -> Result<Self, PoolError> {
        let cannot = |attempt| {
            let path = path.to_owned();
            move |errno| PoolError::Io { path, attempt, errno }
        };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::NOTDIR => PoolError::NotADirectory { path: path.to_owned() },
            errno => cannot("open")(errno),
        })?;
        let lock = open_at(&root, "lock", OFlags::CREATE).map_err(cannot("lock"))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(PoolError::InUse { path: path.to_owned() }),
            locked => locked.map_err(cannot("lock"))?,
        }
        check_filesystem(path, &root, options)?;
        let identity = identify(path, &root)?;
        let subdirectory = |name: &str| {
            match rustix::fs::mkdirat(&root, name, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => rustix::fs::openat(&root, name, flags, Mode::empty()),
                Err(errno) => Err(errno),
            }
            .map_err(cannot("make a directory in"))
        };
        let (files, taken) = (subdirectory(FILES)?, subdirectory(TAKEN)?);
        let device = Look::at(&files).map_err(cannot("look at"))?.inode.device;
        let reserve_bytes = options.reserve_bytes;
        Ok(Self { root, files, taken, _lock: lock, device, identity, reserve_bytes })
    }

    /// Reads a tree. Returns `None` if there is none. EFBIG above [`MOST_TREE`] bytes.
    pub(super) fn read_tree(&self, place: Place) -> Result<Option<Vec<u8>>, Errno> {
        let file = match open_at(&self.root, place.name(), OFlags::RDONLY) {
            Err(Errno::NOENT) => return Ok(None),
            file => File::from(file?),
        };
        if Look::at(&file)?.bytes > MOST_TREE {
            return Err(Errno::FBIG);
        }
        let mut bytes = Vec::new();
        file.take(MOST_TREE).read_to_end(&mut bytes).map_err(|error| errno(&error))?;
        Ok(Some(bytes))
    }

    /// Writes the tree `handover`. After a failure no valid tree `handover` exists;
    /// ENOTRECOVERABLE if one may exist, because it could not be removed.
    pub(super) fn write_handover(&self, bytes: &[u8]) -> Result<(), Errno> {
        fault::before_change()?;
        // The names of the files in the tree must be on disk before the tree is.
        rustix::fs::fsync(&self.files)?;
        let written = replace(&self.root, Place::Handover.name(), bytes);
        written.or_else(|errno| {
            self.remove_handover()?;
            Err(errno)
        })
    }

    /// Removes the tree `handover`. ENOTRECOVERABLE if it may still be there.
    pub(super) fn remove_handover(&self) -> Result<(), Errno> {
        let name = Place::Handover.name();
        let removed = fault::before_change().and_then(|()| {
            match rustix::fs::unlinkat(&self.root, name, AtFlags::empty()) {
                Err(Errno::NOENT) => Ok(()),
                removed => removed,
            }?;
            rustix::fs::fsync(&self.root)
        });
        // If the file cannot be removed, try to truncate it: an empty file is no valid tree.
        let emptied = || {
            fault::before_change()?;
            let file = open_at(&self.root, name, OFlags::WRONLY | OFlags::TRUNC)?;
            rustix::fs::fsync(&file)
        };
        removed.or_else(|_| emptied()).map_err(|_| Errno::NOTRECOVERABLE)
    }

    /// Removes both trees, valid or not. A crash meanwhile can leave a tree; the next start must
    /// then have [`Expect::Nothing`](super::Expect::Nothing) again, to remove that tree.
    pub(super) fn forget_trees(&self) -> Result<(), Errno> {
        for place in [Place::Handover, Place::Incoming] {
            fault::before_change()?;
            match rustix::fs::unlinkat(&self.root, place.name(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        fault::before_change()?;
        rustix::fs::fsync(&self.root)
    }

    /// Renames the tree `handover` to `incoming`, and replaces the old `incoming`.
    pub(super) fn take_handover(&self) -> Result<(), Errno> {
        let (from, to) = (Place::Handover.name(), Place::Incoming.name());
        fault::before_change()?;
        rustix::fs::renameat(&self.root, from, &self.root, to)?;
        fault::before_change()?;
        rustix::fs::fsync(&self.root)
    }

    /// Marks a session of the tree with this digest as taken. When this returns, the mark is on
    /// disk: the session is not given out again, also after a crash. After an error there is no mark, unless that
    /// cannot be removed either.
    pub(super) fn mark_taken(&self, digest: u32, session: usize) -> Result<(), Errno> {
        let name = mark(digest, session);
        fault::before_change()?;
        open_at(&self.taken, &name, OFlags::CREATE | OFlags::WRONLY)?;
        let kept = fault::before_change().and_then(|()| rustix::fs::fsync(&self.taken));
        if kept.is_err() && fault::before_change().is_ok() {
            let _ = rustix::fs::unlinkat(&self.taken, &*name, AtFlags::empty());
        }
        kept
    }

    /// Whether a session of the tree with this digest is marked as taken. On an error, returns
    /// `false`: retrieving the session's files then fails if they are gone.
    pub(super) fn is_taken(&self, digest: u32, session: usize) -> bool {
        rustix::fs::statat(&self.taken, mark(digest, session), AtFlags::empty()).is_ok()
    }

    /// Removes the marks of sessions of all other trees. Ignores errors.
    pub(super) fn forget_taken(&self, digest: u32) {
        let current = mark(digest, 0);
        let (current, _) = current.split_at(8);
        for name in names(&self.taken).unwrap_or_default() {
            let name = name.to_string_lossy();
            if !name.starts_with(current) && fault::before_change().is_ok() {
                let _ = rustix::fs::unlinkat(&self.taken, &*name, AtFlags::empty());
            }
        }
    }

    /// Whether a file of `bytes` bytes leaves [`Options::reserve_bytes`] free, for trees and
    /// documents.
    pub(super) fn has_room(&self, bytes: u64) -> Result<bool, Errno> {
        Ok(bytes.saturating_add(self.reserve_bytes) <= self.free()?.bytes)
    }

    /// Returns how many files can still be created, and how many bytes they can have.
    pub(super) fn free(&self) -> Result<Copies, Errno> {
        let fs = rustix::fs::fstatvfs(&self.files)?;
        let bytes = fs.f_bavail.saturating_mul(fs.f_frsize);
        // A filesystem without a fixed number of inodes says 0 for all of them.
        let files = if fs.f_files == 0 { u64::MAX } else { fs.f_favail };
        Ok(Copies { files, bytes })
    }

    /// Creates a file with `bytes` allocated bytes. Returns its number, and an fd that marks the
    /// file as in use.
    pub(super) fn create(&self, bytes: u64) -> Result<(u64, OwnedFd), Errno> {
        let id = self.unused_number()?;
        fault::before_change()?;
        let fd = open_at(&self.files, &name(id), OFlags::CREATE | OFlags::EXCL | OFlags::RDWR)?;
        let prepare = || {
            rustix::fs::flock(&fd, FlockOperation::NonBlockingLockShared)?;
            fault::before_change()?;
            if bytes > 0 {
                rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes)?;
            }
            Ok(())
        };
        match prepare() {
            Ok(()) => Ok((id, fd)),
            Err(errno) => {
                let _ = self.remove(id);
                Err(errno)
            }
        }
    }

    /// Opens a file for reading and writing. The fd marks the file as in use.
    pub(super) fn open_file(&self, id: u64) -> Result<OwnedFd, Errno> {
        let fd = open_at(&self.files, &name(id), OFlags::RDWR)?;
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockShared)?;
        Ok(fd)
    }

    /// Whether any fd or mapping of the file exists. On an error, returns `true`.
    pub(super) fn is_in_use(&self, id: u64) -> bool {
        let fd = open_at(&self.files, &name(id), OFlags::RDONLY);
        let locked =
            fd.and_then(|fd| rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive));
        locked.is_err()
    }

    pub(super) fn remove(&self, id: u64) -> Result<(), Errno> {
        fault::before_change()?;
        rustix::fs::unlinkat(&self.files, name(id), AtFlags::empty())
    }

    /// Renames a file to a new random number, which is in no tree. Returns the number.
    pub(super) fn renumber(&self, id: u64) -> Result<u64, Errno> {
        let new = self.unused_number()?;
        fault::before_change()?;
        let (from, to) = (name(id), name(new));
        rustix::fs::renameat_with(&self.files, from, &self.files, to, RenameFlags::NOREPLACE)?;
        Ok(new)
    }

    /// Returns the numbers of all files, with their inodes.
    pub(super) fn list(&self) -> Result<Vec<(u64, u64)>, Errno> {
        let found = names(&self.files)?.into_iter().filter_map(|file| {
            let id = u64::from_str_radix(file.to_str().ok()?, 16).ok()?;
            let stat = rustix::fs::statat(&self.files, file, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            Some((id, stat.st_ino))
        });
        Ok(found.collect())
    }

    /// Returns a random number that no file has.
    fn unused_number(&self) -> Result<u64, Errno> {
        loop {
            let id = number::random();
            match rustix::fs::statat(&self.files, name(id), AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => return Ok(id),
                other => drop(other?),
            }
        }
    }
}

/// Writes `bytes` at the start of a file. The file must already be that long.
pub(super) fn write(fd: &OwnedFd, bytes: &[u8]) -> Result<(), Errno> {
    let file = File::from(fd.try_clone().map_err(|error| errno(&error))?);
    fault::before_change()?;
    file.write_all_at(bytes, 0).map_err(|error| errno(&error))
}

/// Waits until a file is on disk.
pub(super) fn sync(fd: &OwnedFd) -> Result<(), Errno> {
    fault::before_change()?;
    rustix::fs::fsync(fd)
}

/// Writes zeros over the `bytes` bytes of a file, and waits until they are on disk. After that, a
/// store to a mapping of the file never needs the filesystem.
pub(super) fn zero(fd: &OwnedFd, bytes: u64) -> Result<(), Errno> {
    const PIECE: u64 = 2 << 20;
    let zeros = vec![0; usize::try_from(PIECE.min(bytes)).unwrap_or(0)];
    let file = File::from(fd.try_clone().map_err(|error| errno(&error))?);
    fault::before_change()?;
    let mut at = 0;
    while at < bytes {
        let piece = usize::try_from(bytes - at).map_or(zeros.len(), |rest| rest.min(zeros.len()));
        file.write_all_at(&zeros[..piece], at).map_err(|error| errno(&error))?;
        at += piece as u64;
    }
    rustix::fs::fsync(fd)
}

/// Reads the first `bytes` bytes of a file, without using its position. EIO if it is shorter.
pub(super) fn read(fd: impl AsFd, bytes: u64) -> Result<Vec<u8>, Errno> {
    let mut contents = vec![0; usize::try_from(bytes).map_err(|_| Errno::FBIG)?];
    let mut read = 0;
    while read < contents.len() {
        match rustix::io::pread(&fd, &mut contents[read..], read as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(more) => read += more,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(contents)
}

/// Sets the position of an open file.
pub(super) fn seek(fd: impl AsFd, position: u64) -> Result<(), Errno> {
    rustix::fs::seek(fd, SeekFrom::Start(position)).map(drop)
}

fn name(id: u64) -> String {
    format!("{id:016x}")
}

fn mark(digest: u32, session: usize) -> String {
    format!("{digest:08x}-{session}")
}

fn open_at(directory: &OwnedFd, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)
}

fn names(directory: &OwnedFd) -> Result<Vec<CString>, Errno> {
    let entries = rustix::fs::Dir::read_from(directory)?;
    entries.map(|entry| Ok(entry?.file_name().to_owned())).collect()
}

/// Returns the errno of an I/O error; EIO if it has none.
fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Replaces the file `name` by one with these bytes, atomically, and waits until it is on disk.
fn replace(root: &OwnedFd, name: &str, bytes: &[u8]) -> Result<(), Errno> {
    let new = format!("{name}.new");
    let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY;
    let write = || {
        fault::before_change()?;
        let file = File::from(open_at(root, &new, flags)?);
        // In two halves, so that tests can simulate a crash between them.
        let (one, other) = bytes.split_at(bytes.len() / 2);
        for (half, at) in [(one, 0), (other, one.len() as u64)] {
            fault::before_change()?;
            file.write_all_at(half, at).map_err(|error| errno(&error))?;
        }
        fault::before_change()?;
        rustix::fs::fsync(&file)?;
        fault::before_change()?;
        rustix::fs::renameat(root, &new, root, name)?;
        fault::before_change()?;
        rustix::fs::fsync(root)
    };
    write().inspect_err(|_| {
        if fault::before_change().is_ok() {
            let _ = rustix::fs::unlinkat(root, &new, AtFlags::empty());
        }
    })
}

fn check_filesystem(path: &Path, root: &OwnedFd, options: &Options) -> Result<(), PoolError> {
    let cannot = |attempt| {
        let path = path.to_owned();
        move |errno| PoolError::Io { path, attempt, errno }
    };
    let fs = rustix::fs::fstatvfs(root).map_err(cannot("look at"))?;
    let found = fs.f_blocks.saturating_mul(fs.f_frsize);
    if found < options.least_bytes {
        let least = options.least_bytes;
        return Err(PoolError::TooSmall { path: path.to_owned(), found, least });
    }
    // Whether files are DAX is an attribute of each file: look at a new one.
    let probe = open_at(root, "probe", OFlags::CREATE | OFlags::RDWR);
    let probe = probe.map_err(cannot("create a file in"))?;
    let mask = rustix::fs::StatxFlags::TYPE;
    let looked = rustix::fs::statx(&probe, "", AtFlags::EMPTY_PATH, mask);
    let _ = rustix::fs::unlinkat(root, "probe", AtFlags::empty());
    let looked = looked.map_err(cannot("look at a file in"))?;
    let is_dax = looked.stx_attributes.contains(rustix::fs::StatxAttributes::DAX);
    if !is_dax && !options.without_dax {
        return Err(PoolError::NoDax { path: path.to_owned() });
    }
    Ok(())
}

/// Returns the identity of the pool. If the pool has none yet, creates and writes one.
fn identify(path: &Path, root: &OwnedFd) -> Result<[u8; 16], PoolError> {
    let cannot = |attempt| {
        let path = path.to_owned();
        move |errno| PoolError::Io { path, attempt, errno }
    };
    let bytes = match open_at(root, IDENTITY, OFlags::RDONLY) {
        Err(Errno::NOENT) => {
            let identity = number::random_bytes();
            let text = format!("{VERSION}\n{:032x}\n", u128::from_be_bytes(identity));
            replace(root, IDENTITY, text.as_bytes()).map_err(cannot("write"))?;
            return Ok(identity);
        }
        file => {
            let file = file.map_err(cannot("read"))?;
            let look = Look::at(&file).map_err(cannot("read"))?;
            read(&file, look.bytes.min(256)).map_err(cannot("read"))?
        }
    };
    let text = String::from_utf8_lossy(&bytes);
    let (version, rest) = text.split_once('\n').unwrap_or((&text, ""));
    if version != VERSION {
        let (found, path) = (version.escape_debug().to_string(), path.to_owned());
        return Err(PoolError::Version { path, found, known: VERSION });
    }
    let digits = rest.strip_suffix('\n').filter(|digits| digits.len() == 32);
    let number = digits.and_then(|digits| u128::from_str_radix(digits, 16).ok());
    number.map(u128::to_be_bytes).ok_or_else(|| PoolError::Identity { path: path.to_owned() })
}
