//! A segment: one piece of guest RAM, created here, or received as an fd that is checked and not trusted.
//!
//! The way a segment survives a kexec ([`Backing`]) decides what kind of file it must be. LUO preserves
//! a shmem file that has no name in any directory (Linux `mm/memfd_luo.c`, `memfd_luo_can_preserve`). It
//! must be executable, because a memfd sealed against execution comes back sealed against writing too.
//! Without LUO, a segment is a file whose pages are themselves the memory: a file on a filesystem with
//! DAX, in RAM that was reserved at boot. The caller names the backing; this module never guesses it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::{fmt, io};

use rustix::fs::{AtFlags, MemfdFlags, OFlags, SealFlags, SeekFrom, StatxAttributes, StatxFlags};

use crate::Error;

/// `f_type` of tmpfs and of the kernel's internal shmem mount (Linux `include/uapi/linux/magic.h`).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Bytes of one unit of `st_blocks`, on every filesystem (stat(2)).
const BLOCK: u64 = 512;

/// Kind of a segment's file, which decides how it survives a kexec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backing {
    /// A memfd, carried over by LUO.
    Memfd,
    /// A file on a filesystem with DAX, which stays where it is in memory. It is fully allocated,
    /// because a store to a hole for which the filesystem has no room would raise SIGBUS.
    DaxFile,
    /// A fully allocated file on any filesystem. For tests: its memory does not survive a kexec.
    AnyFile,
}

/// A memfd, or a file with DAX, that holds one piece of guest RAM.
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

    /// Whether the length is 0. No segment of a layout is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memfd, or the file with DAX.
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

/// Creates a memfd of `len` bytes, all of it a hole. `name`, at most 249 bytes, is shown in
/// `/proc/PID/maps` until the first live update, which does not carry it.
///
/// The size is sealed, because LUO freezes the size of what it preserves and takes memory for every byte of it: a
/// process that receives the memfd must not be able to change that. No other seal can follow, so no process can make
/// the memfd unwritable.
pub fn create_segment(name: &str, len: u64) -> Result<Segment, Error> {
    let failed =
        |attempt, source: io::Error| Error::Create { name: name.to_owned(), len, attempt, source };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC) {
        // Linux before 6.3 does not know MFD_EXEC and makes every memfd executable.
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        made => made,
    }
    .map_err(|errno| failed("create", errno.into()))?;
    rustix::fs::ftruncate(&fd, len).map_err(|errno| failed("size", errno.into()))?;
    let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&fd, seals).map_err(|errno| failed("seal", errno.into()))?;
    Ok(Segment { file: fd.into(), len })
}

/// Checks `fd`, which came from a session or from another process, and returns it as segment `index` of
/// a layout that gives it `expected_len` bytes. Errors if it is no suitable memfd. Touches no page.
///
/// On an error the fd is closed. A caller that must not lose the memory keeps a duplicate.
pub fn check_segment(index: usize, fd: OwnedFd, expected_len: u64) -> Result<Segment, Error> {
    check_segment_of(Backing::Memfd, index, fd, expected_len)
}

/// [`check_segment`] for any backing, also for a file that was just created. Errors if `fd` does not fit
/// `backing`, even where it would fit another backing.
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

/// Returns why a file cannot hold guest RAM in place over a kexec; `None` if it can. A file without a
/// name is one of the reasons: it ceases to exist when the kernel ends. DAX is required only `with_dax`.
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

/// Returns whether any page of a segment exists, in memory or swapped out. A segment without pages is
/// all zero and can be created again instead of being preserved.
///
/// Two sources are asked. `SEEK_DATA` looks into the page cache itself and counts pages in swap (Linux
/// `mm/filemap.c`, `folio_seek_hole_data`), but takes pages that were only reserved with fallocate(2)
/// for a hole. `st_blocks` counts those too, but is only bookkeeping (`mm/shmem.c`,
/// `shmem_recalc_inode`). A wrong `false` would lose memory and a wrong `true` only costs time, so the
/// result is `false` only if both sources say so.
///
/// The answer is final only while the vCPUs are paused and the devices drained. Pages that the guest only
/// read count as touched. So do segments that LUO has preserved, because LUO fills holes, and files that
/// are fully allocated.
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

/// Returns the bytes of a segment that have no memory yet and will take it from the host when they are
/// touched. While the guest runs, the true number can shrink at any time.
pub fn untouched_bytes(segment: &Segment) -> io::Result<u64> {
    /// Bytes of one unit of `st_blocks`, on every filesystem (stat(3type)).
    const BLOCK: u64 = 512;
    let blocks = rustix::fs::fstat(segment)?.st_blocks;
    let touched = u64::try_from(blocks).unwrap_or(0).saturating_mul(BLOCK);
    Ok(segment.len().saturating_sub(touched))
}

/// A file's type, displayed as words of an error text.
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
