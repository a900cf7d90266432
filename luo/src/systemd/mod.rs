//! Sessions in the fd store of a systemd service.
//!
//! systemd keeps fds for a service on request, and passes them back when it starts the service
//! again: after a restart and, from version 261 on, after a kexec. For a kexec, systemd preserves
//! every fd of the store in its own LUO session, immediately before the kexec, and PID 1 of the
//! next kernel retrieves the fds. So a service does not need the device. Here a session exists only
//! in the names of its files in the store:
//!
//! ```text
//!   create_session    sends nothing                      FDNAME of token 3 in session `web`: web/3
//!   preserve          FDSTORE=1 with the fd beside it
//!   switch            BARRIER=1: systemd has all fds
//!   retrieve_session  takes the fds of LISTEN_FDS that belong to the session
//!   finish, drop      FDSTOREREMOVE=1
//! ```
//!
//! Differences from the kernel's sessions: a session that is neither finished nor dropped outlives
//! its process and the next switch, so leaking one (`mem::forget`) keeps it for the next process. A
//! file replaces an earlier file of the same name. If systemd fails to preserve a file it only logs
//! the failure, and the file is missing in the next kernel. `docs/systemd.md` has the facts and
//! their sources.

mod notify;
mod passed;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;

pub use notify::Notify;

use crate::builtin::OpenFile;
use crate::mutex::lock;
use crate::{
    Backend, Error, Incoming, Orchestrator, Outgoing, Preserve, Retrieve, Room, SessionName, Token,
    memory,
};

/// The first version of systemd whose fd stores survive a kexec.
pub const FIRST_VERSION: u32 = 261;

/// The environment variables that a service manager sets for its service. Children of the service
/// must not inherit them.
pub const VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "FDSTORE", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID"];

/// Those of [`VARIABLES`] that describe the fds passed to this process at its start. They hold only
/// for the program that systemd started: a program that this process executes must not see them.
pub const PASSED: [&str; 4] = ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID"];

/// How long a switch waits until systemd has processed all messages.
const PATIENCE: Duration = Duration::from_secs(60);

/// The fd store of this service.
#[derive(Debug)]
pub struct FdStore {
    store: Arc<Store>,
    /// Incoming sessions that were not retrieved, with their files.
    arrived: Mutex<BTreeMap<SessionName, Vec<(Token, OwnedFd)>>>,
    /// See [`FdStore::strangers`].
    strangers: Vec<String>,
}

impl FdStore {
    /// Returns the store described by the environment (`FDSTORE`, `NOTIFY_SOCKET`), with the fds
    /// passed to this process. `None` if the service has no fd store. Call this once, early: a
    /// second call finds no fds.
    pub fn from_env() -> Option<Result<Self, Errno>> {
        let capacity = std::env::var("FDSTORE").ok()?.parse().ok().filter(|max| *max > 0)?;
        let notify = Notify::from_env()?;
        Some(notify.and_then(|notify| Self::new(notify, capacity, passed::take()?)))
    }

    /// A store for up to `capacity` fds, reached through `notify`, that already holds `fds`.
    pub fn new(
        notify: Notify,
        capacity: usize,
        fds: Vec<(String, OwnedFd)>,
    ) -> Result<Self, Errno> {
        let mut held = Vec::new();
        let mut arrived = BTreeMap::<_, Vec<_>>::new();
        let mut strangers = Vec::new();
        for (name, fd) in fds {
            held.push(Held { inode: Inode::of(fd.as_fd())?, name: name.clone() });
            match parse(&name) {
                Some((session, token)) => arrived.entry(session).or_default().push((token, fd)),
                None => strangers.push(name),
            }
        }
        let store = Store {
            notify,
            capacity,
            held: Mutex::new(held),
            outgoing: Mutex::default(),
            incoming: Mutex::default(),
        };
        Ok(Self { store: Arc::new(store), arrived: Mutex::new(arrived), strangers })
    }

    /// The number of fds that the store can hold (`FileDescriptorStoreMax=`).
    pub fn capacity(&self) -> usize {
        self.store.capacity
    }

    /// The names of the incoming sessions that were not retrieved.
    pub fn waiting(&self) -> Vec<SessionName> {
        lock(&self.arrived).keys().cloned().collect()
    }

    /// The names of passed fds that belong to no session. This process closed its copies; the fds
    /// stay in the store.
    pub fn strangers(&self) -> &[String] {
        &self.strangers
    }
}

impl Orchestrator for FdStore {
    fn backend(&self) -> Backend {
        Backend::Systemd
    }

    fn ticket(&self) -> Option<crate::Ticket> {
        None
    }

    fn room(&self) -> Room {
        let held = lock(&self.store.held).len();
        Room { files: Some(self.store.capacity.saturating_sub(held) as u64), copies: None }
    }

    fn create_session(&self, name: &SessionName) -> Result<Outgoing, Error> {
        if !lock(&self.store.outgoing).insert(name.clone()) {
            return Err(Error::Create { session: name.clone(), errno: Errno::EXIST });
        }
        let (store, files) = (Arc::clone(&self.store), Mutex::default());
        Ok(Outgoing::new(name.clone(), Box::new(Made { name: name.clone(), store, files })))
    }

    fn retrieve_session(&self, name: &SessionName) -> Result<Incoming, Error> {
        let error = |errno| Error::RetrieveSession { session: name.clone(), errno };
        let mut incoming = lock(&self.store.incoming);
        if incoming.contains(name) {
            return Err(error(Errno::INVAL));
        }
        let files = lock(&self.arrived).remove(name).ok_or_else(|| error(Errno::NOENT))?;
        incoming.insert(name.clone());
        let taken = Taken { name: name.clone(), store: Arc::clone(&self.store), files };
        Ok(Incoming::new(name.clone(), Box::new(taken)))
    }

    fn create_memory(&self, name: &str, len: u64) -> Result<OwnedFd, Error> {
        memory::memfd(name, len)
    }

    /// Waits until systemd has received all fds, then calls `jump`, which ends this process.
    /// systemd decides what starts next: the service again, or the next kernel.
    fn switch(&self, jump: &mut dyn FnMut()) -> Result<(), Error> {
        self.store.notify.barrier(PATIENCE).map_err(|errno| Error::Switch { errno })?;
        jump();
        Ok(())
    }
}

/// The state that the store and its sessions share.
#[derive(Debug)]
struct Store {
    notify: Notify,
    capacity: usize,
    /// The fds in systemd's store, as far as this process knows.
    held: Mutex<Vec<Held>>,
    /// Names of the open outgoing sessions.
    outgoing: Mutex<BTreeSet<SessionName>>,
    /// Names of the open incoming sessions.
    incoming: Mutex<BTreeSet<SessionName>>,
}

/// One fd in systemd's store.
#[derive(Debug)]
struct Held {
    name: String,
    inode: Inode,
}

/// The identity of the file behind an fd. systemd does not accept a second fd of a file that it
/// holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Inode {
    device: u64,
    number: u64,
}

impl Inode {
    fn of(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(fd)?;
        Ok(Self { device: stat.st_dev, number: stat.st_ino })
    }
}

impl Store {
    /// Stores an fd under `name`, and replaces a file of that name. ENOENT: the fd is not a memfd.
    /// EBUSY: the store has the file under another name. ENOSPC: the store is full.
    fn put(&self, name: &str, fd: BorrowedFd<'_>) -> Result<Inode, Errno> {
        let file = OpenFile::of(fd)?.ok_or(Errno::BADF)?;
        if !file.is_memfd() {
            // systemd would accept the fd, and lose it at the kexec.
            return Err(Errno::NOENT);
        }
        let inode = Inode::of(fd)?;
        let mut held = lock(&self.held);
        if held.iter().any(|other| other.inode == inode && other.name != name) {
            return Err(Errno::BUSY);
        }
        let others = held.iter().filter(|other| other.name != name).count();
        if others >= self.capacity {
            return Err(Errno::NOSPC);
        }
        if others < held.len() {
            self.remove_from(&mut held, name)?;
        }
        // FDPOLL=0: memfds never hang up, so systemd need not watch the fd.
        self.notify.send_fd(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), fd)?;
        held.push(Held { name: name.to_owned(), inode });
        Ok(inode)
    }

    /// Removes the file `inode` from the store if it is still the one under `name`.
    fn remove(&self, name: &str, inode: Inode) -> Result<(), Errno> {
        let mut held = lock(&self.held);
        match held.iter().any(|other| other.name == name && other.inode == inode) {
            true => self.remove_from(&mut held, name),
            false => Ok(()),
        }
    }

    fn remove_from(&self, held: &mut Vec<Held>, name: &str) -> Result<(), Errno> {
        self.notify.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"))?;
        held.retain(|other| other.name != name);
        Ok(())
    }
}

/// An outgoing session.
#[derive(Debug)]
struct Made {
    name: SessionName,
    store: Arc<Store>,
    files: Mutex<Vec<(String, Inode)>>,
}

impl Preserve for Made {
    fn preserve(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), Errno> {
        let name = fd_name(&self.name, token);
        let inode = self.store.put(&name, fd)?;
        lock(&self.files).push((name, inode));
        Ok(())
    }

    /// Returns the socket to systemd, because no fd stands for the session. Closing copies of it
    /// ends nothing.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.store.notify.as_fd()
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for (name, inode) in lock(&self.files).drain(..) {
            // If this fails, the file stays in the store until another file of its name replaces
            // it.
            let _ = self.store.remove(&name, inode);
        }
        lock(&self.store.outgoing).remove(&self.name);
    }
}

/// An incoming session.
#[derive(Debug)]
struct Taken {
    name: SessionName,
    store: Arc<Store>,
    files: Vec<(Token, OwnedFd)>,
}

impl Retrieve for Taken {
    fn retrieve(&self, token: Token) -> Result<OwnedFd, Errno> {
        let mut found = self.files.iter().filter(|(key, _)| *key == token);
        let (_, fd) = found.next().ok_or(Errno::NOENT)?;
        match found.next() {
            // Nothing tells which of the two files is the right one.
            Some(_) => Err(Errno::NOTUNIQ),
            None => rustix::io::fcntl_dupfd_cloexec(fd, 0),
        }
    }

    /// Which of two files of one name is the right one, no attempt will tell.
    fn keeps(&self, _: Token) -> bool {
        false
    }

    fn finish(&self) -> Result<(), Errno> {
        self.files.iter().try_for_each(|(token, fd)| {
            self.store.remove(&fd_name(&self.name, *token), Inode::of(fd.as_fd())?)
        })
    }

    /// See [`Made::as_fd`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.store.notify.as_fd()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        // If this fails, files stay in the store and are passed to the next process, which can try
        // again.
        let _ = self.finish();
        lock(&self.store.incoming).remove(&self.name);
    }
}

/// The name of a file in the store. systemd's names must not contain `:`, names of sessions no `/`,
/// so each `:` of the session's name becomes a `/`.
fn fd_name(session: &SessionName, token: Token) -> String {
    format!("{}/{}", session.to_string().replace(':', "/"), token.0)
}

/// The session and token of a file in the store. `None` if [`fd_name`] does not give this name.
fn parse(name: &str) -> Option<(SessionName, Token)> {
    let (session, token) = name.rsplit_once('/')?;
    let session = SessionName::new(session.replace('/', ":")).ok()?;
    let token = Token(token.parse().ok()?);
    // Refuses other spellings of the same token, such as `web/01`.
    (fd_name(&session, token) == name).then_some((session, token))
}
