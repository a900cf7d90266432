//! The requests of LUO, and a few system calls that need raw ones.
#![expect(unsafe_code, reason = "ioctls and raw system calls")]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use luo::Errno;
use luo::uapi::{self, Finish, NamedSession, SESSION_NAME_LENGTH, TokenedFd};
use rustix::fs::{Mode, OFlags};

fn check(result: libc::c_long) -> Result<i64, Errno> {
    if result >= 0 {
        return Ok(result);
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// An ioctl whose argument is one of LUO's structs.
fn request<T>(fd: impl AsFd, command: u32, argument: &mut T) -> Result<(), Errno> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: LUO reads and writes as much as the struct says that it has.
    check(unsafe { libc::ioctl(fd, command as _, std::ptr::from_mut(argument)) }.into()).map(drop)
}

/// An ioctl that has no argument, or a number.
pub(super) fn plain_ioctl(fd: impl AsFd, command: u32) -> Result<(), Errno> {
    // SAFETY: the commands used here take no pointer, or are refused before it is looked at.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), command as _, 0) }.into()).map(drop)
}

/// Opens the device.
pub(super) fn device() -> Result<OwnedFd, Errno> {
    rustix::fs::open(uapi::DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

fn named(fd: impl AsFd, command: u32, name: &str) -> Result<OwnedFd, Errno> {
    let mut argument = NamedSession { size: 72, fd: -1, name: [0; SESSION_NAME_LENGTH] };
    argument.name[..name.len()].copy_from_slice(name.as_bytes());
    request(fd, command, &mut argument)?;
    // SAFETY: the fd was just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd) })
}

pub(super) fn create(device: impl AsFd, name: &str) -> Result<OwnedFd, Errno> {
    named(device, uapi::CREATE_SESSION, name)
}

pub(super) fn retrieve_session(device: impl AsFd, name: &str) -> Result<OwnedFd, Errno> {
    named(device, uapi::RETRIEVE_SESSION, name)
}

pub(super) fn preserve(session: impl AsFd, file: impl AsFd, token: u64) -> Result<(), Errno> {
    preserve_number(session, file.as_fd().as_raw_fd(), token)
}

pub(super) fn preserve_number(session: impl AsFd, fd: RawFd, token: u64) -> Result<(), Errno> {
    request(session, uapi::SESSION_PRESERVE_FD, &mut TokenedFd { size: 16, fd, token })
}

pub(super) fn retrieve(session: impl AsFd, token: u64) -> Result<OwnedFd, Errno> {
    let mut argument = TokenedFd { size: 16, fd: -1, token };
    request(session, uapi::SESSION_RETRIEVE_FD, &mut argument)?;
    // SAFETY: the fd was just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd) })
}

pub(super) fn finish(session: impl AsFd) -> Result<(), Errno> {
    request(session, uapi::SESSION_FINISH, &mut Finish { size: 8, reserved: 0 })
}

/// `LINUX_REBOOT_CMD_*`.
pub(super) const KEXEC: u32 = 0x4558_4543;
pub(super) const MAGIC: u32 = 0xfee1_dead;

/// reboot(2). Under the emulator it does nothing to the machine.
pub(super) fn reboot(magic: u32, command: u32) -> Result<(), Errno> {
    // SAFETY: the test runs below the emulator, whose filter lets no such call through.
    check(unsafe { libc::syscall(libc::SYS_reboot, magic, 672_274_793, command, 0) }).map(drop)
}

/// kexec_file_load(2), of nothing.
pub(super) fn kexec_file_load() -> Result<(), Errno> {
    // SAFETY: the fds are none, and the filter answers before anybody looks at them.
    check(unsafe { libc::syscall(libc::SYS_kexec_file_load, -1, -1, 0, 0, 0) }).map(drop)
}

/// Forks; the child runs `child`, and its result is its exit status.
pub(super) fn fork(child: impl FnOnce() -> super::Case) -> Result<libc::pid_t, Errno> {
    // SAFETY: callers have one thread.
    let pid = check(unsafe { libc::fork() }.into())?;
    if pid == 0 {
        std::process::exit(i32::from(child().is_err()));
    }
    Ok(pid as libc::pid_t)
}

/// How often [`interrupt_often`] has interrupted this process.
static INTERRUPTIONS: AtomicU64 = AtomicU64::new(0);

pub(super) fn interruptions() -> u64 {
    INTERRUPTIONS.load(Ordering::Relaxed)
}

/// Has this process interrupted by a signal over and over, every call that can be started again.
pub(super) fn interrupt_often() -> Result<(), Errno> {
    extern "C" fn count(_: libc::c_int) {
        INTERRUPTIONS.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the struct is plain numbers, for which zero is a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = count as extern "C" fn(libc::c_int) as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler only counts, which a handler may.
    let set = unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) };
    check(set.into())?;
    let often = libc::timeval { tv_sec: 0, tv_usec: 100 };
    let timer = libc::itimerval { it_interval: often, it_value: often };
    // SAFETY: the timer is only read.
    let set = unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    check(set.into()).map(drop)
}
