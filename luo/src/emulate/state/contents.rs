//! The contents of memfds, there and back, with holes.
//!
//! Contents are whole pages, the last one filled up with zeros, one memfd after the other in a file.
//! A page that is all zero is a hole in the copy, whether it was one or not, and the sum is over the
//! other pages and where they are. So the sum does not depend on what a file system makes of holes,
//! and holes cost nothing.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, Mode, SealFlags, SeekFrom, fchmod, fcntl_add_seals, seek};
use rustix::io::Errno;

use super::index::Entry;
use crate::memory::executable_memfd;

const PAGE: u64 = 4096;
/// How many pages are read at once.
const CHUNK_PAGES: u64 = 256;

/// How much room contents take; `None` if it is more than there can be.
pub(super) fn room(size: u64) -> Option<u64> {
    size.checked_next_multiple_of(PAGE)
}

/// A stretch of a file that starts at a page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) file: &'a File,
    pub(super) start: u64,
    /// Where what is in it ends; behind it are zeros to the end of the page.
    pub(super) end: u64,
}

/// Copies contents to where there are only holes, and returns their sum. Moves the position of
/// `from`.
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

/// The next stretch of data at or behind `at`, widened to whole pages.
fn next_data(part: Part<'_>, at: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= part.end {
        return Ok(None);
    }
    let start = match seek(part.file, SeekFrom::Data(at)) {
        Ok(start) => at.max(start - start % PAGE),
        // A hole up to the end.
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if start >= part.end {
        return Ok(None);
    }
    let end = seek(part.file, SeekFrom::Hole(start))?;
    Ok(Some((start, room(end).unwrap_or(end).min(part.end))))
}

/// Copies whole pages to where `offset` is in `to`.
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

/// Makes a memfd of contents that come back; says their sum, too.
pub(super) fn load(from: Part<'_>, entry: &Entry) -> io::Result<(File, u32)> {
    let memfd = memfd()?;
    memfd.set_len(entry.size)?;
    let sum = copy(from, Part { file: &memfd, start: 0, end: entry.size })?;
    // First the mode: a seal of the mode means more on a file that can be executed.
    fchmod(&memfd, Mode::from_bits_retain(entry.mode))?;
    if entry.seals != SealFlags::empty() {
        fcntl_add_seals(&memfd, entry.seals)?;
    }
    Ok((memfd, sum))
}

/// An empty memfd. The name of the old one is lost, as it is on Linux.
fn memfd() -> io::Result<File> {
    Ok(executable_memfd("", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into())
}
