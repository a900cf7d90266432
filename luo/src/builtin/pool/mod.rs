//! The built-in LUO as a pool: files in RAM that a kexec does not touch, on any stock kernel.
//!
//! A pool is a directory on a filesystem with DAX, in RAM that the kernel does not use otherwise
//! (`memmap=1G!1G` on the command line gives `/dev/pmem0`; ext4 on it is mounted with
//! `dax=always`). The pages of a file there *are* its memory. The next kernel, booted with the same
//! `memmap=`, finds the same files in the same pages. So guest memory from [`Pool::create_memory`]
//! is preserved by recording its file, and is never copied. Memfds with documents are copied into
//! the pool.
//!
//! ```text
//!   start:   handover --> incoming --> sessions          switch:  sessions --> handover --> jump
//!              |  no tree: a cold start                                            |
//!              |  bad tree: live update is disabled, and nothing is removed        v
//!              v                                            jump returns: handover is removed,
//!            leftovers of crashed generations are removed   nothing has changed
//! ```
//!
//! A crash at any moment leaves the tree of the previous generation, or that of the next, complete.
//! A host uses a tree only if the tree has the [`Ticket`] that the host was given ([`Expect`]
//! allows exceptions). A session whose guest memory was given out, or that was finished, is taken: it
//! is not given out again, also not to a restarted host, because its guest may have run since. (With
//! [`Options::taken_when_finished`], only if it was finished.) To
//! look at a session and its documents takes nothing, and whatever fails before the mark of a
//! session is on disk can be tried again. As in the kernel, sessions that nobody retrieves stay until
//! the next switch.
//!
//! For huge pages, the extents of a file and its mapping must be aligned to 2 MiB. So memory is
//! allocated in one piece; ext4 aligns it if made with `-E stride=512,stripe_width=512`.

mod directory;
mod fault;
mod files;
mod handler;
mod number;
pub(crate) mod record;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::in_process::{InProcess, NotHandedOver};
use super::tree::{SessionRecord, v1};
use super::{Compatible, Disabled, HandOverError, Luo, OpenFile, Parameters, SessionId};
use crate::{
    Backend, Error, FromFdError, Incoming, Orchestrator, Outgoing, Room, Session, SessionName,
    Ticket,
};
use directory::{Directory, Place};
use files::{PoolFiles, Preservation};
pub use handler::MOST_COPIED;
use handler::{CopyHandler, FileHandler};
pub use record::Error as TreeError;
use record::Tree;

/// Which tree a pool takes its incoming sessions from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Expect {
    /// The tree of the previous host, whatever its ticket. For callers that know by other means
    /// that no other kernel or host ran since.
    #[default]
    Anything,
    /// The tree with this ticket. If the pool does not have it, live update is disabled, and
    /// nothing in the pool is removed.
    Switch(Ticket),
    /// The tree with this ticket, if it was written: a host of this kernel began the switch, and may have ended before
    /// that. Without it the same as [`Nothing`](Self::Nothing). A tree that cannot be read may be the one, so it disables
    /// live update.
    Begun(Ticket),
    /// No tree, because no switch started this kernel. Trees in the pool are of another boot, and
    /// are removed, valid or not.
    Nothing,
}

/// Requirements and settings of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Least size of its filesystem in bytes: as much as all VMs need.
    pub least_bytes: u64,
    /// Bytes that [`Pool::create_memory`] leaves free, for documents and trees.
    pub reserve_bytes: u64,
    /// The tree to take incoming sessions from.
    pub expect: Expect,
    /// Accepts a filesystem without DAX. For tests only: its memory does not survive a kexec, and a
    /// guest's last writes may never reach the disk.
    pub without_dax: bool,
    /// Marks an incoming session as taken when it is finished, not when guest memory of it is given out. For hosts that
    /// finish a session before its guest runs: one that is killed before that leaves the session to the next host.
    pub taken_when_finished: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            least_bytes: 0,
            reserve_bytes: 32 << 20,
            expect: Expect::Anything,
            without_dax: false,
            taken_when_finished: false,
        }
    }
}

/// Why a directory cannot be used as a pool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The path is not a directory.
    #[error("the pool {} is not a directory", path.display())]
    NotADirectory {
        /// The pool.
        path: PathBuf,
    },
    /// Another host uses it.
    #[error("the pool {} is in use by another host", path.display())]
    InUse {
        /// The pool.
        path: PathBuf,
    },
    /// Its filesystem is too small.
    #[error("the pool {} has {found} bytes, {least} are needed: boot with a larger `memmap=`", path.display())]
    TooSmall {
        /// The pool.
        path: PathBuf,
        /// Bytes of its filesystem.
        found: u64,
        /// Bytes that are needed.
        least: u64,
    },
    /// Its filesystem has no DAX: the files are not in memory that survives a kexec.
    #[error(
        "the pool {} is on a filesystem without DAX, whose memory does not survive a kexec: mount \
         it with `dax=always`", path.display()
    )]
    NoDax {
        /// The pool.
        path: PathBuf,
    },
    /// It has the layout of another version of this program.
    #[error("the pool {} is laid out as `{found}`, this build knows `{known}`", path.display())]
    Version {
        /// The pool.
        path: PathBuf,
        /// The version in the pool, escaped.
        found: String,
        /// The version that this build can read.
        known: &'static str,
    },
    /// Its file `pool` has no valid identity.
    #[error("the pool {} is damaged: its file `pool` has no identity in it", path.display())]
    Identity {
        /// The pool.
        path: PathBuf,
    },
    /// A system call on it failed.
    #[error("cannot {attempt} the pool {}: {errno}", path.display())]
    Io {
        /// The pool.
        path: PathBuf,
        /// The attempted action, as a verb for the error text.
        attempt: &'static str,
        /// The kernel's errno.
        errno: Errno,
    },
}

/// An orchestrator whose sessions survive in a pool. Clones share it. Only one process can use a
/// pool at a time.
#[derive(Debug, Clone)]
pub struct Pool {
    in_process: InProcess,
    files: PoolFiles,
    number: u64,
    ticket: Ticket,
}

/// The sessions of the previous generation.
struct Arrival {
    /// The tree `incoming`, without the sessions that were taken already.
    tree: Tree,
    /// Its sessions.
    sessions: files::Incoming,
}

impl Pool {
    /// Opens the pool at `path`. Makes one in a directory that is no pool yet.
    ///
    /// A bad tree is no error: it disables live update ([`disabled`](Self::disabled) says why).
    /// Nothing is removed then, and memory can be created. To give up the sessions of a bad tree,
    /// empty the directory.
    pub fn start(path: impl AsRef<Path>, options: &Options) -> Result<Self, PoolError> {
        let directory = Directory::open(path.as_ref(), options)?;
        let arrived = arrive(&directory, options.expect);
        let disabled = arrived.as_ref().err().map(|error| Disabled::Pool(error.clone()));
        let parameters = Parameters { handover: disabled.is_none(), ..Parameters::default() };
        let arrived = arrived.ok().flatten();
        let mut luo = Luo::start(parameters, || {
            let tree = arrived.as_ref().ok_or(Errno::NOENT)?;
            v1::encode(&tree.tree.luo).map_err(|_| Errno::BADMSG)
        });
        let (owned, sessions) =
            arrived.map_or_else(Default::default, |arrived| (arrived.tree.files, arrived.sessions));
        let digest = sessions.digest;
        let sessions =
            files::Incoming { taken_when_finished: options.taken_when_finished, ..sessions };
        let files = PoolFiles::new(directory, owned, sessions);
        register_handlers(&mut luo, &files);
        if luo.is_enabled() {
            let mut state = files.state();
            state.directory.forget_taken(digest);
            state.collect();
        }
        let number = luo.liveupdate_number();
        let in_process = InProcess::new(luo, disabled);
        let ticket = Ticket::new(number::random_bytes());
        Ok(Self { in_process, files, number, ticket })
    }

    /// Returns why live update is disabled; `None` if it is enabled.
    pub fn disabled(&self) -> Option<Disabled> {
        self.in_process.disabled()
    }

    /// The number of live updates that led to this generation: 0 after a cold start.
    pub fn liveupdate_number(&self) -> u64 {
        self.number
    }

    /// Removes files that are no longer in use and that no session owns. Does nothing while live
    /// update is disabled. Each start does the same, and each [`Pool::create_memory`] that needs their room.
    pub fn collect(&self) {
        if self.in_process.disabled().is_none() {
            self.files.state().collect();
        }
    }

    /// Makes a session from a copy of its fd. Hands back an fd that represents no session of this
    /// pool.
    pub fn adopt(&self, fd: OwnedFd) -> Result<Session, FromFdError> {
        self.in_process.adopt(fd)
    }

    /// Writes the tree of all outgoing sessions for the next generation, and calls `jump`.
    ///
    /// `Ok` from `jump` means that a successor takes over. The successor waits for the lock of the
    /// pool, which this process has until it ends. Every session call then fails with ESHUTDOWN.
    /// After any error nothing has changed, except that ENOTRECOVERABLE means that the tree could
    /// not be removed. `jump` must not drop a session or call the pool.
    pub fn hand_over<T, E>(
        &self,
        jump: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, HandOverError<E>> {
        let taken = self.in_process.hand_over(|luo| {
            let refused = |errno| HandOverError::Refused(Error::Switch { errno });
            let luo = v1::decode(luo).map_err(|_| refused(Errno::AGAIN))?;
            let state = self.files.state();
            let tree =
                record::encode(&state.tree(luo, self.ticket)).map_err(|_| refused(Errno::AGAIN))?;
            // Before the tree that names them.
            state.sync_copies().map_err(refused)?;
            state.directory.write_handover(&tree).map_err(refused)?;
            jump().map_err(|error| match state.directory.remove_handover() {
                Ok(()) => HandOverError::NotTaken(error),
                Err(errno) => refused(errno),
            })
        });
        taken.map_err(|error| match error {
            NotHandedOver::NotTaken(error) => error,
            NotHandedOver::Machine(errno) => HandOverError::Refused(Error::Switch { errno }),
            NotHandedOver::Disabled(source) => HandOverError::Refused(Error::Disabled { source }),
        })
    }

    /// Calls `act` with the state machine, for a server that answers the requests of other
    /// processes. The pool is locked meanwhile: `act` must not drop a session, and of the pool's
    /// methods may call only [`open_session`](Self::open_session).
    pub fn with_luo<T>(&self, act: impl FnOnce(&mut Luo<OpenFile>) -> T) -> T {
        self.in_process.with_luo(act)
    }

    /// Makes the fd that represents a session, while the session is created or retrieved. The
    /// session ends when the last copy of the fd is closed.
    pub fn open_session(&self, session: SessionId) -> Result<OwnedFd, Errno> {
        self.in_process.open_session(session)
    }
}

/// A tree with its digest, or why it was refused; `None` if there is no tree.
type Found = Option<Result<(Tree, u32), TreeError>>;

fn find(directory: &Directory, place: Place) -> Result<Found, TreeError> {
    let bytes = directory.read_tree(place).map_err(|errno| TreeError::Io { errno })?;
    Ok(bytes.map(|bytes| {
        let tree = record::decode(&bytes, directory.identity)?;
        Ok((tree, record::digest(&bytes)))
    }))
}

/// Finds the tree of the previous generation, and renames `handover` to `incoming` if that is the
/// tree.
fn arrive(directory: &Directory, expect: Expect) -> Result<Option<Arrival>, TreeError> {
    let io = |errno| TreeError::Io { errno };
    if expect == Expect::Nothing {
        directory.forget_trees().map_err(io)?;
        return Ok(None);
    }
    let incoming = find(directory, Place::Incoming)?;
    let mut handover = find(directory, Place::Handover)?;
    if let Expect::Switch(wanted) | Expect::Begun(wanted) = expect {
        let is_wanted =
            |found: &Found| matches!(found, Some(Ok((tree, _))) if tree.ticket == wanted);
        if !is_wanted(&handover) {
            if !is_wanted(&incoming) {
                if let Expect::Begun(_) = expect {
                    handover.transpose()?;
                    incoming.transpose()?;
                    directory.forget_trees().map_err(io)?;
                    return Ok(None);
                }
                let found = handover.or(incoming).transpose()?.map(|(tree, _)| tree.ticket);
                return Err(TreeError::Ticket { wanted, found });
            }
            // `incoming` has the ticket, so an earlier host of this kernel wrote `handover` for a
            // switch that failed and could not be undone.
            directory.remove_handover().map_err(io)?;
            handover = None;
        }
    }
    let Some(handover) = handover else {
        return Ok(incoming.transpose()?.map(|(tree, digest)| remaining(directory, tree, digest)));
    };
    let (tree, digest) = handover?;
    if let Some(Ok((last, _))) = incoming {
        let (found, latest) = (tree.luo.number, last.luo.number);
        if found <= latest {
            return Err(TreeError::Generation { found, latest });
        }
    }
    directory.take_handover().map_err(io)?;
    Ok(Some(remaining(directory, tree, digest)))
}

/// Returns the sessions of the tree that were not taken yet.
fn remaining(directory: &Directory, mut tree: Tree, digest: u32) -> Arrival {
    let sessions = std::mem::take(&mut tree.luo.sessions).into_iter().enumerate();
    let left = sessions.filter(|(place, _)| !directory.is_taken(digest, *place));
    let (places, sessions): (Vec<usize>, _) = left.unzip();
    tree.luo.sessions = sessions;
    let of_session = |(session, place): (&SessionRecord, usize)| {
        let files = record::pool_files(std::slice::from_ref(session));
        files.map(|file| (file.data, place)).collect::<Vec<_>>()
    };
    let sessions: BTreeMap<u64, usize> =
        tree.luo.sessions.iter().zip(places).flat_map(of_session).collect();
    tree.files.retain(|id, _| sessions.contains_key(id));
    Arrival { tree, sessions: files::Incoming { digest, sessions, ..Default::default() } }
}

fn register_handlers(luo: &mut Luo<OpenFile>, files: &PoolFiles) {
    for kind in Preservation::ALL {
        let Some(compatible) = Compatible::new(kind.format()) else { continue };
        let files = files.clone();
        // Fails only while live update is disabled; then no handler is needed.
        let _ = match kind {
            Preservation::File => luo.register_handler(FileHandler { files, compatible }),
            Preservation::Copy => luo.register_handler(CopyHandler { files, compatible }),
        };
    }
}

impl Orchestrator for Pool {
    fn backend(&self) -> Backend {
        Backend::Pool
    }

    /// The ticket of the next switch. The same for each attempt.
    fn ticket(&self) -> Option<Ticket> {
        Some(self.ticket)
    }

    /// Without a limit if the filesystem cannot be asked: then it may have room.
    fn room(&self) -> Room {
        Room { files: None, copies: self.files.state().directory.free().ok() }
    }

    fn create_session(&self, name: &SessionName) -> Result<Outgoing, Error> {
        self.in_process.create_session(name)
    }

    fn retrieve_session(&self, name: &SessionName) -> Result<Incoming, Error> {
        self.in_process.retrieve_session(name)
    }

    /// Creates a file in the pool, with all pages allocated and zeroed. So no store to the memory
    /// can fail for lack of room, or needs the filesystem's journal. Takes as long as zeroing the
    /// memory. After the last fd and mapping of the file are gone, [`Pool::collect`] removes the
    /// file.
    fn create_memory(&self, name: &str, len: u64) -> Result<OwnedFd, Error> {
        let made = match self.in_process.disabled() {
            None => self.files.state().create_memory(len),
            Some(_) => self.files.state().create_memory_only(len),
        };
        made.map_err(|errno| Error::CreateMemory { name: name.to_owned(), len, errno })
    }

    fn switch(&self, jump: &mut dyn FnMut()) -> Result<(), Error> {
        let came_back = self.hand_over(|| {
            jump();
            Err::<std::convert::Infallible, ()>(())
        });
        match came_back {
            Err(HandOverError::Refused(error)) => Err(error),
            Err(HandOverError::NotTaken(())) => Ok(()),
        }
    }
}
