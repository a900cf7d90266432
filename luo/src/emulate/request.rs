//! One ioctl of the program: the [`Caller`] that the state machine sees.
//!
//! The state machine reserves an fd first, and writes the fd's number before it installs a file.
//! The supervisor can install a file as the lowest free fd of another process, but cannot reserve a
//! number or remove a file. So `reserve_fd` only records the wish, the answer is held back, and
//! [`Request::install`] does both at the end, when nothing else can fail. If the process has no
//! free fd, that error takes precedence over every other error, as if it had been found first.

use std::os::fd::AsFd;

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;

use super::anchor::Anchor;
use super::notify::Listener;
use super::tracee::Tracee;
use crate::builtin::decode::{Caller, Fault};
use crate::builtin::{OpenFile, SessionId};

/// A file to install as a new fd.
#[derive(Debug)]
pub(super) enum New {
    Session(SessionId, Anchor),
    File(OpenFile),
}

/// An ioctl that is being executed.
pub(super) struct Request<'a> {
    listener: &'a Listener,
    id: u64,
    tracee: &'a Tracee,
    /// Whether the ioctl needs a new fd.
    wants_fd: bool,
    /// Whether the supervisor had no free fd for its copy of the program's file.
    out_of_fds: bool,
    /// An answer that waits for the number of the fd, and its address.
    answer: Option<(u64, Vec<u8>)>,
    /// A session that is not installed yet.
    opened: Option<(SessionId, Anchor)>,
    /// The file to install.
    new: Option<New>,
}

impl<'a> Request<'a> {
    pub(super) fn new(listener: &'a Listener, id: u64, tracee: &'a Tracee) -> Self {
        Self {
            listener,
            id,
            tracee,
            wants_fd: false,
            out_of_fds: false,
            answer: None,
            opened: None,
            new: None,
        }
    }

    /// Returns the errno that takes precedence over `errno`, or `errno`.
    pub(super) fn worst(&self, errno: Errno) -> Errno {
        if self.wants_fd && self.tracee.has_no_free_fd() {
            Errno::MFILE
        } else if self.out_of_fds && errno == Errno::BADF {
            Errno::NFILE
        } else {
            errno
        }
    }

    /// Installs the new file, if the ioctl made one, and writes its fd into the answer. EMFILE: the
    /// program has no free fd.
    pub(super) fn install(&mut self) -> Result<Option<New>, (Errno, Option<New>)> {
        let Some(new) = self.new.take() else { return Ok(None) };
        let file = match &new {
            New::Session(_, anchor) => anchor.theirs.as_fd(),
            New::File(file) => file.as_fd(),
        };
        match self.listener.add_fd(self.id, file) {
            Ok(fd) => {
                self.write_answer(fd);
                Ok(Some(new))
            }
            Err(errno) => Err((errno, Some(new))),
        }
    }

    /// Writes the held back answer with the number of the fd. `write` has checked that its memory
    /// is writable. If the program has unmapped the memory since, it does not get the number.
    fn write_answer(&mut self, fd: i32) {
        if let Some((address, mut bytes)) = self.answer.take() {
            bytes[4..8].copy_from_slice(&fd.to_le_bytes());
            let _ = self.tracee.write(address, &bytes);
        }
    }
}

impl Caller<OpenFile> for Request<'_> {
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        self.tracee.read(address, bytes)?;
        if self.listener.waits(self.id) { Ok(()) } else { Err(Fault) }
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        if !self.wants_fd {
            return self.tracee.write(address, bytes);
        }
        // Checks that the memory is writable, by writing its present contents.
        let mut present = vec![0; bytes.len()];
        self.tracee.read(address, &mut present)?;
        self.tracee.write(address, &present)?;
        self.answer = Some((address, bytes.to_vec()));
        Ok(())
    }

    fn file(&mut self, fd: i32) -> Option<OpenFile> {
        let file = self.tracee.file(fd);
        self.out_of_fds = file.as_ref().err() == Some(&Errno::MFILE);
        let file = file.ok()?;
        // For Linux an fd opened with O_PATH is not an open file (EBADF).
        let is_path = fcntl_getfl(&file).ok()?.contains(OFlags::PATH);
        (!is_path && self.listener.waits(self.id)).then(|| OpenFile::new(file))
    }

    fn reserve_fd(&mut self) -> Result<i32, Errno> {
        self.wants_fd = true;
        Ok(-1)
    }

    fn release_fd(&mut self, _fd: i32) {}

    fn open_session(&mut self, session: SessionId) -> Result<(), Errno> {
        self.opened = Some((session, Anchor::new()?));
        Ok(())
    }

    fn drop_session(&mut self, _session: SessionId) {
        self.opened = None;
    }

    fn install_session(&mut self, _fd: i32, _session: SessionId) {
        self.new = self.opened.take().map(|(session, anchor)| New::Session(session, anchor));
    }

    fn install_file(&mut self, _fd: i32, file: OpenFile) {
        self.new = Some(New::File(file));
    }
}
