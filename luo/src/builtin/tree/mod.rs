//! Handover trees: what one kernel leaves for the next, as plain values and as bytes.
//!
//! A [`Handover`] has no addresses in it. Two layouts carry it: [`v1`], an FDT, which the built-in LUO
//! uses from one generation to the next; and [`v5`], the pages of Linux 7.3, to read and write
//! what a kernel does. Both are of one record layout ([`record`]), both are read strictly: a tree
//! is a value or an error that says where and what both sides have. Neither is read by halves.

use super::label::{Compatible, Name};
use crate::Token;

#[cfg(feature = "tools")]
pub mod memory;
pub mod record;
#[cfg(test)]
mod samples;
pub(super) mod show;
pub mod v1;
#[cfg(feature = "tools")]
pub mod v5;

/// All that is handed over.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Handover {
    /// How many live updates led to the kernel that reads this.
    pub number: u64,
    /// In the order of their creation.
    pub sessions: Vec<SessionRecord>,
    /// Objects that files share.
    pub flbs: Vec<FlbRecord>,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRecord {
    /// What it is retrieved by.
    pub name: Name,
    /// In the order in which they were preserved.
    pub files: Vec<FileRecord>,
}

/// One file of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRecord {
    /// The format of `data`, which names the handler.
    pub compatible: Compatible,
    /// What the handler wrote down.
    pub data: u64,
    /// What it is retrieved by.
    pub token: Token,
}

/// One object that files share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlbRecord {
    /// The format of `data`, which names the object.
    pub compatible: Compatible,
    /// What the object wrote down.
    pub data: u64,
    /// How many files depend on it.
    pub count: u64,
}

impl Handover {
    /// How many files there are in all sessions.
    pub fn file_count(&self) -> usize {
        self.sessions.iter().map(|session| session.files.len()).sum()
    }
}
