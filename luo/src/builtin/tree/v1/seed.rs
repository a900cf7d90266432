//! The seed's form of `luo-v1`: a tree with the addresses of the records.
//!
//! ```text
//! / {
//!     compatible = "luo-v1";
//!     liveupdate-number = [8 bytes];             u64, little-endian
//!     luo-session {
//!         compatible = "luo-session-v2";
//!         luo-session-header = [8 bytes];        address of 16 pages: count u64, then records
//!     };
//! };
//! ```
//!
//! In a session's record `files` is the address of 2 pages of files' records, or 0. So there can be
//! 819 sessions of 128 files each; more are an error. This form has no shared objects, and no
//! digest: a flipped byte of a name, token or number cannot be detected, and decodes as another
//! tree. Source: the seed, and the files around it in Linux 6.19 (`luo_session.c`, `abi/luo.h`).

use vm_fdt::FdtWriter;

use super::node::{Node, root_node};
use super::{COMPATIBLE, COUNT_BYTES, Error, NUMBER, SESSION_HEADER, SESSION_NODE, read_records};
use crate::builtin::tree::memory::{
    Allocate, Memory, PAGE_BYTES, read_contiguous, write_contiguous,
};
use crate::builtin::tree::record::{FILE_BYTES, SESSION_BYTES, SessionEntry};
use crate::builtin::tree::{FileRecord, Handover, SessionRecord};

/// The format of the node with the address of the sessions.
pub const SESSION_COMPATIBLE: &str = "luo-session-v2";
/// Most sessions: as many as fit into 16 pages after the count.
pub const MAX_SESSIONS: usize = (SESSION_PAGES * PAGE_BYTES - COUNT_BYTES) / SESSION_BYTES;
/// Most files in a session: as many as fit into 2 pages.
pub const MAX_FILES: usize = FILE_PAGES * PAGE_BYTES / FILE_BYTES;

const SESSION_PAGES: usize = 16;
const FILE_PAGES: usize = 2;
const SESSION_PATH: &str = "/luo-session";

/// Encodes a tree: writes the records into `memory`, and returns the tree.
///
/// Errors: [`Error::TooMany`] if there are too many sessions or files, [`Error::Encode`] if there
/// are shared objects, which this form cannot hold, [`Error::Address`] if `memory` is full.
pub fn encode(handover: &Handover, memory: &mut impl Allocate) -> Result<Vec<u8>, Error> {
    let Handover { number, sessions, flbs } = handover;
    if !flbs.is_empty() {
        let problem = format!("there are {} shared objects, the seed has none", flbs.len());
        return Err(Error::Encode { problem });
    }
    check_count("sessions", sessions.len() as u64, MAX_SESSIONS)?;
    let mut header = (sessions.len() as u64).to_le_bytes().to_vec();
    for SessionRecord { name, files } in sessions {
        check_count("files", files.len() as u64, MAX_FILES)?;
        let count = files.len() as u64;
        let bytes: Vec<u8> = files.iter().flat_map(|file| file.to_bytes()).collect();
        let files = if bytes.is_empty() { 0 } else { store(memory, FILE_PAGES, &bytes, "files")? };
        header.extend(SessionEntry { name: *name, files, count }.to_bytes());
    }
    let address = store(memory, SESSION_PAGES, &header, "sessions")?;
    write_fdt(*number, address).map_err(|error| Error::Encode { problem: error.to_string() })
}

/// Decodes a tree and its records.
pub fn decode(bytes: &[u8], memory: &impl Memory) -> Result<Handover, Error> {
    let mut root = root_node(bytes)?;
    root.expect_compatible(COMPATIBLE)?;
    let number = u64::from_le_bytes(root.array(NUMBER)?);
    let mut children = root.into_children()?;
    let sessions = read_sessions(children.require(SESSION_NODE)?, memory)?;
    children.expect_empty()?;
    Ok(Handover { number, sessions, flbs: Vec::new() })
}

fn check_count(what: &'static str, found: u64, most: usize) -> Result<(), Error> {
    let most = most as u64;
    let path = SESSION_PATH.to_owned();
    if found > most { Err(Error::TooMany { path, what, found, most }) } else { Ok(()) }
}

fn store(memory: &mut impl Allocate, pages: usize, bytes: &[u8], what: &str) -> Result<u64, Error> {
    let address = memory.allocate(pages).ok_or_else(|| no_memory(0, what))?;
    write_contiguous(memory, address, bytes).ok_or_else(|| no_memory(address, what))?;
    Ok(address)
}

fn no_memory(address: u64, what: &str) -> Error {
    Error::Address { path: SESSION_PATH.to_owned(), what: what.to_owned(), address }
}

fn write_fdt(number: u64, header: u64) -> vm_fdt::FdtWriterResult<Vec<u8>> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", COMPATIBLE)?;
    fdt.property(NUMBER, &number.to_le_bytes())?;
    let node = fdt.begin_node(SESSION_NODE)?;
    fdt.property_string("compatible", SESSION_COMPATIBLE)?;
    fdt.property(SESSION_HEADER, &header.to_le_bytes())?;
    fdt.end_node(node)?;
    fdt.end_node(root)?;
    fdt.finish()
}

fn read_sessions(mut node: Node<'_>, memory: &impl Memory) -> Result<Vec<SessionRecord>, Error> {
    node.expect_compatible(SESSION_COMPATIBLE)?;
    let address = u64::from_le_bytes(node.array(SESSION_HEADER)?);
    node.into_children()?.expect_empty()?;

    let first_page = fetch(memory, address, COUNT_BYTES, "sessions")?;
    let count = first_page.first_chunk().map_or(0, |count| u64::from_le_bytes(*count));
    check_count("sessions", count, MAX_SESSIONS)?;
    let length = COUNT_BYTES + count as usize * SESSION_BYTES;
    let header = fetch(memory, address, length, "sessions")?;
    let (records, _) = header[COUNT_BYTES..].as_chunks::<SESSION_BYTES>();
    let entries = read_records(SESSION_PATH, SESSION_HEADER, records, SessionEntry::from_bytes, 0)?;
    entries.into_iter().map(|entry| read_session(entry, memory)).collect()
}

fn read_session(entry: SessionEntry, memory: &impl Memory) -> Result<SessionRecord, Error> {
    let SessionEntry { name, files, count } = entry;
    check_count("files", count, MAX_FILES)?;
    if count == 0 {
        if files != 0 {
            let (path, session) = (SESSION_PATH.to_owned(), name.to_string());
            return Err(Error::Files { path, session, found: files, expected: 0 });
        }
        return Ok(SessionRecord { name, files: Vec::new() });
    }
    let what = format!("the files of session `{name}`");
    let bytes = fetch(memory, files, count as usize * FILE_BYTES, &what)?;
    let (records, _) = bytes.as_chunks::<FILE_BYTES>();
    let files = read_records(SESSION_PATH, "files", records, FileRecord::from_bytes, 0)?;
    Ok(SessionRecord { name, files })
}

fn fetch(memory: &impl Memory, address: u64, length: usize, what: &str) -> Result<Vec<u8>, Error> {
    let aligned = address.is_multiple_of(PAGE_BYTES as u64);
    let bytes = (address != 0 && aligned).then(|| read_contiguous(memory, address, length));
    bytes.flatten().ok_or_else(|| no_memory(address, what))
}
