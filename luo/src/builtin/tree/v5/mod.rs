//! The layout `luo-v5`: the tree that Linux 7.3 leaves in memory for the next kernel.
//!
//! ```text
//!  struct luo_ser, 32 bytes           0 compatible[8] "luo-v5"   8 liveupdate_num
//!                                     16 sessions_pa             24 flbs_pa
//!   sessions_pa -> block -> block     each: 0 next u64, 8 count u64, 16 records of 80 bytes
//!                   files -> block    each: 0 next u64, 8 count u64, 16 records of 64 bytes
//!   flbs_pa -> one page               0 pages u64 (1), 8 count u64, 16 records of 64 bytes
//! ```
//!
//! [`decode`] and [`encode`] read and write the tree; [`memfd`] the data of the kernel's memfd
//! handler, to which a file's handle points; [`radix`] the keys of the map of preserved pages.
//! Addresses are physical and page-aligned; 0 means none. No page occurs in a tree twice: a chain
//! that comes to a page again is an error. So decoding ends, and takes no more memory than the tree
//! has pages.
//!
//! The layout has no digest. A flipped byte of a name, token, number or handle decodes as another
//! tree. Bytes after a NUL, or after the last record of a block, are ignored. Any other flipped
//! byte is an error. Sources: `include/linux/kho/abi/{luo,block}.h`,
//! `kernel/liveupdate/kho_block.c`, `luo_core.c`, `luo_session.c`, `luo_file.c`, `luo_flb.c` (Linux
//! 7.3).

use std::collections::HashSet;

use super::memory::{Allocate, Memory, PAGE_BYTES};
use super::record::{BadName, FILE_BYTES, FLB_BYTES, SESSION_BYTES, SessionEntry, u64_at};
use super::{FileRecord, FlbRecord, Handover, SessionRecord};

mod block;
pub mod memfd;
pub mod radix;
#[cfg(test)]
mod tests;
mod vmalloc;

pub use block::{BlockError, MAX_BLOCKS};
pub use vmalloc::{CHUNK_PAGES, VmallocError};

/// The value of `luo_ser.compatible`, with its NULs.
pub const COMPATIBLE: [u8; 8] = *b"luo-v5\0\0";
/// Bytes of `struct luo_ser`.
pub const SER_BYTES: usize = 32;
/// Most sessions in one block.
pub const SESSIONS_PER_BLOCK: usize = block::capacity(SESSION_BYTES);
/// Most files in one block.
pub const FILES_PER_BLOCK: usize = block::capacity(FILE_BYTES);
/// Most shared objects: as many as fit into one page after the two numbers.
pub const MAX_FLBS: usize = (PAGE_BYTES - FLB_HEADER_BYTES) / FLB_BYTES;

const FLB_HEADER_BYTES: usize = 16;

/// Why a tree of this layout cannot be decoded or encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are not as many as `struct luo_ser` has.
    #[error("the tree's `struct luo_ser` has {found} bytes, this build knows {SER_BYTES}")]
    Blob {
        /// The number of bytes.
        found: usize,
    },
    /// A tree of another format.
    #[error("the tree is `{found}`, this build knows `luo-v5`")]
    Incompatible {
        /// The format in the tree, escaped.
        found: String,
    },
    /// A chain of blocks that is not valid.
    #[error("the chain of {of} is damaged")]
    Chain {
        /// The records in the chain: sessions, or files of one session.
        of: String,
        /// What is wrong with it.
        source: BlockError,
    },
    /// A record without a valid name.
    #[error("record {index} of {of} is damaged: {problem}")]
    Record {
        /// The kind of record: sessions, files of one session, or shared objects.
        of: String,
        /// The index of the record, from 0.
        index: usize,
        /// What is wrong with it.
        problem: BadName,
    },
    /// A session with another number of files than its record has.
    #[error("session `{session}` says {count} files, its blocks have {found}")]
    FileCount {
        /// The session.
        session: String,
        /// The number of files in its record.
        count: u64,
        /// The number of files in its blocks.
        found: usize,
    },
    /// The page of shared objects is not valid.
    #[error("the page of shared objects at {address:#x} is damaged: {problem}")]
    Flbs {
        /// The address of the page.
        address: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// No page is left, or the value has more records than the layout can hold.
    #[error("the tree cannot be written: {problem}")]
    Encode {
        /// The reason.
        problem: String,
    },
}

/// Decodes a tree. `blob` must be exactly its `struct luo_ser`; the rest is in `memory`.
pub fn decode(blob: &[u8], memory: &impl Memory) -> Result<Handover, Error> {
    let blob: &[u8; SER_BYTES] = blob.try_into().map_err(|_| Error::Blob { found: blob.len() })?;
    if !blob.starts_with(&COMPATIBLE) {
        return Err(Error::Incompatible { found: blob[..8].escape_ascii().to_string() });
    }
    let mut seen = HashSet::new();
    let sessions = read_sessions(u64_at(blob, 16), memory, &mut seen)?;
    let flbs = read_flbs(u64_at(blob, 24), memory, &mut seen)?;
    Ok(Handover { number: u64_at(blob, 8), sessions, flbs })
}

/// Encodes a tree into pages of `memory`, and returns its `struct luo_ser`.
///
/// Fails with [`Error::Encode`] if `memory` is full or the layout cannot hold as many records.
pub fn encode(handover: &Handover, memory: &mut impl Allocate) -> Result<[u8; SER_BYTES], Error> {
    let Handover { number, sessions, flbs } = handover;
    let mut records = Vec::with_capacity(sessions.len());
    for SessionRecord { name, files } in sessions {
        let bytes: Vec<_> = files.iter().map(|file| file.to_bytes()).collect();
        let address = block::write_chain(&bytes, memory)?;
        let entry = SessionEntry { name: *name, files: address, count: files.len() as u64 };
        records.push(entry.to_bytes());
    }
    let sessions = block::write_chain(&records, memory)?;
    let flbs = write_flbs(flbs, memory)?;
    let mut blob = [0; SER_BYTES];
    blob[..8].copy_from_slice(&COMPATIBLE);
    blob[8..16].copy_from_slice(&number.to_le_bytes());
    blob[16..24].copy_from_slice(&sessions.to_le_bytes());
    blob[24..].copy_from_slice(&flbs.to_le_bytes());
    Ok(blob)
}

fn read_sessions(
    first: u64,
    memory: &impl Memory,
    seen: &mut HashSet<u64>,
) -> Result<Vec<SessionRecord>, Error> {
    let of = || "sessions".to_owned();
    let records = block::read_chain::<SESSION_BYTES>(first, memory, seen)
        .map_err(|source| Error::Chain { of: of(), source })?;
    let mut sessions = Vec::with_capacity(records.len());
    for (index, record) in records.iter().enumerate() {
        let entry = SessionEntry::from_bytes(record).map_err(|problem| Error::Record {
            of: of(),
            index,
            problem,
        })?;
        sessions.push(read_session(entry, memory, seen)?);
    }
    Ok(sessions)
}

fn read_session(
    entry: SessionEntry,
    memory: &impl Memory,
    seen: &mut HashSet<u64>,
) -> Result<SessionRecord, Error> {
    let SessionEntry { name, files, count } = entry;
    let of = || format!("files of session `{name}`");
    let records = block::read_chain::<FILE_BYTES>(files, memory, seen)
        .map_err(|source| Error::Chain { of: of(), source })?;
    if records.len() as u64 != count {
        let session = name.to_string();
        return Err(Error::FileCount { session, count, found: records.len() });
    }
    let read = |(index, record)| {
        FileRecord::from_bytes(record).map_err(|problem| Error::Record { of: of(), index, problem })
    };
    let files = records.iter().enumerate().map(read).collect::<Result<_, _>>()?;
    Ok(SessionRecord { name, files })
}

fn read_flbs(
    address: u64,
    memory: &impl Memory,
    seen: &mut HashSet<u64>,
) -> Result<Vec<FlbRecord>, Error> {
    if address == 0 {
        return Ok(Vec::new());
    }
    let error = |problem: String| Error::Flbs { address, problem };
    let page = block::fetch(address, memory, seen).map_err(|e| error(e.to_string()))?;
    let (pages, count) = (u64_at(page, 0), u64_at(page, 8));
    if pages != 1 {
        return Err(error(format!("it says {pages} pages, this build knows 1")));
    }
    if count > MAX_FLBS as u64 {
        return Err(error(format!("it says {count} objects, the most is {MAX_FLBS}")));
    }
    let (records, _) = page[FLB_HEADER_BYTES..].as_chunks::<FLB_BYTES>();
    let read = |(index, record)| {
        FlbRecord::from_bytes(record).map_err(|problem| Error::Record {
            of: "shared objects".to_owned(),
            index,
            problem,
        })
    };
    records.iter().take(count as usize).enumerate().map(read).collect()
}

fn write_flbs(flbs: &[FlbRecord], memory: &mut impl Allocate) -> Result<u64, Error> {
    if flbs.is_empty() {
        return Ok(0);
    }
    if flbs.len() > MAX_FLBS {
        let problem = format!("there are {} shared objects, the most is {MAX_FLBS}", flbs.len());
        return Err(Error::Encode { problem });
    }
    let mut bytes = 1_u64.to_le_bytes().to_vec();
    bytes.extend((flbs.len() as u64).to_le_bytes());
    bytes.extend(flbs.iter().flat_map(|flb| flb.to_bytes()));
    block::store(&bytes, memory)
}
