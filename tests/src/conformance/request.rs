//! A process while it makes a request to the state machine: its fds, its memory, and the sessions that
//! are being opened for it. What is behind an fd, and how a file of the machine is made of it, is the
//! system's ([`Opens`]).

use std::collections::BTreeMap;

use luo::Errno;
use luo::builtin::SessionId;
use luo::builtin::decode::{Caller, Fault};

use super::fds::Table;
use super::memory::Memory;
use super::system::Argument;

/// What a system has behind its fds.
pub(super) trait Opens {
    /// What is behind an fd.
    type Opened;
    /// A file as the state machine takes and gives it.
    type File;
    /// What stands for a session before it has an fd.
    type Session;

    /// The file that a request can preserve, if this is one.
    fn file(&self, opened: &Self::Opened) -> Option<Self::File>;
    /// Makes what stands for a session.
    fn open_session(&self, session: SessionId) -> Result<Self::Session, Errno>;
    /// What is behind the fd of a session.
    fn of_session(&self, session: SessionId, opened: Self::Session) -> Self::Opened;
    /// What is behind the fd of a file that was retrieved.
    fn of_file(&self, file: Self::File) -> Self::Opened;
}

/// A process while it makes a request.
pub(super) struct Request<'a, S: Opens> {
    system: S,
    table: &'a mut Table<S::Opened>,
    memory: Memory<'a>,
    opened: BTreeMap<SessionId, S::Session>,
}

impl<'a, S: Opens> Request<'a, S> {
    pub(super) fn new(
        system: S,
        table: &'a mut Table<S::Opened>,
        argument: &'a mut Argument,
    ) -> Self {
        Self { system, table, memory: Memory::new(argument), opened: BTreeMap::new() }
    }

    /// Where the argument is.
    pub(super) fn address(&self) -> u64 {
        self.memory.address()
    }
}

impl<S: Opens> Caller<S::File> for Request<'_, S> {
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        self.memory.read(address, bytes)
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.memory.write(address, bytes)
    }

    fn file(&mut self, fd: i32) -> Option<S::File> {
        self.system.file(&self.table.get(fd).ok()?.opened)
    }

    fn reserve_fd(&mut self) -> Result<i32, Errno> {
        self.table.reserve()
    }

    fn release_fd(&mut self, fd: i32) {
        self.table.take(fd);
    }

    fn open_session(&mut self, session: SessionId) -> Result<(), Errno> {
        self.opened.insert(session, self.system.open_session(session)?);
        Ok(())
    }

    fn drop_session(&mut self, session: SessionId) {
        self.opened.remove(&session);
    }

    fn install_session(&mut self, fd: i32, session: SessionId) {
        if let Some(opened) = self.opened.remove(&session) {
            self.table.put(fd, self.system.of_session(session, opened));
        }
    }

    fn install_file(&mut self, fd: i32, file: S::File) {
        self.table.put(fd, self.system.of_file(file));
    }
}
