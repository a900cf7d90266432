//! The state machine for calls from its own process: real files, and sessions that fds represent.
//!
//! The keeper and the pool share a [`InProcess`]: a [`Luo`] behind a lock, with the methods of
//! [`Orchestrator`](crate::Orchestrator). A session lives until the last copy of its fd is closed,
//! in any process. Each call first closes, in the state machine, the sessions whose last fd was
//! closed since the last call. So right after the last close the name can be used again, and the
//! files can be preserved again. How files are preserved is left to the handlers, and where the
//! tree goes is left to the caller of [`InProcess::hand_over`].

mod watch;

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::open_file::{OpenFile, duplicate};
use super::{Disabled, Luo, SessionId, SessionKind};
use crate::mutex::lock;
use crate::{
    Error, FromFdError, Incoming, Outgoing, Preserve, Retrieve, Session, SessionName, Token,
};
use watch::Watch;

/// The state machine of this process. Clones share it.
#[derive(Clone)]
pub(super) struct InProcess {
    shared: Arc<Shared>,
}

struct Shared {
    machine: Mutex<Luo<OpenFile>>,
    watch: Watch,
    /// A reason that replaces the state machine's own [`Luo::disabled`], if its owner has one.
    disabled: Option<Disabled>,
}

/// Why sessions were not handed over. Nothing has changed.
#[derive(Debug)]
pub(super) enum NotHandedOver<E> {
    /// Live update is disabled.
    Disabled(Disabled),
    /// The errno of [`Luo::reboot`]: a file cannot be frozen, the tree cannot be written, or all
    /// sessions are handed over already.
    Machine(Errno),
    /// The successor did not take the tree.
    NotTaken(E),
}

/// Why sessions were not handed over. They have not changed.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError<E> {
    /// The orchestrator cannot hand over its sessions now.
    #[error(transparent)]
    Refused(Error),
    /// The successor did not take the sessions.
    #[error("the successor did not take over the sessions")]
    NotTaken(#[source] E),
}

impl fmt::Debug for InProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the state machine: the calling thread may hold its lock.
        let Shared { watch, disabled, .. } = &*self.shared;
        let mut shown = f.debug_struct("InProcess");
        shown.field("watch", watch).field("disabled", disabled).finish_non_exhaustive()
    }
}

impl InProcess {
    /// `disabled` is why the caller started the state machine without live update; `None` if it
    /// did not.
    pub(super) fn new(machine: Luo<OpenFile>, disabled: Option<Disabled>) -> Self {
        let (machine, watch) = (Mutex::new(machine), Watch::default());
        Self { shared: Arc::new(Shared { machine, watch, disabled }) }
    }

    /// Calls `act` with the state machine, after closing the sessions that have ended. The lock is
    /// held meanwhile: `act` must not drop a session, and of this type's methods may call only
    /// [`open_session`](Self::open_session).
    pub(super) fn with_luo<T>(&self, act: impl FnOnce(&mut Luo<OpenFile>) -> T) -> T {
        let mut luo = lock(&self.shared.machine);
        for session in self.shared.watch.ended() {
            // Errors that change nothing here. EBUSY: the session cannot be finished and stays, as
            // in the kernel. EBADF: it was not created or retrieved after all. ESHUTDOWN: it is
            // handed over.
            let _ = luo.close_session(session);
        }
        act(&mut luo)
    }

    /// Makes the fd that represents a session, while the session is created or retrieved. The
    /// session ends when the last copy of the fd is closed.
    pub(super) fn open_session(&self, id: SessionId) -> Result<OwnedFd, Errno> {
        self.shared.watch.open(id)
    }

    /// Returns why live update is disabled; `None` if it is enabled.
    pub(super) fn disabled(&self) -> Option<Disabled> {
        let own = self.with_luo(|luo| luo.disabled().cloned());
        own.map(|own| self.shared.disabled.clone().unwrap_or(own))
    }

    fn refusal(&self, luo: &Luo<OpenFile>) -> Option<Error> {
        let own = luo.disabled()?.clone();
        Some(Error::Disabled { source: self.shared.disabled.clone().unwrap_or(own) })
    }

    /// Calls `act` with the device open: the first opening builds the incoming sessions.
    fn with_device<T>(
        &self,
        act: impl FnOnce(&mut Luo<OpenFile>) -> Result<T, Errno>,
        error: impl FnOnce(Errno) -> Error,
    ) -> Result<T, Error> {
        self.with_luo(|luo| {
            if let Some(refusal) = self.refusal(luo) {
                return Err(refusal);
            }
            match luo.open_device() {
                Ok(()) => {
                    let done = act(luo);
                    let _ = luo.close_device();
                    done.map_err(error)
                }
                // The device is open, to serve it to other processes: the sessions are built.
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
        Ok(Outgoing::new(name.clone(), Box::new(self.held_session(id, fd))))
    }

    pub(super) fn retrieve_session(&self, name: &SessionName) -> Result<Incoming, Error> {
        let (field, mut fd) = (name.to_array(), None);
        let open = |id| self.open_session(id).map(|opened| fd = Some(opened));
        let error = |errno| Error::RetrieveSession { session: name.clone(), errno };
        let id = self.with_device(|luo| luo.retrieve_session(&field, open), error)?;
        let fd = fd.ok_or(Error::RetrieveSession { session: name.clone(), errno: Errno::BADF })?;
        Ok(Incoming::new(name.clone(), Box::new(self.held_session(id, fd))))
    }

    /// Makes a session from a copy of its fd. Hands back an fd that represents no session of this
    /// process, or a session whose name is no valid [`SessionName`].
    pub(super) fn adopt(&self, fd: OwnedFd) -> Result<Session, FromFdError> {
        let number = fd.as_raw_fd();
        let error = |errno| Error::Adopt { fd: number, errno };
        let session = self.shared.watch.session_of(&fd).ok_or(error(Errno::NOTTY));
        let known = session.and_then(|id| {
            let look = |luo: &mut Luo<OpenFile>| Ok((luo.kind(id)?, luo.session_name(id)?));
            let (kind, name) = self.with_luo(look).map_err(error)?;
            let name = SessionName::from_array(&name.to_field())
                .map_err(|source| Error::ForeignName { fd: number, source })?;
            Ok((id, kind, name))
        });
        match known {
            Ok((id, SessionKind::Outgoing, name)) => {
                Ok(Session::Outgoing(Outgoing::new(name, Box::new(self.held_session(id, fd)))))
            }
            Ok((id, SessionKind::Incoming, name)) => {
                Ok(Session::Incoming(Incoming::new(name, Box::new(self.held_session(id, fd)))))
            }
            Err(error) => Err(FromFdError { fd, error }),
        }
    }

    /// Hands over all outgoing sessions: freezes them, and passes their tree to `take`. If `take`
    /// fails, everything is undone. After success every session call fails with ESHUTDOWN. The lock
    /// is held while `take` runs.
    pub(super) fn hand_over<T, E>(
        &self,
        take: impl FnOnce(&[u8]) -> Result<T, E>,
    ) -> Result<T, NotHandedOver<E>> {
        let mut taken = None;
        let machine = self.with_luo(|luo| {
            luo.reboot(|tree| match taken.insert(take(tree)) {
                Ok(_) => Ok(()),
                Err(_) => Err(Errno::AGAIN),
            })
        });
        match (taken, machine) {
            (Some(Ok(taken)), Ok(())) => Ok(taken),
            (Some(Err(error)), _) => Err(NotHandedOver::NotTaken(error)),
            (_, Err(errno)) => Err(NotHandedOver::Machine(errno)),
            // `reboot` succeeds without calling `take` only while live update is disabled.
            (None, Ok(())) => {
                let disabled = self.disabled().unwrap_or(Disabled::Parameter);
                Err(NotHandedOver::Disabled(disabled))
            }
        }
    }

    fn held_session(&self, id: SessionId, fd: OwnedFd) -> HeldSession {
        HeldSession { fd, id, in_process: ClosesEnded(self.clone()) }
    }
}

/// A session that this process holds. Fields are dropped in their order: `fd` is closed before
/// `in_process` looks for sessions whose last fd is closed.
#[derive(Debug)]
struct HeldSession {
    fd: OwnedFd,
    id: SessionId,
    in_process: ClosesEnded,
}

/// A [`InProcess`] that closes, when dropped, the sessions that have ended.
#[derive(Debug)]
struct ClosesEnded(InProcess);

impl Drop for ClosesEnded {
    fn drop(&mut self) {
        self.0.with_luo(|_| ());
    }
}

impl Preserve for HeldSession {
    fn preserve(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), Errno> {
        let file = match OpenFile::of(fd) {
            Err(Errno::BADF) => None,
            file => file?,
        };
        self.in_process.0.with_luo(|luo| luo.preserve_fd(self.id, token, file))
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Retrieve for HeldSession {
    fn retrieve(&self, token: Token) -> Result<OwnedFd, Errno> {
        self.in_process.0.with_luo(|luo| {
            // A handler can fail because no fd is free, and the file may be lost then. So check that
            // first, as the kernel does.
            drop(spare_fds(self.fd.as_fd())?);
            luo.retrieve_fd(self.id, token)?.duplicate()
        })
    }

    fn keeps(&self, token: Token) -> bool {
        self.in_process.0.with_luo(|luo| luo.has_fd(self.id, token))
    }

    fn finish(&self) -> Result<(), Errno> {
        self.in_process.0.with_luo(|luo| luo.finish(self.id))
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Allocates as many fds as the retrieval of a file needs at most, to check that they are free.
/// Another thread can still take them before they are used.
fn spare_fds(any: BorrowedFd<'_>) -> Result<[OwnedFd; 4], Errno> {
    Ok([duplicate(any)?, duplicate(any)?, duplicate(any)?, duplicate(any)?])
}
