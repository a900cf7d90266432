//! Simulated processes: their fd tables, and the fds that they send each other.

use std::collections::BTreeMap;

use luo::Errno;

use super::system::{Answer, Fd, Letter, Process};

/// An fd: the open file, and whether exec closes the fd.
#[derive(Debug, Clone)]
pub(crate) struct Entry<T> {
    pub(crate) opened: T,
    pub(crate) closes_on_exec: bool,
}

/// The fds of a process, by number.
#[derive(Debug, Clone)]
pub(crate) struct Table<T> {
    /// `None` for a number that is reserved and not open yet.
    entries: BTreeMap<i32, Option<Entry<T>>>,
    most: Option<usize>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), most: None }
    }
}

impl<T> Table<T> {
    pub(crate) fn get(&self, number: i32) -> Result<&Entry<T>, Errno> {
        self.entries.get(&number).and_then(Option::as_ref).ok_or(Errno::BADF)
    }

    /// The number of the next fd, above all present ones.
    pub(crate) fn next(&self) -> i32 {
        self.entries.keys().next_back().map_or(0, |last| last + 1)
    }

    /// Reserves the next number. EMFILE if the table is limited and full.
    pub(crate) fn reserve(&mut self) -> Result<i32, Errno> {
        if self.most.is_some_and(|most| self.entries.len() >= most) {
            return Err(Errno::MFILE);
        }
        let number = self.next();
        self.entries.insert(number, None);
        Ok(number)
    }

    /// Puts an open file at a reserved number. Exec closes the fd.
    pub(crate) fn put(&mut self, number: i32, opened: T) {
        self.entries.insert(number, Some(Entry { opened, closes_on_exec: true }));
    }

    /// Adds an fd that the process opened itself. Exec leaves it open.
    pub(crate) fn open(&mut self, opened: T) -> Result<i32, Errno> {
        let number = self.reserve()?;
        self.entries.insert(number, Some(Entry { opened, closes_on_exec: false }));
        Ok(number)
    }

    pub(crate) fn take(&mut self, number: i32) -> Option<T> {
        Some(self.entries.remove(&number)??.opened)
    }

    pub(crate) fn limit(&mut self, limited: bool) {
        self.most = limited.then_some(self.entries.len());
    }

    /// All open files.
    pub(crate) fn into_opened(self) -> impl Iterator<Item = T> {
        self.entries.into_values().flatten().map(|entry| entry.opened)
    }
}

/// The processes of a system, and the letters between them: fds that were sent and not yet received.
#[derive(Debug)]
pub(crate) struct Processes<T> {
    tables: BTreeMap<Process, Table<T>>,
    last: u32,
    letters: BTreeMap<usize, T>,
}

impl<T> Default for Processes<T> {
    fn default() -> Self {
        Self { tables: BTreeMap::new(), last: 0, letters: BTreeMap::new() }
    }
}

impl<T: Clone> Processes<T> {
    pub(crate) fn table(&mut self, process: Process) -> Result<&mut Table<T>, Errno> {
        self.tables.get_mut(&process).ok_or(Errno::SRCH)
    }

    pub(crate) fn entry(&self, fd: Fd) -> Result<&Entry<T>, Errno> {
        self.tables.get(&fd.process).ok_or(Errno::SRCH)?.get(fd.number)
    }

    /// Adds an open file to a process. The answer is the fd's number.
    pub(crate) fn install(&mut self, process: Process, opened: T) -> Result<Answer, Errno> {
        Ok(Answer::number(self.table(process)?.open(opened)?))
    }

    pub(crate) fn spawn(&mut self) -> Process {
        self.last += 1;
        let process = Process(self.last);
        self.tables.insert(process, Table::default());
        process
    }

    pub(crate) fn fork(&mut self, process: Process) -> Process {
        let table = self.tables.get(&process).cloned().unwrap_or_default();
        let child = self.spawn();
        self.tables.insert(child, table);
        child
    }

    /// Ends a process and returns its open files, which the caller drops.
    pub(crate) fn kill(&mut self, process: Process) -> impl Iterator<Item = T> + use<T> {
        self.tables.remove(&process).unwrap_or_default().into_opened()
    }

    pub(crate) fn send(&mut self, fd: Fd) -> Result<Letter, Errno> {
        let opened = self.entry(fd)?.opened.clone();
        let number = self.letters.keys().next_back().map_or(0, |last| last + 1);
        self.letters.insert(number, opened);
        Ok(Letter(number))
    }

    /// Receives a letter in a process. Without a process the letter is lost: its file is returned as the
    /// error, and the caller drops it.
    pub(crate) fn receive(&mut self, letter: Letter, by: Option<Process>) -> Result<Option<Fd>, T> {
        let Some(opened) = self.letters.remove(&letter.0) else { return Ok(None) };
        let Some(process) = by else { return Err(opened) };
        let number = self.install(process, opened).ok();
        Ok(number.map(|answer| Fd { process, number: answer.number as i32 }))
    }

    /// Ends all processes and closes all their files.
    pub(crate) fn clear(&mut self) {
        self.tables.clear();
        self.letters.clear();
    }
}
