//! The layout `luo-v1`: an FDT, as in the seed.
//!
//! The seed's tree has two properties at the root, the format and the live update number, and one
//! node with the physical address of the sessions' records. [`seed`] reads and writes this form.
//! The built-in LUO has no physical addresses. Its own form, which [`decode`] and [`encode`] read
//! and write, has *the records inline, in place of their addresses*. The formats of the nodes end
//! in `-inline`, so that no reader mistakes one form for the other:
//!
//! ```text
//! / {
//!     compatible = "luo-v1";
//!     liveupdate-number = [8 bytes];          u64, little-endian, as in the seed
//!     digest = <u32>;                         CRC-32 of the tree with this as 0
//!     luo-session {
//!         compatible = "luo-session-v2-inline";
//!         luo-session-header = [8 + 80 n];    count u64, then the sessions' records
//!         luo-files = [64 m];                 the files' records of all sessions
//!     };
//!     luo-flb {                               only if there are shared objects
//!         compatible = "luo-flb-v1-inline";
//!         luo-flb-header = [8 + 64 k];        count u64, then the shared objects' records
//!     };
//! };
//! ```
//!
//! In a session's record (see [`super::record`]) `files` is the position of its first file in
//! `luo-files`, counted from 1, or 0 if it has no files; each session's files follow those of the
//! session before. A tree has only one encoding: [`decode`] encodes the result again, and compares
//! the bytes. So every cut and every flipped byte is an error. The digest protects against damage,
//! not against an attacker. Counts are compared with lengths before records are copied.

use vm_fdt::FdtWriter;

use super::record::{BadName, FILE_BYTES, FLB_BYTES, SESSION_BYTES, SessionEntry};
use super::{FileRecord, FlbRecord, Handover, SessionRecord};

pub(in crate::builtin) mod node;
#[cfg(feature = "tools")]
pub mod seed;
#[cfg(test)]
mod tests;

use node::{Node, root_node};

/// The root's format.
pub const COMPATIBLE: &str = "luo-v1";
/// The format of the node with the sessions, with inline records.
pub const SESSION_COMPATIBLE: &str = "luo-session-v2-inline";
/// The format of the node with the shared objects, with inline records.
pub const FLB_COMPATIBLE: &str = "luo-flb-v1-inline";

const NUMBER: &str = "liveupdate-number";
const DIGEST: &str = "digest";
const SESSION_NODE: &str = "luo-session";
const SESSION_HEADER: &str = "luo-session-header";
const FILES: &str = "luo-files";
const FLB_NODE: &str = "luo-flb";
const FLB_HEADER: &str = "luo-flb-header";
/// Bytes of the count before the records.
const COUNT_BYTES: usize = 8;

/// Why a tree of this layout cannot be decoded or encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are not an FDT.
    #[error("the tree is not a flattened device tree: {problem}")]
    Fdt {
        /// The parser's error.
        problem: String,
    },
    /// The tree can be read, but its bytes are not those that [`encode`] writes for its contents.
    #[error("the tree is damaged: byte {at} of {length} differs from the encoding of its contents")]
    Damaged {
        /// The first byte that differs.
        at: usize,
        /// Bytes of the tree.
        length: usize,
    },
    /// A required property is missing.
    #[error("{path}: the tree has no property `{property}`")]
    MissingProperty {
        /// The node.
        path: String,
        /// The property.
        property: &'static str,
    },
    /// A required node is missing.
    #[error("{path}: the tree has no such node")]
    MissingNode {
        /// The node.
        path: String,
    },
    /// A property that this build does not know.
    #[error("{path}: the tree has a property `{property}`, which this build does not know")]
    UnknownProperty {
        /// The node.
        path: String,
        /// The property.
        property: String,
    },
    /// A node that this build does not know.
    #[error("{path}: the tree has this node, which this build does not know")]
    UnknownNode {
        /// The node.
        path: String,
    },
    /// Two properties or two nodes of one name.
    #[error("{path}: the tree has two of `{name}`")]
    Duplicate {
        /// The node that has both.
        path: String,
        /// Their name.
        name: String,
    },
    /// A node of another format.
    #[error("{path}: the tree is `{found}`, this build knows `{known}`")]
    Incompatible {
        /// The node.
        path: String,
        /// The format in the tree, escaped.
        found: String,
        /// The format that this build can read.
        known: &'static str,
    },
    /// A property that is too short or too long.
    #[error("{path}: `{property}` has {found} bytes, not {expected}")]
    Length {
        /// The node.
        path: String,
        /// The property.
        property: &'static str,
        /// Bytes in the tree.
        found: usize,
        /// Bytes that it should have: a fixed length, or as the counts say.
        expected: u64,
    },
    /// A record without a valid name.
    #[error("{path}: record {index} of `{property}` is damaged: {problem}")]
    Record {
        /// The node.
        path: String,
        /// The property.
        property: &'static str,
        /// Which record, from 0.
        index: usize,
        /// What is wrong with it.
        problem: BadName,
    },
    /// A session's record with a wrong position of its files.
    #[error(
        "{path}: the record of session `{session}` puts its files at {found}, but they are at \
         {expected}"
    )]
    Files {
        /// The node.
        path: String,
        /// The session.
        session: String,
        /// The position in its record; with [`seed`], the address.
        found: u64,
        /// The position after the files of the sessions before it, counted from 1; 0 if the session
        /// has no files.
        expected: u64,
    },
    /// An address without memory. Only [`seed`] has addresses.
    #[error("{path}: there is no memory at {address:#x} for {what}")]
    Address {
        /// The node.
        path: String,
        /// The records that should be at the address.
        what: String,
        /// The address; 0 if none could be allocated.
        address: u64,
    },
    /// More sessions or files than the layout can hold. Only [`seed`] has such limits; the seed's
    /// kernel returns ENOMEM for sessions, ENOSPC for files.
    #[error("{path}: there are {found} {what}, the most is {most}")]
    TooMany {
        /// The node.
        path: String,
        /// `sessions` or `files`.
        what: &'static str,
        /// The number in the tree, or in the value to encode.
        found: u64,
        /// The limit.
        most: u64,
    },
    /// A value that cannot be encoded.
    #[error("the tree cannot be written: {problem}")]
    Encode {
        /// The reason.
        problem: String,
    },
}

/// Encodes a tree. Equal values give equal bytes. Fails only for trees of more than 4 GiB.
pub fn encode(handover: &Handover) -> Result<Vec<u8>, Error> {
    let undigested = write(handover, 0)?;
    write(handover, crc32fast::hash(&undigested))
}

/// Decodes a tree. `bytes` must be exactly the tree.
pub fn decode(bytes: &[u8]) -> Result<Handover, Error> {
    let mut root = root_node(bytes)?;
    root.expect_compatible(COMPATIBLE)?;
    let number = u64::from_le_bytes(root.array(NUMBER)?);
    let _: [u8; 4] = root.array(DIGEST)?;
    let mut children = root.into_children()?;
    let sessions = read_sessions(children.require(SESSION_NODE)?)?;
    let flbs = children.take(FLB_NODE)?.map_or(Ok(Vec::new()), read_flbs)?;
    children.expect_empty()?;

    let handover = Handover { number, sessions, flbs };
    let again = encode(&handover)?;
    if again != bytes {
        let at = again.iter().zip(bytes).take_while(|(a, b)| a == b).count();
        return Err(Error::Damaged { at, length: bytes.len() });
    }
    Ok(handover)
}

fn write(handover: &Handover, digest: u32) -> Result<Vec<u8>, Error> {
    write_fdt(handover, digest).map_err(|error| Error::Encode { problem: error.to_string() })
}

fn write_fdt(handover: &Handover, digest: u32) -> vm_fdt::FdtWriterResult<Vec<u8>> {
    let Handover { number, sessions, flbs } = handover;
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", COMPATIBLE)?;
    fdt.property(NUMBER, &number.to_le_bytes())?;
    fdt.property_u32(DIGEST, digest)?;
    let node = fdt.begin_node(SESSION_NODE)?;
    fdt.property_string("compatible", SESSION_COMPATIBLE)?;
    let (header, files) = session_bytes(sessions);
    fdt.property(SESSION_HEADER, &header)?;
    fdt.property(FILES, &files)?;
    fdt.end_node(node)?;
    if !flbs.is_empty() {
        let node = fdt.begin_node(FLB_NODE)?;
        fdt.property_string("compatible", FLB_COMPATIBLE)?;
        let mut header = (flbs.len() as u64).to_le_bytes().to_vec();
        header.extend(flbs.iter().flat_map(|flb| flb.to_bytes()));
        fdt.property(FLB_HEADER, &header)?;
        fdt.end_node(node)?;
    }
    fdt.end_node(root)?;
    fdt.finish()
}

/// The values of `luo-session-header` and `luo-files`.
fn session_bytes(sessions: &[SessionRecord]) -> (Vec<u8>, Vec<u8>) {
    let mut header = (sessions.len() as u64).to_le_bytes().to_vec();
    let mut files = Vec::new();
    for SessionRecord { name, files: own } in sessions {
        let first = if own.is_empty() { 0 } else { files.len() / FILE_BYTES + 1 };
        let entry = SessionEntry { name: *name, files: first as u64, count: own.len() as u64 };
        header.extend(entry.to_bytes());
        files.extend(own.iter().flat_map(|file| file.to_bytes()));
    }
    (header, files)
}

fn read_sessions(mut node: Node<'_>) -> Result<Vec<SessionRecord>, Error> {
    node.expect_compatible(SESSION_COMPATIBLE)?;
    let header = node.bytes(SESSION_HEADER)?;
    let files = node.bytes(FILES)?;
    let path = node.path().to_owned();
    node.into_children()?.expect_empty()?;

    let entries = counted_records(&path, SESSION_HEADER, &header, SessionEntry::from_bytes)?;
    let (records, rest) = files.as_chunks::<FILE_BYTES>();
    let total = entries.iter().fold(0_u64, |sum, entry| sum.saturating_add(entry.count));
    if total != records.len() as u64 || !rest.is_empty() {
        let expected = total.saturating_mul(FILE_BYTES as u64);
        return Err(Error::Length { path, property: FILES, found: files.len(), expected });
    }
    let mut read = 0;
    let mut sessions = Vec::with_capacity(entries.len());
    for SessionEntry { name, files, count } in entries {
        let expected = if count == 0 { 0 } else { read as u64 + 1 };
        if files != expected {
            let session = name.to_string();
            return Err(Error::Files { path, session, found: files, expected });
        }
        // The sum of all counts is the length of `records`.
        let end = read + count as usize;
        let files = read_records(&path, FILES, &records[read..end], FileRecord::from_bytes, read)?;
        read = end;
        sessions.push(SessionRecord { name, files });
    }
    Ok(sessions)
}

fn read_flbs(mut node: Node<'_>) -> Result<Vec<FlbRecord>, Error> {
    node.expect_compatible(FLB_COMPATIBLE)?;
    let header = node.bytes(FLB_HEADER)?;
    let path = node.path().to_owned();
    node.into_children()?.expect_empty()?;
    counted_records::<FLB_BYTES, _>(&path, FLB_HEADER, &header, FlbRecord::from_bytes)
}

/// Reads a count, then exactly that many records of `N` bytes.
fn counted_records<const N: usize, T>(
    path: &str,
    property: &'static str,
    bytes: &[u8],
    read: impl Fn(&[u8; N]) -> Result<T, BadName>,
) -> Result<Vec<T>, Error> {
    let length = |expected| {
        let path = path.to_owned();
        Error::Length { path, property, found: bytes.len(), expected }
    };
    let Some((count, records)) = bytes.split_first_chunk::<COUNT_BYTES>() else {
        return Err(length(COUNT_BYTES as u64));
    };
    let count = u64::from_le_bytes(*count);
    let (records, rest) = records.as_chunks::<N>();
    if records.len() as u64 != count || !rest.is_empty() {
        return Err(length(count.saturating_mul(N as u64).saturating_add(COUNT_BYTES as u64)));
    }
    read_records(path, property, records, read, 0)
}

fn read_records<const N: usize, T>(
    path: &str,
    property: &'static str,
    records: &[[u8; N]],
    read: impl Fn(&[u8; N]) -> Result<T, BadName>,
    first: usize,
) -> Result<Vec<T>, Error> {
    let read_one = |(index, record): (usize, &[u8; N])| {
        read(record).map_err(|problem| {
            let path = path.to_owned();
            Error::Record { path, property, index: first + index, problem }
        })
    };
    records.iter().enumerate().map(read_one).collect()
}

const _: () = assert!(SESSION_BYTES == 80 && FILE_BYTES == 64 && FLB_BYTES == 64);
