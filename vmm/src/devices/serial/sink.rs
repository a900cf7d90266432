//! The sink of the serial port: a file, a terminal, a pipe, or a port of the host.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::time::Timespec;

/// The file that output is written to and input is read from.
pub(super) struct Sink {
    pub(super) file: File,
    nonblocking: bool,
    /// Whether input is read: the file is non-blocking and open for reading.
    pub(super) reads: bool,
}

pub(super) enum Written {
    Bytes(usize),
    Full,
    Broken,
}

impl Sink {
    pub(super) fn new(fd: OwnedFd) -> Self {
        let flags = fcntl_getfl(&fd).unwrap_or(OFlags::empty());
        let nonblocking = flags.contains(OFlags::NONBLOCK);
        let reads = nonblocking && flags.contains(OFlags::RDWR);
        Self { file: fd.into(), nonblocking, reads }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Written {
        if !self.nonblocking && !self.is_writable() {
            return Written::Full;
        }
        match self.file.write(bytes) {
            Ok(0) => Written::Full,
            Ok(count) => Written::Bytes(count),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => Written::Bytes(0),
                io::ErrorKind::WouldBlock => Written::Full,
                _ => {
                    tracing::debug!("serial output on fd {}: {error}", self.file.as_raw_fd());
                    Written::Broken
                }
            },
        }
    }

    /// Whether a write to a blocking sink, such as a pipe, returns without a wait.
    fn is_writable(&self) -> bool {
        let mut fds = [PollFd::new(&self.file, PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }
}
