//! The transactions in a journal, in the format of Linux's jbd2 (`include/linux/jbd2.h`; what is replayed by
//! `fs/jbd2/recovery.c`).
//!
//! A journal is a ring of blocks. A transaction in it is: descriptor blocks, each with tags and, behind it, a copy
//! of the block that each tag names; blocks with revokes; and a commit block. What has no commit block did not happen.
//! A revoke says that copies of a block are not to be used if they are of its transaction or an earlier one:
//! the block was freed, and may have been used since for a file's data, which is not in the journal.
//! All numbers are big-endian.

use std::collections::BTreeMap;

use super::{CRC, Copied, Copies, Error, Runs, View, read_block};
use crate::boot_disk::partitions::u32_at;

/// What each block of the journal but copies begins with.
pub(super) const MAGIC: u32 = 0xc03b_3998;

/// Types of blocks.
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_V1: u32 = 3;
const SUPERBLOCK_V2: u32 = 4;
const REVOKE: u32 = 5;

/// Features (`JBD2_FEATURE_INCOMPAT_*`): revokes, numbers of 64 bits, two generations of checksums, fast commits.
const REVOKES: u32 = 0x1;
const WIDE: u32 = 0x2;
const CHECKSUM_V2: u32 = 0x8;
const CHECKSUM_V3: u32 = 0x10;
const FAST_COMMIT: u32 = 0x20;
const KNOWN: u32 = REVOKES | WIDE | CHECKSUM_V2 | CHECKSUM_V3 | FAST_COMMIT;

/// Flags of a tag: the copy's first bytes were replaced; no UUID follows; it is the last one.
const ESCAPED: u32 = 0x1;
const SAME_UUID: u32 = 0x2;
const LAST_TAG: u32 = 0x8;

/// Length of the header of each block: magic, type, number of the transaction.
const HEADER: usize = 12;
/// Length of the checksum at the end of a descriptor or revoke block.
const TAIL: usize = 4;
/// Where the checksum of a commit block is.
const COMMIT_CHECKSUM: usize = 16;
/// Length of the journal's superblock, and where its checksum is.
const SUPERBLOCK_LENGTH: usize = 1024;
const SUPERBLOCK_CHECKSUM: usize = 0xfc;
/// Blocks for fast commits if the superblock gives no number.
const FAST_COMMIT_BLOCKS: u32 = 256;
/// The tag of the head of fast commits (`EXT4_FC_TAG_HEAD`, little-endian as they all are).
const FAST_COMMIT_HEAD: u16 = 0x9;

/// Most blocks of a journal: 4 GiB of the usual size, four times what `mke2fs` makes at most.
const BLOCKS: u64 = 1 << 20;
/// Most revokes.
const REVOKES_MAX: usize = 1 << 21;

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32_at(bytes, at).swap_bytes()
}

/// Returns the blocks of the file system whose newest committed contents are in the journal.
pub(super) fn read(view: &mut View, runs: &Runs, block_size: u64) -> Result<Copies, Error> {
    let mut head = vec![0; block_size as usize];
    read_block(view, runs.get(0).ok_or(Error::Damaged("its journal is empty"))?, &mut head)?;
    let format = Format::read(&head, block_size)?;
    if format.maximum > runs.blocks() || format.maximum > BLOCKS {
        return Err(Error::Damaged("its journal is longer than its file, or than 1048576 blocks"));
    }
    // The first block of the journal is no part of the ring: 0 says that there is nothing to replay.
    if format.start == 0 {
        return Ok(Copies::new());
    }
    if format.first == 0 || !(format.first..format.last).contains(&format.start) {
        return Err(Error::Damaged("its journal does not begin where it says"));
    }
    let (next, block) = (format.start, vec![0; block_size as usize]);
    let mut log = Log {
        view,
        runs,
        next,
        left: format.last - format.first,
        number: format.sequence,
        format,
        block,
        done: Done::default(),
        pending: Pending::default(),
    };
    while log.step()? {}
    log.refuse_fast_commits()?;
    log.check_copies()
}

/// A copy in the journal, with the checksum that it must have.
#[derive(Debug, Clone, Copy)]
struct Tagged {
    copied: Copied,
    /// Number of the transaction.
    number: u32,
    checksum: u32,
}

/// What the journal's superblock says.
#[derive(Debug)]
struct Format {
    features: u32,
    uuid: [u8; 16],
    /// Length of the journal in blocks.
    maximum: u64,
    /// First block of the ring, and the one behind its last.
    first: u64,
    last: u64,
    /// Where the first transaction is that is to be replayed, and its number.
    start: u64,
    sequence: u32,
}

impl Format {
    fn read(block: &[u8], block_size: u64) -> Result<Self, Error> {
        let head = block.get(..SUPERBLOCK_LENGTH).unwrap_or(block);
        let features = match (be32(head, 0), be32(head, 4)) {
            (MAGIC, SUPERBLOCK_V1) => 0,
            (MAGIC, SUPERBLOCK_V2) => be32(head, 0x28),
            _ => return Err(Error::Damaged("its journal has no superblock")),
        };
        if features & !KNOWN != 0 {
            return Err(Error::Features(features & !KNOWN));
        }
        if u64::from(be32(head, 0xc)) != block_size {
            return Err(Error::Damaged("its journal has blocks of another size"));
        }
        if features & (CHECKSUM_V2 | CHECKSUM_V3) != 0 {
            let checksum = checksum(&[], head, SUPERBLOCK_CHECKSUM);
            if checksum != be32(head, SUPERBLOCK_CHECKSUM) {
                return Err(Error::Damaged("the superblock of its journal has a wrong checksum"));
            }
        }
        let maximum = u64::from(be32(head, 0x10));
        let fast = match (features & FAST_COMMIT, be32(head, 0x54)) {
            (0, _) => 0,
            (_, 0) => u64::from(FAST_COMMIT_BLOCKS),
            (_, blocks) => u64::from(blocks),
        };
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&head[0x30..0x40]);
        Ok(Self {
            features,
            uuid,
            maximum,
            first: be32(head, 0x14).into(),
            last: maximum.saturating_sub(fast),
            start: be32(head, 0x1c).into(),
            sequence: be32(head, 0x18),
        })
    }

    fn has(&self, features: u32) -> bool {
        self.features & features != 0
    }

    /// Whether the checksum at `at` in a block is right, if blocks have checksums.
    fn is_intact(&self, block: &[u8], at: usize) -> bool {
        !self.has(CHECKSUM_V2 | CHECKSUM_V3) || checksum(&self.uuid, block, at) == be32(block, at)
    }

    /// The bits of a copy's checksum that its tag has room for: none if copies have no checksums.
    fn mask(&self) -> u32 {
        match (self.has(CHECKSUM_V3), self.has(CHECKSUM_V2)) {
            (true, _) => u32::MAX,
            (false, true) => 0xffff,
            (false, false) => 0,
        }
    }

    /// Length of a tag without a UUID.
    fn tag(&self) -> usize {
        if self.has(CHECKSUM_V3) {
            return 16;
        }
        let wide = if self.has(WIDE) { 12 } else { 8 };
        if self.has(CHECKSUM_V2) { wide + 2 } else { wide }
    }

    /// The bytes of a descriptor or revoke block that say something.
    fn body<'b>(&self, block: &'b [u8]) -> &'b [u8] {
        let tail = if self.has(CHECKSUM_V2 | CHECKSUM_V3) { TAIL } else { 0 };
        block.get(HEADER..block.len() - tail).unwrap_or_default()
    }
}

/// The checksum of `seed` and a block in which four bytes at `at` count as 0.
fn checksum(seed: &[u8], block: &[u8], at: usize) -> u32 {
    let mut digest = CRC.digest();
    digest.update(seed);
    digest.update(&block[..at]);
    digest.update(&[0; 4]);
    digest.update(&block[at + 4..]);
    digest.finalize()
}

/// What committed transactions did. Each counts from the first one that is read.
#[derive(Debug, Default)]
struct Done {
    transactions: u32,
    /// The newest copy of each block, with its transaction.
    copies: BTreeMap<u64, (u32, Tagged)>,
    /// The newest revoke of each block.
    revokes: BTreeMap<u64, u32>,
}

/// What a transaction did whose commit block has not been reached.
#[derive(Debug, Default)]
struct Pending {
    copies: Vec<(u64, Tagged)>,
    revokes: Vec<u64>,
    /// A block of revokes has a wrong checksum.
    is_damaged: bool,
}

impl Done {
    fn commit(&mut self, pending: Pending) -> Result<(), Error> {
        if pending.is_damaged {
            return Err(Error::Damaged("revokes in its journal have a wrong checksum"));
        }
        let number = self.transactions;
        self.copies.extend(pending.copies.into_iter().map(|(block, copy)| (block, (number, copy))));
        self.revokes.extend(pending.revokes.into_iter().map(|block| (block, number)));
        self.transactions += 1;
        match self.revokes.len() > REVOKES_MAX {
            true => Err(Error::TooMuch("2097152 revokes")),
            false => Ok(()),
        }
    }

    /// The copies that no revoke of the same or a later transaction names.
    fn copies(&self) -> impl Iterator<Item = (u64, Tagged)> {
        let counts = |block: &u64, number: u32| self.revokes.get(block).is_none_or(|r| number > *r);
        let copies = self.copies.iter().filter(move |(block, (number, _))| counts(block, *number));
        copies.map(|(block, (_, tagged))| (*block, *tagged))
    }
}

/// A journal that is read.
struct Log<'v> {
    view: &'v mut View,
    runs: &'v Runs,
    format: Format,
    /// The block that is read next, and how many are left until the ring has been read once.
    next: u64,
    left: u64,
    /// Number of the transaction that is read.
    number: u32,
    /// The block that was read last.
    block: Vec<u8>,
    done: Done,
    pending: Pending,
}

impl Log<'_> {
    /// The block of the file system that is next in the ring. `None` if all of the ring was read.
    fn advance(&mut self) -> Option<u64> {
        self.left = self.left.checked_sub(1)?;
        let block = self.runs.get(self.next);
        self.next += 1;
        if self.next >= self.format.last {
            self.next = self.format.first;
        }
        block
    }

    /// Reads the next block, with the copies behind it. Returns whether the journal goes on.
    fn step(&mut self) -> Result<bool, Error> {
        let Some(at) = self.advance() else { return Ok(false) };
        read_block(self.view, at, &mut self.block)?;
        // What is behind the last transaction is of an older round, or was never written.
        if be32(&self.block, 0) != MAGIC || be32(&self.block, 8) != self.number {
            return Ok(false);
        }
        let tail = self.block.len() - TAIL;
        match be32(&self.block, 4) {
            DESCRIPTOR if self.format.is_intact(&self.block, tail) => Ok(self.descriptor()),
            REVOKE => {
                self.pending.is_damaged |= !self.format.is_intact(&self.block, tail);
                self.revokes()
            }
            COMMIT if self.format.is_intact(&self.block, COMMIT_CHECKSUM) => {
                self.done.commit(std::mem::take(&mut self.pending))?;
                self.number = self.number.wrapping_add(1);
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Notes the copies of a descriptor block. Returns false if the ring ends among them.
    fn descriptor(&mut self) -> bool {
        let (size, body) = (self.format.tag(), self.format.body(&self.block).to_vec());
        let mut rest = body.as_slice();
        while let Some(tag) = rest.get(..size) {
            let (flags, checksum) = match self.format.has(CHECKSUM_V3) {
                true => (be32(tag, 4), be32(tag, 12)),
                // The checksum, and then the flags, are 16 bits each.
                false => (be32(tag, 4) & 0xffff, be32(tag, 4) >> 16),
            };
            let high = if self.format.has(WIDE) { be32(tag, 8) } else { 0 };
            let block = u64::from(be32(tag, 0)) | u64::from(high) << 32;
            let Some(at) = self.advance() else { return false };
            let from = at.saturating_mul(self.block.len() as u64);
            let copied = Copied { from, escaped: flags & ESCAPED != 0 };
            let number = self.number;
            self.pending.copies.push((block, Tagged { copied, number, checksum }));
            if flags & LAST_TAG != 0 {
                break;
            }
            let uuid = if flags & SAME_UUID != 0 { 0 } else { 16 };
            rest = rest.get(size + uuid..).unwrap_or_default();
        }
        true
    }

    /// Notes the revokes of a block. Always returns true.
    fn revokes(&mut self) -> Result<bool, Error> {
        // The length counts from the block's first byte.
        let length = (be32(&self.block, HEADER) as usize).saturating_sub(HEADER + 4);
        let records = self.format.body(&self.block).get(4..).unwrap_or_default();
        let records = records
            .get(..length)
            .ok_or(Error::Damaged("a block of revokes in its journal is longer than a block"))?;
        match self.format.has(WIDE) {
            true => self.pending.revokes.extend(
                records
                    .chunks_exact(8)
                    .map(|r| u64::from(be32(r, 0)) << 32 | u64::from(be32(r, 4))),
            ),
            false => {
                let records = records.chunks_exact(4).map(|r| u64::from(be32(r, 0)));
                self.pending.revokes.extend(records);
            }
        }
        match self.pending.revokes.len() > REVOKES_MAX {
            true => Err(Error::TooMuch("2097152 revokes")),
            false => Ok(true),
        }
    }

    /// Returns the copies that count. Errors if one of them has a wrong checksum.
    fn check_copies(self) -> Result<Copies, Error> {
        let Self { view, format, mut block, done, .. } = self;
        let mask = format.mask();
        let mut copies = Copies::new();
        for (number, tagged) in done.copies() {
            let Tagged { copied, number: transaction, checksum } = tagged;
            copies.insert(number, copied);
            if mask != 0 {
                view.read_exact_at(copied.from, &mut block)?;
                let mut digest = CRC.digest();
                digest.update(&format.uuid);
                digest.update(&transaction.to_be_bytes());
                digest.update(&block);
                if digest.finalize() & mask != checksum {
                    return Err(Error::Damaged("a block in its journal has a wrong checksum"));
                }
            }
        }
        Ok(copies)
    }

    /// Errors if fast commits follow the last transaction: they are a journal of another kind, behind the ring.
    fn refuse_fast_commits(&mut self) -> Result<(), Error> {
        if !self.format.has(FAST_COMMIT) {
            return Ok(());
        }
        for index in [self.format.last, self.format.last + 1] {
            let Some(at) = self.runs.get(index) else { break };
            read_block(self.view, at, &mut self.block)?;
            let tag = u32_at(&self.block, 0) as u16;
            if tag == FAST_COMMIT_HEAD && u32_at(&self.block, 8) == self.number {
                return Err(Error::FastCommits);
            }
        }
        Ok(())
    }
}
