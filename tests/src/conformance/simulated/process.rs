//! A process's fds, and its memory during one request.

use std::collections::BTreeMap;

use luo::Errno;
use luo::builtin::SessionId;
use luo::builtin::decode::{Caller, Fault};

use super::files::{OpenFile, What};
use crate::conformance::fds;
use crate::conformance::memory::Memory;
use crate::conformance::system::Argument;

/// The fds of a process.
pub(super) type Table = fds::Table<OpenFile>;

/// A process while it makes a request.
pub(super) struct Request<'a> {
    table: &'a mut Table,
    memory: Memory<'a>,
    opened: BTreeMap<SessionId, OpenFile>,
}

impl<'a> Request<'a> {
    pub(super) fn new(table: &'a mut Table, argument: &'a mut Argument) -> Self {
        Self { table, memory: Memory::new(argument), opened: BTreeMap::new() }
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

    fn file(&mut self, fd: i32) -> Option<OpenFile> {
        let opened = &self.table.get(fd).ok()?.opened;
        (!matches!(opened.what, What::Path)).then(|| opened.clone())
    }

    fn reserve_fd(&mut self) -> Result<i32, Errno> {
        self.table.reserve()
    }

    fn release_fd(&mut self, fd: i32) {
        self.table.take(fd);
    }

    fn open_session(&mut self, session: SessionId) -> Result<(), Errno> {
        self.opened.insert(session, OpenFile::new(What::Session(session)));
        Ok(())
    }

    fn drop_session(&mut self, session: SessionId) {
        self.opened.remove(&session);
    }

    fn install_session(&mut self, fd: i32, session: SessionId) {
        if let Some(opened) = self.opened.remove(&session) {
            self.table.put(fd, opened);
        }
    }

    fn install_file(&mut self, fd: i32, file: OpenFile) {
        self.table.put(fd, file);
    }
}
