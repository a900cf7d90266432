//! The ring of records on a guest's disk, and the check of its contents.
//!
//! Record `n` goes to slot `n % slots`; a slot is one block of 4 KiB. Each record has its number, the id
//! of the boot that wrote it, and a CRC over the whole block. These reveal a torn, lost, misplaced or
//! stale write, to the guest and to the harness.

use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of a record: one block, as `O_DIRECT` wants it.
pub const BLOCK: usize = 4096;

const MAGIC: [u8; 8] = *b"PRNLREC1";

/// A buffer that `O_DIRECT` accepts.
#[derive(Debug, Clone)]
#[repr(C, align(4096))]
pub struct Block(pub [u8; BLOCK]);

impl Default for Block {
    fn default() -> Self {
        Self([0; BLOCK])
    }
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its number; the first is 1.
    pub seq: u64,
    /// The boot that wrote it: 16 hex digits, as in the heartbeat.
    pub boot: String,
}

impl Record {
    /// The record as a block.
    pub fn to_block(&self) -> Block {
        let mut block = Block::default();
        let mut boot = [0; 16];
        let len = self.boot.len().min(boot.len());
        boot[..len].copy_from_slice(&self.boot.as_bytes()[..len]);
        block.0[..8].copy_from_slice(&MAGIC);
        block.0[8..16].copy_from_slice(&self.seq.to_le_bytes());
        block.0[16..32].copy_from_slice(&boot);
        for (index, byte) in block.0[32..BLOCK - 4].iter_mut().enumerate() {
            *byte = (self.seq as usize).wrapping_mul(31).wrapping_add(index) as u8;
        }
        let crc = crc32fast::hash(&block.0[..BLOCK - 4]);
        block.0[BLOCK - 4..].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// Decodes a block. `Ok(None)` for a block of zeroes, which was never written.
    pub fn from_block(block: &Block) -> Result<Option<Self>, &'static str> {
        if block.0.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if block.0[..8] != MAGIC {
            return Err("the magic number of a record is missing");
        }
        let (body, crc) = block.0.split_at(BLOCK - 4);
        if crc32fast::hash(body).to_le_bytes() != *crc {
            return Err("the checksum does not match: torn or damaged");
        }
        let mut seq = [0; 8];
        seq.copy_from_slice(&body[8..16]);
        let boot = std::str::from_utf8(&body[16..32]).map_err(|_| "the boot id is not text")?;
        let boot = boot.trim_end_matches('\0').to_owned();
        Ok(Some(Self { seq: u64::from_le_bytes(seq), boot }))
    }
}

/// Blocks of a read-only disk of the tests.
pub const READ_ONLY_BLOCKS: u64 = 16;

/// What block `number` of such a disk holds.
pub fn read_only_record(number: u64) -> Record {
    Record { seq: number + 1, boot: "read-only".to_owned() }
}

/// The contents of a whole ring.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// Number of slots with a valid record that belongs there.
    pub records: u64,
    /// The highest number of a record.
    pub newest: u64,
    /// The boot that wrote the record with the highest number.
    pub newest_boot: String,
    /// Each slot with invalid contents, and the problem.
    pub bad: Vec<(u64, String)>,
    /// Numbers of records that the ring should hold, given the newest, and whose slots hold an older
    /// record or none.
    pub missing: Vec<u64>,
}

/// Reads and checks a ring of `slots` slots.
pub fn read_ring(disk: &impl FileExt, slots: u64) -> io::Result<Contents> {
    let mut contents = Contents::default();
    let mut found = vec![0; slots as usize];
    let mut block = Block::default();
    for slot in 0..slots {
        disk.read_exact_at(&mut block.0, slot * BLOCK as u64)?;
        match Record::from_block(&block) {
            Ok(None) => {}
            Ok(Some(record)) if record.seq % slots != slot => {
                contents.bad.push((slot, format!("record {} is misplaced", record.seq)));
            }
            Ok(Some(record)) => {
                contents.records += 1;
                found[slot as usize] = record.seq;
                if record.seq > contents.newest {
                    contents.newest = record.seq;
                    contents.newest_boot = record.boot;
                }
            }
            Err(problem) => contents.bad.push((slot, problem.to_owned())),
        }
    }
    let oldest = contents.newest.saturating_sub(slots - 1).max(1);
    contents.missing =
        (oldest..=contents.newest).filter(|seq| found[(seq % slots) as usize] != *seq).collect();
    Ok(contents)
}

/// Number of slots on a disk of `bytes` bytes: as many as fit, but at most 1,024, so that the ring is
/// often overwritten.
pub fn slots(bytes: u64) -> u64 {
    (bytes / BLOCK as u64).min(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn record(seq: u64) -> Record {
        Record { seq, boot: "0123456789abcdef".into() }
    }

    fn ring(slots: u64, written: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(slots * BLOCK as u64).unwrap();
        for seq in 1..=written {
            write(&file, slots, seq);
        }
        file
    }

    fn write(file: &File, slots: u64, seq: u64) {
        file.write_all_at(&record(seq).to_block().0, seq % slots * BLOCK as u64).unwrap();
    }

    #[test]
    fn a_record_reads_back_and_an_empty_block_is_none() {
        assert_eq!(Record::from_block(&record(77).to_block()), Ok(Some(record(77))));
        assert_eq!(Record::from_block(&Block::default()), Ok(None));
    }

    #[test]
    fn any_flipped_byte_of_a_record_is_an_error() {
        let block = record(5).to_block();
        for at in 0..BLOCK {
            let mut flipped = block.clone();
            flipped.0[at] ^= 0x10;
            assert!(Record::from_block(&flipped).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_ring_before_and_after_it_went_round_is_whole() {
        for (written, records) in [(0, 0), (1, 1), (7, 7), (8, 8), (9, 8), (100, 8)] {
            let contents = read_ring(&ring(8, written), 8).unwrap();
            assert_eq!((contents.records, contents.newest), (records, written));
            assert_eq!(contents.bad, []);
            assert_eq!(contents.missing, [] as [u64; 0], "{written}");
        }
    }

    #[test]
    fn a_write_that_was_lost_torn_or_misplaced_is_found() {
        // Lost: slot of 97 still holds 89.
        let disk = ring(8, 100);
        write(&disk, 8, 89);
        assert_eq!(read_ring(&disk, 8).unwrap().missing, [97]);

        let disk = ring(8, 100);
        disk.write_all_at(&[0xaa; 512], 2 * BLOCK as u64 + 512).unwrap();
        let contents = read_ring(&disk, 8).unwrap();
        assert_eq!(contents.bad.len(), 1);
        assert_eq!(contents.missing, [98]);

        let disk = ring(8, 100);
        disk.write_all_at(&record(98).to_block().0, 3 * BLOCK as u64).unwrap();
        let contents = read_ring(&disk, 8).unwrap();
        assert_eq!(contents.bad, [(3, "record 98 is misplaced".to_owned())]);
        assert_eq!(contents.missing, [99]);
    }

    #[test]
    fn a_disk_shorter_than_its_ring_is_an_error() {
        assert!(read_ring(&ring(8, 3), 9).is_err());
    }
}
