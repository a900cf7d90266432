//! A pool's tree: the sessions, and the records of their files in the pool.
//!
//! ```text
//! / {
//!     compatible = "luo-pool-v1";
//!     pool = [16 bytes];        identity of the pool that the tree was written into
//!     ticket = [16 bytes];      ticket of the switch that wrote the tree
//!     digest = <u32>;           CRC-32 of the tree with this as 0
//!     files = [8 + 40 n];       count u64, then: id u64, inode u64, bytes u64, position u64,
//!                               seals u32, digest u32; little-endian, by id
//!     luo = [ .. ];             the sessions, as a `luo-v1` tree; its handles are ids of `files`
//! };
//! ```
//!
//! Decoding is strict, as in [`v1`]: a tree has only one encoding, so every cut and every flipped
//! byte is an error. So is a preserved file without exactly one record, and a record without its
//! file. Whether the files in the pool match their records is checked when they are opened.

use std::collections::BTreeMap;

use rustix::io::Errno;
use vm_fdt::FdtWriter;

use super::super::tree::{FileRecord, Handover, SessionRecord, record::u64_at, v1};
use super::files::Preservation;
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

/// Why a pool's tree was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The filesystem failed to read, rename or remove it.
    #[error("cannot access the tree in the pool: {errno}")]
    Io {
        /// The kernel's errno, or EFBIG for a tree that is too large.
        errno: Errno,
    },
    /// It is not a pool's tree, or is damaged.
    #[error("cannot decode the tree in the pool")]
    Tree(#[source] v1::Error),
    /// The property with the sessions is not a `luo-v1` tree, or is damaged.
    #[error("cannot decode the sessions in the pool's tree")]
    Sessions(#[source] v1::Error),
    /// It was written into another pool, and copied or moved here.
    #[error("the tree in the pool was written into another pool: their files were mixed up")]
    Foreign,
    /// It does not have the ticket that the host was given, or there is no tree.
    #[error("this host was given the ticket {wanted}, but {}", of(found.as_ref()))]
    Ticket {
        /// The ticket that the host was given.
        wanted: Ticket,
        /// The ticket of the tree in the pool; `None` without a tree.
        found: Option<Ticket>,
    },
    /// It is not newer than the tree that was taken over last.
    #[error(
        "the tree in the pool is of live update {found}, but this pool was already taken over \
         after live update {latest}"
    )]
    Generation {
        /// The live update number in the tree.
        found: u64,
        /// The live update number of the tree that was taken over last.
        latest: u64,
    },
    /// A preserved file without exactly one record, or a record without its file.
    #[error("the tree in the pool does not have exactly one record of file {id:016x}")]
    Files {
        /// The number of the file.
        id: u64,
    },
}

fn of(found: Option<&Ticket>) -> String {
    match found {
        Some(ticket) => format!("the tree in the pool has ticket {ticket}"),
        None => "the pool has no tree".to_owned(),
    }
}

/// The record of a file in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its inode number. A file of that name with another inode is another file.
    pub(crate) inode: u64,
    /// Its size in bytes.
    pub(crate) bytes: u64,
    /// The position of the open file at the switch, in bytes.
    pub(crate) position: u64,
    /// For a copy, the seals of the copied memfd; otherwise 0.
    pub(crate) seals: u32,
    /// For a copy, the CRC-32 of its contents; otherwise 0.
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

/// A pool's tree as a plain value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tree {
    pub(crate) pool: [u8; 16],
    pub(crate) ticket: Ticket,
    pub(crate) files: BTreeMap<u64, Entry>,
    pub(crate) luo: Handover,
}

/// Returns the records of the files that are in the pool.
pub(crate) fn pool_files(sessions: &[SessionRecord]) -> impl Iterator<Item = &FileRecord> {
    let files = sessions.iter().flat_map(|session| &session.files);
    files.filter(|file| Preservation::of(&file.compatible).is_some())
}

/// Encodes a tree.
pub(crate) fn encode(tree: &Tree) -> Result<Vec<u8>, v1::Error> {
    let undigested = write(tree, 0)?;
    write(tree, crc32fast::hash(&undigested))
}

/// Decodes a tree. Errors if it was written into another pool than `pool`.
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

/// Returns the digest of an encoded tree, which is in the names of its sessions' marks.
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

/// Checks that every file of the pool in a session has one record, and every record such a file.
fn check_files(tree: &Tree) -> Result<(), Error> {
    let mut left: BTreeMap<_, _> = tree.files.iter().collect();
    for FileRecord { data, .. } in pool_files(&tree.luo.sessions) {
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
