//! A service manager's side of the fd store, as systemd 262 keeps it: `docs/systemd.md` has the facts.

#![expect(clippy::unwrap_used, reason = "a test whose double cannot go on has failed")]

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix,
    SocketFlags, SocketType, bind, recvmsg, socket_with,
};

/// The fds in a store, each with its name, in the order in which a service gets them at its next start.
pub type Kept = Vec<(String, OwnedFd)>;

/// The socket at which a manager gets the messages of its service.
#[derive(Debug)]
pub struct NotifySocket(OwnedFd);

/// A message of a service.
#[derive(Debug)]
pub struct Message {
    /// Its lines.
    pub text: String,
    fds: Vec<OwnedFd>,
}

impl NotifySocket {
    /// Makes the socket at this path.
    pub fn bind(path: &Path) -> Self {
        let address = SocketAddrUnix::new(path).unwrap();
        let (family, kind) = (AddressFamily::UNIX, SocketType::DGRAM);
        let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None).unwrap();
        bind(&socket, &address).unwrap();
        Self(socket)
    }

    /// Waits for the next message. Returns `None` if the message is empty: a test ends its manager with it.
    pub fn receive(&self) -> Option<Message> {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let got = recvmsg(&self.0, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        let fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        let fds = fds.collect();
        let text = String::from_utf8(bytes[..got.bytes].to_vec()).unwrap();
        (got.bytes > 0).then_some(Message { text, fds })
    }
}

impl Message {
    /// Does with a store that takes at most `capacity` fds what the message asks for. An fd beyond that is closed, and so
    /// is one of a file that the store has.
    pub fn obey(self, kept: &mut Kept, capacity: usize) {
        let Self { text, fds } = self;
        let lines: BTreeMap<&str, &str> = text.lines().filter_map(|l| l.split_once('=')).collect();
        let name = lines.get("FDNAME").copied().filter(|name| !name.contains(':'));
        let name = name.unwrap_or("stored");
        if lines.contains_key("FDSTOREREMOVE") {
            kept.retain(|(other, _)| other != name);
        } else if lines.contains_key("FDSTORE") {
            for fd in fds {
                let known = kept.iter().any(|(_, other)| inode(other) == inode(&fd));
                if kept.len() < capacity && !known {
                    kept.push((name.to_owned(), fd));
                }
            }
        }
    }
}

fn inode(fd: &OwnedFd) -> (u64, u64) {
    let stat = rustix::fs::fstat(fd.as_fd()).unwrap();
    (stat.st_dev, stat.st_ino)
}
