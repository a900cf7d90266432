//! Chains of blocks, the pages that hold records: `struct kho_block_header_ser` and its records.
//!
//! A block is a page with the address of the next block (0 in the last block), the number of its
//! records (from 1 to as many as fit), and the records. Writers fill each block before the next;
//! readers accept blocks that are not full. Source: `kernel/liveupdate/kho_block.c`,
//! `include/linux/kho/abi/block.h` (Linux 7.3).

use std::collections::HashSet;

use super::Error;
use crate::builtin::tree::memory::{Allocate, Memory, PAGE_BYTES, Page, write_contiguous};
use crate::builtin::tree::record::u64_at;

/// Most blocks in a chain.
pub const MAX_BLOCKS: usize = 10_000;

const HEADER_BYTES: usize = 16;

/// The number of records of `record_bytes` bytes that fit in a block.
pub(super) const fn capacity(record_bytes: usize) -> usize {
    (PAGE_BYTES - HEADER_BYTES) / record_bytes
}

/// Why a chain of blocks is not valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// An address that is not a multiple of the page size.
    #[error("{address:#x} is not the address of a page")]
    Alignment {
        /// The address.
        address: u64,
    },
    /// An address without memory.
    #[error("there is no memory at {address:#x}")]
    Missing {
        /// The address.
        address: u64,
    },
    /// A page that occurs in the tree for the second time.
    #[error("the page at {address:#x} is part of the tree twice")]
    Again {
        /// Its address.
        address: u64,
    },
    /// A number of records that is 0, or more than fit.
    #[error("the block at {address:#x} says {count} records, it can have 1 to {most}")]
    Count {
        /// Its address.
        address: u64,
        /// The number of records in its header.
        count: u64,
        /// The number of records that fit.
        most: usize,
    },
    /// More than [`MAX_BLOCKS`] blocks in a chain.
    #[error("the chain goes on after {MAX_BLOCKS} blocks, at {address:#x}")]
    TooLong {
        /// The address of the first block above the limit.
        address: u64,
    },
}

/// Returns the page at `address` and adds it to `seen`. Errors if it is in `seen` already.
pub(super) fn fetch<'a>(
    address: u64,
    memory: &'a impl Memory,
    seen: &mut HashSet<u64>,
) -> Result<&'a Page, BlockError> {
    if !address.is_multiple_of(PAGE_BYTES as u64) {
        return Err(BlockError::Alignment { address });
    }
    let page = memory.page(address).ok_or(BlockError::Missing { address })?;
    if seen.insert(address) { Ok(page) } else { Err(BlockError::Again { address }) }
}

/// Reads all records of the chain that starts at `first`; none if `first` is 0.
pub(super) fn read_chain<const N: usize>(
    first: u64,
    memory: &impl Memory,
    seen: &mut HashSet<u64>,
) -> Result<Vec<[u8; N]>, BlockError> {
    let most = capacity(N);
    let mut records = Vec::new();
    let mut address = first;
    let mut blocks = 0;
    while address != 0 {
        blocks += 1;
        if blocks > MAX_BLOCKS {
            return Err(BlockError::TooLong { address });
        }
        let page = fetch(address, memory, seen)?;
        let (next, count) = (u64_at(page, 0), u64_at(page, 8));
        let fitting = usize::try_from(count).ok().filter(|count| (1..=most).contains(count));
        let count = fitting.ok_or(BlockError::Count { address, count, most })?;
        let (all, _) = page[HEADER_BYTES..].as_chunks::<N>();
        records.extend_from_slice(&all[..count]);
        address = next;
    }
    Ok(records)
}

/// Writes records into a chain of blocks. Returns the address of the first block, or 0 if there are
/// no records.
pub(super) fn write_chain<const N: usize>(
    records: &[[u8; N]],
    memory: &mut impl Allocate,
) -> Result<u64, Error> {
    let blocks = records.len().div_ceil(capacity(N));
    if blocks > MAX_BLOCKS {
        let problem = format!("{} records take {blocks} blocks", records.len());
        return Err(Error::Encode { problem });
    }
    // Last block first: each block has the address of the next.
    let mut next = 0_u64;
    for block in records.chunks(capacity(N)).rev() {
        let mut bytes = next.to_le_bytes().to_vec();
        bytes.extend((block.len() as u64).to_le_bytes());
        bytes.extend(block.as_flattened());
        next = store(&bytes, memory)?;
    }
    Ok(next)
}

/// Writes at most a page of bytes into a new page. Returns its address.
pub(super) fn store(bytes: &[u8], memory: &mut impl Allocate) -> Result<u64, Error> {
    let full = || Error::Encode { problem: "there is no page left".to_owned() };
    let address = memory.allocate(1).ok_or_else(full)?;
    write_contiguous(memory, address, bytes).ok_or_else(full)?;
    Ok(address)
}
