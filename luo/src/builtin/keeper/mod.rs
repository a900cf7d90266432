//! The built-in LUO as a keeper: one process, the host, holds the fds of all preserved files.
//!
//! Preserved files survive the end of a VMM, because the host holds them. A new host takes over
//! from the old one with a [`Handover`]: as inherited fds over exec, or in messages with SCM_RIGHTS
//! (253 fds fit in one message). This is a switch with its usual rules: outgoing sessions become
//! incoming, and incoming sessions that are not finished are lost. A kexec ends the process, so
//! [`Orchestrator::switch`] is refused.
//!
//! A keeper preserves memfds and, unlike the kernel's LUO, any other regular file. A file is handed
//! over as the same open file. Its size can be changed while it is preserved, but a memfd that was
//! resized cancels the switch.
//!
//! The fd that represents a session is the end of a pipe. Any copy of the fd, in any process, keeps
//! the session alive, and [`Keeper::adopt`] makes a session from a copy. The fd answers no
//! requests.

mod handler;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::in_process::{InProcess, NotHandedOver};
use super::open_file::OpenFile;
use super::tree::{self, v1};
use super::{Compatible, HandOverError, Luo, Parameters, SessionId};
use crate::{
    Backend, Error, FromFdError, Incoming, Orchestrator, Outgoing, Room, Session, SessionName,
    Ticket, memory,
};
use handler::{Carried, FdHandler, FileKind};

/// Everything that a keeper hands to the next one.
#[derive(Debug)]
#[must_use = "dropping it loses every session in it"]
pub struct Handover {
    /// The sessions, in the layout [`v1`]. Each handle has the index of the file's fd in `fds`.
    pub tree: Vec<u8>,
    /// The preserved files.
    pub fds: Vec<OwnedFd>,
}

/// A [`Handover`] that was refused, and is handed back with nothing lost.
#[derive(Debug, thiserror::Error)]
#[error("cannot take over the sessions of the previous keeper")]
pub struct ArriveError {
    /// The refused handover.
    pub handover: Handover,
    /// Why it is refused.
    #[source]
    pub problem: Problem,
}

/// What is wrong with a [`Handover`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The tree cannot be read.
    #[error(transparent)]
    Tree(#[from] v1::Error),
    /// More or fewer fds than files.
    #[error("the tree has {expected} files, but {found} fds were handed over with it")]
    Fds {
        /// Files in the tree.
        expected: usize,
        /// Fds in the handover.
        found: usize,
    },
}

/// A switch that failed. The keeper is handed back unchanged.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct SwitchError {
    /// The keeper, with all its sessions.
    pub keeper: Keeper,
    /// Why the switch failed.
    pub error: Error,
}

/// An orchestrator with the sessions of this process, and those of its predecessor. Clones share
/// them.
#[derive(Debug, Clone)]
pub struct Keeper {
    in_process: InProcess,
    carried: Carried,
    number: u64,
}

impl Keeper {
    /// Starts a keeper without a predecessor.
    pub fn start() -> Self {
        Self::with(Carried::default(), None)
    }

    /// Starts a keeper that takes over from its predecessor.
    ///
    /// Errors if the tree cannot be decoded, or the number of fds is wrong. A wrong fd is no error
    /// here, but when its file is retrieved.
    pub fn arrive(handover: Handover) -> Result<Self, ArriveError> {
        match check(&handover) {
            Ok(()) => {
                let Handover { tree, fds } = handover;
                Ok(Self::with(Carried::new(fds), Some(tree)))
            }
            Err(problem) => Err(ArriveError { handover, problem }),
        }
    }

    fn with(carried: Carried, tree: Option<Vec<u8>>) -> Self {
        let mut luo = Luo::start(Parameters::default(), || tree.ok_or(Errno::NOENT));
        for kind in FileKind::ALL {
            if let Some(compatible) = Compatible::new(kind.format()) {
                // Cannot fail: live update is enabled (the tree was checked), and the formats
                // differ.
                let _ =
                    luo.register_handler(FdHandler { kind, carried: carried.clone(), compatible });
            }
        }
        let number = luo.liveupdate_number();
        Self { in_process: InProcess::new(luo, None), carried, number }
    }

    /// Hands over all outgoing sessions. Incoming sessions that are not finished are lost. After
    /// success, calls on sessions and on clones of the keeper fail with ESHUTDOWN. A failure
    /// changes nothing.
    pub fn switch(self) -> Result<Handover, SwitchError> {
        match self.hand_over(Ok::<_, std::convert::Infallible>) {
            Ok(handover) => Ok(handover),
            Err(HandOverError::Refused(error)) => Err(SwitchError { keeper: self, error }),
        }
    }

    /// Hands over all outgoing sessions to `take`, which passes them to the successor.
    ///
    /// If `take` fails, nothing has changed. After success every session call fails with ESHUTDOWN,
    /// as after [`switch`](Self::switch). `take` must not drop a session or call the keeper.
    pub fn hand_over<T, E>(
        &self,
        take: impl FnOnce(Handover) -> Result<T, E>,
    ) -> Result<T, HandOverError<E>> {
        let taken = self.in_process.hand_over(|tree| {
            take(Handover { tree: tree.to_vec(), fds: self.carried.take_outgoing() })
        });
        // If a file could not be frozen, the fds of the files before it are still in the list.
        drop(self.carried.take_outgoing());
        taken.map_err(|error| match error {
            NotHandedOver::NotTaken(error) => HandOverError::NotTaken(error),
            NotHandedOver::Machine(errno) => HandOverError::Refused(Error::Switch { errno }),
            NotHandedOver::Disabled(source) => HandOverError::Refused(Error::Disabled { source }),
        })
    }

    /// The number of switches that led to this keeper.
    pub fn liveupdate_number(&self) -> u64 {
        self.number
    }

    /// Makes a session from a copy of its fd. Hands back an fd that represents no session of this
    /// keeper.
    pub fn adopt(&self, fd: OwnedFd) -> Result<Session, FromFdError> {
        self.in_process.adopt(fd)
    }

    /// Calls `act` with the state machine, for a server that answers the requests of other
    /// processes. The keeper is locked meanwhile: `act` must not drop a session, and of the
    /// keeper's methods may call only [`open_session`](Self::open_session).
    pub fn with_luo<T>(&self, act: impl FnOnce(&mut Luo<OpenFile>) -> T) -> T {
        self.in_process.with_luo(act)
    }

    /// Makes the fd that represents a session, while the session is created or retrieved. The
    /// session ends when the last copy of the fd is closed.
    pub fn open_session(&self, session: SessionId) -> Result<OwnedFd, Errno> {
        self.in_process.open_session(session)
    }
}

/// Checks that the tree can be decoded, and has as many files of the keeper's formats as there are
/// fds.
fn check(handover: &Handover) -> Result<(), Problem> {
    let tree::Handover { sessions, .. } = v1::decode(&handover.tree)?;
    let formats = FileKind::ALL.map(FileKind::format);
    let kept = |file: &&tree::FileRecord| {
        formats.iter().any(|format| format.as_bytes() == file.compatible.as_bytes())
    };
    let expected = sessions.iter().flat_map(|session| &session.files).filter(kept).count();
    let found = handover.fds.len();
    if expected == found { Ok(()) } else { Err(Problem::Fds { expected, found }) }
}

impl Orchestrator for Keeper {
    fn backend(&self) -> Backend {
        Backend::Keeper
    }

    fn ticket(&self) -> Option<Ticket> {
        None
    }

    fn room(&self) -> Room {
        Room::default()
    }

    fn create_session(&self, name: &SessionName) -> Result<Outgoing, Error> {
        self.in_process.create_session(name)
    }

    fn retrieve_session(&self, name: &SessionName) -> Result<Incoming, Error> {
        self.in_process.retrieve_session(name)
    }

    fn create_memory(&self, name: &str, len: u64) -> Result<OwnedFd, Error> {
        memory::memfd(name, len)
    }

    /// Always fails with EOPNOTSUPP, without calling the jump: a kexec would lose all sessions.
    fn switch(&self, _: &mut dyn FnMut()) -> Result<(), Error> {
        Err(Error::Switch { errno: Errno::OPNOTSUPP })
    }
}
