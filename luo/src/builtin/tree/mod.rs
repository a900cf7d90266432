//! Handover trees: the sessions that one kernel leaves for the next, as plain values and as bytes.
//!
//! A [`Handover`] has no addresses. It can be encoded in two layouts: [`v1`], an FDT, which the
//! built-in LUO uses between generations; and [`v5`], the pages in memory of Linux 7.3, to read
//! what a kernel wrote and write what it reads. Both use the same records ([`record`]). Both are
//! decoded strictly: decoding returns the whole tree, or an error that names the place, what the
//! tree has and what this build knows.

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

/// The contents of a handover tree.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Handover {
    /// The number of live updates that led to the kernel that reads the tree.
    pub number: u64,
    /// The outgoing sessions, in the order of their creation.
    pub sessions: Vec<SessionRecord>,
    /// The shared objects that files depend on.
    pub flbs: Vec<FlbRecord>,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRecord {
    /// The name of the session.
    pub name: Name,
    /// The files, in the order in which they were preserved.
    pub files: Vec<FileRecord>,
}

/// One file of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRecord {
    /// The format of `data`, which names the handler.
    pub compatible: Compatible,
    /// The file's handle, which only the handler understands.
    pub data: u64,
    /// The token of the file in its session.
    pub token: Token,
}

/// One shared object (see [`flb`](super::flb)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlbRecord {
    /// The format of `data`, which names the object.
    pub compatible: Compatible,
    /// The object's handle, which only the object understands.
    pub data: u64,
    /// The number of files that depend on it.
    pub count: u64,
}

impl Handover {
    /// The number of files in all sessions.
    pub fn file_count(&self) -> usize {
        self.sessions.iter().map(|session| session.files.len()).sum()
    }
}
