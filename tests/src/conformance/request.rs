//! A process during a request to the state machine: its fds, its memory, and the sessions that are being
//! opened for it. The system's [`Opens`] defines the object behind an fd, and translates between these
//! objects and files of the state machine.

use std::collections::BTreeMap;

use luo::Errno;
use luo::builtin::SessionId;
use luo::builtin::decode::{Caller, Fault};

use super::fds::Table;
use super::memory::Memory;
use super::system::Argument;

/// Translates between a system's open objects and files of the state machine.
pub(super) trait Opens {
    /// The object behind an fd.
    type Opened;
    /// A file of the state machine.
    type File;
    /// A session that has no fd number yet.
    type Session;

    /// The file that a request can preserve. `None` if the object is no such file.
    fn file(&self, opened: &Self::Opened) -> Option<Self::File>;
    /// Opens a session.
    fn open_session(&self, session: SessionId) -> Result<Self::Session, Errno>;
    /// The object for the fd of a session.
    fn of_session(&self, session: SessionId, opened: Self::Session) -> Self::Opened;
    /// The object for the fd of a retrieved file.
    fn of_file(&self, file: Self::File) -> Self::Opened;
}

/// A process during a request.
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

    /// Address of the argument.
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
