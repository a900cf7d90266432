//! One preserved file, before and after the switch, and the handler callbacks for it.
//!
//! [`Preserved`] is a file of this kernel, [`Arrived`] a file record of the previous kernel. A step
//! that fails changes nothing: it undoes its parts in reverse order. The order among files and
//! sessions is left to [`super::session`] and [`super::reboot`].

use rustix::io::Errno;

use super::flb::Flbs;
use super::handler::{File, Handle, HandlerId, Handlers, Identities, Identity, Retrieval};
use super::tree::FileRecord;
use crate::Token;

/// A file of an outgoing session, with a reference that keeps it open.
#[derive(Debug)]
pub(super) struct Preserved<F> {
    handler: HandlerId,
    identity: Identity,
    file: F,
    handle: Handle,
}

/// A file of an incoming session.
#[derive(Debug)]
pub(super) struct Arrived<F> {
    handler: HandlerId,
    handle: Handle,
    state: Arrival<F>,
}

/// Whether an incoming file was retrieved; the owned form of [`Retrieval`].
#[derive(Debug)]
enum Arrival<F> {
    Waiting,
    Retrieved { file: F, identity: Identity },
    Failed(Errno),
}

impl<F> Preserved<F> {
    pub(super) fn handler(&self) -> HandlerId {
        self.handler
    }
}

impl<F> Arrived<F> {
    pub(super) fn handler(&self) -> HandlerId {
        self.handler
    }

    pub(super) fn retrieval(&self) -> Retrieval<'_, F> {
        self.state.as_retrieval()
    }
}

impl<F> Arrival<F> {
    fn as_retrieval(&self) -> Retrieval<'_, F> {
        match self {
            Self::Waiting => Retrieval::Never,
            Self::Retrieved { file, .. } => Retrieval::Done(file),
            Self::Failed(errno) => Retrieval::Failed(*errno),
        }
    }
}

/// The handlers, the shared objects, and the objects that are in use by some file.
#[derive(Debug)]
pub(super) struct Registry<F> {
    pub(super) handlers: Handlers<F>,
    pub(super) flbs: Flbs,
    identities: Identities,
}

impl<F> Default for Registry<F> {
    fn default() -> Self {
        Self {
            handlers: Handlers::default(),
            flbs: Flbs::default(),
            identities: Identities::default(),
        }
    }
}

impl<F: File> Registry<F> {
    /// Preserves `file`. ENOENT if no handler can preserve it. EBUSY if its object is preserved
    /// already, or retrieved and not finished. Else any error of a shared object or the handler.
    pub(super) fn preserve(&mut self, file: F) -> Result<Preserved<F>, Errno> {
        let handler = self.handlers.accepting(&file).ok_or(Errno::NOENT)?;
        let identity = self.handlers.identity(handler, &file);
        self.identities.claim(identity)?;
        match self.preserve_claimed(handler, &file) {
            Ok(handle) => Ok(Preserved { handler, identity, file, handle }),
            Err(errno) => {
                self.identities.release(identity);
                Err(errno)
            }
        }
    }

    fn preserve_claimed(&mut self, handler: HandlerId, file: &F) -> Result<Handle, Errno> {
        self.flbs.preserve(self.handlers.flbs(handler))?;
        match self.handlers.get(handler).preserve(file) {
            Ok(handle) => {
                self.handlers.file_added(handler);
                Ok(handle)
            }
            Err(errno) => {
                self.flbs.unpreserve(self.handlers.flbs(handler));
                Err(errno)
            }
        }
    }

    /// Undoes [`preserve`](Self::preserve).
    pub(super) fn unpreserve(&mut self, preserved: Preserved<F>) {
        let Preserved { handler, identity, file, handle } = preserved;
        self.handlers.get(handler).unpreserve(&file, handle);
        self.flbs.unpreserve(self.handlers.flbs(handler));
        self.identities.release(identity);
        self.handlers.file_removed(handler);
    }

    /// Freezes a file for the switch.
    pub(super) fn freeze(&mut self, preserved: &mut Preserved<F>) -> Result<(), Errno> {
        let Preserved { handler, file, handle, .. } = preserved;
        *handle = self.handlers.get(*handler).freeze(file, *handle)?;
        Ok(())
    }

    /// Undoes [`freeze`](Self::freeze).
    pub(super) fn unfreeze(&mut self, preserved: &Preserved<F>) {
        let Preserved { handler, file, handle, .. } = preserved;
        self.handlers.get(*handler).unfreeze(file, *handle);
    }

    /// Returns the record of a file for the next kernel.
    pub(super) fn record(&self, preserved: &Preserved<F>, token: Token) -> FileRecord {
        let compatible = self.handlers.compatible(preserved.handler);
        FileRecord { compatible, data: preserved.handle.0, token }
    }

    /// Takes over a file record of the previous kernel. ENOENT if no handler has its format.
    pub(super) fn deserialize(&mut self, record: &FileRecord) -> Result<Arrived<F>, Errno> {
        let handler = self.handlers.of_format(&record.compatible).ok_or(Errno::NOENT)?;
        self.handlers.file_added(handler);
        Ok(Arrived { handler, handle: Handle(record.data), state: Arrival::Waiting })
    }

    /// Returns a new reference to the file. The first call makes the handler retrieve the file. If
    /// the handler fails, this and all later calls return its errno, unless the handler keeps the file.
    pub(super) fn retrieve(&mut self, arrived: &mut Arrived<F>) -> Result<F, Errno> {
        match &arrived.state {
            Arrival::Retrieved { file, .. } => return Ok(file.clone()),
            Arrival::Failed(errno) => return Err(*errno),
            Arrival::Waiting => {}
        }
        match self.handlers.get(arrived.handler).retrieve(arrived.handle) {
            Ok(file) => {
                let identity = self.handlers.identity(arrived.handler, &file);
                self.identities.share(identity);
                arrived.state = Arrival::Retrieved { file: file.clone(), identity };
                Ok(file)
            }
            Err(errno) => {
                if !self.handlers.get(arrived.handler).keeps(errno) {
                    arrived.state = Arrival::Failed(errno);
                }
                Err(errno)
            }
        }
    }

    /// Asks the handler whether the file can be finished now.
    pub(super) fn can_finish(&mut self, arrived: &Arrived<F>) -> bool {
        let Arrived { handler, handle, state } = arrived;
        self.handlers.get(*handler).can_finish(state.as_retrieval(), *handle)
    }

    /// Finishes a file, retrieved or not.
    pub(super) fn finish(&mut self, arrived: Arrived<F>) {
        let Arrived { handler, handle, state } = arrived;
        self.handlers.get(handler).finish(state.as_retrieval(), handle);
        self.flbs.finish(self.handlers.flbs(handler));
        if let Arrival::Retrieved { identity, .. } = state {
            self.identities.release(identity);
        }
        self.handlers.file_removed(handler);
    }
}
