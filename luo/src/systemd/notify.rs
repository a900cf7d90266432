//! Messages to the service manager: the datagrams of sd_notify(3), with fds beside them.

use std::ffi::OsStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, sendmsg_addr, socket_with,
};
use rustix::pipe::{PipeFlags, pipe_with};

/// Where a service manager listens for its service.
///
/// A message is one or more `NAME=value` lines. The manager takes the messages of one service in
/// their order and answers none.
#[derive(Debug)]
pub struct Notify {
    socket: OwnedFd,
    manager: SocketAddrUnix,
}

impl Notify {
    /// The manager that `NOTIFY_SOCKET` names. `None`: this process is nobody's service, or its
    /// manager is to be reached by something else than a Unix socket.
    pub fn from_env() -> Option<Result<Self, Errno>> {
        let address = std::env::var_os("NOTIFY_SOCKET")?;
        matches!(address.as_bytes().first(), Some(b'/' | b'@')).then(|| Self::to(&address))
    }

    /// The manager at `address`: a path, or an abstract name after `@`.
    pub fn to(address: &OsStr) -> Result<Self, Errno> {
        let manager = match address.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(address)?,
        };
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket, manager })
    }

    /// Sends a message. ECONNREFUSED: no manager listens there.
    pub fn send(&self, message: &str) -> Result<(), Errno> {
        self.send_with(message, None)
    }

    /// Sends a message with an fd beside it, which stays the caller's as well.
    pub fn send_fd(&self, message: &str, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        self.send_with(message, Some(fd))
    }

    fn send_with(&self, message: &str, fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fd.into_iter().collect();
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let slices = [IoSlice::new(message.as_bytes())];
        rustix::io::retry_on_intr(|| {
            sendmsg_addr(&self.socket, &self.manager, &slices, &mut control, SendFlags::NOSIGNAL)
        })
        .map(drop)
        // That no file is there says the same, and ENOENT means something else to callers.
        .map_err(|errno| if errno == Errno::NOENT { Errno::CONNREFUSED } else { errno })
    }

    /// Waits until the manager has taken every message sent before. ETIMEDOUT: not within
    /// `patience`.
    pub fn barrier(&self, patience: Duration) -> Result<(), Errno> {
        let (here, there) = pipe_with(PipeFlags::CLOEXEC)?;
        self.send_fd("BARRIER=1", there.as_fd())?;
        // The manager closes its copy, and with that the last one.
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
    /// The socket that the messages leave by.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
