//! Copies the contents of memfds to and from a file, with holes.
//!
//! The file has the memfds one after another, each in whole pages; the last page is padded with
//! zeros. A page of zeros becomes a hole in the copy. The checksum covers the other pages and their
//! offsets, so the sum does not depend on how a file system stores holes, and holes take neither
//! time nor space.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, Mode, SealFlags, SeekFrom, fchmod, fcntl_add_seals, seek};
use rustix::io::Errno;

use super::index::Entry;
use crate::memory::executable_memfd;

const PAGE: u64 = 4096;
/// Number of pages per read.
const CHUNK_PAGES: u64 = 256;

/// Returns the space that contents of `size` bytes take in the file, in bytes. `None` on overflow.
pub(super) fn room(size: u64) -> Option<u64> {
    size.checked_next_multiple_of(PAGE)
}

/// A range of a file that starts at a page boundary.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) file: &'a File,
    /// Offset in bytes.
    pub(super) start: u64,
    /// Offset of the end in bytes. Zeros follow up to the end of the page.
    pub(super) end: u64,
}

/// Copies contents to a range that has only holes, and returns their checksum. Moves the file
/// position of `from`.
pub(super) fn copy(from: Part<'_>, to: Part<'_>) -> io::Result<u32> {
    let mut sum = crc32fast::Hasher::new();
    let pages = (from.end - from.start).div_ceil(PAGE).min(CHUNK_PAGES);
    let mut buffer = vec![0; (pages * PAGE) as usize];
    let mut at = from.start;
    while let Some((start, end)) = next_data(from, at)? {
        at = start;
        while at < end {
            let length = (end - at).min(buffer.len() as u64) as usize;
            from.file.read_exact_at(&mut buffer[..length], at)?;
            let filled = length.next_multiple_of(PAGE as usize);
            buffer[length..filled].fill(0);
            copy_pages(&buffer[..filled], at - from.start, to, &mut sum)?;
            at += filled as u64;
        }
    }
    Ok(sum.finalize())
}

/// Returns the start and end of the next data at or behind `at`, rounded to whole pages.
fn next_data(part: Part<'_>, at: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= part.end {
        return Ok(None);
    }
    let start = match seek(part.file, SeekFrom::Data(at)) {
        Ok(start) => at.max(start - start % PAGE),
        // ENXIO: only a hole follows.
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if start >= part.end {
        return Ok(None);
    }
    let end = seek(part.file, SeekFrom::Hole(start))?;
    Ok(Some((start, room(end).unwrap_or(end).min(part.end))))
}

/// Copies whole pages to `offset` in `to`, except pages of zeros, and adds them to the checksum.
fn copy_pages(
    pages: &[u8],
    offset: u64,
    to: Part<'_>,
    sum: &mut crc32fast::Hasher,
) -> io::Result<()> {
    for (page, offset) in pages.chunks(PAGE as usize).zip((offset..).step_by(PAGE as usize)) {
        if page.iter().all(|byte| *byte == 0) {
            continue;
        }
        sum.update(&offset.to_le_bytes());
        sum.update(page);
        let place = to.start + offset;
        let wanted = to.end.saturating_sub(place).min(PAGE) as usize;
        to.file.write_all_at(&page[..wanted], place)?;
    }
    Ok(())
}

/// Creates a memfd from saved contents. Returns it and the checksum of the contents.
pub(super) fn load(from: Part<'_>, entry: &Entry) -> io::Result<(File, u32)> {
    let memfd = memfd()?;
    memfd.set_len(entry.size)?;
    let sum = copy(from, Part { file: &memfd, start: 0, end: entry.size })?;
    // The mode is set before the seals: F_SEAL_EXEC freezes the execute bits, and on an executable
    // file adds further seals.
    fchmod(&memfd, Mode::from_bits_retain(entry.mode))?;
    if entry.seals != SealFlags::empty() {
        fcntl_add_seals(&memfd, entry.seals)?;
    }
    Ok((memfd, sum))
}

/// Creates an empty memfd. The name of the old memfd is lost, as on Linux.
fn memfd() -> io::Result<File> {
    Ok(executable_memfd("", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into())
}
