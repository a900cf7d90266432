//! An array over pages that are not side by side: `struct kho_vmalloc` and its chunks.
//!
//! A chunk is a page: where the next one is, and up to 511 addresses of the array's pages, ended by
//! a 0 if there are fewer. Linux 7.3 begins a new chunk when one is full, so that an array of
//! a multiple of 511 pages ends with an empty chunk; reading takes it or leaves it.
//! Source: `kernel/liveupdate/kexec_handover.c`, `include/linux/kho/abi/kexec_handover.h`.

use std::collections::HashSet;

use super::{BlockError, Error, block};
use crate::builtin::tree::memory::{Allocate, Memory, PAGE_BYTES, write_contiguous};

/// Addresses in one chunk.
pub const CHUNK_PAGES: usize = PAGE_BYTES / 8 - 1;

/// Why an array cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VmallocError {
    /// A page of it is not there, or there twice.
    #[error(transparent)]
    Page(#[from] BlockError),
    /// Not as many pages as it says.
    #[error("the array says {said} pages, its chunks have {found}{}", if *.more { " and more" } else { "" })]
    PageCount {
        /// What it says.
        said: u32,
        /// What its chunks have, as far as they were read.
        found: usize,
        /// Whether they go on.
        more: bool,
    },
    /// Not as many pages as its length needs.
    #[error("the array says {said} pages, {bytes} bytes take {needed}")]
    Length {
        /// What it says.
        said: u32,
        /// Bytes of what is in it.
        bytes: u64,
        /// Pages that they take.
        needed: u64,
    },
}

/// Reads the `bytes` bytes of an array that says it has `said` pages.
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
    // As many pages as `bytes` takes, so that it is not more than a usize.
    array.truncate(bytes as usize);
    Ok(array)
}

/// The addresses of the array's pages.
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

/// Writes an array, and says where its first chunk is and how many pages it has.
pub(super) fn write(array: &[u8], memory: &mut impl Allocate) -> Result<(u64, u32), Error> {
    let full = || Error::Encode { problem: "there is no page left".to_owned() };
    let mut pages = Vec::new();
    for page in array.chunks(PAGE_BYTES) {
        pages.push(block::store(page, memory)?.to_le_bytes());
    }
    let total = u32::try_from(pages.len()).map_err(|_| full())?;
    // As the kernel does it: a full chunk is followed by another one, empty if need be.
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

/// The chunks of an array, for tests that damage them.
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
