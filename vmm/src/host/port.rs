//! The control port: a virtio-serial port of the host on which it serves the API.
//!
//! There is one port as long as the host lives, whatever its client does: it comes late, leaves and comes back, and sends
//! or reads what it likes. A port that cannot be opened is tried again, because a host that is PID 1 may have no other
//! way to be asked.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::api::{Line, Lines, StreamError};
use crate::causes::chain;
use crate::devices::files::OpenError;
use crate::devices::serial::{open_port, open_port_now};

/// Time between two attempts to read a port whose client has left. Such a port is not polled, because every poll would
/// return at once.
const PAUSE: Duration = Duration::from_millis(200);
/// Time between two attempts to open a port that cannot be opened.
const OPEN_PAUSE: Duration = Duration::from_secs(1);

/// The control port.
pub(super) struct Port {
    name: String,
    /// `None` if the port cannot be opened.
    lines: Option<Lines>,
    /// When to look at it again. `None`: when it is ready.
    due: Option<Instant>,
    /// Whether nobody is at its other end.
    has_left: bool,
}

impl Port {
    fn closed(name: &str) -> Self {
        Self { name: name.to_owned(), lines: None, due: None, has_left: false }
    }

    /// Opens the port of this name. Only logs an error: a host without its control port still runs its VMs.
    pub(super) fn open(name: &str) -> Self {
        let mut port = Self::closed(name);
        if let Err(error) = port.open_by(open_port) {
            tracing::error!("{}", chain(&error).join(": "));
        }
        port
    }

    /// Tries again to open the port, if it is not open and its time has come. Returns whether it is open now and was
    /// not before.
    pub(super) fn open_again(&mut self) -> bool {
        let opened = self.lines.is_none() && self.is_due() && self.open_by(open_port_now).is_ok();
        if opened {
            tracing::info!("the control port `{}` is open after all", self.name);
        }
        opened
    }

    fn open_by(
        &mut self,
        open: impl FnOnce(&str) -> Result<File, OpenError>,
    ) -> Result<(), OpenError> {
        let opened = open(&self.name);
        self.due = opened.is_err().then(|| Instant::now() + OPEN_PAUSE);
        self.lines = Some(Lines::new(opened?.into()));
        Ok(())
    }

    /// What to wait for, and on which file. `None` while it is not polled.
    pub(super) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let lines = self.lines.as_ref().filter(|_| self.due.is_none())?;
        let interest = match lines.is_behind() {
            true => PollFlags::IN | PollFlags::OUT,
            false => PollFlags::IN,
        };
        Some((lines.as_fd(), interest))
    }

    /// When to look at it again, ready or not.
    pub(super) fn due(&self) -> Option<Instant> {
        match &self.lines {
            Some(lines) if lines.has_lines() && !lines.is_behind() => Some(Instant::now()),
            _ => self.due,
        }
    }

    /// Whether to look at it now, ready or not.
    pub(super) fn is_due(&self) -> bool {
        self.due().is_some_and(|due| due <= Instant::now())
    }

    /// Whether its client has left.
    pub(super) fn has_left(&self) -> bool {
        self.has_left
    }

    /// Writes what the client has not taken yet, and returns the lines that it has sent.
    pub(super) fn read(&mut self) -> Vec<String> {
        let Some(lines) = &mut self.lines else { return Vec::new() };
        (self.due, self.has_left) = (None, false);
        let error = match lines.flush().and_then(|()| lines.read()) {
            Ok(read) => {
                if read.is_empty() && !lines.is_behind() {
                    self.due = Some(Instant::now() + PAUSE);
                }
                return read;
            }
            Err(error) => error,
        };
        match error {
            // The next client is served as this one was.
            StreamError::Closed => {
                lines.go_on();
                self.has_left = true;
                self.due = Some(Instant::now() + PAUSE);
            }
            StreamError::TooLong | StreamError::Stuck => {
                tracing::warn!("control port `{}`: {}", self.name, chain(&error).join(": "));
                lines.send(&Line::Error { id: 0, error: chain(&error), outcome: None }.text());
            }
            StreamError::Io(_) => {
                tracing::warn!("control port `{}`: {}", self.name, chain(&error).join(": "));
                self.lines = None;
                self.due = Some(Instant::now() + OPEN_PAUSE);
            }
        }
        Vec::new()
    }

    /// Sends a line, as far as the client takes it.
    pub(super) fn send(&mut self, line: &Line) {
        if let Some(lines) = &mut self.lines {
            lines.send(&line.text());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::{self, Read, Write};
    use std::os::unix::fs::OpenOptionsExt;
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    fn port(file: File) -> Port {
        let mut port = Port::closed("control");
        port.open_by(|_| Ok(file)).unwrap();
        port
    }

    /// A FIFO, which as a virtio-serial port has an end of file as long as nobody is at its other end.
    fn fifo(path: &Path) -> Port {
        mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let mut options = OpenOptions::new();
        port(options.read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap())
    }

    #[test]
    fn one_client_after_another_is_served() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("port");
        let mut port = fifo(&path);
        for sent in ["one", "two", "three"] {
            assert!(port.read().is_empty() && port.has_left(), "nobody is there");
            assert!(port.interest().is_none() && port.due().is_some(), "every poll would return");
            let mut client = OpenOptions::new().write(true).open(&path).unwrap();
            writeln!(client, "{sent}").unwrap();
            assert_eq!((port.read(), port.has_left()), (vec![sent.to_owned()], false));
            // What is not a whole line is no part of what the next client sends.
            client.write_all(b"{\"do\":\"power-o").unwrap();
            drop(client);
            assert!(port.read().is_empty());
        }
    }

    #[test]
    fn a_client_that_sends_too_long_a_line_is_told_so_once_and_served_on() {
        let (mut client, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut port = port(File::from(std::os::fd::OwnedFd::from(ours)));
        let client_writes = client.try_clone().unwrap();
        let writer = std::thread::spawn(move || {
            let mut client = client_writes;
            client.write_all(&vec![b'x'; 1 << 20]).unwrap();
            client.write_all(b"\none\ntwo\n").unwrap();
        });
        let mut read = Vec::new();
        while read.len() < 2 {
            read.extend(port.read());
        }
        writer.join().unwrap();
        assert_eq!(read, ["one", "two"]);
        client.set_nonblocking(true).unwrap();
        let mut told = String::new();
        let end = client.read_to_string(&mut told).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(told.matches("a line is longer than").count(), 1, "{told}");
    }

    #[test]
    fn a_port_that_cannot_be_opened_is_tried_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("port");
        let mut port = Port::closed("no such port");
        let failed = port.open_by(open_port_now).unwrap_err();
        assert!(failed.to_string().contains("no such port"), "{failed}");
        assert!(port.interest().is_none() && port.read().is_empty());
        let due = port.due().expect("it is tried again");
        assert!(due > Instant::now() && !port.open_again(), "not at once");
        std::fs::write(&path, "").unwrap();
        port.open_by(|_| Ok(File::open(&path).unwrap())).unwrap();
        assert!(port.interest().is_some());
    }
}
