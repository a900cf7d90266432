//! A process's fds, which are real ones under made-up numbers, and its memory during a request.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use luo::Errno;
use luo::builtin::decode::{Caller, Fault};
use luo::builtin::{OpenFile, SessionId};

use super::fd_of;
use crate::memory::Memory;
use crate::system::Argument;

/// What is behind an fd.
#[derive(Debug)]
pub(super) enum Opened {
    Device(Arc<()>),
    Session(SessionId, OwnedFd),
    File(OwnedFd),
}

/// An fd.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) opened: Opened,
    pub(super) closes_on_exec: bool,
}

impl Entry {
    /// Another fd of the same open file.
    pub(super) fn copy(&self) -> Self {
        let copy = |fd: &OwnedFd| fd.try_clone().expect("the test may have that many fds");
        let opened = match &self.opened {
            Opened::Device(device) => Opened::Device(Arc::clone(device)),
            Opened::Session(id, fd) => Opened::Session(*id, copy(fd)),
            Opened::File(fd) => Opened::File(copy(fd)),
        };
        Self { opened, closes_on_exec: self.closes_on_exec }
    }
}

/// The fds of a process.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// `None`: reserved.
    entries: BTreeMap<i32, Option<Entry>>,
    most: Option<usize>,
}

impl Table {
    pub(super) fn copy(&self) -> Self {
        let copy =
            |(number, entry): (&i32, &Option<Entry>)| (*number, entry.as_ref().map(Entry::copy));
        Self { entries: self.entries.iter().map(copy).collect(), most: self.most }
    }

    pub(super) fn get(&self, number: i32) -> Option<&Entry> {
        self.entries.get(&number)?.as_ref()
    }

    /// Reserves a free number.
    pub(super) fn reserve(&mut self) -> Result<i32, Errno> {
        if self.most.is_some_and(|most| self.entries.len() >= most) {
            return Err(Errno::MFILE);
        }
        let number = self.entries.keys().next_back().map_or(0, |last| last + 1);
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
        match &self.table.get(fd)?.opened {
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
            let opened = Opened::Session(session, opened);
            self.table.put(fd, Entry { opened, closes_on_exec: true });
        }
    }

    fn install_file(&mut self, fd: i32, file: OpenFile) {
        let opened = Opened::File(fd_of(&file));
        self.table.put(fd, Entry { opened, closes_on_exec: true });
    }
}
