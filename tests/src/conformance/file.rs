//! Real files: opens each kind of file, and performs operations on open ones.
//!
//! Shared by every system with a kernel's files, in this process and in others.
#![expect(unsafe_code, reason = "mappings, and fds that have no owner")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use luo::Errno;
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags, SeekFrom};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};

use super::system::Answer;

/// A directory in shared memory.
const TMPFS: &str = "/dev/shm";

/// The kinds of file that a case can open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum What {
    /// A memfd that can be sealed.
    Memfd,
    /// A memfd that cannot be sealed.
    UnsealableMemfd,
    /// A memfd that cannot be executed (`MFD_NOEXEC_SEAL`).
    NoexecMemfd,
    /// A memfd of huge pages (`MFD_HUGETLB`).
    HugeMemfd,
    /// memfd_secret(2).
    Secret,
    /// `/dev/null`.
    Null,
    Pipe,
    Socket,
    Eventfd,
    Timerfd,
    Epoll,
    /// A file of an ordinary file system: the running program.
    DiskFile,
    Directory,
    /// A VM's fd of KVM.
    Vm,
    /// A file of tmpfs that has a name.
    Tmpfs,
    /// A file of tmpfs that never had a name (O_TMPFILE).
    NamelessTmpfs,
}

/// An operation on an open file, and its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FileCall {
    /// Reads up to so many bytes at the position, and advances it.
    Read(usize),
    /// Reads up to so many bytes at an offset.
    ReadAt(u64, usize),
    /// Writes at an offset. Answers the number of bytes written.
    WriteAt(u64, Vec<u8>),
    /// write(2), at the position.
    Write(Vec<u8>),
    /// Sets the position.
    Seek(u64),
    /// Answers the offset of the first hole.
    SeekHole,
    Truncate(u64),
    /// fallocate(2): mode, offset, length.
    Allocate(u32, u64, u64),
    AddSeals(u32),
    Seals,
    /// F_GETFL.
    Flags,
    Size,
    /// In units of 512 bytes.
    Blocks,
    Mode,
    Owner,
    /// The target of its link in `/proc/self/fd`.
    Link,
    /// Removes its name in the file system.
    Unlink,
    /// Stores one byte through a mapping.
    Store(u64, u8),
    /// Maps one page for reading.
    Map,
    /// MADV_REMOVE of so many bytes at the start of a mapping.
    Remove(usize),
    /// Maps so many bytes with MADV_HUGEPAGE and touches them. Answers how many KiB are huge pages.
    HugeKib(usize),
    /// Opens an inotify fd that reports when the file is deleted.
    Watch,
    /// Waits until the fd of [`FileCall::Watch`] reports. ETIMEDOUT after 30 s.
    Gone,
}

/// Opens a file.
pub(crate) fn open(what: What) -> Result<OwnedFd, Errno> {
    let memfd = |flags| rustix::fs::memfd_create("case", flags | MemfdFlags::CLOEXEC);
    let path = |path: &str, flags: OFlags| {
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
    };
    match what {
        What::Memfd => memfd(MemfdFlags::ALLOW_SEALING),
        What::UnsealableMemfd => memfd(MemfdFlags::empty()),
        What::NoexecMemfd => memfd(MemfdFlags::NOEXEC_SEAL),
        What::HugeMemfd => memfd(MemfdFlags::HUGETLB),
        What::Secret => secret(),
        What::Null => path("/dev/null", OFlags::RDWR),
        What::Pipe => Ok(rustix::pipe::pipe()?.0),
        What::Socket => {
            use rustix::net::{AddressFamily, SocketType, socket};
            socket(AddressFamily::UNIX, SocketType::STREAM, None)
        }
        What::Eventfd => rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC),
        What::Timerfd => {
            use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)
        }
        What::Epoll => rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC),
        What::DiskFile => {
            let program = std::env::current_exe().map_err(|_| Errno::NOENT)?;
            rustix::fs::open(program, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        }
        What::Directory => path(TMPFS, OFlags::RDONLY | OFlags::DIRECTORY),
        What::Vm => virtual_machine(),
        What::Tmpfs => {
            let name = format!("{TMPFS}/perennial-{}", unique());
            path(&name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)
        }
        What::NamelessTmpfs => path(TMPFS, OFlags::RDWR | OFlags::TMPFILE),
    }
}

/// A text that is unique among all processes and calls.
fn unique() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static LAST: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}", std::process::id(), LAST.fetch_add(1, Ordering::Relaxed))
}

fn owned(result: libc::c_long) -> Result<OwnedFd, Errno> {
    use std::os::fd::FromRawFd;
    if result < 0 {
        return Err(last_errno());
    }
    // SAFETY: the call that returned this number created the fd, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn secret() -> Result<OwnedFd, Errno> {
    // SAFETY: the call only creates an fd.
    owned(unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) })
}

fn virtual_machine() -> Result<OwnedFd, Errno> {
    const KVM_CREATE_VM: u32 = 0xae01;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let kvm = rustix::fs::open("/dev/kvm", flags, Mode::empty())?;
    // SAFETY: the request takes a number, the machine type, and only creates an fd.
    owned(unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM as _, 0) }.into())
}

/// Borrows the fd with a number. Errors if it is not open.
pub(crate) fn borrow(number: RawFd) -> Result<BorrowedFd<'static>, Errno> {
    // SAFETY: F_GETFD changes nothing.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(last_errno());
    }
    // SAFETY: the fd is open, hence not -1. If another thread closes it meanwhile, calls with it
    // return EBADF.
    Ok(unsafe { BorrowedFd::borrow_raw(number) })
}

/// Takes ownership of the fd that a call just created and whose number it returned.
pub(crate) fn take(number: RawFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: the caller has the number from the call that created the fd; nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Performs an operation on an open file.
pub(crate) fn operate(fd: impl AsFd, call: FileCall) -> Result<Answer, Errno> {
    let fd = fd.as_fd();
    let stat = || rustix::fs::fstat(fd);
    let number = |number: i64| Ok(Answer::number(number));
    match call {
        FileCall::Read(length) => {
            let mut bytes = vec![0; length];
            let read = rustix::io::read(fd, &mut bytes)?;
            bytes.truncate(read);
            Ok(Answer::bytes(bytes))
        }
        FileCall::ReadAt(offset, length) => {
            let mut bytes = vec![0; length];
            let read = rustix::io::pread(fd, &mut bytes, offset)?;
            bytes.truncate(read);
            Ok(Answer::bytes(bytes))
        }
        FileCall::WriteAt(offset, bytes) => number(rustix::io::pwrite(fd, &bytes, offset)? as i64),
        FileCall::Write(bytes) => number(rustix::io::write(fd, &bytes)? as i64),
        FileCall::Seek(offset) => number(rustix::fs::seek(fd, SeekFrom::Start(offset))? as i64),
        FileCall::SeekHole => number(rustix::fs::seek(fd, SeekFrom::Hole(0))? as i64),
        FileCall::Truncate(size) => {
            rustix::fs::ftruncate(fd, size)?;
            number(0)
        }
        FileCall::Allocate(mode, offset, length) => {
            let mode = FallocateFlags::from_bits_retain(mode);
            rustix::fs::fallocate(fd, mode, offset, length)?;
            number(0)
        }
        FileCall::AddSeals(seals) => {
            rustix::fs::fcntl_add_seals(fd, SealFlags::from_bits_retain(seals))?;
            number(0)
        }
        FileCall::Seals => number(rustix::fs::fcntl_get_seals(fd)?.bits().into()),
        FileCall::Flags => number(rustix::fs::fcntl_getfl(fd)?.bits().into()),
        FileCall::Size => number(stat()?.st_size),
        FileCall::Blocks => number(stat()?.st_blocks),
        FileCall::Mode => number((stat()?.st_mode & 0o7777).into()),
        FileCall::Owner => number(stat()?.st_uid.into()),
        FileCall::Link => Ok(Answer::bytes(link(fd)?)),
        FileCall::Unlink => {
            rustix::fs::unlink(link(fd)?)?;
            number(0)
        }
        FileCall::Store(offset, byte) => {
            let mapping = Mapping::new(fd, offset as usize + 1, ProtFlags::WRITE, None)?;
            mapping.store(offset as usize, byte);
            number(0)
        }
        FileCall::Map => Mapping::new(fd, 1, ProtFlags::empty(), None).and_then(|_| number(0)),
        FileCall::Remove(length) => {
            Mapping::new(fd, length, ProtFlags::WRITE, Some(Advice::LinuxRemove))?;
            number(0)
        }
        FileCall::HugeKib(length) => number(huge_kib(fd, length)?),
        FileCall::Watch => {
            use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
            use std::os::fd::IntoRawFd;
            let watch = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            add_watch(&watch, path(fd), WatchFlags::DELETE_SELF)?;
            number(watch.into_raw_fd().into())
        }
        FileCall::Gone => {
            use rustix::event::{PollFd, PollFlags, Timespec, poll};
            // Far longer than needed, so that a failing test ends.
            let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit))? {
                0 => Err(Errno::TIMEDOUT),
                _ => number(0),
            }
        }
    }
}

fn path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn link(fd: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    Ok(rustix::fs::readlink(path(fd), Vec::new())?.into_bytes())
}

/// A shared mapping of the start of a file.
struct Mapping {
    start: *mut std::ffi::c_void,
    length: usize,
}

impl Mapping {
    fn new(
        fd: BorrowedFd<'_>,
        length: usize,
        and: ProtFlags,
        advice: Option<Advice>,
    ) -> Result<Self, Errno> {
        let (protection, null) = (ProtFlags::READ | and, std::ptr::null_mut());
        // SAFETY: this creates a new mapping at a free address, to which nothing refers yet.
        let start = unsafe { rustix::mm::mmap(null, length, protection, MapFlags::SHARED, fd, 0) }?;
        let mapping = Self { start, length };
        if let Some(advice) = advice {
            // SAFETY: the range is this mapping; no reference to its contents is ever made.
            unsafe { rustix::mm::madvise(start, length, advice) }?;
        }
        Ok(mapping)
    }

    fn store(&self, offset: usize, byte: u8) {
        assert!(offset < self.length, "the offset is in the mapping");
        // SAFETY: the byte is in the mapping, which is writable. Other mappings of the file see the
        // change, as intended.
        unsafe { self.start.cast::<u8>().wrapping_add(offset).write_volatile(byte) };
    }

    fn load(&self, offset: usize) -> u8 {
        assert!(offset < self.length, "the offset is in the mapping");
        // SAFETY: the byte is in the mapping, which is readable.
        unsafe { self.start.cast::<u8>().wrapping_add(offset).read_volatile() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, and nothing refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.start, self.length) };
    }
}

/// KiB of a mapping of the file that are huge pages (`Documentation/filesystems/proc.rst`, smaps).
fn huge_kib(fd: BorrowedFd<'_>, length: usize) -> Result<i64, Errno> {
    let mapping = Mapping::new(fd, length, ProtFlags::WRITE, Some(Advice::LinuxHugepage))?;
    for offset in (0..length).step_by(4096) {
        mapping.store(offset, mapping.load(offset));
    }
    let maps = std::fs::read_to_string("/proc/self/smaps").map_err(|_| Errno::NOENT)?;
    let end = mapping.start as usize + length;
    let of_mapping = maps.split_inclusive('\n').skip_while(|line| {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        range.and_then(|(_, last)| usize::from_str_radix(last, 16).ok()) != Some(end)
    });
    let mut huge = of_mapping.filter_map(|line| line.strip_prefix("ShmemPmdMapped:"));
    let kib = huge.next().and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse().ok());
    kib.ok_or(Errno::NODATA)
}
