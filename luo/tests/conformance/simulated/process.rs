//! A process's fds, and its memory during one request.

use std::collections::BTreeMap;

use luo::Errno;
use luo::builtin::SessionId;
use luo::builtin::decode::{Caller, Fault};

use super::files::{OpenFile, What};
use crate::memory::Memory;
use crate::system::Argument;

/// What is behind an fd.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) opened: OpenFile,
    pub(super) closes_on_exec: bool,
}

/// The fds of a process.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    /// `None`: reserved.
    entries: BTreeMap<i32, Option<Entry>>,
    most: Option<usize>,
}

impl Table {
    pub(super) fn get(&self, number: i32) -> Option<&Entry> {
        self.entries.get(&number)?.as_ref()
    }

    /// Reserves the lowest free number.
    pub(super) fn reserve(&mut self) -> Result<i32, Errno> {
        if self.most.is_some_and(|most| self.entries.len() >= most) {
            return Err(Errno::MFILE);
        }
        // Most often it is the one behind the last.
        let behind = self.entries.keys().next_back().map_or(0, |last| last + 1);
        let is_full = usize::try_from(behind) == Ok(self.entries.len());
        let number = (0..behind).filter(|_| !is_full).find(|n| !self.entries.contains_key(n));
        let number = number.unwrap_or(behind);
        self.entries.insert(number, None);
        Ok(number)
    }

    pub(super) fn put(&mut self, number: i32, entry: Entry) {
        self.entries.insert(number, Some(entry));
    }

    pub(super) fn take(&mut self, number: i32) -> Option<Entry> {
        self.entries.remove(&number)?
    }

    pub(super) fn limit(&mut self, limited: bool) {
        self.most = limited.then_some(self.entries.len());
    }

    pub(super) fn into_entries(self) -> impl Iterator<Item = Entry> {
        self.entries.into_values().flatten()
    }
}

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

    fn install(&mut self, number: i32, opened: OpenFile) {
        self.table.put(number, Entry { opened, closes_on_exec: true });
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
        let opened = &self.table.get(fd)?.opened;
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
            self.install(fd, opened);
        }
    }

    fn install_file(&mut self, fd: i32, file: OpenFile) {
        self.install(fd, file);
    }
}
