//! The backends under test, with their steps between generations.

use std::convert::Infallible;
use std::os::fd::OwnedFd;

use luo::builtin::HandOverError;
use luo::builtin::keeper::{Handover, Keeper};
use luo::builtin::pool::{Options, Pool};
use luo::{Errno, Orchestrator};
use tempfile::TempDir;

/// A backend under test.
pub(crate) trait Subject {
    /// Whether incoming sessions survive a crash of the host.
    const SURVIVES_A_CRASH: bool;

    fn new() -> Self;
    fn orchestrator(&self) -> &dyn Orchestrator;
    /// Creates a file that can be preserved. `object` selects its kind.
    fn file(&self, object: u32) -> OwnedFd;
    /// Hands all outgoing sessions over. The process ends afterwards.
    fn leave(&mut self) -> Result<(), Errno>;
    /// Tries a handover that the next kernel or host does not take.
    fn leave_in_vain(&self);
    /// Starts the next generation.
    fn arrive(&mut self);
    /// Crashes the host and starts it again.
    fn crash(&mut self);
    /// Removes files that are no longer used.
    fn collect(&self);
    /// Removes unused files and returns the number of the others. `None` if the backend cannot
    /// count.
    fn file_count(&self) -> Option<usize>;
    fn liveupdate_number(&self) -> u64;
}

pub(crate) struct KeeperSubject {
    keeper: Keeper,
    handover: Option<Handover>,
}

impl Subject for KeeperSubject {
    const SURVIVES_A_CRASH: bool = false;

    fn new() -> Self {
        Self { keeper: Keeper::start(), handover: None }
    }

    fn orchestrator(&self) -> &dyn Orchestrator {
        &self.keeper
    }

    fn file(&self, object: u32) -> OwnedFd {
        match object % 2 {
            0 => self.keeper.create_memory("file", 4096).unwrap(),
            _ => tempfile::tempfile().unwrap().into(),
        }
    }

    fn leave(&mut self) -> Result<(), Errno> {
        let handover = self.keeper.clone().switch().map_err(|e| e.error.errno().unwrap())?;
        self.handover = Some(handover);
        Ok(())
    }

    fn leave_in_vain(&self) {
        let answer = self.keeper.hand_over(|_| Err::<(), _>(()));
        assert!(matches!(answer, Err(HandOverError::NotTaken(()))));
    }

    fn arrive(&mut self) {
        self.keeper = Keeper::arrive(self.handover.take().unwrap()).unwrap();
    }

    fn crash(&mut self) {}

    fn collect(&self) {}

    fn file_count(&self) -> Option<usize> {
        None
    }

    fn liveupdate_number(&self) -> u64 {
        self.keeper.liveupdate_number()
    }
}

pub(crate) struct PoolSubject {
    directory: TempDir,
    pool: Option<Pool>,
}

impl PoolSubject {
    fn pool(&self) -> &Pool {
        self.pool.as_ref().unwrap()
    }
}

impl Subject for PoolSubject {
    const SURVIVES_A_CRASH: bool = true;

    fn new() -> Self {
        let directory = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap();
        let mut subject = Self { directory, pool: None };
        subject.arrive();
        subject
    }

    fn orchestrator(&self) -> &dyn Orchestrator {
        self.pool()
    }

    /// Memory in the pool, or a memfd that the pool copies.
    fn file(&self, object: u32) -> OwnedFd {
        match object % 2 {
            0 => self.pool().create_memory("file", 4096).unwrap(),
            _ => {
                let flags = rustix::fs::MemfdFlags::CLOEXEC;
                rustix::fs::memfd_create("file", flags).unwrap()
            }
        }
    }

    fn leave(&mut self) -> Result<(), Errno> {
        match self.pool().hand_over(|| Ok::<_, Infallible>(())) {
            Ok(()) => Ok(()),
            Err(HandOverError::Refused(error)) => Err(error.errno().unwrap()),
        }
    }

    fn leave_in_vain(&self) {
        let answer = self.pool().hand_over(|| Err::<(), _>(()));
        assert!(matches!(answer, Err(HandOverError::NotTaken(()))));
    }

    fn arrive(&mut self) {
        self.pool = None;
        let options = Options { reserve_bytes: 0, without_dax: true, ..Options::default() };
        let pool = Pool::start(self.directory.path(), &options).unwrap();
        assert_eq!(pool.disabled(), None);
        self.pool = Some(pool);
    }

    fn crash(&mut self) {
        self.arrive();
    }

    fn collect(&self) {
        self.pool().collect();
    }

    fn file_count(&self) -> Option<usize> {
        self.pool().collect();
        Some(std::fs::read_dir(self.directory.path().join("files")).unwrap().count())
    }

    fn liveupdate_number(&self) -> u64 {
        self.pool().liveupdate_number()
    }
}
