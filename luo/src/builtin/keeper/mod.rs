//! The built-in LUO on a keeper: sessions whose fds live in one process.
//!
//! The host is that process. A VMM that dies or is replaced takes nothing with it, and the host itself
//! is replaced by handing everything that is kept, a [`Handover`], to its successor: as inherited fds
//! over exec, or in messages with SCM_RIGHTS (253 fds fit in one). For sessions that is a switch like
//! any other, with all its rules: outgoing ones become incoming, what is not finished is lost. A kexec
//! ends the process and is refused.
//!
//! Beside memfds any regular file can be preserved, which the kernel's LUO does not do. A file goes over
//! as the same open file. Its size is not frozen while it is preserved: memory that was resized
//! calls the switch off.
//!
//! The fd that stands for a session is the end of a pipe, which serves to be held: a copy of it, wherever
//! it is, keeps the session, and [`Keeper::adopt`] makes a session of it again. It takes no requests.

mod handler;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::direct::{Direct, NotHandedOver};
use super::open_file::OpenFile;
use super::tree::{self, v1};
use super::{Compatible, HandOverError, Luo, Parameters, SessionId};
use crate::{
    Backend, Error, FromFdError, Incoming, Orchestrator, Outgoing, Session, SessionName, Ticket,
    memory,
};
use handler::{Carried, FdHandler, Kind};

/// Everything that a keeper hands to the next one.
#[derive(Debug)]
#[must_use = "dropping it loses every session in it"]
pub struct Handover {
    /// The sessions, as [`v1`] writes them. Its handles mean the fds by their place.
    pub tree: Vec<u8>,
    /// The preserved files, in this order.
    pub fds: Vec<OwnedFd>,
}

/// What was handed over cannot be taken. It is handed back, with nothing lost.
#[derive(Debug, thiserror::Error)]
#[error("what the last keeper handed over cannot be taken")]
pub struct ArriveError {
    /// What was handed over.
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
    /// Fds are missing, or too many.
    #[error("the tree has {expected} files, {found} fds came with it")]
    Fds {
        /// Files in the tree.
        expected: usize,
        /// Fds that came.
        found: usize,
    },
}

/// A switch that did not take place. The keeper is handed back as it was.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct SwitchError {
    /// The keeper, with all its sessions.
    pub keeper: Keeper,
    /// Why.
    pub error: Error,
}

/// The sessions of this process, and of the one before it. Clones are the same keeper.
#[derive(Debug, Clone)]
pub struct Keeper {
    direct: Direct,
    carried: Carried,
    number: u64,
}

impl Keeper {
    /// A keeper without a predecessor.
    pub fn start() -> Self {
        Self::with(Carried::default(), None)
    }

    /// Takes over from the last keeper. What is wrong with one file only is told when that file is
    /// retrieved.
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
        for kind in Kind::ALL {
            if let Some(compatible) = Compatible::new(kind.format()) {
                // Neither is disabled, nor is the format there: this is a new machine.
                let _ =
                    luo.register_handler(FdHandler { kind, carried: carried.clone(), compatible });
            }
        }
        let number = luo.liveupdate_number();
        Self { direct: Direct::new(luo, None, Box::new(|_| Ok(()))), carried, number }
    }

    /// Hands everything over, and is done: every session call is answered ESHUTDOWN from then on.
    /// What came in and is not finished is lost with this keeper. A failure changes nothing.
    pub fn switch(self) -> Result<Handover, SwitchError> {
        match self.hand_over(Ok::<_, std::convert::Infallible>) {
            Ok(handover) => Ok(handover),
            Err(HandOverError::Refused(error)) => Err(SwitchError { keeper: self, error }),
        }
    }

    /// Hands everything to `take`, such as a function that sends it to the successor. If that fails
    /// everything is as it was; if it succeeds the keeper is done, as after [`switch`](Self::switch).
    /// Nothing in `take` may drop a session or call the keeper.
    pub fn hand_over<T, E>(
        &self,
        take: impl FnOnce(Handover) -> Result<T, E>,
    ) -> Result<T, HandOverError<E>> {
        let taken = self.direct.hand_over(|tree| {
            take(Handover { tree: tree.to_vec(), fds: self.carried.take_outgoing() })
        });
        // If a file could not be frozen, those before it left their fds.
        drop(self.carried.take_outgoing());
        taken.map_err(|error| match error {
            NotHandedOver::NotTaken(error) => HandOverError::NotTaken(error),
            NotHandedOver::Machine(errno) => HandOverError::Refused(Error::Switch { errno }),
            NotHandedOver::Disabled(source) => HandOverError::Refused(Error::Disabled { source }),
        })
    }

    /// How many switches led to this keeper.
    pub fn liveupdate_number(&self) -> u64 {
        self.number
    }

    /// Takes a copy of a session's fd as that session. The fd of anything else is handed back.
    pub fn adopt(&self, fd: OwnedFd) -> Result<Session, FromFdError> {
        self.direct.adopt(fd)
    }

    /// Calls the machine itself: for who serves its protocol to others. The keeper waits meanwhile:
    /// nothing in `act` may drop a session or call the keeper, save for
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

/// Whether the fds are as many as the tree's files.
fn check(handover: &Handover) -> Result<(), Problem> {
    let tree::Handover { sessions, .. } = v1::decode(&handover.tree)?;
    let formats = Kind::ALL.map(Kind::format);
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

    fn create_session(&self, name: &SessionName) -> Result<Outgoing, Error> {
        self.direct.create_session(name)
    }

    fn retrieve_session(&self, name: &SessionName) -> Result<Incoming, Error> {
        self.direct.retrieve_session(name)
    }

    fn create_memory(&self, name: &str, len: u64) -> Result<OwnedFd, Error> {
        memory::memfd(name, len)
    }

    /// Always fails, with EOPNOTSUPP: what is kept would be lost.
    fn switch(&self, _: &mut dyn FnMut()) -> Result<(), Error> {
        Err(Error::Switch { errno: Errno::OPNOTSUPP })
    }
}
