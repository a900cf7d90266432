//! One piece of guest RAM: made once, or taken back and looked at like a stranger.
//!
//! What a segment must be follows from what carries it over a kexec ([`Backing`]). LUO preserves a
//! shmem file without a name in any directory (Linux `mm/memfd_luo.c`, `memfd_luo_can_preserve`), and
//! executable, because a memfd sealed against execution comes back sealed against writing too. Without
//! LUO a file does it whose pages are memory themselves: one on a filesystem with DAX in RAM that
//! was reserved at boot. Which one it is the caller says; it is never guessed.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::{fmt, io};

use rustix::fs::{AtFlags, MemfdFlags, OFlags, SealFlags, SeekFrom, StatxAttributes, StatxFlags};

use crate::Error;

/// `f_type` of tmpfs and of the kernel's internal shmem mount (Linux `include/uapi/linux/magic.h`).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// `st_blocks` counts in these, whatever the filesystem (stat(2)).
const BLOCK: u64 = 512;

/// What a segment's file is, and so how it survives a kexec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backing {
    /// A memfd, which LUO carries.
    Memfd,
    /// A file on a filesystem with DAX, which stays where it is. All of it is allocated: a store for
    /// which the filesystem had no room would be a SIGBUS.
    DaxFile,
    /// The same on any filesystem. For tests: its memory does not survive a kexec.
    AnyFile,
}

/// A memfd, or a file, that holds one piece of guest RAM.
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

    /// The memfd, or file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Another fd of the same file, to hand to another process.
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
/// that says it has `expected_len` bytes. It has to be a memfd. Touches no page.
///
/// An fd that is refused is closed: who must not lose the memory keeps another fd of it.
pub fn check_segment(index: usize, fd: OwnedFd, expected_len: u64) -> Result<Segment, Error> {
    check_segment_of(Backing::Memfd, index, fd, expected_len)
}

/// [`check_segment`] for a segment of any backing, and for a file that was just made. What is refused
/// as one backing is not tried as another.
pub fn check_segment_of(
    backing: Backing,
    index: usize,
    fd: OwnedFd,
    expected_len: u64,
) -> Result<Segment, Error> {
    let unfit = |problem: String| Err(Error::Unfit { index, problem });
    let stat =
        rustix::fs::fstat(&fd).map_err(|errno| examined(index, "find out its size", errno))?;
    let problem = match backing {
        Backing::Memfd => memfd_problem(index, &fd, &stat)?,
        Backing::DaxFile => file_problem(index, &fd, &stat, true)?,
        Backing::AnyFile => file_problem(index, &fd, &stat, false)?,
    };
    if let Some(problem) = problem {
        return unfit(problem);
    }
    if u64::try_from(stat.st_size) != Ok(expected_len) {
        return unfit(format!("it has {} bytes, the layout says {expected_len}", stat.st_size));
    }
    let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(BLOCK);
    if backing != Backing::Memfd && allocated < expected_len {
        return unfit(format!("only {allocated} of its {expected_len} bytes are allocated"));
    }
    let flags = rustix::fs::fcntl_getfl(&fd)
        .map_err(|errno| examined(index, "find out its access mode", errno))?;
    if flags & OFlags::ACCMODE != OFlags::RDWR {
        return unfit("its fd is not open for both reading and writing".to_owned());
    }
    if backing == Backing::Memfd {
        let seals = rustix::fs::fcntl_get_seals(&fd)
            .map_err(|errno| examined(index, "find out its seals", errno))?;
        let harmful = seals & (SealFlags::WRITE | SealFlags::FUTURE_WRITE | SealFlags::EXEC);
        if !harmful.is_empty() {
            let names: Vec<_> =
                harmful.iter_names().map(|(name, _)| format!("F_SEAL_{name}")).collect();
            let names = names.join(" and ");
            return unfit(format!("it is sealed with {names}, guest RAM must not be"));
        }
    }
    Ok(Segment { file: fd.into(), len: expected_len })
}

/// Returns why a file is not a memfd; `None` if it is one.
fn memfd_problem(
    index: usize,
    fd: &OwnedFd,
    stat: &rustix::fs::Stat,
) -> Result<Option<String>, Error> {
    let filesystem = filesystem(index, fd)?;
    if filesystem != TMPFS_MAGIC || kind(stat) != libc::S_IFREG {
        return Ok(Some(format!(
            "it is {} on a filesystem of type {filesystem:#x}, not a file in shared memory \
             (type {TMPFS_MAGIC:#x})",
            Kind(kind(stat))
        )));
    }
    let named = stat.st_nlink != 0;
    Ok(named.then(|| "it has a name in a directory, so it is not a memfd".to_owned()))
}

/// Why a file is none that stays where it is, if it is none. A file that has no name any more is gone
/// with the kernel.
fn file_problem(
    index: usize,
    fd: &OwnedFd,
    stat: &rustix::fs::Stat,
    with_dax: bool,
) -> Result<Option<String>, Error> {
    if kind(stat) != libc::S_IFREG {
        return Ok(Some(format!("it is {}, not a file", Kind(kind(stat)))));
    }
    if stat.st_nlink == 0 {
        let problem = "it has no name in a directory, so the next kernel would not find it";
        return Ok(Some(problem.to_owned()));
    }
    let (flags, mask) = (AtFlags::EMPTY_PATH, StatxFlags::TYPE);
    let attributes = rustix::fs::statx(fd, "", flags, mask)
        .map_err(|errno| examined(index, "find out whether it has DAX", errno))?
        .stx_attributes;
    if with_dax && !attributes.contains(StatxAttributes::DAX) {
        return Ok(Some(format!(
            "it is a file without DAX on a filesystem of type {:#x}: its pages are copies, which \
             no kexec leaves alone",
            filesystem(index, fd)?
        )));
    }
    Ok(None)
}

fn filesystem(index: usize, fd: &OwnedFd) -> Result<u64, Error> {
    let found = rustix::fs::fstatfs(fd);
    let found = found.map_err(|errno| examined(index, "find out its filesystem", errno))?;
    Ok(found.f_type as u64)
}

fn kind(stat: &rustix::fs::Stat) -> libc::mode_t {
    libc::mode_t::from(stat.st_mode) & libc::S_IFMT
}

fn examined(index: usize, attempt: &'static str, errno: rustix::io::Errno) -> Error {
    Error::Examine { index, attempt, source: errno.into() }
}

/// Whether any page of a segment exists, in memory or swapped out. If none does, it is all zero and
/// can be created again instead of being preserved.
///
/// `SEEK_DATA` asks the page cache itself, and counts pages in swap (Linux `mm/filemap.c`,
/// `folio_seek_hole_data`), but takes pages that were only reserved with fallocate(2) for a hole.
/// `st_blocks` counts those too, but is bookkeeping (`mm/shmem.c`, `shmem_recalc_inode`). A wrong "no"
/// would lose memory and a wrong "yes" only costs time, so it is "no" only if both say so.
///
/// The answer holds only while nothing runs that could touch the segment: ask (again) when the vCPUs are
/// paused and the devices drained. What the guest merely read counts as touched, and so does
/// everything that LUO once preserved, as it fills holes, and every file that is allocated.
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

/// Bytes of a segment that have no memory yet, and will take it from the host once they are touched. As
/// with [`is_touched`], a running guest makes the answer smaller at any time.
pub fn untouched_bytes(segment: &Segment) -> io::Result<u64> {
    /// What `st_blocks` counts in, whatever the file system (stat(3type)).
    const BLOCK: u64 = 512;
    let blocks = rustix::fs::fstat(segment)?.st_blocks;
    let touched = u64::try_from(blocks).unwrap_or(0).saturating_mul(BLOCK);
    Ok(segment.len().saturating_sub(touched))
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
