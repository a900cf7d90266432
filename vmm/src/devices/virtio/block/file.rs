//! Positioned I/O between a file and guest memory, without a buffer between them.

#![expect(unsafe_code, reason = "the kernel reads and writes guest memory through raw addresses")]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;

/// Size of a file or a block device, in bytes.
pub(super) fn size(file: &File) -> io::Result<u64> {
    // Block devices have no length in their metadata; their end can be sought.
    (&mut &*file).seek(SeekFrom::End(0))
}

/// Fills `memory` from `file` at `offset`. An end of the file before that is an error.
pub(super) fn read(file: &File, memory: &VolatileSlice<'_>, offset: u64) -> io::Result<()> {
    transfer(memory.len(), offset, |done, offset| {
        let guard = memory.ptr_guard_mut();
        let fd = file.as_raw_fd();
        let rest = memory.len() - done;
        let place = guard.as_ptr().wrapping_add(done).cast();
        // SAFETY: `rest` bytes at `place` are the end of the slice, which stays mapped while the
        // guard lives. The guest may write there at the same time; nothing relies on the contents.
        unsafe { libc::pread(fd, place, rest, offset) }
    })
}

/// Writes `memory` to `file` at `offset`.
pub(super) fn write(file: &File, memory: &VolatileSlice<'_>, offset: u64) -> io::Result<()> {
    transfer(memory.len(), offset, |done, offset| {
        let guard = memory.ptr_guard();
        let fd = file.as_raw_fd();
        let rest = memory.len() - done;
        let place = guard.as_ptr().wrapping_add(done).cast();
        // SAFETY: as above, and the kernel only reads.
        unsafe { libc::pwrite(fd, place, rest, offset) }
    })
}

/// Repeats `step(done, offset)` until `len` bytes are done.
fn transfer(
    len: usize,
    offset: u64,
    mut step: impl FnMut(usize, libc::off_t) -> isize,
) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let at = offset.checked_add(done as u64).and_then(|at| libc::off_t::try_from(at).ok());
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        match step(done, at) {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count if count > 0 => done += count as usize,
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
