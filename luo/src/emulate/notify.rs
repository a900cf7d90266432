//! The calls of a seccomp listener, each as a function. See seccomp_unotify(2).
//!
//! A thread whose call the filter sends to the listener waits for the answer. A [`Notification`]
//! describes the call. The thread may die while it waits; functions about its call then return
//! `None` or ENOENT.
#![expect(unsafe_code, reason = "a seccomp listener needs raw system calls and ioctls")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_int, c_ulong, seccomp_notif, seccomp_notif_addfd, seccomp_notif_resp, sock_filter};
use rustix::io::Errno;

/// A system call that waits for its answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Notification {
    /// The kernel's identifier of the notification.
    pub(super) id: u64,
    /// The thread ID of the caller.
    pub(super) thread: u32,
    /// The number of the system call.
    pub(super) call: libc::c_long,
    pub(super) arguments: [u64; 6],
}

/// The answer to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The kernel executes the call, as without a filter.
    Continue,
    /// The call returns 0.
    Success,
    /// The call fails with this errno.
    Errno(Errno),
}

impl From<Result<(), Errno>> for Answer {
    fn from(result: Result<(), Errno>) -> Self {
        result.map_or_else(Self::Errno, |()| Self::Success)
    }
}

/// A seccomp listener, the source of notifications.
#[derive(Debug)]
pub(super) struct Listener(OwnedFd);

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn check(result: c_int) -> Result<c_int, Errno> {
    if result >= 0 {
        return Ok(result);
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Puts this thread and its descendants under the filter, and returns the listener. Allocates
/// nothing, so it may be called between fork and exec.
///
/// Installing a filter needs CAP_SYS_ADMIN or `no_new_privs`; the latter is set only without the
/// former. From Linux 5.19 on, only fatal signals interrupt a waiting thread
/// (`WAIT_KILLABLE_RECV`): a call that the supervisor has executed must not be restarted.
pub(super) fn install(filter: &[sock_filter]) -> Result<OwnedFd, Errno> {
    let listen = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    let killable = listen | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    let mut installed = install_with(filter, killable);
    if installed.as_ref().is_err_and(|errno| *errno == Errno::ACCESS) {
        rustix::thread::set_no_new_privs(true)?;
        installed = install_with(filter, killable);
    }
    match installed {
        Err(Errno::INVAL) => install_with(filter, listen),
        installed => installed,
    }
}

fn install_with(filter: &[sock_filter], flags: c_ulong) -> Result<OwnedFd, Errno> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| Errno::TOOBIG)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: SECCOMP_SET_MODE_FILTER reads one sock_fprog and the instructions that it names, all of
    // which outlive the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    };
    let fd = check(fd as c_int)?;
    // SAFETY: with NEW_LISTENER the call returns a new fd, which has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Listener {
    /// Takes over an fd that [`install`] returned.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Waits for the next call and returns it. `None` if its thread has died or a signal ended the
    /// wait.
    pub(super) fn receive(&self) -> Result<Option<Notification>, Errno> {
        // SAFETY: the struct is plain numbers, and the kernel wants it zeroed.
        let mut notification: seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: NOTIF_RECV writes one seccomp_notif.
        let result = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_RECV as _,
                &raw mut notification,
            )
        };
        match check(result) {
            Ok(_) => Ok(Some(Notification {
                id: notification.id,
                thread: notification.pid,
                call: notification.data.nr.into(),
                arguments: notification.data.args,
            })),
            Err(Errno::NOENT | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Answers the call. ENOENT: its thread has died.
    pub(super) fn answer(&self, id: u64, answer: Answer) -> Result<(), Errno> {
        let (error, flags) = match answer {
            Answer::Continue => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
            Answer::Success => (0, 0),
            Answer::Errno(errno) => (-errno.raw_os_error(), 0),
        };
        let mut response = seccomp_notif_resp { id, val: 0, error, flags };
        // SAFETY: NOTIF_SEND reads one seccomp_notif_resp.
        let result = unsafe {
            libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw mut response)
        };
        check(result).map(drop)
    }

    /// Whether the call still waits. If so, its thread ID was not reused, and everything read by
    /// that ID until now belonged to its thread.
    pub(super) fn waits(&self, id: u64) -> bool {
        // SAFETY: NOTIF_ID_VALID reads one u64.
        let result = unsafe {
            libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID as _, &raw const id)
        };
        result == 0
    }

    /// Installs a file as the lowest free fd of the caller. EMFILE: the caller has no free fd.
    pub(super) fn add_fd(&self, id: u64, file: BorrowedFd<'_>) -> Result<i32, Errno> {
        self.add(id, file, true, 0)
    }

    /// Like [`add_fd`](Self::add_fd), and answers the call with the number of the fd.
    pub(super) fn answer_with_fd(
        &self,
        id: u64,
        file: BorrowedFd<'_>,
        closes_on_exec: bool,
    ) -> Result<(), Errno> {
        self.add(id, file, closes_on_exec, libc::SECCOMP_ADDFD_FLAG_SEND as u32).map(drop)
    }

    fn add(
        &self,
        id: u64,
        file: BorrowedFd<'_>,
        closes_on_exec: bool,
        flags: u32,
    ) -> Result<i32, Errno> {
        let newfd_flags = if closes_on_exec { libc::O_CLOEXEC as u32 } else { 0 };
        let srcfd = file.as_raw_fd() as u32;
        let request = seccomp_notif_addfd { id, flags, srcfd, newfd: 0, newfd_flags };
        // SAFETY: NOTIF_ADDFD reads one seccomp_notif_addfd. The kernel takes its own reference to the
        // file; ours is borrowed.
        let result = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_ADDFD as _,
                &raw const request,
            )
        };
        check(result)
    }
}
