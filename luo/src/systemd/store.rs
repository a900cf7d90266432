//! What is in systemd's store, as far as this process knows, and what systemd itself says of it.
//!
//! systemd drops an fd for which it has no room or no memory, and tells nobody but its log. So room is counted here
//! before anything is sent, and systemd is asked afterwards how many fds it has.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::time::Duration;

use rustix::io::Errno;

use super::Notify;
use crate::SessionName;
use crate::builtin::OpenFile;
use crate::mutex::lock;

/// What systemd says of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// The number of fds that it holds.
    pub files: usize,
    /// The number of fds that it can hold (`FileDescriptorStoreMax=`), which an operator may have changed since this
    /// process was started.
    pub most: usize,
}

/// Asks systemd what the store holds. `None` if that cannot be found out: then nothing tells whether systemd has kept
/// what was sent to it.
pub type Ask = fn() -> Option<Count>;

/// The state that the store and its sessions share.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) notify: Notify,
    pub(super) ask: Ask,
    pub(super) contents: Mutex<Contents>,
    /// Names of the open outgoing sessions.
    pub(super) outgoing: Mutex<BTreeSet<SessionName>>,
    /// Names of the open incoming sessions.
    pub(super) incoming: Mutex<BTreeSet<SessionName>>,
}

/// The fds in systemd's store, as far as this process knows, and its room.
#[derive(Debug)]
pub(super) struct Contents {
    capacity: usize,
    held: Vec<Held>,
    /// The names of files that are to come. No other file takes their room.
    reserved: BTreeSet<String>,
    /// Fds in the store that this process does not know of: another process of the service has sent them. Negative if
    /// systemd has fewer than this process knows of.
    unknown: isize,
}

/// One fd in systemd's store.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) name: String,
    pub(super) inode: Inode,
}

/// The identity of the file behind an fd. systemd does not accept a second fd of a file that it
/// holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inode {
    device: u64,
    number: u64,
}

impl Inode {
    pub(super) fn of(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(fd)?;
        Ok(Self { device: stat.st_dev, number: stat.st_ino })
    }
}

impl Contents {
    pub(super) fn new(capacity: usize, held: Vec<Held>) -> Self {
        Self { capacity, held, reserved: BTreeSet::new(), unknown: 0 }
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// The number of files for which there is room, beside those that are reserved.
    pub(super) fn free(&self) -> usize {
        let taken = self.held.len() + self.reserved.len();
        self.capacity.saturating_sub(taken.saturating_add_signed(self.unknown))
    }

    /// Keeps room for a file of this name. ENOSPC: there is none.
    pub(super) fn reserve(&mut self, name: &str) -> Result<(), Errno> {
        if self.holds(name) || self.reserved.contains(name) {
            return Ok(());
        }
        if self.free() == 0 {
            return Err(Errno::NOSPC);
        }
        self.reserved.insert(name.to_owned());
        Ok(())
    }

    /// Keeps room for this file no more.
    pub(super) fn release(&mut self, name: &str) {
        self.reserved.remove(name);
    }

    /// Whether it has a file of this name.
    pub(super) fn holds(&self, name: &str) -> bool {
        self.held.iter().any(|held| held.name == name)
    }

    /// Compares what systemd holds with what this process knows. EXFULL: systemd has less than was sent to it since the
    /// last comparison `from_new`.
    fn compare(&mut self, count: Count, from_new: bool) -> Result<(), Errno> {
        let unknown = count.files as isize - self.held.len() as isize;
        self.capacity = count.most;
        match unknown < self.unknown && !from_new {
            true => Err(Errno::XFULL),
            false => {
                self.unknown = unknown;
                Ok(())
            }
        }
    }
}

impl Store {
    /// Stores an fd under `name`, and replaces a file of that name. ENOENT: the fd is not a memfd.
    /// EBUSY: the store has the file under another name. ENOSPC: the store is full.
    pub(super) fn put(&self, name: &str, fd: BorrowedFd<'_>) -> Result<Inode, Errno> {
        let file = OpenFile::of(fd)?.ok_or(Errno::BADF)?;
        if !file.is_memfd() {
            // systemd would accept the fd, and lose it at the kexec.
            return Err(Errno::NOENT);
        }
        let inode = Inode::of(fd)?;
        let mut contents = lock(&self.contents);
        if contents.held.iter().any(|other| other.inode == inode && other.name != name) {
            return Err(Errno::BUSY);
        }
        // The room of the file that it replaces, or that was reserved for it, is its own.
        let (replaces, is_reserved) = (contents.holds(name), contents.reserved.contains(name));
        if !replaces && !is_reserved && contents.free() == 0 {
            return Err(Errno::NOSPC);
        }
        if replaces {
            self.remove_from(&mut contents, name)?;
        }
        // FDPOLL=0: memfds never hang up, so systemd need not watch the fd.
        self.notify.send_fd(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), fd)?;
        contents.release(name);
        contents.held.push(Held { name: name.to_owned(), inode });
        Ok(inode)
    }

    /// Removes the file `inode` from the store if it is still the one under `name`.
    pub(super) fn remove(&self, name: &str, inode: Inode) -> Result<(), Errno> {
        let mut contents = lock(&self.contents);
        match contents.held.iter().any(|other| other.name == name && other.inode == inode) {
            true => self.remove_from(&mut contents, name),
            false => Ok(()),
        }
    }

    fn remove_from(&self, contents: &mut Contents, name: &str) -> Result<(), Errno> {
        self.notify.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"))?;
        contents.held.retain(|other| other.name != name);
        Ok(())
    }

    /// Waits until systemd has processed all messages, and compares what it has with what was sent. ETIMEDOUT: systemd
    /// did not do so in time. EXFULL: it has less.
    pub(super) fn confirm(&self, patience: Duration) -> Result<(), Errno> {
        self.notify.barrier(patience)?;
        let Some(count) = (self.ask)() else { return Ok(()) };
        let from_new = lock(&self.outgoing).is_empty();
        lock(&self.contents).compare(count, from_new)
    }
}
