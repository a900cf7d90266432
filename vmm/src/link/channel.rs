//! One end of the link: packets with file descriptors over a Unix socket pair.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest packet, in bytes: enough for a machine with 24 disks at paths of the greatest length.
const MAX_PACKET: usize = 128 << 10;
/// Most fds in one packet: Linux's `SCM_MAX_FD`.
const MAX_FDS: usize = 253;

/// The link to the other process failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The other end is gone.
    #[error("the other process has closed the link")]
    Closed,
    /// The other end is gone, and did not read all that was sent to it.
    #[error("the other process has ended and has not read what was sent last")]
    Unread,
    /// No packet arrived within the time set by [`Channel::set_timeout`].
    #[error("the other process did not answer in time")]
    TimedOut,
    /// The other process has not read what was sent before.
    #[error("the other process does not read its link: it hangs")]
    Full,
    /// A packet is too large, was cut off or does not follow the protocol.
    #[error("a message on the link cannot be read: {0}")]
    Malformed(String),
    /// The socket failed.
    #[error("the link failed")]
    Socket(#[source] io::Error),
}

/// One end of the link.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Creates two connected ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// Wraps the socket that this process was started with.
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Returns the socket, to pass it to a child process.
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// Bounds how long [`receive`](Self::receive) waits; `None` removes the bound.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(&self.socket, sockopt::Timeout::Recv, timeout)?)
    }

    /// Sends one message and the fds that go with it. Waits while the link is full.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        self.send_with(message, fds, SendFlags::empty())
    }

    /// The same, but errors if the link is full.
    pub fn send_at_once<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        self.send_with(message, fds, SendFlags::DONTWAIT)
    }

    fn send_with<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<(), LinkError> {
        let bytes = serde_json::to_vec(message).map_err(|e| LinkError::Malformed(e.to_string()))?;
        if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
            let problem = format!("{} bytes and {} fds are too many", bytes.len(), fds.len());
            return Err(LinkError::Malformed(problem));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let slices = [IoSlice::new(&bytes)];
        match sendmsg(&self.socket, &slices, &mut control, flags | SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(Errno::AGAIN) => Err(LinkError::Full),
            Err(Errno::PIPE) => Err(self.closed()),
            Err(Errno::CONNRESET) => Err(LinkError::Unread),
            Err(errno) => Err(LinkError::Socket(errno.into())),
        }
    }

    /// The error of a link whose other end was closed just now. Linux looks whether that end left something unread before
    /// it looks whether the end is closed, so it may have told only the one.
    fn closed(&self) -> LinkError {
        match sockopt::socket_error(&self.socket) {
            Ok(Err(Errno::CONNRESET)) => LinkError::Unread,
            _ => LinkError::Closed,
        }
    }

    /// Waits for one message and the fds that come with it.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), LinkError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = self.receive_with(&mut control)?;
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        Ok((message, fds.flatten().collect()))
    }

    /// Waits for one message of a process that is to send no fds. A message with fds is malformed. Linux drops the files then
    /// and gives this process no fds of them: closing one might wait without end for the server of its file system.
    pub fn receive_without_fds<T: DeserializeOwned>(&self) -> Result<T, LinkError> {
        self.receive_with(&mut RecvAncillaryBuffer::default())
    }

    fn receive_with<T: DeserializeOwned>(
        &self,
        control: &mut RecvAncillaryBuffer<'_>,
    ) -> Result<T, LinkError> {
        let mut bytes = vec![0; MAX_PACKET];
        let received = loop {
            let mut slices = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.socket, &mut slices, control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(LinkError::TimedOut),
                Err(Errno::CONNRESET) => return Err(LinkError::Unread),
                Err(errno) => return Err(LinkError::Socket(errno.into())),
                Ok(received) => break received,
            }
        };
        if received.bytes == 0 {
            return Err(self.closed());
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(LinkError::Malformed("the message was cut off".to_owned()));
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(LinkError::Malformed("it came with more files than it may".to_owned()));
        }
        serde_json::from_slice(&bytes[..received.bytes])
            .map_err(|e| LinkError::Malformed(e.to_string()))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Envelope, FromVm, Reply, Request, Role};
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_message_arrives_with_the_same_open_files() {
        let (host, vm) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_at(b"guest", 0).unwrap();
        let envelope = Envelope { request: Request::Save, roles: vec![Role::State] };
        host.send(&envelope, &[file.as_fd()]).unwrap();
        let (received, mut fds): (Envelope, _) = vm.receive().unwrap();
        assert_eq!(received.request, Request::Save);
        let mut text = [0; 5];
        File::from(fds.pop().unwrap()).read_exact_at(&mut text, 0).unwrap();
        assert_eq!(&text, b"guest");
    }

    #[test]
    fn files_that_the_host_does_not_expect_make_a_message_malformed() {
        let (host, vm) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        for count in [1, MAX_FDS] {
            vm.send(&FromVm::Reply(Reply::Built), &vec![file.as_fd(); count]).unwrap();
            let received = host.receive_without_fds::<FromVm>();
            assert!(matches!(received, Err(LinkError::Malformed(_))), "{received:?}");
        }
        vm.send(&FromVm::Reply(Reply::Built), &[]).unwrap();
        let received = host.receive_without_fds::<FromVm>().unwrap();
        assert!(matches!(received, FromVm::Reply(Reply::Built)), "{received:?}");
    }

    #[test]
    fn a_closed_end_and_a_silent_end_are_told_apart() {
        let (host, vm) = Channel::pair().unwrap();
        host.set_timeout(Some(Duration::from_millis(1))).unwrap();
        assert!(matches!(host.receive::<FromVm>(), Err(LinkError::TimedOut)));
        drop(vm);
        assert!(matches!(host.receive::<FromVm>(), Err(LinkError::Closed)));
        assert!(matches!(host.send(&Reply::Built, &[]), Err(LinkError::Closed)));
    }

    #[test]
    fn a_process_that_reads_nothing_keeps_nobody_waiting() {
        let (host, _vm) = Channel::pair().unwrap();
        let error = loop {
            if let Err(error) = host.send_at_once(&Reply::Built, &[]) {
                break error;
            }
        };
        assert!(matches!(error, LinkError::Full), "{error}");
        // The largest packet fits into an empty link.
        let (host, vm) = Channel::pair().unwrap();
        let largest = "x".repeat(MAX_PACKET - 2);
        host.send_at_once(&largest, &[]).unwrap();
        assert_eq!(vm.receive::<String>().unwrap().0, largest);
    }

    #[test]
    fn garbage_is_malformed_and_not_a_panic() {
        let (host, vm) = Channel::pair().unwrap();
        for garbage in ["{", "[]", "{\"reply\":\"nothing\"}", "\u{0}"] {
            host.send(&serde_json::Value::from(garbage), &[]).unwrap();
            assert!(matches!(vm.receive::<FromVm>(), Err(LinkError::Malformed(_))));
        }
    }
}
