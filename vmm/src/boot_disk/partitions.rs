//! The partitions of a disk: GPT (UEFI specification 2.10, chapter 5), MBR with logical partitions, or none. Like Linux,
//! this finds a GPT only behind a protective MBR (5.2.3), because a tool that writes another table may leave the GPT.
//!
//! A table is parsed here and not by a crate, because it is a few fields, and `gpt` allocates as much memory as
//! the table's header claims. A guest that writes nonsense gets an error or fewer partitions, after a bounded
//! number of reads.

use std::io;

use super::view::View;

/// Most partitions that are looked at.
const MOST: usize = 128;
/// Bytes of an MBR, however long a sector is.
const MBR: u64 = 512;

const GPT_SIGNATURE: &[u8; 8] = b"EFI PART";
/// Bytes of a GPT header up to its last field.
const GPT_HEADER: usize = 92;
/// Most bytes of the table of a GPT, and its usual size 64 times over.
const GPT_TABLE_MAX: usize = 1 << 20;
const GPT_ENTRY: usize = 128;

const MBR_SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// The type of the MBR partition that protects a GPT.
const PROTECTIVE: u8 = 0xee;
/// The types of MBR partitions that hold logical partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// The partition table of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    Gpt,
    Mbr,
    /// No table: a file system may begin at the disk's first byte.
    None,
}

/// A partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Partition {
    /// Its number, as in `/dev/vda1`; 0 is the whole disk.
    pub(super) number: u32,
    /// First byte on the disk.
    pub(super) start: u64,
    /// Length in bytes.
    pub(super) bytes: u64,
}

/// The partitions of a disk, in the order of their numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) scheme: Scheme,
    pub(super) partitions: Vec<Partition>,
}

/// Reads the partition table, whose addresses count logical sectors of `sector` bytes. `is_file_system` says that a
/// file system begins at the disk's first byte: such a disk may end its first sector like an MBR. Errors if the disk
/// cannot be read.
pub(super) fn read(disk: &mut View, sector: u64, is_file_system: bool) -> io::Result<Table> {
    if is_protected(disk, sector)?
        && let Some(partitions) = gpt(disk, sector)?
    {
        return Ok(Table { scheme: Scheme::Gpt, partitions });
    }
    if !is_file_system {
        let partitions = mbr(disk, sector)?;
        if !partitions.is_empty() {
            return Ok(Table { scheme: Scheme::Mbr, partitions });
        }
    }
    let whole = Partition { number: 0, start: 0, bytes: disk.len() };
    Ok(Table { scheme: Scheme::None, partitions: vec![whole] })
}

/// Whether the MBR says that the disk has a GPT: one of its partitions has the type for that and begins at the GPT's
/// header (`is_pmbr_valid` in Linux block/partitions/efi.c).
fn is_protected(disk: &mut View, sector: u64) -> io::Result<bool> {
    let entries = mbr_sector(disk, sector, 0)?.into_iter().flatten();
    Ok(entries.into_iter().any(|(kind, first, _)| kind == PROTECTIVE && first == 1))
}

/// The partitions of the GPT, whose copy at the end of the disk counts if the first is damaged. `None` if
/// there is no GPT.
fn gpt(disk: &mut View, sector: u64) -> io::Result<Option<Vec<Partition>>> {
    let last = (disk.len() / sector).saturating_sub(1);
    for header in [1, last] {
        if let Some(table) = gpt_at(disk, sector, header)? {
            return Ok(Some(table));
        }
    }
    Ok(None)
}

fn gpt_at(disk: &mut View, sector: u64, header_at: u64) -> io::Result<Option<Vec<Partition>>> {
    let mut header = [0; GPT_HEADER];
    let at = header_at.checked_mul(sector);
    let Some(at) = at.filter(|at| has(disk, *at, GPT_HEADER as u64)) else {
        return Ok(None);
    };
    disk.read_exact_at(at, &mut header)?;
    // Longer headers have nothing more but zeroes that the checksum covers; nobody writes them.
    let plain = &header[..8] == GPT_SIGNATURE && u32_at(&header, 12) as usize == GPT_HEADER;
    let checksum = u32_at(&header, 16);
    header[16..20].fill(0);
    if !plain || crc32fast::hash(&header) != checksum || u64_at(&header, 24) != header_at {
        return Ok(None);
    }
    let (table_at, entries) = (u64_at(&header, 72), u32_at(&header, 80) as usize);
    let entry = u32_at(&header, 84) as usize;
    let length = entries.checked_mul(entry).filter(|length| *length <= GPT_TABLE_MAX);
    let (Some(length), Some(table_at)) = (length, table_at.checked_mul(sector)) else {
        return Ok(None);
    };
    let outside = table_at.saturating_add(length as u64) > disk.len();
    if entry < GPT_ENTRY || !entry.is_multiple_of(GPT_ENTRY) || outside {
        return Ok(None);
    }
    let mut table = vec![0; length];
    disk.read_exact_at(table_at, &mut table)?;
    if crc32fast::hash(&table) != u32_at(&header, 88) {
        return Ok(None);
    }
    let partitions = (1..).zip(table.chunks_exact(entry)).filter_map(|(number, entry)| {
        // The first 16 bytes are the type; all zeroes say that the entry is unused.
        let used = entry[..16].iter().any(|byte| *byte != 0);
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let sectors = last.checked_sub(first)?.checked_add(1)?;
        let (start, bytes) = (first.checked_mul(sector)?, sectors.checked_mul(sector)?);
        used.then_some(Partition { number, start, bytes })
    });
    Ok(Some(partitions.take(MOST).collect()))
}

/// The partitions of the MBR, and the logical ones in its extended partition. Empty if there is no MBR.
fn mbr(disk: &mut View, sector: u64) -> io::Result<Vec<Partition>> {
    let Some(primary) = mbr_sector(disk, sector, 0)? else { return Ok(Vec::new()) };
    let mut partitions = Vec::new();
    let mut extended = None;
    for (number, (kind, first, sectors)) in (1..).zip(primary) {
        match kind {
            _ if sectors == 0 => {}
            0 | PROTECTIVE => {}
            kind if EXTENDED.contains(&kind) => extended = Some(first),
            _ => partitions.extend(of_sectors(sector, number, first, sectors)),
        }
    }
    // The logical partitions are a chain of sectors, each with one of them and the way to the next. A chain
    // that runs in a circle ends with the last number.
    let mut next = extended;
    for number in 5..MOST as u32 {
        let (Some(base), Some(at)) = (extended, next) else { break };
        let Some([(kind, first, sectors), link, ..]) = mbr_sector(disk, sector, at)? else { break };
        if kind != 0 && sectors != 0 {
            partitions.extend(of_sectors(sector, number, at.saturating_add(first), sectors));
        }
        next = EXTENDED.contains(&link.0).then(|| base.saturating_add(link.1));
    }
    Ok(partitions)
}

/// A partition whose place is in sectors of `sector` bytes. `None` if no disk is that large.
fn of_sectors(sector: u64, number: u32, first: u64, sectors: u64) -> Option<Partition> {
    let (start, bytes) = (first.checked_mul(sector)?, sectors.checked_mul(sector)?);
    Some(Partition { number, start, bytes })
}

/// The type, first sector and number of sectors of each entry in an MBR at sector `at`, if it has the signature.
fn mbr_sector(disk: &mut View, sector: u64, at: u64) -> io::Result<Option<[(u8, u64, u64); 4]>> {
    let mut mbr = [0; MBR as usize];
    let Some(at) = at.checked_mul(sector).filter(|at| has(disk, *at, MBR)) else {
        return Ok(None);
    };
    disk.read_exact_at(at, &mut mbr)?;
    let entry = |index: usize| {
        let entry = &mbr[446 + 16 * index..];
        (entry[4], u64::from(u32_at(entry, 8)), u64::from(u32_at(entry, 12)))
    };
    Ok((mbr[510..] == MBR_SIGNATURE).then(|| [entry(0), entry(1), entry(2), entry(3)]))
}

/// Whether the disk has `bytes` at `at`.
fn has(disk: &View, at: u64, bytes: u64) -> bool {
    at.checked_add(bytes).is_some_and(|end| end <= disk.len())
}

/// The little-endian number at `at`; bytes beyond the end count as 0.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u64_at(bytes, at) as u32
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.iter_mut().zip(bytes.iter().skip(at)).for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(number)
}
