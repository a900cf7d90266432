//! Sessions in the fd store of a systemd service.
//!
//! systemd keeps fds for a service that asks it to, and hands them back when it starts the service
//! again: after a restart, and from version 261 on after a kexec, too. Then it is systemd that
//! preserves every fd of the store in a LUO session of its own, immediately before the kexec, and
//! PID 1 that retrieves them. So a service needs no device, and here a session is nothing but the
//! names of its files in the store:
//!
//! ```text
//!   create_session    nothing                            FDNAME of token 3 in session `web`: web/3
//!   preserve          FDSTORE=1 with the fd beside it
//!   switch            BARRIER=1: systemd has them all
//!   retrieve_session  the fds of LISTEN_FDS whose name says so
//!   finish, drop      FDSTOREREMOVE=1
//! ```
//!
//! What differs from the kernel's sessions: a session that is neither finished nor dropped outlasts
//! its process, and the next switch as well; whoever forgets one keeps it for the next process. Two
//! outgoing files under one name are one, the later. What systemd fails to preserve it only logs: the
//! file is then missing in the next kernel. `docs/systemd.md` has the facts and their sources.

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
    Backend, Error, Incoming, Orchestrator, Outgoing, Preserve, Retrieve, SessionName, Token,
    memory,
};

/// The first systemd whose fd stores survive a kexec.
pub const FIRST_VERSION: u32 = 261;

/// What a service manager tells its service in the environment. None of it is meant for the
/// service's children.
pub const VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "FDSTORE", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID"];

/// Those of them that speak of fds which this process was started with. They are true once: another
/// program in this process must not find them.
pub const PASSED: [&str; 4] = ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID"];

/// How long systemd may take to look at what it was sent.
const PATIENCE: Duration = Duration::from_secs(60);

/// The fd store of this service.
#[derive(Debug)]
pub struct FdStore {
    store: Arc<Store>,
    arrived: Mutex<BTreeMap<SessionName, Vec<(Token, OwnedFd)>>>,
    strangers: Vec<String>,
}

impl FdStore {
    /// The store that the environment speaks of, and what is in it. `None`: there is none. A process
    /// takes it once, early; a second one would find it empty.
    pub fn from_env() -> Option<Result<Self, Errno>> {
        let capacity = std::env::var("FDSTORE").ok()?.parse().ok().filter(|max| *max > 0)?;
        let notify = Notify::from_env()?;
        Some(notify.and_then(|notify| Self::new(notify, capacity, passed::take()?)))
    }

    /// The store of `capacity` fds behind `notify`, which holds `fds`.
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

    /// How many fds the store takes (`FileDescriptorStoreMax=`).
    pub fn capacity(&self) -> usize {
        self.store.capacity
    }

    /// The sessions that came in and that nobody has taken.
    pub fn waiting(&self) -> Vec<SessionName> {
        lock(&self.arrived).keys().cloned().collect()
    }

    /// Names of fds that came in and belong to no session. They are closed here and stay in the
    /// store.
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

    /// Waits until systemd has taken everything. It is not systemd that is left here: `jump` ends
    /// this process, and what comes next is for systemd to decide.
    fn switch(&self, jump: &mut dyn FnMut()) -> Result<(), Error> {
        self.store.notify.barrier(PATIENCE).map_err(|errno| Error::Switch { errno })?;
        jump();
        Ok(())
    }
}

/// What is known of the store.
#[derive(Debug)]
struct Store {
    notify: Notify,
    capacity: usize,
    held: Mutex<Vec<Held>>,
    /// Sessions of this process that are open.
    outgoing: Mutex<BTreeSet<SessionName>>,
    incoming: Mutex<BTreeSet<SessionName>>,
}

/// One fd in the store.
#[derive(Debug)]
struct Held {
    name: String,
    inode: Inode,
}

/// Which file an fd is of. systemd takes no second fd of a file that it holds.
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
    /// Puts an fd in under `name`, in the place of what was there.
    fn put(&self, name: &str, fd: BorrowedFd<'_>) -> Result<Inode, Errno> {
        let file = OpenFile::of(fd)?.ok_or(Errno::BADF)?;
        if !file.is_memfd() {
            // systemd would take it, and lose it at the kexec.
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
        // Memfds never hang up, so that there is nothing to watch.
        self.notify.send_fd(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), fd)?;
        held.push(Held { name: name.to_owned(), inode });
        Ok(inode)
    }

    /// Takes the file out that is there under `name`, unless another took its place.
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

    /// There is no such fd. This is the one by which the store is reached; closing a copy of it ends
    /// nothing.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.store.notify.as_fd()
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for (name, inode) in lock(&self.files).drain(..) {
            // What stays in the store is replaced by the next file of that name.
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
            // Nothing says which of them is the right one.
            Some(_) => Err(Errno::NOTUNIQ),
            None => rustix::io::fcntl_dupfd_cloexec(fd, 0),
        }
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
        // What stays in the store comes back, to be dropped again.
        let _ = self.finish();
        lock(&self.store.incoming).remove(&self.name);
    }
}

/// The name of a file in the store. systemd takes no `:` in it, sessions no `/`.
fn fd_name(session: &SessionName, token: Token) -> String {
    format!("{}/{}", session.to_string().replace(':', "/"), token.0)
}

fn parse(name: &str) -> Option<(SessionName, Token)> {
    let (session, token) = name.rsplit_once('/')?;
    let session = SessionName::new(session.replace('/', ":")).ok()?;
    let token = Token(token.parse().ok()?);
    // One way to write each.
    (fd_name(&session, token) == name).then_some((session, token))
}
