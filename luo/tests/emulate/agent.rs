//! A process of the program under the emulator, which does what it is ordered to by system calls.
//!
//! Its connection to the test is at an fd far above those that it uses. It ends when that is closed.
#![expect(unsafe_code, reason = "it is about raw system calls")]

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use libc::{c_int, c_long, c_void};
use luo::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::wire::{self, Order, Packet};

/// Where the connection is.
const CONTROL: RawFd = 900;
const PAGE: usize = 4096;

/// `--agent SOCKET`: the first process.
pub(crate) fn main(arguments: &[OsString]) -> ExitCode {
    let [path] = arguments else { return ExitCode::from(2) };
    // SAFETY: nobody handles this signal; ignored, children need not be waited for.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    match serve(path) {
        Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => ExitCode::SUCCESS,
        Err(errno) => {
            eprintln!("agent: {errno}");
            ExitCode::FAILURE
        }
    }
}

fn check(result: c_long) -> Result<i64, Errno> {
    if result >= 0 {
        return Ok(result);
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

fn control() -> BorrowedFd<'static> {
    // SAFETY: it is open while the agent serves, and nothing else closes it.
    unsafe { BorrowedFd::borrow_raw(CONTROL) }
}

fn hello(path: &OsString) -> Result<(), Errno> {
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path.as_os_str())?)?;
    // SAFETY: dup3 closes what was there before, which is the connection of this process's parent.
    check(unsafe { libc::dup3(socket.as_raw_fd(), CONTROL, libc::O_CLOEXEC) }.into())?;
    let number = std::env::var(luo::emulate::NUMBER_VARIABLE).ok();
    let number = number.and_then(|number| number.parse().ok()).unwrap_or(-1);
    wire::send(control(), [i64::from(std::process::id()), number, 0, 0], &[], None)
}

fn serve(path: &OsString) -> Result<(), Errno> {
    hello(path)?;
    loop {
        let packet = wire::receive(control())?;
        let order = Order::from_number(packet.numbers[0]).ok_or(Errno::INVAL)?;
        if matches!(order, Order::Spawn | Order::Fork) {
            // SAFETY: this process has one thread.
            let child = check(unsafe { libc::fork() }.into())?;
            if child == 0 {
                if order == Order::Spawn {
                    // SAFETY: whatever is open here belongs to the parent's part.
                    check(unsafe { libc::close_range(3, CONTROL as u32 - 1, 0) }.into())?;
                }
                hello(path)?;
            }
            continue;
        }
        let mut sent = None;
        let (errno, value, bytes) = match execute(order, packet, &mut sent) {
            Ok((value, bytes)) => (0, value, bytes),
            Err(errno) => (errno.raw_os_error(), 0, Vec::new()),
        };
        // SAFETY: an fd that is to be sent was found open.
        let fd = sent.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
        wire::send(control(), [errno.into(), value, 0, 0], &bytes, fd)?;
    }
}

fn execute(
    order: Order,
    packet: Packet,
    sent: &mut Option<RawFd>,
) -> Result<(i64, Vec<u8>), Errno> {
    let Packet { numbers: [_, first, second, third], mut bytes, fd } = packet;
    let number = first as RawFd;
    let value = match order {
        Order::Spawn | Order::Fork => return Err(Errno::INVAL),
        Order::LimitFds => limit_fds(first != 0)?,
        Order::OpenDevice => {
            open("/dev/liveupdate", if first != 0 { libc::O_RDONLY } else { libc::O_RDWR })?
        }
        Order::Memfd => memfd(&bytes)?,
        Order::Reopen => open(&format!("/proc/self/fd/{number}"), libc::O_RDWR)?,
        Order::ReopenAsPath => open(&format!("/proc/self/fd/{number}"), libc::O_PATH)?,
        Order::Unsupported => open("/dev/null", libc::O_RDWR)?,
        // SAFETY: it copies a number.
        Order::Dup => check(unsafe { libc::dup(number) }.into())?,
        // SAFETY: fds here are numbers that the test keeps; no owner is confused.
        Order::Close => check(unsafe { libc::close(number) }.into())?,
        Order::Send => {
            // SAFETY: it only asks.
            check(unsafe { libc::fcntl(number, libc::F_GETFD) }.into())?;
            *sent = Some(number);
            0
        }
        Order::Receive => fd.ok_or(Errno::BADF)?.into_raw_fd().into(),
        Order::Ioctl => {
            ioctl(number, second as u32, Place::from_numbers(third), &mut bytes)?;
            return Ok((0, bytes));
        }
        Order::ClosesOnExec => {
            // SAFETY: it only asks.
            let flags = check(unsafe { libc::fcntl(number, libc::F_GETFD) }.into())?;
            i64::from(flags & i64::from(libc::FD_CLOEXEC) != 0)
        }
        Order::IsSameFile => i64::from(is_same_file(number, second as RawFd)?),
        Order::Read => {
            bytes = vec![0; second as usize];
            // SAFETY: the buffer has as many bytes as are asked for.
            let read = unsafe { libc::read(number, bytes.as_mut_ptr().cast(), bytes.len()) };
            bytes.truncate(check(read as c_long)? as usize);
            return Ok((0, bytes));
        }
        Order::WriteAt => {
            // SAFETY: the buffer has as many bytes as are written.
            let written =
                unsafe { libc::pwrite(number, bytes.as_ptr().cast(), bytes.len(), second) };
            check(written as c_long)?
        }
        Order::Reboot => reboot()?,
    };
    Ok((value, Vec::new()))
}

fn open(path: &str, flags: c_int) -> Result<i64, Errno> {
    let path = std::ffi::CString::new(path).map_err(|_| Errno::INVAL)?;
    // SAFETY: the path is a C string.
    check(unsafe { libc::open(path.as_ptr(), flags) }.into())
}

fn memfd(contents: &[u8]) -> Result<i64, Errno> {
    let file = rustix::fs::memfd_create("agent", rustix::fs::MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(file);
    file.write_all_at(contents, 0).map_err(|_| Errno::IO)?;
    Ok(file.into_raw_fd().into())
}

fn reboot() -> Result<i64, Errno> {
    const MAGIC: u32 = 0xfee1_dead;
    const KEXEC: u32 = 0x4558_4543;
    // SAFETY: under the emulator this call only ends the program.
    check(unsafe { libc::syscall(libc::SYS_reboot, MAGIC, 0x2812_1969, KEXEC, 0) })
}

/// Lets no fd be opened any more, or as many as ever.
fn limit_fds(limited: bool) -> Result<i64, Errno> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let current = if limited {
        // The lowest free number: fds above it stay.
        // SAFETY: the probe is closed at once.
        Some(unsafe { OwnedFd::from_raw_fd(open("/dev/null", 0)? as RawFd) }.as_raw_fd() as u64)
    } else {
        limit.maximum.or(Some(1024))
    };
    setrlimit(Resource::Nofile, Rlimit { current, ..limit })?;
    Ok(0)
}

fn is_same_file(one: RawFd, other: RawFd) -> Result<bool, Errno> {
    const KCMP_FILE: c_int = 0;
    let me = std::process::id();
    // SAFETY: it compares two numbers of this process.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, me, me, KCMP_FILE, one, other) };
    match check(order) {
        Err(Errno::NOSYS) => {
            const F_DUPFD_QUERY: c_int = 1027;
            // SAFETY: it only asks.
            check(unsafe { libc::fcntl(one, F_DUPFD_QUERY, other) }.into()).map(|same| same == 1)
        }
        order => order.map(|order| order == 0),
    }
}

/// Where an argument is; see [`crate::system::Place`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Writable,
    Unaligned,
    ReadOnly,
    Null,
    CutAfter(u32),
}

impl Place {
    pub(crate) fn to_number(self) -> i64 {
        match self {
            Self::Writable => -1,
            Self::Unaligned => -2,
            Self::ReadOnly => -3,
            Self::Null => -4,
            Self::CutAfter(length) => length.into(),
        }
    }

    fn from_numbers(number: i64) -> Self {
        match number {
            -1 => Self::Writable,
            -2 => Self::Unaligned,
            -3 => Self::ReadOnly,
            -4 => Self::Null,
            length => Self::CutAfter(length as u32),
        }
    }
}

/// Pages with nothing behind them.
struct Arena {
    start: *mut c_void,
    pages: usize,
}

impl Arena {
    fn new(bytes: usize) -> Result<Self, Errno> {
        let pages = bytes.div_ceil(PAGE) + 1;
        let (rw, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        let flags = private | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, anywhere.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), (pages + 1) * PAGE, rw, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(Errno::NOMEM);
        }
        let this = Self { start, pages };
        this.protect(pages, 1, libc::PROT_NONE)?;
        Ok(this)
    }

    fn protect(&self, page: usize, pages: usize, protection: c_int) -> Result<(), Errno> {
        let at = self.start.wrapping_byte_add(page * PAGE);
        // SAFETY: the pages are of this mapping, and nothing refers to them.
        check(unsafe { libc::mprotect(at, pages * PAGE, protection) }.into()).map(drop)
    }

    /// The address so many bytes before the end.
    fn before_end(&self, bytes: usize) -> *mut u8 {
        self.start.wrapping_byte_add(self.pages * PAGE - bytes).cast()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one, and nothing refers to it any more.
        unsafe { libc::munmap(self.start, (self.pages + 1) * PAGE) };
    }
}

fn ioctl(fd: RawFd, command: u32, place: Place, bytes: &mut [u8]) -> Result<(), Errno> {
    let arena = Arena::new(bytes.len() + 1)?;
    let there = match place {
        Place::Null => 0,
        Place::CutAfter(length) => bytes.len().min(length as usize),
        _ => bytes.len(),
    };
    let address = match place {
        Place::Null => std::ptr::null_mut(),
        Place::Unaligned => arena.before_end(there + 1),
        _ => arena.before_end(there),
    };
    if there > 0 {
        // SAFETY: the arena has room for more than these bytes before its end.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address, there) };
    }
    if place == Place::ReadOnly {
        arena.protect(0, arena.pages, libc::PROT_READ)?;
    }
    // SAFETY: the argument is ours, or not there, which the kernel finds out.
    let result = check(unsafe { libc::ioctl(fd, command as _, address) }.into());
    if there > 0 {
        // SAFETY: the same bytes, which can be read in every case.
        unsafe { std::ptr::copy_nonoverlapping(address, bytes.as_mut_ptr(), there) };
    }
    result.map(drop)
}
