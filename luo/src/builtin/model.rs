//! The state machine itself, and its start.
//!
//! A [`Luo`] is the orchestrator of one kernel: one machine from start to switch. The next one
//! starts from the tree that this one leaves. It starts in two steps, in the order of the seed:
//! *early*, the subtree of the previous kernel is retrieved and checked (format, live update number,
//! sessions), whether or not live update is switched on; *late*, the outgoing tree is begun, with
//! the number plus one. What goes wrong disables live update and stays on record; where the kernel
//! panics, a program on top of it need not.
//!
//! No fd, no address, no clock and no lock is in here. Who calls holds the machine alone.

use rustix::io::Errno;

use super::device::Device;
use super::file::Registry;
use super::flb::{Flb, FlbId};
use super::handler::{File, Handler, HandlerId};
use super::session::{IncomingSession, OutgoingSession, SessionId, Sessions};
use super::tree::{Handover, SessionRecord, v1};

/// How many there can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most outgoing sessions.
    pub sessions: usize,
    /// What one more session is answered.
    pub sessions_errno: Errno,
    /// Most files in one session. One more is answered ENOSPC.
    pub files: usize,
}

impl Limits {
    /// Linux 7.3: 10 000 blocks of 51 sessions, and of 63 files (`kho_block.c`, `abi/luo.h`).
    pub const KERNEL: Self =
        Self { sessions: 510_000, sessions_errno: Errno::NOSPC, files: 630_000 };
    /// The seed: 16 pages of sessions behind a count, 2 pages of files.
    pub const SEED: Self = Self { sessions: 819, sessions_errno: Errno::NOMEM, files: 128 };
}

/// What a machine is started with: the command line, so to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// Whether live update is switched on (`liveupdate=`).
    pub liveupdate: bool,
    /// Whether there is anything that carries a tree to the next kernel (`kho=`).
    pub handover: bool,
    /// How many sessions and files there can be.
    pub limits: Limits,
}

impl Default for Parameters {
    /// All on, with the limits of Linux 7.3.
    fn default() -> Self {
        Self { liveupdate: true, handover: true, limits: Limits::KERNEL }
    }
}

/// Why live update is disabled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Disabled {
    /// It was not switched on.
    #[error("live update is not switched on")]
    Parameter,
    /// There is nothing that could carry a tree.
    #[error("nothing carries a tree to the next kernel")]
    NoHandover,
    /// The tree of the previous kernel could not be got hold of.
    #[error("cannot retrieve the tree of the previous kernel: {errno}")]
    Retrieve {
        /// What the carrier answered. ENOENT is no failure: then there is no tree.
        errno: Errno,
    },
    /// The tree in the pool is not to be trusted.
    #[error("the sessions of the previous kernel cannot be taken")]
    Pool(#[from] super::pool::TreeError),
    /// The tree of the previous kernel is not one of this format.
    #[error("the tree of the previous kernel cannot be read")]
    Tree(#[from] v1::Error),
}

/// The orchestrator of one kernel. `F` is a reference to an open file.
#[derive(Debug)]
pub struct Luo<F> {
    enabled: Result<(), Disabled>,
    pub(super) limits: Limits,
    /// Of the previous kernel; 0 if there was none.
    incoming_number: u64,
    /// Sessions of the previous kernel that are not built yet.
    pub(super) arrived: Vec<SessionRecord>,
    /// The tree for the next kernel: begun at the start, filled in by the reboot.
    pub(super) outgoing_tree: Handover,
    pub(super) device: Device,
    pub(super) registry: Registry<F>,
    pub(super) outgoing: Sessions<OutgoingSession<F>>,
    pub(super) incoming: Sessions<IncomingSession<F>>,
    last_session: u64,
    pub(super) handed_over: bool,
}

impl<F: File> Luo<F> {
    /// Starts a machine. `subtree` gives the tree of the previous kernel, as [`v1`] wrote it; ENOENT
    /// says that there is none. It is asked only if there is a carrier.
    ///
    /// Never fails: see [`disabled`](Self::disabled).
    pub fn start<T: AsRef<[u8]>>(
        parameters: Parameters,
        subtree: impl FnOnce() -> Result<T, Errno>,
    ) -> Self {
        let mut luo = Self {
            enabled: if parameters.liveupdate { Ok(()) } else { Err(Disabled::Parameter) },
            limits: parameters.limits,
            incoming_number: 0,
            arrived: Vec::new(),
            outgoing_tree: Handover::default(),
            device: Device::default(),
            registry: Registry::default(),
            outgoing: Sessions::default(),
            incoming: Sessions::default(),
            last_session: 0,
            handed_over: false,
        };
        if !parameters.handover {
            luo.enabled = Err(Disabled::NoHandover);
        } else if let Err(disabled) = luo.early_startup(subtree) {
            luo.enabled = Err(disabled);
        }
        luo.late_startup();
        luo
    }

    fn early_startup<T: AsRef<[u8]>>(
        &mut self,
        subtree: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<(), Disabled> {
        let tree = match subtree() {
            Ok(bytes) => v1::decode(bytes.as_ref())?,
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(Disabled::Retrieve { errno }),
        };
        let Handover { number, sessions, flbs } = tree;
        self.incoming_number = number;
        self.arrived = sessions;
        if let Err(errno) = self.registry.flbs.set_incoming(&flbs) {
            self.device.deserialized = Some(Err(errno));
        }
        Ok(())
    }

    fn late_startup(&mut self) {
        if self.is_enabled() {
            self.outgoing_tree.number = self.incoming_number.wrapping_add(1);
        }
    }

    /// Whether live update is enabled.
    pub fn is_enabled(&self) -> bool {
        self.enabled.is_ok()
    }

    /// Why live update is disabled, if it is.
    pub fn disabled(&self) -> Option<&Disabled> {
        self.enabled.as_ref().err()
    }

    /// How many live updates led to this kernel: 0 after a cold start.
    pub fn liveupdate_number(&self) -> u64 {
        self.incoming_number
    }

    /// The tree for the next kernel: without sessions until [`reboot`](Self::reboot) succeeded.
    /// Empty, with number 0, while live update is disabled.
    pub fn outgoing_tree(&self) -> &Handover {
        &self.outgoing_tree
    }

    /// Adds a handler. The first one that can preserve a file takes it. EOPNOTSUPP: live update is
    /// disabled. EEXIST: a handler of that format is there.
    pub fn register_handler(
        &mut self,
        handler: impl Handler<F> + 'static,
    ) -> Result<HandlerId, Errno> {
        self.check_enabled()?;
        self.registry.handlers.register(Box::new(handler))
    }

    /// Adds a shared object, on which no handler depends yet. EOPNOTSUPP: live update is disabled.
    /// EEXIST: one of that format is there. ENOSPC: there are [`MAX_FLBS`](super::flb::MAX_FLBS).
    pub fn register_flb(&mut self, flb: impl Flb + 'static) -> Result<FlbId, Errno> {
        self.check_enabled()?;
        self.registry.flbs.register(Box::new(flb))
    }

    /// Makes every file of a handler depend on a shared object. EINVAL: no such handler or object.
    /// EEXIST: it does already. EBUSY: the handler has files.
    pub fn bind_flb(&mut self, handler: HandlerId, flb: FlbId) -> Result<(), Errno> {
        self.check_enabled()?;
        if !self.registry.flbs.contains(flb) {
            return Err(Errno::INVAL);
        }
        self.registry.handlers.bind(handler, flb)
    }

    /// Makes a shared object of the previous kernel again, unless that was done. ENOENT: none came
    /// in. ENODATA: its last file is finished. A failure of the object itself can be tried again.
    pub fn retrieve_flb(&mut self, flb: FlbId) -> Result<(), Errno> {
        self.check_enabled()?;
        self.check_running()?;
        self.registry.flbs.retrieve(flb)
    }

    fn check_enabled(&self) -> Result<(), Errno> {
        if self.is_enabled() { Ok(()) } else { Err(Errno::OPNOTSUPP) }
    }

    /// ESHUTDOWN: everything is handed over. The kernel lets such calls wait for ever instead.
    pub(super) fn check_running(&self) -> Result<(), Errno> {
        if self.handed_over { Err(Errno::SHUTDOWN) } else { Ok(()) }
    }

    pub(super) fn new_session_id(&mut self) -> SessionId {
        self.last_session += 1;
        SessionId(self.last_session)
    }
}
