//! Where guest RAM comes from: what it is follows from what carries it over a live update.

use std::io;
use std::os::fd::OwnedFd;

use guest_mem::{Segment, check_segment_of, create_segment};
use luo::Orchestrator;

use crate::link::Ram;

/// A segment cannot be made, or is not what it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// There is no memory for it.
    #[error(transparent)]
    Create(#[from] luo::Error),
    /// It does not do as guest RAM.
    #[error(transparent)]
    Unfit(#[from] guest_mem::Error),
}

/// Makes guest RAM that this host's LUO can carry, or plain memfds if it has none.
#[derive(Clone, Copy)]
pub struct RamSource<'a> {
    luo: Option<&'a dyn Orchestrator>,
    promised: u64,
}

impl<'a> RamSource<'a> {
    /// The source that belongs to this LUO.
    pub fn new(luo: Option<&'a dyn Orchestrator>) -> Self {
        Self { luo, promised: 0 }
    }

    /// The same, with `bytes` of the host's memory promised to guests that have not touched them yet.
    pub fn with_promised(self, bytes: u64) -> Self {
        Self { promised: bytes, ..self }
    }

    /// What guests may still take of the host's memory without having been told so here.
    pub fn promised(self) -> u64 {
        self.promised
    }

    /// What its segments are.
    pub fn kind(self) -> Ram {
        match self.luo.is_some_and(|luo| luo.backend().memory_is_dax_files()) {
            true => Ram::DaxFile,
            false => Ram::Memfd,
        }
    }

    /// A new segment, number `index` of the VM called `name`.
    pub fn create(self, name: &str, index: usize, len: u64) -> Result<Segment, RamError> {
        match self.luo {
            Some(luo) => Ok(self.take(index, luo.create_memory(name, len)?, len)?),
            None => Ok(create_segment(name, len)?),
        }
    }

    /// Takes what was retrieved as a segment.
    pub fn take(self, index: usize, fd: OwnedFd, len: u64) -> Result<Segment, guest_mem::Error> {
        check_segment_of(self.kind().into(), index, fd, len)
    }
}

/// Bytes of this host's memory that are available without swapping.
pub fn available_bytes() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    guest_mem::available_bytes(&text).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use luo::builtin::pool::{Options, Pool};

    use super::*;

    #[test]
    fn a_pool_gives_files_and_everything_else_memfds() {
        let directory = tempfile::tempdir().unwrap();
        let options = Options { without_dax: true, reserve_bytes: 0, ..Options::default() };
        let pool = Pool::start(directory.path(), &options).unwrap();
        let ram = RamSource::new(Some(&pool));
        assert_eq!(ram.kind(), Ram::DaxFile);
        // This pool's files have no DAX, and so are not taken for guest RAM.
        let error = ram.create("web", 0, 2 << 20).unwrap_err().to_string();
        assert!(error.contains("without DAX"), "{error}");

        let none = RamSource::new(None);
        assert_eq!(none.kind(), Ram::Memfd);
        let segment = none.create("web", 0, 2 << 20).unwrap();
        let file = pool.create_memory("web", 2 << 20).unwrap();
        assert!(none.take(0, segment.into(), 2 << 20).is_ok());
        assert!(none.take(0, file, 2 << 20).is_err(), "a file is no memfd");
    }
}
