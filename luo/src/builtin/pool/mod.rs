//! The built-in LUO on a pool: memory that a kexec leaves alone, on any stock kernel.
//!
//! A pool is a directory on a filesystem with DAX that lies in RAM which was kept from the kernel
//! (`memmap=1G!1G` on the command line gives `/dev/pmem0`; ext4 on it is mounted with `dax=always`).
//! There the files' pages *are* the memory. The next kernel, started with the same `memmap=`, finds
//! the same files in the same pages. So guest memory made by [`Pool::create_memory`] is preserved by
//! noting which file it is, and never copied; memfds with documents are copied into the pool.
//!
//! ```text
//!   start:   handover --> incoming --> sessions          switch:  sessions --> handover --> jump
//!              |  no tree: a cold start                                            |
//!              |  a bad one: live update is disabled, and nothing is removed       v
//!              v                                              came back: handover is removed,
//!            leftovers of crashed generations are removed     all is as it was
//! ```
//!
//! What is on disk is complete at each moment: a crash anywhere leaves the tree of the last
//! generation or that of the next. It is given out for the [`Ticket`] of its switch, which the next
//! kernel is handed ([`Expect`]). Sessions once retrieved are not given out again, even if the host
//! is started anew: their guests may have run since. As in the kernel, what nobody retrieved
//! waits until it is finished or replaced by the next switch.
//!
//! Huge pages: a file's extents and the mapping have to be aligned to 2 MiB. Memory is allocated in one
//! piece for that; ext4 aligns it if it was made with `-E stride=512,stripe_width=512`.

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

use super::direct::{BeforeRetrieval, Direct, NotHandedOver};
use super::tree::v1;
use super::{Compatible, Disabled, HandOverError, Luo, OpenFile, Parameters, SessionId};
use crate::{
    Backend, Error, FromFdError, Incoming, Orchestrator, Outgoing, Session, SessionName, Ticket,
};
use directory::{Directory, Place};
use files::{Files, Kind};
pub use handler::MOST_COPIED;
use handler::{CopyHandler, FileHandler};
pub use record::Error as TreeError;
use record::Tree;

/// Whose sessions a pool gives out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Expect {
    /// Whatever the last host left. For who has another way to know that nothing happened between.
    #[default]
    Anything,
    /// What this kernel was handed the ticket of. A pool that does not have it is left as it is, and
    /// live update is disabled.
    Switch(Ticket),
    /// Nothing: this kernel was not entered by a switch. What is there is of another boot, and is
    /// given up, in whatever state it is.
    Nothing,
}

/// What a pool has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Fewest bytes that its filesystem has: what all VMs need.
    pub least_bytes: u64,
    /// Bytes that memory never takes, so that documents and trees find room.
    pub reserve_bytes: u64,
    /// Whose sessions are given out.
    pub expect: Expect,
    /// Takes a filesystem without DAX. For tests: nothing in it survives a kexec, and what a guest
    /// wrote last may never reach the disk.
    pub without_dax: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            least_bytes: 0,
            reserve_bytes: 32 << 20,
            expect: Expect::Anything,
            without_dax: false,
        }
    }
}

/// Why a directory cannot be used as a pool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The path is something else.
    #[error("the pool {} is not a directory", path.display())]
    NotADirectory {
        /// The pool.
        path: PathBuf,
    },
    /// Another host has it.
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
    /// Its files are not in the memory that survives.
    #[error(
        "the pool {} is on a filesystem without DAX, from which no memory survives: mount it with \
         `dax=always`", path.display()
    )]
    NoDax {
        /// The pool.
        path: PathBuf,
    },
    /// Another version of this program has laid it out.
    #[error("the pool {} is laid out as `{found}`, this build knows `{known}`", path.display())]
    Version {
        /// The pool.
        path: PathBuf,
        /// What it says, escaped.
        found: String,
        /// What would be read.
        known: &'static str,
    },
    /// It does not say which pool it is.
    #[error("the pool {} is damaged: its file `pool` has no identity in it", path.display())]
    Identity {
        /// The pool.
        path: PathBuf,
    },
    /// The filesystem refused.
    #[error("cannot {attempt} the pool {}: {errno}", path.display())]
    Io {
        /// The pool.
        path: PathBuf,
        /// What was tried.
        attempt: &'static str,
        /// What the kernel answered.
        errno: Errno,
    },
}

/// Sessions on a pool. Clones are the same. One process has a pool at a time.
#[derive(Debug, Clone)]
pub struct Pool {
    direct: Direct,
    files: Files,
    number: u64,
    ticket: Ticket,
}

/// What the last generation left.
struct Arrival {
    tree: Tree,
    /// By which its sessions are noted as taken.
    digest: u32,
    /// Of each session that can still be retrieved: which one it is in the tree that came.
    places: Vec<usize>,
}

impl Pool {
    /// Opens the pool at `path`, or makes one of an empty directory there.
    ///
    /// A bad tree is no error: it disables live update ([`disabled`](Self::disabled) says why), leaves
    /// everything where it is, and memory can be made. To give up what it holds, empty the directory.
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
        let owned = arrived.as_ref().map_or_else(BTreeMap::new, |a| a.tree.files.clone());
        let files = Files::new(directory, owned);
        register_handlers(&mut luo, &files);
        if luo.is_enabled() {
            let mut state = files.state();
            state.directory.forget_taken(arrived.as_ref().map_or(0, |arrived| arrived.digest));
            state.collect();
        }
        let number = luo.liveupdate_number();
        let direct = Direct::new(luo, disabled, before_retrieval(files.clone(), arrived));
        let ticket = Ticket::new(number::random_bytes());
        Ok(Self { direct, files, number, ticket })
    }

    /// Why live update is disabled, if it is.
    pub fn disabled(&self) -> Option<Disabled> {
        self.direct.disabled()
    }

    /// How many live updates led here: 0 after a cold start.
    pub fn liveupdate_number(&self) -> u64 {
        self.number
    }

    /// Removes memory that nobody has any more, and that no session owns. It is done at each start and
    /// before memory is made, too.
    pub fn collect(&self) {
        if self.direct.disabled().is_none() {
            self.files.state().collect();
        }
    }

    /// Takes a copy of a session's fd as that session. The fd of anything else is handed back.
    pub fn adopt(&self, fd: OwnedFd) -> Result<Session, FromFdError> {
        self.direct.adopt(fd)
    }

    /// Puts all outgoing sessions where the next generation will look, and calls `jump`.
    ///
    /// `Ok` from it says that a successor has taken over (which waits for the lock of the pool, that
    /// is, for this process to end): every session call is answered ESHUTDOWN from then on. After any
    /// error everything is as it was. Nothing in `jump` may drop a session or call the pool.
    pub fn hand_over<T, E>(
        &self,
        jump: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, HandOverError<E>> {
        let taken = self.direct.hand_over(|luo| {
            let refused = |errno| HandOverError::Refused(Error::Switch { errno });
            let luo = v1::decode(luo).map_err(|_| refused(Errno::AGAIN))?;
            let state = self.files.state();
            let tree =
                record::encode(&state.tree(luo, self.ticket)).map_err(|_| refused(Errno::AGAIN))?;
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

    /// Calls the machine itself: for who serves its protocol to others. The pool waits meanwhile:
    /// nothing in `act` may drop a session or call the pool, save for
    /// [`open_session`](Self::open_session).
    pub fn with_machine<T>(&self, act: impl FnOnce(&mut Luo<OpenFile>) -> T) -> T {
        self.direct.with_machine(act)
    }

    /// The fd that stands for a session which the machine is about to give out: its last close ends
    /// the session.
    pub fn open_session(&self, session: SessionId) -> Result<OwnedFd, Errno> {
        self.direct.open_session(session)
    }
}

/// What is found where a tree can be, with the tree's digest.
type Found = Option<Result<(Tree, u32), TreeError>>;

fn find(directory: &Directory, place: Place) -> Result<Found, TreeError> {
    let bytes = directory.read_tree(place).map_err(|errno| TreeError::Io { errno })?;
    Ok(bytes.map(|bytes| {
        let tree = record::decode(&bytes, directory.identity)?;
        Ok((tree, record::digest(&bytes)))
    }))
}

/// The tree of the last generation, made the one that came in.
fn arrive(directory: &Directory, expect: Expect) -> Result<Option<Arrival>, TreeError> {
    let io = |errno| TreeError::Io { errno };
    if expect == Expect::Nothing {
        directory.forget_trees().map_err(io)?;
        return Ok(None);
    }
    let incoming = find(directory, Place::Incoming)?;
    let mut handover = find(directory, Place::Handover)?;
    if let Expect::Switch(wanted) = expect {
        let is_wanted =
            |found: &Found| matches!(found, Some(Ok((tree, _))) if tree.ticket == wanted);
        if !is_wanted(&handover) {
            if !is_wanted(&incoming) {
                let found = handover.or(incoming).transpose()?.map(|(tree, _)| tree.ticket);
                return Err(TreeError::Ticket { wanted, found });
            }
            // This kernel's host tried a switch that did not happen and could not be undone.
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

/// The sessions that nobody has retrieved yet.
fn remaining(directory: &Directory, mut tree: Tree, digest: u32) -> Arrival {
    let sessions = std::mem::take(&mut tree.luo.sessions).into_iter().enumerate();
    let left = sessions.filter(|(place, _)| !directory.is_taken(digest, *place));
    let (places, sessions) = left.unzip();
    tree.luo.sessions = sessions;
    let owned: Vec<u64> = record::pool_files(&tree.luo).map(|file| file.data).collect();
    tree.files.retain(|id, _| owned.contains(id));
    Arrival { tree, digest, places }
}

fn register_handlers(luo: &mut Luo<OpenFile>, files: &Files) {
    for kind in Kind::ALL {
        let Some(compatible) = Compatible::new(kind.format()) else { continue };
        let files = files.clone();
        // They are refused only while live update is disabled; then nobody asks for them.
        let _ = match kind {
            Kind::File => luo.register_handler(FileHandler { files, compatible }),
            Kind::Copy => {
                let copies = BTreeMap::new();
                luo.register_handler(CopyHandler { files, compatible, copies })
            }
        };
    }
}

/// Notes on disk that a session is taken before anybody can have its memory.
fn before_retrieval(files: Files, arrived: Option<Arrival>) -> BeforeRetrieval {
    let (digest, places) = arrived.map_or((0, Vec::new()), |a| (a.digest, a.places));
    Box::new(move |session| {
        // The machine counts sessions from 1 in the order of the tree, before any of its own.
        let index = usize::try_from(session.0).ok().and_then(|number| number.checked_sub(1));
        match index.and_then(|index| places.get(index)) {
            Some(place) => files.state().directory.mark_taken(digest, *place),
            None => Ok(()),
        }
    })
}

impl Orchestrator for Pool {
    fn backend(&self) -> Backend {
        Backend::Pool
    }

    /// That of the next switch. The same for each attempt.
    fn ticket(&self) -> Option<Ticket> {
        Some(self.ticket)
    }

    fn create_session(&self, name: &SessionName) -> Result<Outgoing, Error> {
        self.direct.create_session(name)
    }

    fn retrieve_session(&self, name: &SessionName) -> Result<Incoming, Error> {
        self.direct.retrieve_session(name)
    }

    /// A file in the pool, all of it allocated and written: no store to it can fail for want of room,
    /// and none has to reach the filesystem's journal. It takes as long as zeroing the memory does.
    /// The file is removed when its last fd and mapping is gone, the next time that room is looked for.
    fn create_memory(&self, name: &str, len: u64) -> Result<OwnedFd, Error> {
        let made = match self.direct.disabled() {
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
