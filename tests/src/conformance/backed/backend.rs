//! The backends: how each takes requests, and how it switches from one generation to the next.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::Path;

use luo::builtin::keeper::Keeper;
use luo::builtin::pool::{Options, Pool, PoolError};
use luo::builtin::{HandOverError, Luo, OpenFile, SessionId};
use luo::{Errno, Error};
use tempfile::TempDir;

use crate::conformance::machine::kernel;
use crate::conformance::profile::{self, Profile};
use crate::conformance::system::Next;

/// The effect of a request on the state machine.
pub(crate) type Act<'a, T> = &'a mut dyn FnMut(&mut Luo<OpenFile>) -> Result<T, Errno>;

/// One backend.
pub(crate) trait Backend: Sync {
    /// What the backend lacks, and where it deviates.
    const PROFILE: &'static Profile;

    fn with_luo<T>(&self, act: Act<'_, T>) -> Result<T, Errno>;

    fn open_session(&self, session: SessionId) -> Result<OwnedFd, Errno>;

    /// Hands over, calls `end` to end all processes, and starts the next generation.
    fn switch(&mut self, end: &mut dyn FnMut()) -> Result<(), Errno>;

    fn liveupdate_number(&self) -> u64;
}

fn errno(error: &Error) -> Errno {
    error.errno().expect("live update is enabled")
}

/// The keeper.
pub(crate) struct KeeperBackend(Keeper);

impl KeeperBackend {
    pub(crate) fn new() -> Self {
        Self(Keeper::start())
    }
}

impl Backend for KeeperBackend {
    const PROFILE: &'static Profile = &profile::KEEPER;

    fn with_luo<T>(&self, act: Act<'_, T>) -> Result<T, Errno> {
        self.0.with_luo(act)
    }

    fn open_session(&self, session: SessionId) -> Result<OwnedFd, Errno> {
        self.0.open_session(session)
    }

    fn switch(&mut self, end: &mut dyn FnMut()) -> Result<(), Errno> {
        let handover = self.0.clone().switch().map_err(|refused| errno(&refused.error))?;
        end();
        self.0 = Keeper::arrive(handover).expect("the handover is unchanged");
        Ok(())
    }

    fn liveupdate_number(&self) -> u64 {
        self.0.liveupdate_number()
    }
}

/// A pool that is a directory, on any filesystem.
pub(crate) struct PoolBackend {
    directory: TempDir,
    pool: Option<Pool>,
}

impl PoolBackend {
    pub(crate) fn new() -> Self {
        let directory = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new());
        let directory = directory.expect("a temporary directory can be created");
        let pool = Some(Self::start(&directory));
        Self { directory, pool }
    }

    fn start(directory: &TempDir) -> Pool {
        let options = Options { reserve_bytes: 0, without_dax: true, ..Options::default() };
        let pool = loop {
            match Pool::start(directory.path(), &options) {
                // A process that another test has just forked holds the last pool's lock until its
                // exec.
                Err(PoolError::InUse { .. }) => std::thread::yield_now(),
                pool => break pool.expect("the directory can hold a pool"),
            }
        };
        assert_eq!(pool.disabled(), None);
        pool
    }

    fn pool(&self) -> &Pool {
        self.pool.as_ref().expect("the pool is absent only during a switch")
    }
}

impl Backend for PoolBackend {
    const PROFILE: &'static Profile = &profile::POOL;

    fn with_luo<T>(&self, act: Act<'_, T>) -> Result<T, Errno> {
        self.pool().with_luo(act)
    }

    fn open_session(&self, session: SessionId) -> Result<OwnedFd, Errno> {
        self.pool().open_session(session)
    }

    fn switch(&mut self, end: &mut dyn FnMut()) -> Result<(), Errno> {
        match self.pool().hand_over(|| Ok::<_, Infallible>(())) {
            Ok(()) => {}
            Err(HandOverError::Refused(error)) => return Err(errno(&error)),
        }
        end();
        self.pool = None;
        self.pool = Some(Self::start(&self.directory));
        Ok(())
    }

    fn liveupdate_number(&self) -> u64 {
        self.pool().liveupdate_number()
    }
}

/// A pool in memory that survives a kexec. Its switch is a kexec.
pub(crate) struct KexecPoolBackend(Pool);

impl KexecPoolBackend {
    pub(crate) fn start(directory: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let pool = Pool::start(directory, &Options::default())?;
        match pool.disabled() {
            None => Ok(Self(pool)),
            Some(disabled) => Err(disabled.into()),
        }
    }
}

impl Backend for KexecPoolBackend {
    const PROFILE: &'static Profile = &profile::POOL;

    fn with_luo<T>(&self, act: Act<'_, T>) -> Result<T, Errno> {
        self.0.with_luo(act)
    }

    fn open_session(&self, session: SessionId) -> Result<OwnedFd, Errno> {
        self.0.open_session(session)
    }

    fn switch(&mut self, _: &mut dyn FnMut()) -> Result<(), Errno> {
        match self.0.hand_over(|| Err::<Infallible, _>(kernel::enter(Next::Kernel))) {
            Ok(never) => match never {},
            Err(HandOverError::Refused(error)) => Err(errno(&error)),
            Err(HandOverError::NotTaken(errno)) => Err(errno),
        }
    }

    fn liveupdate_number(&self) -> u64 {
        self.0.liveupdate_number()
    }
}
