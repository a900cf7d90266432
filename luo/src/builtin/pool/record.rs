//! A pool's tree: the sessions, and which files are theirs.
//!
//! ```text
//! / {
//!     compatible = "luo-pool-v1";
//!     pool = [16 bytes];        which pool it was written into
//!     ticket = [16 bytes];      which switch it was written by
//!     digest = <u32>;           CRC-32 of the tree with this as 0
//!     files = [8 + 40 n];       count u64, then: id u64, inode u64, bytes u64, position u64,
//!                               seals u32, digest u32; little-endian, by id
//!     luo = [ .. ];             the sessions, as `luo-v1` has them; a handle there is an id here
//! };
//! ```
//!
//! Read strictly, like [`v1`]: a tree has one form, so every cut and every flipped byte is an error.
//! That each preserved file has one record and each record its file is part of that. Whether the
//! files in the pool are those is left to who opens them.

use std::collections::BTreeMap;

use rustix::io::Errno;
use vm_fdt::FdtWriter;

use super::super::tree::{FileRecord, Handover, record::u64_at, v1};
use super::files::Kind;
use crate::Ticket;

/// The root's format.
pub(crate) const COMPATIBLE: &str = "luo-pool-v1";
const POOL: &str = "pool";
const TICKET: &str = "ticket";
const DIGEST: &str = "digest";
const FILES: &str = "files";
const LUO: &str = "luo";
const COUNT_BYTES: usize = 8;
const ENTRY_BYTES: usize = 40;

/// Why a pool's tree is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It cannot be got from the filesystem.
    #[error("the tree in the pool cannot be read: {errno}")]
    Io {
        /// What the kernel answered.
        errno: Errno,
    },
    /// It is no tree of a pool, or damaged.
    #[error("the tree in the pool cannot be understood")]
    Tree(#[source] v1::Error),
    /// The part with the sessions is no tree, or damaged.
    #[error("the sessions in the pool's tree cannot be understood")]
    Sessions(#[source] v1::Error),
    /// It was written into another pool.
    #[error("the tree in the pool is of another pool, which was copied or mixed up")]
    Foreign,
    /// It is of another switch than the one by which this kernel was entered.
    #[error(
        "the pool does not hold what this kernel was entered with: that has the ticket {wanted}, {}",
        of(found.as_ref())
    )]
    Ticket {
        /// The ticket that this kernel was given.
        wanted: Ticket,
        /// The one in the pool, if there is any.
        found: Option<Ticket>,
    },
    /// It is not of the generation before this one.
    #[error("the tree in the pool is of live update {found}, and live update {latest} was there")]
    Generation {
        /// What the tree says.
        found: u64,
        /// What this pool was at.
        latest: u64,
    },
    /// A preserved file without exactly one record, or a record without its file.
    #[error("the tree in the pool does not have exactly one record of file {id:016x}")]
    Files {
        /// The file.
        id: u64,
    },
}

fn of(found: Option<&Ticket>) -> String {
    match found {
        Some(ticket) => format!("what is in the pool {ticket}"),
        None => "and in the pool there is nothing".to_owned(),
    }
}

/// What is known of a file in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its inode: a file in its place that has another is not it.
    pub(crate) inode: u64,
    /// Its size.
    pub(crate) bytes: u64,
    /// Its position at the switch.
    pub(crate) position: u64,
    /// A copy's: the seals of the memfd that it is of.
    pub(crate) seals: u32,
    /// A copy's: the CRC-32 of its contents.
    pub(crate) digest: u32,
}

impl Entry {
    fn to_bytes(self, id: u64) -> [u8; ENTRY_BYTES] {
        let Self { inode, bytes, position, seals, digest } = self;
        let mut record = [0; ENTRY_BYTES];
        for (field, value) in record.chunks_exact_mut(8).zip([id, inode, bytes, position]) {
            field.copy_from_slice(&value.to_le_bytes());
        }
        let last = u64::from(digest) << 32 | u64::from(seals);
        record[32..].copy_from_slice(&last.to_le_bytes());
        record
    }

    fn from_bytes(record: &[u8; ENTRY_BYTES]) -> (u64, Self) {
        let last = u64_at(record, 32);
        let (seals, digest) = (last as u32, (last >> 32) as u32);
        let (inode, bytes, position) = (u64_at(record, 8), u64_at(record, 16), u64_at(record, 24));
        (u64_at(record, 0), Self { inode, bytes, position, seals, digest })
    }
}

/// A pool's tree as a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tree {
    pub(crate) pool: [u8; 16],
    pub(crate) ticket: Ticket,
    pub(crate) files: BTreeMap<u64, Entry>,
    pub(crate) luo: Handover,
}

/// The files of a tree that are in the pool.
pub(crate) fn pool_files(luo: &Handover) -> impl Iterator<Item = &FileRecord> {
    let files = luo.sessions.iter().flat_map(|session| &session.files);
    files.filter(|file| Kind::of(&file.compatible).is_some())
}

/// Writes a tree.
pub(crate) fn encode(tree: &Tree) -> Result<Vec<u8>, v1::Error> {
    let undigested = write(tree, 0)?;
    write(tree, crc32fast::hash(&undigested))
}

/// Reads a tree, which has to be of this pool.
pub(crate) fn decode(bytes: &[u8], pool: [u8; 16]) -> Result<Tree, Error> {
    let tree = read(bytes).map_err(Error::Tree)??;
    let again = encode(&tree).map_err(Error::Tree)?;
    if again != bytes {
        let at = again.iter().zip(bytes).take_while(|(a, b)| a == b).count();
        return Err(Error::Tree(v1::Error::Damaged { at, length: bytes.len() }));
    }
    if tree.pool != pool {
        return Err(Error::Foreign);
    }
    check_files(&tree)?;
    Ok(tree)
}

/// A tree's own digest, by which its sessions' notes are found.
pub(crate) fn digest(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

fn read(bytes: &[u8]) -> Result<Result<Tree, Error>, v1::Error> {
    let mut root = v1::node::root_node(bytes)?;
    root.expect_compatible(COMPATIBLE)?;
    let pool = root.array(POOL)?;
    let ticket = Ticket::new(root.array(TICKET)?);
    let _: [u8; 4] = root.array(DIGEST)?;
    let files = root.bytes(FILES)?;
    let files = read_entries(root.path(), &files)?;
    let luo = root.bytes(LUO)?;
    root.into_children()?.expect_empty()?;
    let luo = v1::decode(&luo).map_err(Error::Sessions);
    Ok(luo.map(|luo| Tree { pool, ticket, files, luo }))
}

fn read_entries(path: &str, bytes: &[u8]) -> Result<BTreeMap<u64, Entry>, v1::Error> {
    let length = |expected| {
        let path = path.to_owned();
        v1::Error::Length { path, property: FILES, found: bytes.len(), expected }
    };
    let Some((count, records)) = bytes.split_first_chunk::<COUNT_BYTES>() else {
        return Err(length(COUNT_BYTES as u64));
    };
    let count = u64::from_le_bytes(*count);
    let (records, rest) = records.as_chunks::<ENTRY_BYTES>();
    if records.len() as u64 != count || !rest.is_empty() {
        let expected = count.saturating_mul(ENTRY_BYTES as u64).saturating_add(COUNT_BYTES as u64);
        return Err(length(expected));
    }
    Ok(records.iter().map(Entry::from_bytes).collect())
}

/// Every file in a session has one record, and every record such a file.
fn check_files(tree: &Tree) -> Result<(), Error> {
    let mut left: BTreeMap<_, _> = tree.files.iter().collect();
    for FileRecord { data, .. } in pool_files(&tree.luo) {
        left.remove(data).ok_or(Error::Files { id: *data })?;
    }
    left.keys().next().map_or(Ok(()), |id| Err(Error::Files { id: **id }))
}

fn write(tree: &Tree, digest: u32) -> Result<Vec<u8>, v1::Error> {
    let luo = v1::encode(&tree.luo)?;
    write_fdt(tree, &luo, digest).map_err(|error| v1::Error::Encode { problem: error.to_string() })
}

fn write_fdt(tree: &Tree, luo: &[u8], digest: u32) -> vm_fdt::FdtWriterResult<Vec<u8>> {
    let mut files = (tree.files.len() as u64).to_le_bytes().to_vec();
    files.extend(tree.files.iter().flat_map(|(id, entry)| entry.to_bytes(*id)));
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", COMPATIBLE)?;
    fdt.property(POOL, &tree.pool)?;
    fdt.property(TICKET, &tree.ticket.to_bytes())?;
    fdt.property_u32(DIGEST, digest)?;
    fdt.property(FILES, &files)?;
    fdt.property(LUO, luo)?;
    fdt.end_node(root)?;
    fdt.finish()
}
