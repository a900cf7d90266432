//! One ioctl of the program, as the state machine sees its caller.
//!
//! The machine reserves an fd first and says its number before there is anything behind it. Here a
//! file can be put behind the lowest free fd of another process, but never be taken away again; so
//! `reserve_fd` only takes note, the answer is held back, and both are done at the end, when nothing
//! else can fail. That the process had no free fd is found out then, and goes before
//! every other error, as if it had been found out first.

use std::os::fd::AsFd;

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;

use super::anchor::Anchor;
use super::notify::Listener;
use super::tracee::Tracee;
use crate::builtin::decode::{Caller, Fault};
use crate::builtin::{OpenFile, SessionId};

/// What goes behind the new fd.
#[derive(Debug)]
pub(super) enum New {
    Session(SessionId, Anchor),
    File(OpenFile),
}

/// An ioctl that is being made.
pub(super) struct Request<'a> {
    listener: &'a Listener,
    id: u64,
    tracee: &'a Tracee,
    wants_fd: bool,
    /// This process had no fd for a file that the program has.
    out_of_fds: bool,
    /// The answer, and where it goes, if it waits for the fd.
    answer: Option<(u64, Vec<u8>)>,
    opened: Option<(SessionId, Anchor)>,
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

    /// The errno that goes before `errno`, if one does.
    pub(super) fn worst(&self, errno: Errno) -> Errno {
        if self.wants_fd && self.tracee.has_no_free_fd() {
            Errno::MFILE
        } else if self.out_of_fds && errno == Errno::BADF {
            Errno::NFILE
        } else {
            errno
        }
    }

    /// Puts the new file, if there is one, behind an fd. EMFILE: there is none that is free.
    pub(super) fn install(&mut self) -> Result<Option<New>, (Errno, Option<New>)> {
        let Some(new) = self.new.take() else { return Ok(None) };
        let file = match &new {
            New::Session(_, anchor) => anchor.theirs.as_fd(),
            New::File(file) => file.as_fd(),
        };
        match self.listener.add_fd(self.id, file) {
            Ok(fd) => {
                self.tell(fd);
                Ok(Some(new))
            }
            Err(errno) => Err((errno, Some(new))),
        }
    }

    /// Writes the answer, which could be written a moment ago. If that has changed since, the program
    /// has taken its memory away while it waited, and does not learn the number.
    fn tell(&mut self, fd: i32) {
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
        // Whether it can be written: what is there is written once more.
        let mut there = vec![0; bytes.len()];
        self.tracee.read(address, &mut there)?;
        self.tracee.write(address, &there)?;
        self.answer = Some((address, bytes.to_vec()));
        Ok(())
    }

    fn file(&mut self, fd: i32) -> Option<OpenFile> {
        let file = self.tracee.file(fd);
        self.out_of_fds = file.as_ref().err() == Some(&Errno::MFILE);
        let file = file.ok()?;
        // Opened with O_PATH it is not open for the machine.
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
