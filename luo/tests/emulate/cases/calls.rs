//! The requests of LUO, and other system calls that have no safe wrapper.
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

/// An ioctl that takes a pointer to one of LUO's structs.
fn request<T>(fd: impl AsFd, command: u32, argument: &mut T) -> Result<(), Errno> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: LUO reads and writes only the bytes that the struct's `size` field gives.
    check(unsafe { libc::ioctl(fd, command as _, std::ptr::from_mut(argument)) }.into()).map(drop)
}

/// An ioctl without an argument, or with 0 as its argument.
pub(super) fn plain_ioctl(fd: impl AsFd, command: u32) -> Result<(), Errno> {
    // SAFETY: the commands used here take no pointer, or fail before the pointer is used.
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

/// reboot(2). Under the emulator it does not affect the real machine.
pub(super) fn reboot(magic: u32, command: u32) -> Result<(), Errno> {
    // SAFETY: the test runs under the emulator, whose filter never passes this call to the kernel.
    check(unsafe { libc::syscall(libc::SYS_reboot, magic, 672_274_793, command, 0) }).map(drop)
}

/// kexec_file_load(2), with invalid fds.
pub(super) fn kexec_file_load() -> Result<(), Errno> {
    // SAFETY: the fds are invalid, and the filter answers before the kernel uses the arguments.
    check(unsafe { libc::syscall(libc::SYS_kexec_file_load, -1, -1, 0, 0, 0) }).map(drop)
}

/// Forks. The child process runs `child` and exits with 0 if that succeeds, else with 1.
pub(super) fn fork(child: impl FnOnce() -> super::Case) -> Result<libc::pid_t, Errno> {
    // SAFETY: callers are single-threaded, so the child may run any code.
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

/// Interrupts this process by SIGALRM every 100 µs. With SA_RESTART, Linux restarts interrupted
/// calls.
pub(super) fn interrupt_often() -> Result<(), Errno> {
    extern "C" fn count(_: libc::c_int) {
        INTERRUPTIONS.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the struct has only integers, for which zero is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = count as extern "C" fn(libc::c_int) as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler only adds to an atomic, which is async-signal-safe.
    let set = unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) };
    check(set.into())?;
    let often = libc::timeval { tv_sec: 0, tv_usec: 100 };
    let timer = libc::itimerval { it_interval: often, it_value: often };
    // SAFETY: the call only reads the timer.
    let set = unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    check(set.into()).map(drop)
}
