//! Moves bytes between a file and guest memory, in one system call for all pieces of a request and
//! without a buffer between them.

#![expect(unsafe_code, reason = "the kernel reads and writes guest memory through raw addresses")]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::Image;

/// Returns the size of a file or a block device, in bytes.
pub(super) fn size(file: &File) -> io::Result<u64> {
    // Block devices have no length in their metadata; their end can be sought.
    (&mut &*file).seek(SeekFrom::End(0))
}

/// Pieces of guest memory, with the mapping of that memory, which stays as long as they do.
#[derive(Debug)]
pub(super) struct Pieces {
    iovecs: Vec<libc::iovec>,
    /// The first of `iovecs` that is not done.
    first: usize,
    _memory: Arc<GuestMemoryMmap>,
}

// SAFETY: the addresses are of guest RAM, which `_memory` keeps mapped and which no thread owns: the
// guest may change it at any time, so nothing relies on what is in it.
unsafe impl Send for Pieces {}

impl Pieces {
    /// The pieces `slices` of `memory`.
    pub(super) fn new(memory: &Arc<GuestMemoryMmap>, slices: &[VolatileSlice<'_>]) -> Self {
        let iovec = |slice: &VolatileSlice<'_>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        Self { iovecs: slices.iter().map(iovec).collect(), first: 0, _memory: memory.clone() }
    }

    /// The pieces that are left, as the kernel wants them. Valid as long as `self` is not changed or
    /// dropped; moving it does no harm.
    pub(super) fn left(&self) -> &[libc::iovec] {
        &self.iovecs[self.first..]
    }

    /// Takes `count` bytes off the front.
    pub(super) fn advance(&mut self, mut count: usize) {
        while let Some(iovec) = self.iovecs.get_mut(self.first).filter(|_| count > 0) {
            let done = count.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(done);
            iovec.iov_len -= done;
            count -= done;
            if iovec.iov_len == 0 {
                self.first += 1;
            }
        }
    }
}

/// A read or a write of a disk: between the bytes of the file from `offset` on and `pieces`.
#[derive(Debug)]
pub(super) struct Transfer {
    /// Whether the file is written; otherwise it is read.
    pub(super) write: bool,
    /// Where the rest of the data is in guest memory.
    pub(super) pieces: Pieces,
    /// Where the rest of the data is in the file, in bytes.
    pub(super) offset: u64,
    /// Length of the rest, in bytes.
    pub(super) rest: u64,
    /// Length of all data, in bytes.
    pub(super) bytes: u64,
    /// Whether it goes through the page cache although the disk has `direct=on`.
    pub(super) cached: bool,
}

impl Transfer {
    /// Counts `count` bytes as moved. Returns whether all are; errors if `count` is 0, which is the end
    /// of the file.
    pub(super) fn advance(&mut self, count: usize) -> io::Result<bool> {
        if count == 0 && self.rest > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.pieces.advance(count);
        self.offset += count as u64;
        self.rest = self.rest.saturating_sub(count as u64);
        Ok(self.rest == 0)
    }

    /// Moves bytes with one system call, with `flags` of preadv2(2). Returns how many.
    pub(super) fn step(&self, image: &Image, flags: libc::c_int) -> io::Result<usize> {
        let cached = image.cached.as_ref().filter(|_| self.cached);
        let (fd, pieces) = (cached.unwrap_or(&image.file).as_raw_fd(), self.pieces.left());
        let count = pieces.len() as libc::c_int;
        let offset = libc::off_t::try_from(self.offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let moved = match self.write {
            // SAFETY: `fd` is open as long as `image`, and `pieces` are mapped memory of the guest as
            // long as `self`, both of which are borrowed here. The kernel reads them.
            true => unsafe { libc::pwritev2(fd, pieces.as_ptr(), count, offset, flags) },
            // SAFETY: as above, and the kernel writes them.
            false => unsafe { libc::preadv2(fd, pieces.as_ptr(), count, offset, flags) },
        };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }
}
