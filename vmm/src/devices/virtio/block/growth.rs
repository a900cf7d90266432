//! The size of a disk's storage, from which the disk takes its own while its guest runs.

use std::io;

use rustix::fs::{FallocateFlags, FileType, fallocate, fstat};

use super::{BlockError, SECTOR, Shared, transfer};

impl Shared {
    /// Returns the size of the disk's file or block device, in bytes. Grows a file to `wanted` bytes before that.
    /// Errors if the disk would be smaller than the guest was told.
    pub(super) fn measure(&self, wanted: Option<u64>) -> Result<u64, BlockError> {
        let (path, told) = (|| self.image.path(), self.sectors() * SECTOR);
        if let Some(wanted) = wanted {
            self.grow_file(wanted, told)?;
        }
        let here = transfer::size(&self.image.file);
        let here = here.map_err(|source| BlockError::Size { path: path(), source })?;
        match here < told {
            true => Err(BlockError::Smaller { path: path(), told, here }),
            false => Ok(here),
        }
    }

    fn grow_file(&self, wanted: u64, told: u64) -> Result<(), BlockError> {
        let path = self.image.path();
        let block = self.geometry.block_bytes;
        if wanted < told {
            return Err(BlockError::Shrink { path, told, wanted });
        }
        if !wanted.is_multiple_of(block.into()) {
            return Err(BlockError::NoBlocks { path, wanted, block });
        }
        let size = || -> io::Result<_> {
            let kind = FileType::from_raw_mode(fstat(&self.image.file)?.st_mode);
            Ok((transfer::size(&self.image.file)?, kind))
        };
        match size().map_err(|source| BlockError::Size { path: path.clone(), source })? {
            (here, _) if here >= wanted => Ok(()),
            (here, kind) if kind != FileType::RegularFile => {
                Err(BlockError::NoFile { path, here, wanted })
            }
            // Its last block is allocated and no other. This never makes a file smaller, as ftruncate(2) could.
            (_, _) => fallocate(&self.image.file, FallocateFlags::empty(), wanted - 1, 1)
                .map_err(|errno| BlockError::Grow { path, wanted, source: errno.into() }),
        }
    }
}
