//! Messages to the service manager: the datagrams of sd_notify(3), with or without an fd.

use std::ffi::OsStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, sendmsg_addr, socket_with,
};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::mutex::lock;

/// How long a message waits for room in the manager's queue.
const SENT_WITHIN: Duration = Duration::from_secs(10);

/// The connection to the service manager of this service.
///
/// A message has one or more `NAME=value` lines. The manager processes the messages of a service in
/// their order and sends no answers.
#[derive(Debug)]
pub struct Notify {
    socket: OwnedFd,
    manager: SocketAddrUnix,
    /// Whether the last message found no room in time. Then the next ones do not wait.
    is_stuck: AtomicBool,
    /// The pipe of the next [`barrier`](Self::barrier), so that a process without a file left can still leave.
    pipe: Mutex<Option<(OwnedFd, OwnedFd)>>,
}

impl Notify {
    /// Connects to the manager at the address in `NOTIFY_SOCKET`. `None` if the variable is not set
    /// (this process is not a service), or if the address is not that of a Unix socket.
    pub fn from_env() -> Option<Result<Self, Errno>> {
        let address = std::env::var_os("NOTIFY_SOCKET")?;
        matches!(address.as_bytes().first(), Some(b'/' | b'@')).then(|| Self::to(&address))
    }

    /// Connects to the manager at `address`: a path, or an abstract name after `@`.
    pub fn to(address: &OsStr) -> Result<Self, Errno> {
        let manager = match address.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(address)?,
        };
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Send, Some(SENT_WITHIN))?;
        let pipe = Mutex::new(pipe_with(PipeFlags::CLOEXEC).ok());
        Ok(Self { socket, manager, is_stuck: AtomicBool::new(false), pipe })
    }

    /// The same, with messages that wait so long for room.
    #[cfg(test)]
    pub(super) fn waiting(self, within: Duration) -> Self {
        set_socket_timeout(&self.socket, Timeout::Send, Some(within)).unwrap();
        self
    }

    /// Sends a message. ECONNREFUSED: no manager listens at the address. ETIMEDOUT: the manager's queue is full, because
    /// it does not read.
    pub fn send(&self, message: &str) -> Result<(), Errno> {
        self.send_with(message, None)
    }

    /// Sends a message that the manager can do without, so it does not wait for room. ETIMEDOUT: there is none.
    pub fn hint(&self, message: &str) -> Result<(), Errno> {
        self.send_by(message, None, SendFlags::DONTWAIT)
    }

    /// Sends a message with a copy of an fd.
    pub fn send_fd(&self, message: &str, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        self.send_with(message, Some(fd))
    }

    fn send_with(&self, message: &str, fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let flags = match self.is_stuck.load(Ordering::Relaxed) {
            true => SendFlags::DONTWAIT,
            false => SendFlags::empty(),
        };
        let sent = self.send_by(message, fd, flags);
        self.is_stuck.store(sent == Err(Errno::TIMEDOUT), Ordering::Relaxed);
        sent
    }

    fn send_by(
        &self,
        message: &str,
        fd: Option<BorrowedFd<'_>>,
        flags: SendFlags,
    ) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fd.into_iter().collect();
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let slices = [IoSlice::new(message.as_bytes())];
        let flags = SendFlags::NOSIGNAL | flags;
        let sent = rustix::io::retry_on_intr(|| {
            sendmsg_addr(&self.socket, &self.manager, &slices, &mut control, flags)
        });
        sent.map(drop).map_err(|errno| match errno {
            // A missing socket file means the same as a socket without a listener. Callers use ENOENT
            // for files that cannot be preserved.
            Errno::NOENT => Errno::CONNREFUSED,
            Errno::AGAIN => Errno::TIMEDOUT,
            errno => errno,
        })
    }

    /// Waits until the manager has processed every earlier message. ETIMEDOUT: the manager did not
    /// do so within `patience`.
    pub fn barrier(&self, patience: Duration) -> Result<(), Errno> {
        let kept = lock(&self.pipe).take();
        let pipe = kept.map_or_else(|| pipe_with(PipeFlags::CLOEXEC), Ok)?;
        let passed = self.pass_through(pipe, patience);
        // Both of its files are closed by now.
        *lock(&self.pipe) = pipe_with(PipeFlags::CLOEXEC).ok();
        passed
    }

    fn pass_through(
        &self,
        (here, there): (OwnedFd, OwnedFd),
        patience: Duration,
    ) -> Result<(), Errno> {
        self.send_fd("BARRIER=1", there.as_fd())?;
        // Now the manager has the only copy, and closes it when it processes this message.
        drop(there);
        let patience = Timespec::try_from(patience).map_err(|_| Errno::INVAL)?;
        let mut closed = [PollFd::new(&here, PollFlags::empty())];
        match rustix::io::retry_on_intr(|| poll(&mut closed, Some(&patience)))? {
            0 => Err(Errno::TIMEDOUT),
            _ => Ok(()),
        }
    }
}

impl AsFd for Notify {
    /// The socket that sends the messages.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
