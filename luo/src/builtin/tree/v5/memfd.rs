//! The format `memfd-v2` of the kernel's memfd handler: the record of a memfd, and its folios.
//!
//! A file's handle is the address of a page that starts with `struct memfd_luo_ser` (48 bytes). It
//! points to an array with one 16-byte record for each folio: page frame number and flags, and the
//! index of the folio in the file. The number of pages of a folio is not in its record, but in the
//! map of preserved memory ([`super::radix`]). Source: `mm/memfd_luo.c`,
//! `include/linux/kho/abi/memfd.h` (Linux 7.3).

use std::collections::HashSet;

use super::{BlockError, Error, VmallocError, block, vmalloc};
use crate::builtin::tree::memory::{Allocate, Memory};
use crate::builtin::tree::record::u64_at;

/// The name of the format.
pub const COMPATIBLE: &str = "memfd-v2";
/// Most base pages of a preserved memfd.
pub const MAX_PAGES: u64 = u32::MAX as u64;

const SER_BYTES: usize = 48;
const FOLIO_BYTES: usize = 16;
/// Page frame numbers have 52 bits; the flags are above.
const FLAGS_SHIFT: u32 = 52;
const DIRTY: u64 = 1 << 0;
const UPTODATE: u64 = 1 << 1;
/// Flag: how the kernel had allocated the array of folios (`KHO_VMALLOC_ALLOC`).
const VM_ALLOC: u16 = 1;

/// A preserved memfd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memfd {
    /// Position of the open file, in bytes.
    pub position: u64,
    /// Size of the file, in bytes.
    pub size: u64,
    /// Its seals (`F_SEAL_*`).
    pub seals: u32,
    /// Its folios, in the order of the kernel's array.
    pub folios: Vec<Folio>,
}

/// A run of pages of the file that are contiguous in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Folio {
    /// Page frame number of its first page, below 2^52. The kernel skips a record with 0.
    pub frame: u64,
    /// Whether it is marked dirty. Linux 7.3 marks every folio.
    pub dirty: bool,
    /// Whether it is marked up to date. Linux 7.3 marks every folio.
    pub uptodate: bool,
    /// Offset of its first page in the file, in pages.
    pub index: u64,
}

/// Why the record of a memfd cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemfdError {
    /// The page with its record cannot be read.
    #[error("cannot read the record of the memfd")]
    Record(#[source] BlockError),
    /// A value that this build does not know.
    #[error("the record of the memfd says {what} {found:#x}, this build knows {known}")]
    Unknown {
        /// Which field.
        what: &'static str,
        /// The value.
        found: u64,
        /// The values that this build knows.
        known: &'static str,
    },
    /// The array of its folios cannot be read.
    #[error("cannot read the {count} folios of the memfd")]
    Folios {
        /// The number of folios in its record.
        count: u64,
        /// What is wrong with the array.
        source: VmallocError,
    },
}

/// Decodes the memfd with this handle.
pub fn decode(handle: u64, memory: &impl Memory) -> Result<Memfd, MemfdError> {
    let mut seen = HashSet::new();
    let page = block::fetch(handle, memory, &mut seen).map_err(MemfdError::Record)?;
    let (position, size, count) = (u64_at(page, 0), u64_at(page, 8), u64_at(page, 24));
    let (seals, flags) = halves(u64_at(page, 16));
    let (pages, array_flags) = halves(u64_at(page, 40));
    expect("flags", u64::from(flags), flags == 0, "0")?;
    expect("folios", count, count <= MAX_PAGES, "at most 2^32 - 1")?;
    // The upper 16 bits are the order of the array's pages; this build knows only 0.
    let known = array_flags <= u32::from(VM_ALLOC) | 2;
    expect("an array of kind", u64::from(array_flags), known, "order 0, allocated or huge")?;
    let first = u64_at(page, 32);
    let bytes = count * FOLIO_BYTES as u64;
    let array = vmalloc::read(first, pages, bytes, memory, &mut seen)
        .map_err(|source| MemfdError::Folios { count, source })?;
    let (records, _) = array.as_chunks::<FOLIO_BYTES>();
    let folios = records.iter().map(read_folio).collect::<Result<_, _>>()?;
    Ok(Memfd { position, size, seals, folios })
}

/// Encodes a memfd into pages of `memory`, and returns its handle. Errors if `memory` is full, or a
/// frame number has more than 52 bits.
pub fn encode(memfd: &Memfd, memory: &mut impl Allocate) -> Result<u64, Error> {
    let Memfd { position, size, seals, folios } = memfd;
    let mut array = Vec::with_capacity(folios.len() * FOLIO_BYTES);
    for Folio { frame, dirty, uptodate, index } in folios {
        if frame >> FLAGS_SHIFT != 0 {
            return Err(Error::Encode { problem: format!("frame {frame:#x} has over 52 bits") });
        }
        let flags = if *dirty { DIRTY } else { 0 } | if *uptodate { UPTODATE } else { 0 };
        array.extend((flags << FLAGS_SHIFT | frame).to_le_bytes());
        array.extend(index.to_le_bytes());
    }
    // A file without folios has no array.
    let (first, pages, kind) = match vmalloc_of(&array, memory)? {
        Some((first, pages)) => (first, pages, VM_ALLOC),
        None => (0, 0, 0),
    };
    let mut bytes = Vec::with_capacity(SER_BYTES);
    bytes.extend(position.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    bytes.extend(seals.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend((folios.len() as u64).to_le_bytes());
    bytes.extend(first.to_le_bytes());
    bytes.extend(pages.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(0_u16.to_le_bytes());
    block::store(&bytes, memory)
}

fn vmalloc_of(array: &[u8], memory: &mut impl Allocate) -> Result<Option<(u64, u32)>, Error> {
    if array.is_empty() { Ok(None) } else { vmalloc::write(array, memory).map(Some) }
}

fn read_folio(record: &[u8; FOLIO_BYTES]) -> Result<Folio, MemfdError> {
    let first = u64_at(record, 0);
    let flags = first >> FLAGS_SHIFT;
    expect("a folio with flags", flags, flags & !(DIRTY | UPTODATE) == 0, "dirty and up to date")?;
    Ok(Folio {
        frame: first & ((1 << FLAGS_SHIFT) - 1),
        dirty: flags & DIRTY != 0,
        uptodate: flags & UPTODATE != 0,
        index: u64_at(record, 8),
    })
}

fn expect(
    what: &'static str,
    found: u64,
    known: bool,
    knows: &'static str,
) -> Result<(), MemfdError> {
    if known { Ok(()) } else { Err(MemfdError::Unknown { what, found, known: knows }) }
}

/// Returns the low and the high half.
fn halves(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}
