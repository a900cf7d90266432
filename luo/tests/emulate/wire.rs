//! Orders to an agent and its reports: one packet each, with an fd if need be.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use luo::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// What an agent is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Order {
    Spawn,
    Fork,
    LimitFds,
    OpenDevice,
    Memfd,
    Reopen,
    ReopenAsPath,
    Unsupported,
    Dup,
    Close,
    Send,
    Receive,
    Ioctl,
    ClosesOnExec,
    IsSameFile,
    Read,
    WriteAt,
    Reboot,
}

impl Order {
    const ALL: [Self; 18] = [
        Self::Spawn,
        Self::Fork,
        Self::LimitFds,
        Self::OpenDevice,
        Self::Memfd,
        Self::Reopen,
        Self::ReopenAsPath,
        Self::Unsupported,
        Self::Dup,
        Self::Close,
        Self::Send,
        Self::Receive,
        Self::Ioctl,
        Self::ClosesOnExec,
        Self::IsSameFile,
        Self::Read,
        Self::WriteAt,
        Self::Reboot,
    ];

    pub(crate) fn from_number(number: i64) -> Option<Self> {
        Self::ALL.into_iter().find(|order| *order as i64 == number)
    }
}

/// A packet: four numbers, bytes, perhaps an fd. What the numbers mean depends on who sent it.
#[derive(Debug, Default)]
pub(crate) struct Packet {
    pub(crate) numbers: [i64; 4],
    pub(crate) bytes: Vec<u8>,
    pub(crate) fd: Option<OwnedFd>,
}

const HEAD: usize = 32;
const MOST: usize = 1 << 16;

/// Sends a packet; the fd in it is not taken but `fd` is sent.
pub(crate) fn send(
    socket: impl AsFd,
    numbers: [i64; 4],
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let head: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() {
        message.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let parts = [IoSlice::new(&head), IoSlice::new(bytes)];
    sendmsg(socket, &parts, &mut message, SendFlags::NOSIGNAL).map(drop)
}

/// Waits for a packet; EPIPE at the end.
pub(crate) fn receive(socket: impl AsFd) -> Result<Packet, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = vec![0; MOST];
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let received = recvmsg(socket, &mut parts, &mut message, RecvFlags::empty())?;
    let fd = message.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    buffer.truncate(received.bytes);
    let Some((head, bytes)) = buffer.split_at_checked(HEAD) else { return Err(Errno::PIPE) };
    let mut numbers = [0; 4];
    for (number, bytes) in numbers.iter_mut().zip(head.as_chunks().0) {
        *number = i64::from_le_bytes(*bytes);
    }
    Ok(Packet { numbers, bytes: bytes.to_vec(), fd })
}
