//! Orders to an agent and its answers: one packet each, with an fd if the order carries one.

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

/// An order to an agent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Fork; the child closes all fds of its parent.
    Spawn,
    /// Fork; the child keeps the fds of its parent.
    Fork,
    /// Send a copy of an fd.
    Send(i32),
    /// Receive the fd that this packet carries.
    Receive,
    /// Make a call.
    Call(Call),
}

/// An agent's first message.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) pid: u32,
    /// Number of live updates that led to its kernel, if the emulator passed it.
    pub(super) number: Option<u64>,
}

/// Most bytes in a packet.
const MOST: usize = 1 << 17;

/// Sends a packet, with a copy of `fd`.
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

/// Waits for a packet. EPIPE if the connection is closed.
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
