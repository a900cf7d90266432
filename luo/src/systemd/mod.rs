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
mod store;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;

pub use notify::Notify;
pub use store::{Ask, Count};

use crate::mutex::lock;
use crate::{
    Backend, Error, Incoming, Orchestrator, Outgoing, Preserve, Probe, Retrieve, Room, SessionName,
    Token, memory,
};
use store::{Contents, Held, Inode, Store};

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

/// How long it may take systemd to process them before a switch: nothing depends on it yet.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(10);

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
    /// second call finds no fds. `ask` finds out what systemd says of the store.
    pub fn from_env(ask: Ask) -> Option<Result<Self, Errno>> {
        let capacity = std::env::var("FDSTORE").ok()?.parse().ok().filter(|max| *max > 0)?;
        let notify = Notify::from_env()?;
        Some(notify.and_then(|notify| Self::new(notify, capacity, ask, passed::take()?)))
    }

    /// The names of the sessions whose fds this process was started with, whether it has a store or not. Takes none of them.
    pub fn passed_sessions() -> BTreeSet<SessionName> {
        let names = passed::names_of_this_process();
        names.iter().filter_map(|name| parse(name)).map(|(session, _)| session).collect()
    }

    /// A store for up to `capacity` fds, reached through `notify`, that already holds `fds`.
    pub fn new(
        notify: Notify,
        capacity: usize,
        ask: Ask,
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
            ask,
            contents: Mutex::new(Contents::new(capacity, held)),
            outgoing: Mutex::default(),
            incoming: Mutex::default(),
        };
        Ok(Self { store: Arc::new(store), arrived: Mutex::new(arrived), strangers })
    }

    /// The number of fds that the store can hold (`FileDescriptorStoreMax=`).
    pub fn capacity(&self) -> usize {
        lock(&self.store.contents).capacity()
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
        Room { files: Some(lock(&self.store.contents).free() as u64), copies: None }
    }

    fn create_session(&self, name: &SessionName) -> Result<Outgoing, Error> {
        if !lock(&self.store.outgoing).insert(name.clone()) {
            return Err(Error::Create { session: name.clone(), errno: Errno::EXIST });
        }
        let made = Made {
            name: name.clone(),
            store: Arc::clone(&self.store),
            files: Mutex::default(),
            reserved: Mutex::default(),
        };
        Ok(Outgoing::new(name.clone(), Box::new(made)))
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

    /// Waits until systemd has received all fds, and asks it how many it has. Before anything is preserved, that is
    /// what later answers are compared with.
    fn confirm(&self) -> Result<(), Error> {
        self.store.confirm(CONFIRMED_WITHIN).map_err(|errno| Error::Switch { errno })
    }

    /// Waits until systemd has processed all messages. What it holds is not compared with anything.
    fn probe(&self) -> Option<Probe> {
        let store = Arc::clone(&self.store);
        let unanswered = |errno| Error::Switch { errno };
        Some(Box::new(move || store.notify.barrier(CONFIRMED_WITHIN).map_err(unanswered)))
    }

    /// Waits until systemd has received all fds, then calls `jump`, which ends this process.
    /// systemd decides what starts next: the service again, or the next kernel.
    fn switch(&self, jump: &mut dyn FnMut()) -> Result<(), Error> {
        self.store.confirm(PATIENCE).map_err(|errno| Error::Switch { errno })?;
        jump();
        Ok(())
    }
}

/// An outgoing session.
#[derive(Debug)]
struct Made {
    name: SessionName,
    store: Arc<Store>,
    files: Mutex<Vec<(String, Inode)>>,
    reserved: Mutex<Vec<String>>,
}

impl Preserve for Made {
    fn preserve(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), Errno> {
        let name = fd_name(&self.name, token);
        let inode = self.store.put(&name, fd)?;
        lock(&self.files).push((name, inode));
        Ok(())
    }

    fn reserve(&self, token: Token) -> Result<(), Errno> {
        let name = fd_name(&self.name, token);
        lock(&self.store.contents).reserve(&name)?;
        lock(&self.reserved).push(name);
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
        let mut contents = lock(&self.store.contents);
        lock(&self.reserved).drain(..).for_each(|name| contents.release(&name));
        drop(contents);
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

    /// Stores the files again that files of the same name have replaced.
    fn put_back(&self) -> Result<(), (Token, Errno)> {
        for (token, fd) in &self.files {
            let name = fd_name(&self.name, *token);
            if !lock(&self.store.contents).holds(&name) {
                self.store.put(&name, fd.as_fd()).map_err(|errno| (*token, errno))?;
            }
        }
        Ok(())
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
