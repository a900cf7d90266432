//! The files of a pool, and when each can be removed.
//!
//! ```text
//!  created as memory, or as the copy of a preserved memfd --> files/ID
//!  owned:   preserved in an outgoing or incoming session. Only that session removes it.
//!  used:    an fd or a mapping of it exists (see `directory`). `collect` does not remove it.
//!  neither: a leftover of a VM, a session or a generation that is gone. `collect` removes it.
//! ```
//!
//! A file in the pool gets a new number when it is preserved, unpreserved, or taken. So a
//! number in a tree means the file as that tree preserved it, and a stale copy of a tree finds no
//! files. The inode and the size are checked as well. Reading and writing files is left to
//! [`super::handler`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
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

/// How a file is preserved in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Preservation {
    /// A file of the pool, which stays where it is.
    File,
    /// A small memfd, which is copied into the pool.
    Copy,
}

impl Preservation {
    /// Both kinds, in the order in which their handlers are registered.
    pub(super) const ALL: [Self; 2] = [Self::File, Self::Copy];

    /// The name of the format of the handles, which are numbers of files.
    pub(super) fn format(self) -> &'static str {
        match self {
            Self::File => "file-pool-v1",
            Self::Copy => "memfd-pool-v1",
        }
    }

    /// Returns the kind with this format; `None` if it is no format of the pool.
    pub(super) fn of(format: &Compatible) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.format().as_bytes() == format.as_bytes())
    }
}

/// The files of this process's pool. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct PoolFiles(Arc<Mutex<State>>);

#[derive(Debug)]
pub(super) struct State {
    pub(super) directory: Directory,
    /// PoolFiles of sessions, by number.
    pub(super) owned: BTreeMap<u64, Entry>,
    /// The copies of preserved memfds, open for writing, by number.
    pub(super) copies: BTreeMap<u64, OwnedFd>,
    /// Numbers of files that were looked up before, by inode.
    numbers: HashMap<u64, u64>,
    incoming: Incoming,
}

/// The incoming sessions and the marks on disk of those that were taken.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// The digest of their tree, which is in the names of the marks.
    pub(super) digest: u32,
    /// The index in the tree of the session that has a file, by the file's number.
    pub(super) sessions: BTreeMap<u64, usize>,
    /// The sessions with a mark.
    pub(super) taken: BTreeSet<usize>,
    /// See [`Options::taken_when_finished`](super::Options::taken_when_finished).
    pub(super) taken_when_finished: bool,
}

impl PoolFiles {
    /// `owned` are the files of the incoming sessions.
    pub(super) fn new(
        directory: Directory,
        owned: BTreeMap<u64, Entry>,
        incoming: Incoming,
    ) -> Self {
        let (copies, numbers) = (BTreeMap::new(), HashMap::new());
        Self(Arc::new(Mutex::new(State { directory, owned, copies, numbers, incoming })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

impl State {
    /// Creates memory: a file of `bytes` bytes, all allocated and zero. Removes leftovers first if they take the room
    /// that is needed, and only then: that opens every file of the pool, and a VM has many.
    ///
    /// All pages are allocated and written now, not at the first access. If the filesystem could
    /// not allocate a page at the first access, the guest would get a SIGBUS. A page that it did
    /// allocate then would have to reach the filesystem's journal in the blackout.
    ///
    /// EINVAL if `bytes` is 0. ENOSPC if the pool has not enough room beside its reserve.
    pub(super) fn create_memory(&mut self, bytes: u64) -> Result<OwnedFd, Errno> {
        if !self.directory.has_room(bytes)? {
            self.collect();
        }
        self.create_memory_only(bytes)
    }

    /// The same, without removing leftovers: for a pool whose sessions are not known.
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

    /// Creates the file for the copy of a memfd. Removes leftovers if there is no room without that.
    pub(super) fn create_copy(&mut self, bytes: u64) -> Result<(u64, OwnedFd), Errno> {
        match self.directory.create(bytes) {
            Err(Errno::NOSPC) => {
                self.collect();
                self.directory.create(bytes)
            }
            created => created,
        }
    }

    /// Removes files that no session owns and that are not in use. Ignores errors: the next call
    /// tries again.
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

    /// Returns the number of the file with this inode; `None` if it is no file of the pool.
    pub(super) fn number_of(&mut self, inode: Inode) -> Option<u64> {
        if inode.device != self.directory.device {
            return None;
        }
        if let Some(id) = self.numbers.get(&inode.number) {
            return Some(*id);
        }
        // An earlier host of this pool may have made the file.
        let found = self.directory.list().ok()?.into_iter().find(|(_, i)| *i == inode.number);
        let (id, _) = found?;
        self.numbers.insert(inode.number, id);
        Some(id)
    }

    /// Renames a file to a new random number. Returns the number.
    pub(super) fn renumber(&mut self, id: u64, inode: Inode) -> Result<u64, Errno> {
        let new = self.directory.renumber(id)?;
        self.numbers.insert(inode.number, new);
        Ok(new)
    }

    /// Whether guest memory can be given out again until its session is finished.
    pub(super) fn gives_again(&self) -> bool {
        self.incoming.taken_when_finished
    }

    /// Marks the session of an incoming file on disk as taken: no later host gets it. `Ok` for a file of no incoming
    /// session, and if the session is marked already.
    pub(super) fn take(&mut self, id: u64) -> Result<(), Errno> {
        let Incoming { digest, sessions, taken, .. } = &mut self.incoming;
        let Some(session) = sessions.get(&id).copied() else { return Ok(()) };
        if !taken.contains(&session) {
            self.directory.mark_taken(*digest, session)?;
            taken.insert(session);
        }
        Ok(())
    }

    /// Opens an owned file. ESTALE if it is missing, or another file is in its place.
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

    /// Removes an owned file. Ignores errors: `collect` removes the file later.
    pub(super) fn discard(&mut self, id: u64) {
        if let Some(entry) = self.owned.remove(&id) {
            let _ = self.directory.remove(id);
            self.numbers.remove(&entry.inode);
        }
    }

    /// Waits until the copies of all memfds are on disk. The first call commits the filesystem's journal, and with it
    /// what belongs to the others.
    pub(super) fn sync_copies(&self) -> Result<(), Errno> {
        self.copies.values().try_for_each(directory::sync)
    }

    /// Returns the pool's tree for these outgoing sessions, and the ticket of their switch.
    pub(super) fn tree(&self, luo: Handover, ticket: Ticket) -> Tree {
        let of_session = |id: &u64| self.owned.get(id).map(|entry| (*id, *entry));
        let files = pool_files(&luo.sessions).filter_map(|file| of_session(&file.data)).collect();
        Tree { pool: self.directory.identity, ticket, files, luo }
    }
}
