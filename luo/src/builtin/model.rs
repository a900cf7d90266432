//! The state machine [`Luo`] and its start.
//!
//! A [`Luo`] is the orchestrator of one kernel, from its start to the switch. The next kernel's
//! [`Luo`] starts from the tree that this one leaves. The start has two steps, in the order of the
//! seed. The early step retrieves and checks the tree of the previous kernel (format, live update
//! number, sessions), whether or not live update is switched on. The late step begins the outgoing
//! tree, with the live update number plus one. An error in the early step disables live update and
//! is kept as the reason; the kernel panics instead.
//!
//! This module has no fd, no address, no clock and no lock. A caller needs exclusive access.

use rustix::io::Errno;

use super::device::Device;
use super::file::Registry;
use super::flb::{Flb, FlbId};
use super::handler::{File, Handler, HandlerId};
use super::session::{IncomingSession, OutgoingSession, SessionId, Sessions};
use super::tree::{Handover, SessionRecord, v1};

/// How many sessions and files a [`Luo`] can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most outgoing sessions.
    pub sessions: usize,
    /// The errno for creating one session more.
    pub sessions_errno: Errno,
    /// Most files in one session. Preserving one more fails with ENOSPC.
    pub files: usize,
}

impl Limits {
    /// Linux 7.3: 10 000 blocks of 51 sessions, and of 63 files (`kho_block.c`, `abi/luo.h`).
    pub const KERNEL: Self =
        Self { sessions: 510_000, sessions_errno: Errno::NOSPC, files: 630_000 };
    /// The seed: 16 pages with a count and sessions, 2 pages of files for each session.
    pub const SEED: Self = Self { sessions: 819, sessions_errno: Errno::NOMEM, files: 128 };
}

/// The parameters of [`Luo::start`]; the kernel takes them from its command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// Whether live update is switched on (`liveupdate=`).
    pub liveupdate: bool,
    /// Whether a carrier brings the tree to the next kernel (`kho=` switches on the kernel's).
    pub handover: bool,
    /// Limits on sessions and files.
    pub limits: Limits,
}

impl Default for Parameters {
    /// Live update and handover switched on, with the limits of Linux 7.3.
    fn default() -> Self {
        Self { liveupdate: true, handover: true, limits: Limits::KERNEL }
    }
}

/// Why live update is disabled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Disabled {
    /// [`Parameters::liveupdate`] is false.
    #[error("live update is not switched on")]
    Parameter,
    /// [`Parameters::handover`] is false.
    #[error("nothing is available to carry the tree to the next kernel")]
    NoHandover,
    /// The carrier failed to deliver the tree of the previous kernel.
    #[error("cannot retrieve the tree of the previous kernel: {errno}")]
    Retrieve {
        /// The carrier's errno. Never ENOENT, which means that the previous kernel left no tree.
        errno: Errno,
    },
    /// The tree in the pool was refused.
    #[error("cannot take over the sessions of the previous kernel from the pool")]
    Pool(#[from] super::pool::TreeError),
    /// The tree of the previous kernel is damaged or has another format.
    #[error("the tree of the previous kernel cannot be read")]
    Tree(#[from] v1::Error),
}

/// The orchestrator of one kernel, as a state machine. `F` is a reference to an open file.
#[derive(Debug)]
pub struct Luo<F> {
    enabled: Result<(), Disabled>,
    pub(super) limits: Limits,
    /// Live update number in the tree of the previous kernel; 0 without a tree.
    incoming_number: u64,
    /// Sessions of the previous kernel, until the first opening of the device builds them.
    pub(super) arrived: Vec<SessionRecord>,
    /// The tree for the next kernel: begun at the start, filled in by [`reboot`](Self::reboot).
    pub(super) outgoing_tree: Handover,
    pub(super) device: Device,
    pub(super) registry: Registry<F>,
    pub(super) outgoing: Sessions<OutgoingSession<F>>,
    pub(super) incoming: Sessions<IncomingSession<F>>,
    last_session: u64,
    pub(super) handed_over: bool,
}

impl<F: File> Luo<F> {
    /// Starts the state machine. `subtree` returns the tree of the previous kernel in the layout
    /// [`v1`], or ENOENT if the previous kernel left no tree. It is called only if
    /// [`Parameters::handover`] is set.
    ///
    /// Never fails: an error disables live update, see [`disabled`](Self::disabled).
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

    /// Returns why live update is disabled; `None` if it is enabled.
    pub fn disabled(&self) -> Option<&Disabled> {
        self.enabled.as_ref().err()
    }

    /// The number of live updates that led to this kernel: 0 after a cold start.
    pub fn liveupdate_number(&self) -> u64 {
        self.incoming_number
    }

    /// The tree for the next kernel. It has no sessions until [`reboot`](Self::reboot) succeeds.
    /// While live update is disabled it is empty, with number 0.
    pub fn outgoing_tree(&self) -> &Handover {
        &self.outgoing_tree
    }

    /// Adds a handler. A file goes to the first handler that can preserve it.
    ///
    /// EOPNOTSUPP if live update is disabled. EEXIST if a handler of that format is registered.
    pub fn register_handler(
        &mut self,
        handler: impl Handler<F> + 'static,
    ) -> Result<HandlerId, Errno> {
        self.check_enabled()?;
        self.registry.handlers.register(Box::new(handler))
    }

    /// Adds a shared object, on which no handler depends yet.
    ///
    /// EOPNOTSUPP if live update is disabled. EEXIST if a shared object of that format is
    /// registered. ENOSPC if [`MAX_FLBS`](super::flb::MAX_FLBS) are registered.
    pub fn register_flb(&mut self, flb: impl Flb + 'static) -> Result<FlbId, Errno> {
        self.check_enabled()?;
        self.registry.flbs.register(Box::new(flb))
    }

    /// Makes every file of a handler depend on a shared object.
    ///
    /// EOPNOTSUPP if live update is disabled. EINVAL if the handler or the object does not exist.
    /// EEXIST if they are bound already. EBUSY if the handler has files.
    pub fn bind_flb(&mut self, handler: HandlerId, flb: FlbId) -> Result<(), Errno> {
        self.check_enabled()?;
        if !self.registry.flbs.contains(flb) {
            return Err(Errno::INVAL);
        }
        self.registry.handlers.bind(handler, flb)
    }

    /// Retrieves a shared object of the previous kernel, unless it is retrieved already.
    ///
    /// EOPNOTSUPP if live update is disabled. ESHUTDOWN after the switch. EINVAL if the object is
    /// not registered. ENOENT if the previous kernel preserved no such object. ENODATA if its last
    /// file is finished. After an error of [`Flb::retrieve`] the call can be repeated.
    pub fn retrieve_flb(&mut self, flb: FlbId) -> Result<(), Errno> {
        self.check_enabled()?;
        self.check_running()?;
        self.registry.flbs.retrieve(flb)
    }

    fn check_enabled(&self) -> Result<(), Errno> {
        if self.is_enabled() { Ok(()) } else { Err(Errno::OPNOTSUPP) }
    }

    /// ESHUTDOWN if all sessions are handed over. The kernel blocks such calls forever instead.
    pub(super) fn check_running(&self) -> Result<(), Errno> {
        if self.handed_over { Err(Errno::SHUTDOWN) } else { Ok(()) }
    }

    pub(super) fn new_session_id(&mut self) -> SessionId {
        self.last_session += 1;
        SessionId(self.last_session)
    }
}
