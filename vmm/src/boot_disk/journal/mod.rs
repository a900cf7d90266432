//! The journal of an ext4 file system that was not unmounted, as after a power failure.
//!
//! The newest contents of some blocks are then only in the journal, and Linux copies them to their places before it
//! mounts. The disk is not written here: [`replay`] returns a view in which those blocks have their contents of
//! the journal and the superblock says that nothing is left to do. `ext4-view` could read a journal too, but it
//! keeps blocks that a later transaction revokes (and so shows old metadata in place of a file's data), stops at
//! the end of a journal that goes on at its beginning, and refuses journals without checksums.
//!
//! ```text
//!   superblock --inode--> where the journal is --log--> committed blocks --replay--> view with an overlay
//! ```

mod inode;
mod log;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;

use super::partitions::u32_at;
use super::view::{Overlay, View};

/// Largest blocks that ext4 has.
const BLOCK_MAX: u64 = 64 << 10;
/// Where the superblock of ext4 begins, and its length.
const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_LENGTH: usize = 1024;
/// `s_feature_incompat`, and in it: the journal has to be replayed.
const INCOMPAT: usize = 0x60;
const RECOVER: u32 = 0x4;
/// `s_feature_ro_compat`, and in it: metadata has checksums, the superblock's in its last four bytes.
const RO_COMPAT: usize = 0x64;
const METADATA_CSUM: u32 = 0x400;
const CHECKSUM: usize = 0x3fc;

/// CRC-32C as ext4 stores it: without the inversion at the end.
const CRC32C: crc::Algorithm<u32> = crc::Algorithm { xorout: 0, ..crc::CRC_32_ISCSI };
const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&CRC32C);

/// A journal cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub(super) enum JournalError {
    #[error("the disk cannot be read")]
    Read(#[from] io::Error),
    #[error("{0}")]
    Damaged(&'static str),
    #[error("the journal is on another device")]
    Elsewhere,
    #[error("the journal has the features {0:#x}, which cannot be read here")]
    Features(u32),
    #[error("the journal has fast commits, which cannot be read here")]
    FastCommits,
    #[error("the journal has more than {0}")]
    TooMuch(&'static str),
}

use JournalError as Error;

/// Returns the file system that begins at the first byte of `view` as it is after its journal was replayed.
pub(super) fn replay(mut view: View) -> Result<View, Error> {
    let mut superblock = vec![0; SUPERBLOCK_LENGTH];
    view.read_exact_at(SUPERBLOCK, &mut superblock)?;
    if u32_at(&superblock, INCOMPAT) & RECOVER == 0 {
        return Ok(view);
    }
    let block_size = block_size(&superblock)?;
    let runs = inode::journal(&mut view, &superblock, block_size)?;
    let blocks = log::read(&mut view, &runs, block_size)?;
    let mut overlay = Overlay { block_size, blocks, head: Vec::new() };
    // The superblock may itself be in the journal.
    let mut head = vec![0; SUPERBLOCK as usize + SUPERBLOCK_LENGTH];
    view.again().over(overlay.clone()).read_exact_at(0, &mut head)?;
    settle(&mut head[SUPERBLOCK as usize..]);
    overlay.head = head;
    Ok(view.over(overlay))
}

/// Makes the superblock say that the file system was unmounted.
fn settle(superblock: &mut [u8]) {
    let incompat = u32_at(superblock, INCOMPAT) & !RECOVER;
    superblock[INCOMPAT..INCOMPAT + 4].copy_from_slice(&incompat.to_le_bytes());
    if u32_at(superblock, RO_COMPAT) & METADATA_CSUM != 0 {
        let checksum = CRC.checksum(&superblock[..CHECKSUM]);
        superblock[CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
    }
}

fn block_size(superblock: &[u8]) -> Result<u64, Error> {
    let size = 1024_u64.checked_shl(u32_at(superblock, 0x18)).unwrap_or(0);
    match (1024..=BLOCK_MAX).contains(&size) {
        true => Ok(size),
        false => Err(Error::Damaged("its blocks are larger than 64 KiB")),
    }
}

/// Where the newest contents of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Copied {
    /// First byte of the copy in the journal, in the view.
    from: u64,
    /// The first four bytes, the journal's own mark, were replaced by zeroes in the journal.
    escaped: bool,
}

/// The blocks of a file system whose newest contents are in the journal.
pub(super) type Copies = BTreeMap<u64, Copied>;

impl Copied {
    /// Reads the block from the journal.
    pub(super) fn read(self, view: &mut View, block: &mut [u8]) -> io::Result<()> {
        view.read_exact_at(self.from, block)?;
        if self.escaped {
            block[..4].copy_from_slice(&log::MAGIC.to_be_bytes());
        }
        Ok(())
    }
}

/// The runs of blocks that a file consists of: each the number of its first block on the disk, and its length.
#[derive(Debug, Default)]
struct Runs(Vec<(u64, u64)>);

impl Runs {
    /// Adds blocks behind those that are there.
    fn push(&mut self, first: u64, length: u64) {
        match self.0.last_mut() {
            Some((last, count)) if last.checked_add(*count) == Some(first) => *count += length,
            _ => self.0.push((first, length)),
        }
    }

    fn blocks(&self) -> u64 {
        self.0.iter().fold(0, |sum: u64, (_, length)| sum.saturating_add(*length))
    }

    /// The block on the disk of the file's block `index`.
    fn get(&self, mut index: u64) -> Option<u64> {
        for (first, length) in &self.0 {
            if index < *length {
                return first.checked_add(index);
            }
            index -= length;
        }
        None
    }
}

/// Reads a block of the file system.
fn read_block(view: &mut View, number: u64, block: &mut [u8]) -> Result<(), Error> {
    let at = number.checked_mul(block.len() as u64);
    Ok(view.read_exact_at(at.unwrap_or(u64::MAX), block)?)
}
