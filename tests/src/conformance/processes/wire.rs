//! Orders to an agent and its reports: one packet each, with an fd if need be.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use luo::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::conformance::system::Call;

/// What an agent is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Become two, of which the second has no fds.
    Spawn,
    /// Become two.
    Fork,
    /// Send a copy of an fd.
    Send(i32),
    /// Take the fd that comes with this.
    Receive,
    /// Anything else.
    Call(Call),
}

/// What an agent says first.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) pid: u32,
    /// How many live updates led to its kernel, where it is told.
    pub(super) number: Option<u64>,
}

/// Longest packet.
const MOST: usize = 1 << 17;

/// Sends a packet; the fd in it is not taken but `fd` is sent.
pub(super) fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let bytes = serde_json::to_vec(message).map_err(|_| Errno::INVAL)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
}

/// Waits for a packet; EPIPE at the end.
pub(super) fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
) -> Result<(T, Option<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = vec![0; MOST];
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let received = recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::empty())?;
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if received.bytes == 0 {
        return Err(Errno::PIPE);
    }
    let message = serde_json::from_slice(&buffer[..received.bytes]).map_err(|_| Errno::BADMSG)?;
    Ok((message, fd))
}
