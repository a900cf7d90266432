//! The backends: how each is asked, and how it gets from one generation to the next.

use std::convert::Infallible;
use std::os::fd::OwnedFd;

use luo::builtin::keeper::Keeper;
use luo::builtin::pool::{Options, Pool};
use luo::builtin::{HandOverError, Luo, OpenFile, SessionId};
use luo::{Errno, Error};
use tempfile::TempDir;

/// What a request does to the machine.
pub(crate) type Act<'a, T> = &'a mut dyn FnMut(&mut Luo<OpenFile>) -> Result<T, Errno>;

/// One backend.
pub(crate) trait Backend {
    fn with_machine<T>(&self, act: Act<'_, T>) -> Result<T, Errno>;

    fn open_session(&self, session: SessionId) -> Result<OwnedFd, Errno>;

    /// Hands over, lets everything else end, and arrives.
    fn switch(&mut self, end: &mut dyn FnMut()) -> Result<(), Errno>;

    fn liveupdate_number(&self) -> u64;
}

fn errno(error: &Error) -> Errno {
    error.errno().expect("live update is enabled")
}

/// A process that keeps the fds.
pub(crate) struct KeeperBackend(Keeper);

impl KeeperBackend {
    pub(crate) fn new() -> Self {
        Self(Keeper::start())
    }
}

impl Backend for KeeperBackend {
    fn with_machine<T>(&self, act: Act<'_, T>) -> Result<T, Errno> {
        self.0.with_machine(act)
    }

    fn open_session(&self, session: SessionId) -> Result<OwnedFd, Errno> {
        self.0.open_session(session)
    }

    fn switch(&mut self, end: &mut dyn FnMut()) -> Result<(), Errno> {
        let handover = self.0.clone().switch().map_err(|refused| errno(&refused.error))?;
        end();
        self.0 = Keeper::arrive(handover).expect("nothing happened to it on its way");
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
        let directory = directory.expect("there is room for a pool");
        let pool = Some(Self::start(&directory));
        Self { directory, pool }
    }

    fn start(directory: &TempDir) -> Pool {
        let options = Options { reserve_bytes: 0, without_dax: true, ..Options::default() };
        let pool = Pool::start(directory.path(), &options).expect("it is a good directory");
        assert_eq!(pool.disabled(), None);
        pool
    }

    fn pool(&self) -> &Pool {
        self.pool.as_ref().expect("there is one between switches")
    }
}

impl Backend for PoolBackend {
    fn with_machine<T>(&self, act: Act<'_, T>) -> Result<T, Errno> {
        self.pool().with_machine(act)
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
