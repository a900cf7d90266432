//! The files of a pool, and who may remove one.
//!
//! ```text
//!  create, or a memfd is preserved --> files/ID <-- retrieve, renumber
//!  owned:   in a session, of either side. Nothing removes it but that session.
//!  used:    somebody has its fd or mapping (see `directory`). Stays, under any number.
//!  neither: a leftover of a VM, a session or a generation that is gone. Removed by `collect`.
//! ```
//!
//! A file gets a new number each time that it is preserved. So a number in a tree means a file as it
//! was preserved then, and a tree that was kept back finds nothing. The inode and the size are
//! checked as well. What is done with which file is left to [`super::handler`].

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;

use super::super::Compatible;
use super::super::open_file::{Inode, Look};
use super::super::tree::Handover;
use super::directory::{self, Directory};
use super::record::{Entry, Tree, pool_files};
use crate::Ticket;
use crate::mutex::lock;

/// What a preserved file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// It lies in the pool and stays there.
    File,
    /// A small memfd, of which the pool has a copy.
    Copy,
}

impl Kind {
    /// Both, in the order in which they are asked.
    pub(super) const ALL: [Self; 2] = [Self::File, Self::Copy];

    /// The format of its handles, which are numbers of files.
    pub(super) fn format(self) -> &'static str {
        match self {
            Self::File => "file-pool-v1",
            Self::Copy => "memfd-pool-v1",
        }
    }

    /// The kind with this format, if it is one of the pool's.
    pub(super) fn of(format: &Compatible) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.format().as_bytes() == format.as_bytes())
    }
}

/// The files of this process's pool. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Files(Arc<Mutex<State>>);

#[derive(Debug)]
pub(super) struct State {
    pub(super) directory: Directory,
    /// Files of sessions, by number.
    pub(super) owned: BTreeMap<u64, Entry>,
    /// Where files that were seen are: by inode.
    numbers: HashMap<u64, u64>,
}

impl Files {
    /// `owned` are the files of the sessions that came in.
    pub(super) fn new(directory: Directory, owned: BTreeMap<u64, Entry>) -> Self {
        let numbers = HashMap::new();
        Self(Arc::new(Mutex::new(State { directory, owned, numbers })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

impl State {
    /// Memory: a file of `bytes` bytes whose every byte is there, and zero.
    ///
    /// All of it is taken and written now, and nothing is left to the first touch. A page that the
    /// filesystem could not give then would be a SIGBUS in a guest; and a page that it gave then would
    /// have to reach its journal before the next kernel, in the blackout.
    pub(super) fn create_memory(&mut self, bytes: u64) -> Result<OwnedFd, Errno> {
        self.collect();
        self.create_memory_only(bytes)
    }

    /// The same without removing anything, for a pool whose sessions are not known.
    pub(super) fn create_memory_only(&mut self, bytes: u64) -> Result<OwnedFd, Errno> {
        if bytes == 0 {
            return Err(Errno::INVAL);
        }
        if !self.directory.has_room(bytes)? {
            return Err(Errno::NOSPC);
        }
        let (id, fd) = self.directory.create(bytes)?;
        let ready = directory::zero(&fd, bytes).and_then(|()| Look::at(&fd));
        match ready {
            Ok(look) => {
                self.numbers.insert(look.inode.number, id);
                Ok(fd)
            }
            Err(errno) => {
                let _ = self.directory.remove(id);
                Err(errno)
            }
        }
    }

    /// Removes files that no session owns and nobody has. Best effort: what stays is removed later.
    pub(super) fn collect(&mut self) {
        for (id, inode) in self.directory.list().unwrap_or_default() {
            if self.owned.contains_key(&id) || self.directory.is_in_use(id) {
                continue;
            }
            if self.directory.remove(id).is_ok() {
                self.numbers.remove(&inode);
            }
        }
    }

    /// The number of a file in the pool, if it is one.
    pub(super) fn number_of(&mut self, inode: Inode) -> Option<u64> {
        if inode.device != self.directory.device {
            return None;
        }
        if let Some(id) = self.numbers.get(&inode.number) {
            return Some(*id);
        }
        // Made by the host that was before this one, perhaps.
        let found = self.directory.list().ok()?.into_iter().find(|(_, i)| *i == inode.number);
        let (id, _) = found?;
        self.numbers.insert(inode.number, id);
        Some(id)
    }

    /// Gives a file another number.
    pub(super) fn renumber(&mut self, id: u64, inode: Inode) -> Result<u64, Errno> {
        let new = self.directory.renumber(id)?;
        self.numbers.insert(inode.number, new);
        Ok(new)
    }

    /// Opens an owned file. ESTALE: what is there is not it.
    pub(super) fn open_owned(&self, id: u64) -> Result<(OwnedFd, Entry), Errno> {
        let entry = *self.owned.get(&id).ok_or(Errno::STALE)?;
        let fd = match self.directory.open_file(id) {
            Err(Errno::NOENT | Errno::LOOP | Errno::ISDIR) => return Err(Errno::STALE),
            fd => fd?,
        };
        let Look { inode, is_regular, bytes, .. } = Look::at(&fd)?;
        if !is_regular || inode.number != entry.inode || bytes != entry.bytes {
            return Err(Errno::STALE);
        }
        Ok((fd, entry))
    }

    /// Removes an owned file. Best effort: what stays is a leftover.
    pub(super) fn discard(&mut self, id: u64) {
        if let Some(entry) = self.owned.remove(&id) {
            let _ = self.directory.remove(id);
            self.numbers.remove(&entry.inode);
        }
    }

    /// The pool's tree for these sessions, which are handed over by the switch with this ticket.
    pub(super) fn tree(&self, luo: Handover, ticket: Ticket) -> Tree {
        let of_session = |id: &u64| self.owned.get(id).map(|entry| (*id, *entry));
        let files = pool_files(&luo).filter_map(|file| of_session(&file.data)).collect();
        Tree { pool: self.directory.identity, ticket, files, luo }
    }
}
