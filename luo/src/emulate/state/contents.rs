//! The contents of a memfd, there and back, with holes.
//!
//! Contents are what they are page by page: a page that is all zero is a hole in the copy, whether it
//! was one or not, and the sum is over the other pages and where they are. So the sum does not
//! depend on what a file system makes of holes, and holes cost nothing.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{
    MemfdFlags, Mode, SealFlags, SeekFrom, fchmod, fcntl_add_seals, memfd_create, seek,
};
use rustix::io::Errno;

use super::index::Entry;

const PAGE: usize = 4096;
/// How much is read at once.
const CHUNK: usize = 256 * PAGE;

/// Copies `size` bytes to an empty file, and returns their sum. Moves the position of `from`.
pub(super) fn copy(from: &File, to: &File, size: u64) -> io::Result<u32> {
    to.set_len(size)?;
    let mut sum = crc32fast::Hasher::new();
    let mut buffer = vec![0; CHUNK.min(size.div_ceil(PAGE as u64) as usize * PAGE)];
    let mut at = 0;
    while let Some((start, end)) = next_data(from, at, size)? {
        at = start;
        while at < end {
            let length = (end - at).min(buffer.len() as u64) as usize;
            let chunk = &mut buffer[..length];
            from.read_exact_at(chunk, at)?;
            copy_pages(chunk, to, at, &mut sum)?;
            at += length as u64;
        }
    }
    Ok(sum.finalize())
}

/// The next stretch of data at or behind `at`, widened to whole pages.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    const MASK: u64 = PAGE as u64 - 1;
    if at >= size {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start & !MASK,
        // A hole up to the end.
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let end = seek(file, SeekFrom::Hole(start.max(at)))?;
    let end = end.checked_next_multiple_of(PAGE as u64).unwrap_or(size);
    Ok((start.max(at) < size).then(|| (start.max(at), end.min(size))))
}

fn copy_pages(chunk: &[u8], to: &File, at: u64, sum: &mut crc32fast::Hasher) -> io::Result<()> {
    for (index, page) in chunk.chunks(PAGE).enumerate() {
        if page.iter().all(|byte| *byte == 0) {
            continue;
        }
        let place = at + (index * PAGE) as u64;
        sum.update(&place.to_le_bytes());
        sum.update(page);
        to.write_all_at(page, place)?;
    }
    Ok(())
}

/// An empty memfd for contents that come back. Its name is lost, as it is on Linux.
pub(super) fn memfd() -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = match memfd_create("", flags | MemfdFlags::EXEC) {
        // Linux before 6.3 does not know the flag.
        Err(Errno::INVAL) => memfd_create("", flags)?,
        memfd => memfd?,
    };
    Ok(memfd.into())
}

/// Gives a memfd with its contents back what else belongs to it: first the mode, because a seal of
/// the mode means more on a file that can be executed.
pub(super) fn dress(memfd: &File, entry: &Entry) -> io::Result<()> {
    fchmod(memfd, Mode::from_bits_retain(entry.mode))?;
    if entry.seals != SealFlags::empty() {
        fcntl_add_seals(memfd, entry.seals)?;
    }
    Ok(())
}
