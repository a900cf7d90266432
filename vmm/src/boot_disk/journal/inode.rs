//! Where the journal is on the disk: the blocks of its inode, by extents or by the older block maps.
//! Offsets are those of the kernel's `struct ext4_super_block`, `ext4_group_desc`, `ext4_inode` and
//! `ext4_extent` (`fs/ext4/ext4.h`, `ext4_extents.h`).

use super::{Error, Runs, View, read_block};
use crate::boot_disk::partitions::{u32_at, u64_at};

/// Most blocks with extents or pointers that are read, and most runs of a journal: one that was made with its file
/// system has a few.
const NODES: usize = 4096;
const RUNS: usize = 1 << 16;
/// `EXT4_EXTENTS_FL` of an inode.
const EXTENTS: u32 = 0x8_0000;
/// Levels of a tree of extents (`EXT4_MAX_EXTENT_DEPTH`).
const DEPTH: u16 = 5;
const EXTENT_MAGIC: u16 = 0xf30a;
/// Longest extent; a longer one has not been written yet.
const EXTENT_MAX: u16 = 1 << 15;
/// Length of `i_block`.
const ROOT: usize = 60;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u32_at(bytes, at) as u16
}

/// Returns the blocks of the journal.
pub(super) fn journal(view: &mut View, superblock: &[u8], block_size: u64) -> Result<Runs, Error> {
    let number = u32_at(superblock, 0xe0);
    if number == 0 {
        return Err(Error::Elsewhere);
    }
    let inode = inode(view, superblock, block_size, number)?;
    let bytes = u64::from(u32_at(&inode, 0x4)) | u64::from(u32_at(&inode, 0x6c)) << 32;
    let mut blocks =
        Blocks { view, block_size, runs: Runs::default(), wanted: bytes / block_size, nodes: 0 };
    let root = &inode[0x28..0x28 + ROOT];
    match u32_at(&inode, 0x20) & EXTENTS {
        0 => blocks.map(root)?,
        _ => blocks.extents(root, DEPTH)?,
    }
    Ok(blocks.runs)
}

/// Reads the inode with this number.
fn inode(
    view: &mut View,
    superblock: &[u8],
    block_size: u64,
    number: u32,
) -> Result<Vec<u8>, Error> {
    let damaged = || Error::Damaged("the inode of its journal is nowhere");
    let wide = u32_at(superblock, 0x60) & 0x80 != 0;
    let descriptor_size = if wide { u64::from(u16_at(superblock, 0xfe)) } else { 32 };
    let inode_size = match u32_at(superblock, 0x4c) {
        0 => 128,
        _ => u64::from(u16_at(superblock, 0x58)),
    };
    let per_group = u32_at(superblock, 0x28);
    let (group, index) = match per_group {
        0 => return Err(damaged()),
        _ => ((number - 1) / per_group, (number - 1) % per_group),
    };
    let descriptors = (u64::from(u32_at(superblock, 0x14)) + 1) * block_size;
    let mut descriptor = [0; 64];
    let length = if wide && descriptor_size >= 64 { 64 } else { 32 };
    let at = descriptors + u64::from(group) * descriptor_size;
    view.read_exact_at(at, &mut descriptor[..length])?;
    let table = u64::from(u32_at(&descriptor, 0x8)) | u64::from(u32_at(&descriptor, 0x28)) << 32;
    let mut inode = vec![0; 128];
    let at =
        table.checked_mul(block_size).and_then(|at| at.checked_add(u64::from(index) * inode_size));
    view.read_exact_at(at.ok_or_else(damaged)?, &mut inode)?;
    Ok(inode)
}

/// The blocks of an inode, while they are collected.
struct Blocks<'v> {
    view: &'v mut View,
    block_size: u64,
    runs: Runs,
    /// Number of blocks by the length of the file.
    wanted: u64,
    nodes: usize,
}

impl Blocks<'_> {
    fn push(&mut self, first: u64, length: u64) -> Result<(), Error> {
        self.runs.push(first, length);
        match self.runs.0.len() > RUNS {
            true => Err(Error::TooMuch("65536 pieces")),
            false => Ok(()),
        }
    }

    fn read(&mut self, number: u64) -> Result<Vec<u8>, Error> {
        self.nodes += 1;
        if self.nodes > NODES {
            return Err(Error::TooMuch("4096 blocks that say where it is"));
        }
        let mut block = vec![0; self.block_size as usize];
        read_block(self.view, number, &mut block)?;
        Ok(block)
    }

    /// Collects the extents of a node. A node is at most `depth` levels above the leaves.
    fn extents(&mut self, node: &[u8], depth: u16) -> Result<(), Error> {
        const DAMAGED: Error = Error::Damaged("the extents of its journal are damaged");
        let (magic, entries, level) = (u16_at(node, 0), u16_at(node, 2), u16_at(node, 6));
        if magic != EXTENT_MAGIC || level > depth {
            return Err(DAMAGED);
        }
        let entries = node.get(12..).unwrap_or_default().chunks_exact(12).take(entries.into());
        for entry in entries {
            let logical = u64::from(u32_at(entry, 0));
            if level > 0 {
                // A child is below its parent, so this ends.
                let child = u64_at(entry, 4) & 0xffff_ffff_ffff;
                let child = self.read(child)?;
                self.extents(&child, level - 1)?;
                continue;
            }
            let length = u16_at(entry, 4);
            let first = u64::from(u32_at(entry, 8)) | u64::from(u16_at(entry, 6)) << 32;
            // A journal has no holes and was written as a whole.
            if length == 0 || length > EXTENT_MAX || logical != self.runs.blocks() {
                return Err(DAMAGED);
            }
            self.push(first, length.into())?;
        }
        Ok(())
    }

    /// Collects the blocks of a map: 12 blocks, and three blocks with pointers of one to three levels.
    fn map(&mut self, root: &[u8]) -> Result<(), Error> {
        for index in 0..12 {
            self.pointer(u32_at(root, index * 4), 0)?;
        }
        for level in 1..=3_u16 {
            self.pointer(u32_at(root, 44 + 4 * usize::from(level)), level)?;
        }
        Ok(())
    }

    fn pointer(&mut self, block: u32, level: u16) -> Result<(), Error> {
        if self.runs.blocks() >= self.wanted {
            return Ok(());
        }
        match (block, level) {
            (0, _) => Err(Error::Damaged("its journal has a hole")),
            (block, 0) => self.push(block.into(), 1),
            (block, level) => {
                let pointers = self.read(block.into())?;
                pointers.chunks_exact(4).try_for_each(|p| self.pointer(u32_at(p, 0), level - 1))
            }
        }
    }
}
