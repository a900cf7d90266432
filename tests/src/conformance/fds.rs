//! The fds of a process that is not there: a table of numbers.

use std::collections::BTreeMap;

use luo::Errno;

/// An fd: what is open, and whether exec closes it.
#[derive(Debug, Clone)]
pub(crate) struct Entry<T> {
    pub(crate) opened: T,
    pub(crate) closes_on_exec: bool,
}

/// The fds of a process. No number is given twice.
#[derive(Debug, Clone)]
pub(crate) struct Table<T> {
    /// `None`: reserved.
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

    /// The number of the next fd, above all that there are.
    pub(crate) fn next(&self) -> i32 {
        self.entries.keys().next_back().map_or(0, |last| last + 1)
    }

    /// Reserves it.
    pub(crate) fn reserve(&mut self) -> Result<i32, Errno> {
        if self.most.is_some_and(|most| self.entries.len() >= most) {
            return Err(Errno::MFILE);
        }
        let number = self.next();
        self.entries.insert(number, None);
        Ok(number)
    }

    /// What a request opened is there under the number that it reserved; exec closes it.
    pub(crate) fn put(&mut self, number: i32, opened: T) {
        self.entries.insert(number, Some(Entry { opened, closes_on_exec: true }));
    }

    /// An fd that the process opened itself, which exec leaves open.
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

    /// All that is open.
    pub(crate) fn into_opened(self) -> impl Iterator<Item = T> {
        self.entries.into_values().flatten().map(|entry| entry.opened)
    }
}
