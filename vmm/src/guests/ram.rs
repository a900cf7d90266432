//! Creates and checks guest RAM. The LUO backend that carries it decides what kind of file it is.

use std::io;
use std::os::fd::OwnedFd;

use guest_mem::{Segment, check_segment_of, create_segment};
use luo::Orchestrator;

use crate::link::Ram;

/// A segment cannot be created, or a file cannot be used as a segment.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// LUO cannot create the memory.
    #[error(transparent)]
    Create(#[from] luo::Error),
    /// The file cannot be used as guest RAM, or the memfd cannot be created.
    #[error(transparent)]
    Unfit(#[from] guest_mem::Error),
}

/// Creates guest RAM that this host's LUO can carry, or plain memfds if the host has no LUO.
#[derive(Clone, Copy)]
pub struct RamSource<'a> {
    luo: Option<&'a dyn Orchestrator>,
    promised: u64,
}

impl<'a> RamSource<'a> {
    /// The source of guest RAM for this LUO.
    pub fn new(luo: Option<&'a dyn Orchestrator>) -> Self {
        Self { luo, promised: 0 }
    }

    /// The same source, with `bytes` of the host's memory reserved for guests that have not touched
    /// them yet.
    pub fn with_promised(self, bytes: u64) -> Self {
        Self { promised: bytes, ..self }
    }

    /// Bytes of the host's memory that existing guests have not touched yet but may take at any time.
    pub fn promised(self) -> u64 {
        self.promised
    }

    /// Kind of file of the segments.
    pub fn kind(self) -> Ram {
        match self.luo.is_some_and(|luo| luo.backend().memory_is_dax_files()) {
            true => Ram::DaxFile,
            false => Ram::Memfd,
        }
    }

    /// Creates segment `index` of the VM called `name`, of `len` bytes.
    pub fn create(self, name: &str, index: usize, len: u64) -> Result<Segment, RamError> {
        match self.luo {
            Some(luo) => Ok(self.take(index, luo.create_memory(name, len)?, len)?),
            None => Ok(create_segment(name, len)?),
        }
    }

    /// Checks a retrieved fd and returns it as segment `index` of `len` bytes.
    pub fn take(self, index: usize, fd: OwnedFd, len: u64) -> Result<Segment, guest_mem::Error> {
        check_segment_of(self.kind().into(), index, fd, len)
    }
}

/// Returns the bytes without memory of a segment that LUO will fill when it preserves the segment: none if the guest has
/// not touched the segment, because then it is not preserved.
pub fn filled_bytes(segment: &Segment) -> io::Result<u64> {
    match guest_mem::is_touched(segment)? {
        true => guest_mem::untouched_bytes(segment),
        false => Ok(0),
    }
}

/// Returns the bytes of this host's memory that are available without swapping.
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
        // The files of this pool have no DAX, so they are refused as guest RAM.
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
