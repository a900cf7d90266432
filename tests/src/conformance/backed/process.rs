//! A process's fds, which are real ones under made-up numbers, and its memory during a request.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use luo::Errno;
use luo::builtin::decode::{Caller, Fault};
use luo::builtin::{OpenFile, SessionId};

use super::fd_of;
use crate::conformance::fds;
use crate::conformance::memory::Memory;
use crate::conformance::system::Argument;

/// What is behind an fd.
#[derive(Debug)]
pub(super) enum Opened {
    Device(Arc<()>),
    Session(SessionId, OwnedFd),
    File(OwnedFd),
}

impl Clone for Opened {
    /// Another fd of the same open file.
    fn clone(&self) -> Self {
        let copy = |fd: &OwnedFd| fd.try_clone().expect("the test may have that many fds");
        match self {
            Self::Device(device) => Self::Device(Arc::clone(device)),
            Self::Session(id, fd) => Self::Session(*id, copy(fd)),
            Self::File(fd) => Self::File(copy(fd)),
        }
    }
}

/// The fds of a process.
pub(super) type Table = fds::Table<Opened>;

/// Makes the fd that stands for a session.
type OpenSession<'a> = &'a dyn Fn(SessionId) -> Result<OwnedFd, Errno>;

/// A process while it makes a request.
pub(super) struct Request<'a> {
    table: &'a mut Table,
    memory: Memory<'a>,
    open: OpenSession<'a>,
    opened: BTreeMap<SessionId, OwnedFd>,
}

impl<'a> Request<'a> {
    pub(super) fn new(
        table: &'a mut Table,
        argument: &'a mut Argument,
        open: OpenSession<'a>,
    ) -> Self {
        Self { table, memory: Memory::new(argument), open, opened: BTreeMap::new() }
    }

    /// Where the argument is.
    pub(super) fn address(&self) -> u64 {
        self.memory.address()
    }
}

impl Caller<OpenFile> for Request<'_> {
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        self.memory.read(address, bytes)
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.memory.write(address, bytes)
    }

    /// The device has no open file here: something stands in for it that nobody preserves.
    fn file(&mut self, fd: i32) -> Option<OpenFile> {
        match &self.table.get(fd).ok()?.opened {
            Opened::Session(_, file) | Opened::File(file) => {
                OpenFile::of(file.as_fd()).expect("the test may have that many fds")
            }
            Opened::Device(_) => {
                let (nothing, _) = std::io::pipe().ok()?;
                Some(OpenFile::new(nothing.into()))
            }
        }
    }

    fn reserve_fd(&mut self) -> Result<i32, Errno> {
        self.table.reserve()
    }

    fn release_fd(&mut self, fd: i32) {
        self.table.take(fd);
    }

    fn open_session(&mut self, session: SessionId) -> Result<(), Errno> {
        self.opened.insert(session, (self.open)(session)?);
        Ok(())
    }

    fn drop_session(&mut self, session: SessionId) {
        self.opened.remove(&session);
    }

    fn install_session(&mut self, fd: i32, session: SessionId) {
        if let Some(opened) = self.opened.remove(&session) {
            self.table.put(fd, Opened::Session(session, opened));
        }
    }

    fn install_file(&mut self, fd: i32, file: OpenFile) {
        self.table.put(fd, Opened::File(fd_of(&file)));
    }
}
