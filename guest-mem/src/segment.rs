//! One memfd of guest RAM: made once, or taken back and looked at like a stranger.
//!
//! What a segment must be follows from what LUO can preserve and from what comes back: a shmem file
//! without a name in any directory (Linux `mm/memfd_luo.c`, `memfd_luo_can_preserve`), and executable,
//! because a memfd sealed against execution comes back sealed against writing too.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::{fmt, io};

use rustix::fs::{MemfdFlags, OFlags, SealFlags, SeekFrom};

use crate::Error;

/// `f_type` of tmpfs and of the kernel's internal shmem mount (Linux `include/uapi/linux/magic.h`).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A memfd that holds one piece of guest RAM.
#[derive(Debug)]
pub struct Segment {
    file: File,
    len: u64,
}

impl Segment {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it holds nothing, which no segment of a layout does.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Another fd of the same memfd, to hand to another process.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, len: self.len })
    }
}

impl AsFd for Segment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<Segment> for OwnedFd {
    fn from(segment: Segment) -> Self {
        segment.file.into()
    }
}

/// Makes a segment of `len` bytes, all of it a hole. `name` is seen in `/proc/PID/maps` until the
/// first live update, which does not carry it; it has at most 249 bytes.
///
/// It is sized here and never again: LUO freezes the size of what it preserves. Seals cannot be added
/// to it, so nobody who is handed it can make it unwritable.
pub fn create_segment(name: &str, len: u64) -> Result<Segment, Error> {
    let failed =
        |attempt, source: io::Error| Error::Create { name: name.to_owned(), len, attempt, source };
    let fd = match rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::EXEC) {
        // Linux before 6.3 does not know MFD_EXEC, and makes every memfd executable.
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC),
        made => made,
    }
    .map_err(|errno| failed("create", errno.into()))?;
    rustix::fs::ftruncate(&fd, len).map_err(|errno| failed("size", errno.into()))?;
    Ok(Segment { file: fd.into(), len })
}

/// Takes `fd`, which came back from a session or from another process, as segment `index` of a layout
/// that says it has `expected_len` bytes. Touches no page.
///
/// An fd that is refused is closed: who must not lose the memory keeps another fd of it.
pub fn check_segment(index: usize, fd: OwnedFd, expected_len: u64) -> Result<Segment, Error> {
    let examine = |attempt| {
        move |errno: rustix::io::Errno| Error::Examine { index, attempt, source: errno.into() }
    };
    let unfit = |problem: String| Err(Error::Unfit { index, problem });

    let filesystem = rustix::fs::fstatfs(&fd).map_err(examine("find out its filesystem"))?;
    let stat = rustix::fs::fstat(&fd).map_err(examine("find out its size"))?;
    let mode = libc::mode_t::from(stat.st_mode) & libc::S_IFMT;
    if filesystem.f_type as u64 != TMPFS_MAGIC || mode != libc::S_IFREG {
        return unfit(format!(
            "it is {} on a filesystem of type {:#x}, not a file in shared memory (type {TMPFS_MAGIC:#x})",
            Kind(mode),
            filesystem.f_type
        ));
    }
    if stat.st_nlink != 0 {
        return unfit("it has a name in a directory, so it is not a memfd".to_owned());
    }
    if u64::try_from(stat.st_size) != Ok(expected_len) {
        return unfit(format!("it has {} bytes, the layout says {expected_len}", stat.st_size));
    }
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(examine("find out its access mode"))?;
    if flags & OFlags::ACCMODE != OFlags::RDWR {
        return unfit("its fd is not open for both reading and writing".to_owned());
    }
    let seals = rustix::fs::fcntl_get_seals(&fd).map_err(examine("find out its seals"))?;
    let harmful = seals & (SealFlags::WRITE | SealFlags::FUTURE_WRITE | SealFlags::EXEC);
    if !harmful.is_empty() {
        let names: Vec<_> =
            harmful.iter_names().map(|(name, _)| format!("F_SEAL_{name}")).collect();
        return unfit(format!("it is sealed with {}, guest RAM must not be", names.join(" and ")));
    }
    Ok(Segment { file: fd.into(), len: expected_len })
}

/// Whether any page of a segment exists, in memory or swapped out. If none does, it is all zero and
/// can be made anew instead of being preserved.
///
/// `SEEK_DATA` asks the page cache itself, and counts pages in swap (Linux `mm/filemap.c`,
/// `folio_seek_hole_data`), but takes pages that were only reserved with fallocate(2) for a hole.
/// `st_blocks` counts those too, but is bookkeeping (`mm/shmem.c`, `shmem_recalc_inode`). A wrong "no"
/// would lose memory and a wrong "yes" only costs time, so it is "no" only if both say so.
///
/// The answer holds only while nothing runs that could touch the segment: ask (again) when the vCPUs are
/// paused and the devices drained. What the guest merely read counts as touched, and so does
/// everything that LUO once preserved, as it fills holes.
pub fn is_touched(segment: &impl AsFd) -> io::Result<bool> {
    let segment = segment.as_fd();
    if rustix::fs::fstat(segment)?.st_blocks != 0 {
        return Ok(true);
    }
    match rustix::fs::seek(segment, SeekFrom::Data(0)) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::NXIO) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// A file's type for an error.
struct Kind(libc::mode_t);

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            libc::S_IFREG => "a file",
            libc::S_IFDIR => "a directory",
            libc::S_IFCHR | libc::S_IFBLK => "a device",
            libc::S_IFIFO => "a pipe",
            libc::S_IFSOCK => "a socket",
            _ => "no file",
        })
    }
}
