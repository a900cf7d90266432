//! An array over pages that are not contiguous: `struct kho_vmalloc` and its chunks.
//!
//! A chunk is a page with the address of the next chunk, and up to 511 addresses of the array's
//! pages, followed by a 0 if there are fewer. Linux 7.3 adds a new chunk as soon as one is full: an
//! array of a multiple of 511 pages ends with an empty chunk. Reading accepts arrays with and
//! without the empty chunk. Source: `kernel/liveupdate/kexec_handover.c`,
//! `include/linux/kho/abi/kexec_handover.h`.

use std::collections::HashSet;

use super::{BlockError, Error, block};
use crate::builtin::tree::memory::{Allocate, Memory, PAGE_BYTES, write_contiguous};

/// Most addresses in one chunk.
pub const CHUNK_PAGES: usize = PAGE_BYTES / 8 - 1;

/// Why an array cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VmallocError {
    /// A page that cannot be read, or occurs twice.
    #[error(transparent)]
    Page(#[from] BlockError),
    /// Another number of pages than the array's record has.
    #[error("the array says {said} pages, its chunks have {found}{}", if *.more { " and more" } else { "" })]
    PageCount {
        /// The number of pages in its record.
        said: u32,
        /// The number of pages in its chunks, as far as they were read.
        found: usize,
        /// Whether more chunks follow.
        more: bool,
    },
    /// Another number of pages than its length needs.
    #[error("the array says {said} pages, {bytes} bytes take {needed}")]
    Length {
        /// The number of pages in its record.
        said: u32,
        /// Length of its contents in bytes.
        bytes: u64,
        /// The number of pages that the bytes need.
        needed: u64,
    },
}

/// Reads the `bytes` bytes of an array whose record has `said` pages.
pub(super) fn read(
    first: u64,
    said: u32,
    bytes: u64,
    memory: &impl Memory,
    seen: &mut HashSet<u64>,
) -> Result<Vec<u8>, VmallocError> {
    let needed = bytes.div_ceil(PAGE_BYTES as u64);
    if u64::from(said) != needed {
        return Err(VmallocError::Length { said, bytes, needed });
    }
    let pages = read_chunks(first, said, memory, seen)?;
    let mut array = Vec::new();
    for address in pages {
        array.extend_from_slice(block::fetch(address, memory, seen)?);
    }
    // `bytes` fits into a usize: the pages that it needs were read into `array`.
    array.truncate(bytes as usize);
    Ok(array)
}

/// Reads the addresses of the array's pages.
fn read_chunks(
    first: u64,
    said: u32,
    memory: &impl Memory,
    seen: &mut HashSet<u64>,
) -> Result<Vec<u64>, VmallocError> {
    let mut pages = Vec::new();
    let mut chunk = first;
    while chunk != 0 {
        let (addresses, _) = block::fetch(chunk, memory, seen)?.as_chunks::<8>();
        let (next, addresses) = addresses.split_at(1);
        let addresses = addresses.iter().map(|address| u64::from_le_bytes(*address));
        let before = pages.len();
        pages.extend(addresses.take_while(|address| *address != 0));
        let more = next != [[0; 8]];
        let full = pages.len() - before == CHUNK_PAGES;
        if pages.len() as u64 > u64::from(said) || (more && !full) {
            return Err(VmallocError::PageCount { said, found: pages.len(), more });
        }
        chunk = next.first().map_or(0, |next| u64::from_le_bytes(*next));
    }
    if pages.len() as u64 == u64::from(said) {
        Ok(pages)
    } else {
        Err(VmallocError::PageCount { said, found: pages.len(), more: false })
    }
}

/// Writes an array. Returns the address of its first chunk, and its number of pages.
pub(super) fn write(array: &[u8], memory: &mut impl Allocate) -> Result<(u64, u32), Error> {
    let full = || Error::Encode { problem: "there is no page left".to_owned() };
    let mut pages = Vec::new();
    for page in array.chunks(PAGE_BYTES) {
        pages.push(block::store(page, memory)?.to_le_bytes());
    }
    let total = u32::try_from(pages.len()).map_err(|_| full())?;
    // As in the kernel, another chunk follows a full one, even if it is empty.
    let mut next = 0_u64;
    for index in (0..=pages.len() / CHUNK_PAGES).rev() {
        let start = index * CHUNK_PAGES;
        let end = pages.len().min(start + CHUNK_PAGES);
        let address = memory.allocate(1).ok_or_else(full)?;
        let mut chunk = next.to_le_bytes().to_vec();
        chunk.extend(pages[start..end].as_flattened());
        write_contiguous(memory, address, &chunk).ok_or_else(full)?;
        next = address;
    }
    Ok((next, total))
}

/// Returns the addresses of an array's chunks, for tests that damage them.
#[cfg(test)]
pub(super) fn chunks(first: u64, memory: &impl Memory) -> Vec<u64> {
    let mut found = Vec::new();
    let mut chunk = first;
    while chunk != 0 {
        found.push(chunk);
        chunk = memory.page(chunk).map_or(0, |page| super::u64_at(page, 0));
    }
    found
}
