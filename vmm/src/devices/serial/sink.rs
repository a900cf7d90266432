//! The sink of the serial port: a file, a terminal, a pipe, or a port of the host.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::time::Timespec;

/// The file that output is written to and input is read from.
pub(super) struct Sink {
    pub(super) file: File,
    nonblocking: bool,
    /// Whether input is read: the file is non-blocking and open for reading.
    pub(super) reads: bool,
    /// What is at the other end.
    pub(super) peer: Peer,
}

/// What is at the other end of a sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// Something that stays: a file, a port.
    Fixed,
    /// A program that has opened the pseudoterminal, if any has.
    Pty,
    /// A client of the console's socket.
    Client,
    /// A client that takes no more output, and whose input is not read to its end yet.
    LeavingClient,
}

pub(super) enum Written {
    Bytes(usize),
    Full,
    Failed(io::Error),
}

impl Sink {
    pub(super) fn new(fd: OwnedFd, peer: Peer) -> Self {
        let flags = fcntl_getfl(&fd).unwrap_or(OFlags::empty());
        let nonblocking = flags.contains(OFlags::NONBLOCK);
        let reads = nonblocking && flags.contains(OFlags::RDWR);
        Self { file: fd.into(), nonblocking, reads, peer }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Written {
        let takes_output = match self.peer {
            // Without a program the kernel would keep the oldest output, not the latest.
            Peer::Pty => !self.polls(PollFlags::HUP),
            _ => self.nonblocking || self.polls(PollFlags::OUT),
        };
        if !takes_output {
            return Written::Full;
        }
        match self.file.write(bytes) {
            Ok(0) => Written::Full,
            Ok(count) => Written::Bytes(count),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => Written::Bytes(0),
                io::ErrorKind::WouldBlock => Written::Full,
                _ => Written::Failed(error),
            },
        }
    }

    /// Whether the file is ready in this way: a blocking one for a write without a wait (`OUT`), or a
    /// pseudoterminal that no program has opened (`HUP`).
    fn polls(&self, flags: PollFlags) -> bool {
        let mut fds = [PollFd::new(&self.file, flags)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        // HUP is reported unasked.
        let wanted = flags | PollFlags::ERR;
        poll(&mut fds, Some(&at_once)).is_ok() && fds[0].revents().intersects(wanted)
    }
}
