//! The kernel's side of a seccomp listener, one call a function.
//!
//! A thread that makes a call which the filter sends here waits until it is answered. All that is
//! known of it is in its [`Notification`]; it may die meanwhile, and then what is asked about it is
//! `None` or ENOENT. See seccomp_unotify(2).
#![expect(unsafe_code, reason = "seccomp is made of raw calls and ioctls")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_int, c_ulong, seccomp_notif, seccomp_notif_addfd, seccomp_notif_resp, sock_filter};
use rustix::io::Errno;

/// A call that waits for its answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Notification {
    /// What the answer refers to.
    pub(super) id: u64,
    /// The thread that made it.
    pub(super) thread: u32,
    pub(super) call: libc::c_long,
    pub(super) arguments: [u64; 6],
}

/// How a call goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// As if there were no filter.
    Continue,
    /// With 0.
    Success,
    /// With an error.
    Errno(Errno),
}

impl From<Result<(), Errno>> for Answer {
    fn from(result: Result<(), Errno>) -> Self {
        result.map_or_else(Self::Errno, |()| Self::Success)
    }
}

/// Where notifications come from.
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

/// Puts this thread, and all that come of it, under the filter. Makes no allocation, so that it may
/// be called between fork and exec.
///
/// A filter needs CAP_SYS_ADMIN, or that the program cannot gain rights by exec. The listener lets
/// waiting threads be killed but not interrupted by other signals, where the kernel can (5.19):
/// a call that did its work must not be started again.
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
    // SAFETY: with NEW_LISTENER the call returns an fd that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Listener {
    /// Takes an fd that [`install`] made.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The next call. Waits if there is none; `None` if it is gone again.
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

    /// Lets the call go on. ENOENT: its thread is gone.
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

    /// Whether the call still waits: if so, all that was read by its thread's number until now was
    /// that thread's.
    pub(super) fn waits(&self, id: u64) -> bool {
        // SAFETY: NOTIF_ID_VALID reads one u64.
        let result = unsafe {
            libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID as _, &raw const id)
        };
        result == 0
    }

    /// Puts a file behind the lowest free fd of the caller. EMFILE: there is none.
    pub(super) fn add_fd(&self, id: u64, file: BorrowedFd<'_>) -> Result<i32, Errno> {
        self.add(id, file, true, 0)
    }

    /// The same, and answers the call with the fd.
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
