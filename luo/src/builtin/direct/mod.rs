//! The machine, called by its own process: real files, and sessions that are held by fds.
//!
//! A [`Direct`] is what the keeper and the pool have in common: the [`Luo`] behind a lock, and the
//! [`Orchestrator`](crate::Orchestrator)'s verbs on it. A session lives as long as any copy of its fd
//! does, wherever that is. That nobody has it any more is noticed at the next call, whatever it is:
//! before the machine is asked anything, it is told what ended. So a name is free, and a file can be
//! preserved anew, at once after the last close. How files are carried is up to the handlers, and
//! where the tree goes to whoever hands over.

mod watch;

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::open_file::{OpenFile, duplicate};
use super::{Disabled, Kind, Luo, SessionId};
use crate::mutex::lock;
use crate::{
    Error, FromFdError, Incoming, Outgoing, Preserve, Retrieve, Session, SessionName, Token,
};
use watch::Watch;

/// What is to be done before a session that came in is given out. A failure leaves it where it is.
pub(super) type BeforeRetrieval = Box<dyn Fn(SessionId) -> Result<(), Errno> + Send + Sync>;

/// The machine of this process. Clones are the same one.
#[derive(Clone)]
pub(super) struct Direct {
    shared: Arc<Shared>,
}

struct Shared {
    machine: Mutex<Luo<OpenFile>>,
    watch: Watch,
    /// A better reason than the machine's own, if there is one.
    disabled: Option<Disabled>,
    before_retrieval: BeforeRetrieval,
}

/// Why sessions were not handed over. Everything is as it was.
#[derive(Debug)]
pub(super) enum NotHandedOver<E> {
    /// Live update is disabled.
    Disabled(Disabled),
    /// The machine refuses: a file cannot be frozen, or all is handed over already.
    Machine(Errno),
    /// Whoever was to take the tree did not.
    NotTaken(E),
}

/// Why sessions were not handed over. They are as they were.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError<E> {
    /// They cannot be handed over now.
    #[error(transparent)]
    Refused(Error),
    /// Whoever was to take them did not.
    #[error("the sessions were not taken over")]
    NotTaken(#[source] E),
}

impl fmt::Debug for Direct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the machine: a caller may hold its lock.
        let Shared { watch, disabled, .. } = &*self.shared;
        let mut shown = f.debug_struct("Direct");
        shown.field("watch", watch).field("disabled", disabled).finish_non_exhaustive()
    }
}

impl Direct {
    /// `disabled` is why the machine was started without live update, if it was.
    pub(super) fn new(
        machine: Luo<OpenFile>,
        disabled: Option<Disabled>,
        before_retrieval: BeforeRetrieval,
    ) -> Self {
        let (machine, watch) = (Mutex::new(machine), Watch::default());
        Self { shared: Arc::new(Shared { machine, watch, disabled, before_retrieval }) }
    }

    /// Calls the machine, which knows by then what ended. The lock is held: nothing in `act` may
    /// drop a session or call anything here but [`open_session`](Self::open_session).
    pub(super) fn with_machine<T>(&self, act: impl FnOnce(&mut Luo<OpenFile>) -> T) -> T {
        let mut luo = lock(&self.shared.machine);
        for session in self.shared.watch.ended() {
            // A session that cannot be finished stays in the machine, as in the kernel; one that was
            // returned or handed over is not its holder's any more.
            let _ = luo.close_session(session);
        }
        act(&mut luo)
    }

    /// The fd that stands for a session which the machine is about to give out. Its last close ends
    /// the session.
    pub(super) fn open_session(&self, id: SessionId) -> Result<OwnedFd, Errno> {
        let fd = self.shared.watch.open(id)?;
        (self.shared.before_retrieval)(id)?;
        Ok(fd)
    }

    /// Why live update is disabled, if it is.
    pub(super) fn disabled(&self) -> Option<Disabled> {
        let own = self.with_machine(|luo| luo.disabled().cloned());
        own.map(|own| self.shared.disabled.clone().unwrap_or(own))
    }

    fn refusal(&self, luo: &Luo<OpenFile>) -> Option<Error> {
        let own = luo.disabled()?.clone();
        Some(Error::Disabled { source: self.shared.disabled.clone().unwrap_or(own) })
    }

    /// Calls the machine with its device open, as far as that is needed: the first opening makes
    /// sessions of what came in.
    fn with_device<T>(
        &self,
        act: impl FnOnce(&mut Luo<OpenFile>) -> Result<T, Errno>,
        error: impl FnOnce(Errno) -> Error,
    ) -> Result<T, Error> {
        self.with_machine(|luo| {
            if let Some(refusal) = self.refusal(luo) {
                return Err(refusal);
            }
            match luo.open_device() {
                Ok(()) => {
                    let done = act(luo);
                    let _ = luo.close_device();
                    done.map_err(error)
                }
                // Somebody serves the device to others; this process needs no second one.
                Err(Errno::BUSY) => act(luo).map_err(error),
                Err(errno) => {
                    let errno = luo.deserialize_error().unwrap_or(errno);
                    Err(Error::Unreadable { errno })
                }
            }
        })
    }

    pub(super) fn create_session(&self, name: &SessionName) -> Result<Outgoing, Error> {
        let (field, mut fd) = (name.to_array(), None);
        let open = |id| self.open_session(id).map(|opened| fd = Some(opened));
        let error = |errno| Error::Create { session: name.clone(), errno };
        let id = self.with_device(|luo| luo.create_session(&field, open), error)?;
        let fd = fd.ok_or(Error::Create { session: name.clone(), errno: Errno::BADF })?;
        Ok(Outgoing::new(name.clone(), Box::new(self.held(id, fd))))
    }

    pub(super) fn retrieve_session(&self, name: &SessionName) -> Result<Incoming, Error> {
        let (field, mut fd) = (name.to_array(), None);
        let open = |id| self.open_session(id).map(|opened| fd = Some(opened));
        let error = |errno| Error::RetrieveSession { session: name.clone(), errno };
        let id = self.with_device(|luo| luo.retrieve_session(&field, open), error)?;
        let fd = fd.ok_or(Error::RetrieveSession { session: name.clone(), errno: Errno::BADF })?;
        Ok(Incoming::new(name.clone(), Box::new(self.held(id, fd))))
    }

    /// Takes a copy of a session's fd as that session.
    pub(super) fn adopt(&self, fd: OwnedFd) -> Result<Session, FromFdError> {
        let number = fd.as_raw_fd();
        let error = |errno| Error::Adopt { fd: number, errno };
        let session = self.shared.watch.session_of(&fd).ok_or(error(Errno::NOTTY));
        let known = session.and_then(|id| {
            let look = |luo: &mut Luo<OpenFile>| Ok((luo.kind(id)?, luo.session_name(id)?));
            let (kind, name) = self.with_machine(look).map_err(error)?;
            let name = SessionName::from_array(&name.to_field())
                .map_err(|source| Error::ForeignName { fd: number, source })?;
            Ok((id, kind, name))
        });
        match known {
            Ok((id, Kind::Outgoing, name)) => {
                Ok(Session::Outgoing(Outgoing::new(name, Box::new(self.held(id, fd)))))
            }
            Ok((id, Kind::Incoming, name)) => {
                Ok(Session::Incoming(Incoming::new(name, Box::new(self.held(id, fd)))))
            }
            Err(error) => Err(FromFdError { fd, error }),
        }
    }

    /// Hands all outgoing sessions over: freezes them, and gives their tree to `take`. If that fails
    /// all is undone; if it succeeds every call is answered ESHUTDOWN from then on. The lock is held.
    pub(super) fn hand_over<T, E>(
        &self,
        take: impl FnOnce(&[u8]) -> Result<T, E>,
    ) -> Result<T, NotHandedOver<E>> {
        let mut taken = None;
        let machine = self.with_machine(|luo| {
            luo.reboot(|tree| match taken.insert(take(tree)) {
                Ok(_) => Ok(()),
                Err(_) => Err(Errno::AGAIN),
            })
        });
        match (taken, machine) {
            (Some(Ok(taken)), Ok(())) => Ok(taken),
            (Some(Err(error)), _) => Err(NotHandedOver::NotTaken(error)),
            (_, Err(errno)) => Err(NotHandedOver::Machine(errno)),
            // Only a machine that is disabled has nothing to give.
            (None, Ok(())) => {
                let disabled = self.disabled().unwrap_or(Disabled::Parameter);
                Err(NotHandedOver::Disabled(disabled))
            }
        }
    }

    fn held(&self, id: SessionId, fd: OwnedFd) -> Held {
        Held { fd, id, ender: Ender(self.clone()) }
    }
}

/// A session that this process has. The order of the fields is that of their end: the fd is closed
/// before it is looked whether that was its last copy.
#[derive(Debug)]
struct Held {
    fd: OwnedFd,
    id: SessionId,
    ender: Ender,
}

/// Looks for sessions that ended, when it ends itself.
#[derive(Debug)]
struct Ender(Direct);

impl Drop for Ender {
    fn drop(&mut self) {
        self.0.with_machine(|_| ());
    }
}

impl Preserve for Held {
    fn preserve(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), Errno> {
        let file = match OpenFile::of(fd) {
            Err(Errno::BADF) => None,
            file => file?,
        };
        self.ender.0.with_machine(|luo| luo.preserve_fd(self.id, token, file))
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Retrieve for Held {
    fn retrieve(&self, token: Token) -> Result<OwnedFd, Errno> {
        self.ender.0.with_machine(|luo| {
            // What a handler fails at is lost, and it may fail for want of an fd. The kernel looks
            // for one first, too.
            drop(spare_fds(self.fd.as_fd())?);
            luo.retrieve_fd(self.id, token)?.duplicate()
        })
    }

    fn finish(&self) -> Result<(), Errno> {
        self.ender.0.with_machine(|luo| luo.finish(self.id))
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// As many fds as the retrieval of a file needs at most. Another thread can still take them.
fn spare_fds(any: BorrowedFd<'_>) -> Result<[OwnedFd; 4], Errno> {
    Ok([duplicate(any)?, duplicate(any)?, duplicate(any)?, duplicate(any)?])
}
