//! The bytes of a state document. Only this module knows that a document is an FDT.
//!
//! [`encode`] writes a tree with `vm-fdt`, [`decode`] reads one with `dtoolkit`. Each tree has exactly one
//! encoding: FDT version 17, no reserved memory, blocks side by side, properties in the order of their
//! names. The first property of the root is `digest`, the CRC-32 of all bytes with the digest's own four
//! bytes taken as zero. So the digest is always at the same offset and is checked before the bytes are
//! parsed, and bytes that a decoded tree would not encode to are refused. A cut, a flipped bit and a
//! surplus byte are therefore errors wherever they are.
//!
//! The digest detects damage. It does not prevent forgery: a process that can write the document can
//! compute the digest. The bounds below ensure that a forged document causes no panic, no endless recursion
//! and no unbounded allocation.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::{Node as _, Property as _};
use vm_fdt::FdtWriter;

use super::Schema;
use super::node::{MAX_PROPERTY_NAME, Node, StateError, read_node};

mod show;
#[cfg(test)]
mod tests;

pub use show::{Detail, show};

/// Largest document in bytes. A vCPU needs about 12 KiB, so a thousand vCPUs have room.
pub const MAX_BYTES: usize = 16 << 20;
/// Deepest nesting: the root is at depth 1.
pub const MAX_DEPTH: usize = 16;
/// Most nodes in a document.
pub const MAX_NODES: usize = 1 << 14;
/// Most properties in a document, over all nodes.
pub const MAX_PROPERTIES: usize = 1 << 18;
/// Longest name of a node, and longest unit address.
pub const MAX_NODE_NAME: usize = 31;
/// The root property that [`encode`] adds and [`decode`] removes.
pub const DIGEST_PROPERTY: &str = "digest";

/// Offset of the FDT's structure block: behind the header and an empty memory reservation block.
const STRUCTURE_AT: usize = 40 + 16;
/// The first bytes of each structure block: FDT_BEGIN_NODE, an empty name, FDT_PROP, a length of 4, and the
/// first string as the name.
const STRUCTURE_START: [u8; 20] = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 0];
/// Offset of the digest.
const DIGEST_AT: usize = STRUCTURE_AT + STRUCTURE_START.len();
const DIGEST_BYTES: usize = 4;

/// Encodes `value` as the root of a document.
pub fn write_document<S: Schema>(value: &S) -> Result<Vec<u8>, StateError> {
    encode(&value.to_node(""))
}

/// Decodes a document whose root is an `S`. Errors if a part of the document is not read.
pub fn read_document<S: Schema>(bytes: &[u8]) -> Result<S, StateError> {
    read_node(&decode(bytes)?, "")
}

/// Encodes the tree at `root`, whose name is empty, as a document.
///
/// The same tree always gives the same bytes. Errors with [`StateError::Encode`] for a tree that [`decode`]
/// would refuse: bad or duplicate names, a root property called `digest`, or a tree beyond the bounds of
/// this module.
pub fn encode(root: &Node) -> Result<Vec<u8>, StateError> {
    if root.properties.contains_key(DIGEST_PROPERTY) {
        return Err(StateError::Encode(format!("/: `{DIGEST_PROPERTY}` is the document's own")));
    }
    check_tree(root).map_err(StateError::Encode)?;
    let mut bytes = write_fdt(root).map_err(|error| StateError::Encode(error.to_string()))?;
    if bytes.len() > MAX_BYTES {
        let problem = format!("it has {} bytes, the most is {MAX_BYTES}", bytes.len());
        return Err(StateError::Encode(problem));
    }
    let digest = digest(&bytes).map_err(StateError::Encode)?;
    bytes[DIGEST_AT..DIGEST_AT + DIGEST_BYTES].copy_from_slice(&digest.to_be_bytes());
    Ok(bytes)
}

/// Decodes a document. `bytes` must be exactly the document: its memfd has the same size.
///
/// Errors with [`StateError::Damaged`] for bytes that [`encode`] would not have written.
pub fn decode(bytes: &[u8]) -> Result<Node, StateError> {
    check_bytes(bytes).map_err(StateError::Damaged)?;
    let fdt = Fdt::new(bytes).map_err(|error| StateError::Damaged(error.to_string()))?;
    let mut root = Collector::default().node(&fdt.root(), "").map_err(StateError::Damaged)?;
    root.properties.remove(DIGEST_PROPERTY);

    let again = encode(&root).map_err(|error| StateError::Damaged(error.to_string()))?;
    if again != bytes {
        let at = again.iter().zip(bytes).take_while(|(a, b)| a == b).count();
        return Err(StateError::Damaged(format!(
            "it is not written as this build writes it: byte {at} of {} differs",
            bytes.len()
        )));
    }
    Ok(root)
}

/// Facts about an undamaged document that do not depend on bindings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Length of the document.
    pub bytes: usize,
    /// Number of nodes, the root included.
    pub nodes: usize,
    /// Number of properties over all nodes, the digest not included.
    pub properties: usize,
    /// The document's digest.
    pub digest: u32,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, nodes, properties, digest } = self;
        write!(f, "{bytes} bytes, {nodes} nodes, {properties} properties, digest {digest:#010x}")
    }
}

/// Checks that `bytes` are an undamaged document, without reading its bindings.
pub fn check(bytes: &[u8]) -> Result<Summary, StateError> {
    let root = decode(bytes)?;
    let Count { nodes, properties } = check_tree(&root).map_err(StateError::Damaged)?;
    let digest = digest(bytes).map_err(StateError::Damaged)?;
    Ok(Summary { bytes: bytes.len(), nodes, properties, digest })
}

/// Writes the right digest into `bytes`, if they have the layout of a document.
///
/// For tests and fuzzers, whose changed documents must pass the check of the digest.
pub fn reseal(bytes: &mut [u8]) {
    if let Ok(digest) = digest(bytes) {
        bytes[DIGEST_AT..DIGEST_AT + DIGEST_BYTES].copy_from_slice(&digest.to_be_bytes());
    }
}

/// Returns the CRC-32 of `bytes` with the digest's own bytes taken as zero.
fn digest(bytes: &[u8]) -> Result<u32, String> {
    let start = bytes.get(STRUCTURE_AT..DIGEST_AT);
    let rest = bytes.get(DIGEST_AT + DIGEST_BYTES..);
    let (Some(start), Some(rest)) = (start, rest) else {
        return Err(format!("it ends after {} bytes, before its digest", bytes.len()));
    };
    if start != STRUCTURE_START {
        return Err(format!("its first property is not `{DIGEST_PROPERTY}`"));
    }
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..DIGEST_AT]);
    crc.update(&[0; DIGEST_BYTES]);
    crc.update(rest);
    Ok(crc.finalize())
}

/// Checks size, header and digest, without following any offset.
fn check_bytes(bytes: &[u8]) -> Result<(), String> {
    if bytes.len() > MAX_BYTES {
        return Err(format!("it has {} bytes, the most is {MAX_BYTES}", bytes.len()));
    }
    let (cells, _) = bytes.as_chunks::<4>();
    let Some(&[magic, total, ..]) = cells.first_chunk::<2>() else {
        return Err(format!("it has {} bytes, too few for a header", bytes.len()));
    };
    if magic != [0xd0, 0x0d, 0xfe, 0xed] {
        return Err(format!("its magic number is {magic:02x?}, not that of an FDT"));
    }
    let total = u32::from_be_bytes(total);
    if usize::try_from(total) != Ok(bytes.len()) {
        return Err(format!("its header says {total} bytes, there are {}", bytes.len()));
    }
    let computed = digest(bytes)?;
    let written = cells.get(DIGEST_AT / 4).map(|cell| u32::from_be_bytes(*cell));
    if written != Some(computed) {
        let written = written.unwrap_or_default();
        return Err(format!("its digest says {written:#010x}, its bytes give {computed:#010x}"));
    }
    check_header(cells)
}

/// Checks the header's other fields, each of which has one valid value. `dtoolkit` checks them less
/// strictly and uses them as offsets.
fn check_header(cells: &[[u8; 4]]) -> Result<(), String> {
    let field =
        |index: usize| cells.get(index).map_or(0, |cell| u64::from(u32::from_be_bytes(*cell)));
    let (total, strings_at, strings_len, structure_len) = (field(1), field(3), field(8), field(9));
    let structure_at = STRUCTURE_AT as u64;
    let expected = [
        ("structure offset", field(2), structure_at),
        ("strings offset", strings_at, structure_at + structure_len),
        ("reservation offset", field(4), 40),
        ("version", field(5), 17),
        ("oldest compatible version", field(6), 16),
        ("boot CPU", field(7), 0),
        ("end of the strings", strings_at + strings_len, total),
    ];
    match expected.into_iter().find(|(_, found, right)| found != right) {
        Some((what, found, right)) => Err(format!("its header's {what} is {found}, not {right}")),
        None if cells[10..14].as_flattened().iter().any(|byte| *byte != 0) => {
            Err("it reserves memory".to_owned())
        }
        None => Ok(()),
    }
}

fn write_fdt(root: &Node) -> vm_fdt::FdtWriterResult<Vec<u8>> {
    let mut fdt = FdtWriter::new()?;
    let handle = fdt.begin_node("")?;
    fdt.property(DIGEST_PROPERTY, &[0; DIGEST_BYTES])?;
    write_content(&mut fdt, root)?;
    fdt.end_node(handle)?;
    fdt.finish()
}

/// Recursion is as deep as the tree, which [`check_tree`] has bounded.
fn write_content(fdt: &mut FdtWriter, node: &Node) -> vm_fdt::FdtWriterResult<()> {
    for (name, value) in &node.properties {
        fdt.property(name, value)?;
    }
    for child in &node.children {
        let handle = fdt.begin_node(&child.name)?;
        write_content(fdt, child)?;
        fdt.end_node(handle)?;
    }
    Ok(())
}

/// Counts nodes and properties and compares them with the bounds.
#[derive(Debug, Default)]
struct Count {
    nodes: usize,
    properties: usize,
}

impl Count {
    fn node(&mut self, path: &str, depth: usize) -> Result<(), String> {
        self.nodes += 1;
        if depth > MAX_DEPTH {
            return Err(format!("{path}: it is {depth} nodes deep, the most is {MAX_DEPTH}"));
        }
        if self.nodes > MAX_NODES {
            return Err(format!("{path}: it is one node more than {MAX_NODES}, the most"));
        }
        Ok(())
    }

    fn property(&mut self, path: &str, name: &str) -> Result<(), String> {
        self.properties += 1;
        if self.properties > MAX_PROPERTIES {
            return Err(format!(
                "{path}: property `{name}` is one more than {MAX_PROPERTIES}, the most"
            ));
        }
        Ok(())
    }
}

/// Checks names and bounds of a whole tree.
fn check_tree(root: &Node) -> Result<Count, String> {
    if !root.name.is_empty() {
        return Err(format!("the root is called `{}`, its name must be empty", root.name));
    }
    let mut count = Count::default();
    check_node(root, "", 1, &mut count)?;
    Ok(count)
}

fn check_node(node: &Node, path: &str, depth: usize, count: &mut Count) -> Result<(), String> {
    count.node(shown(path), depth)?;
    for name in node.properties.keys() {
        count.property(shown(path), name)?;
        check_property_name(shown(path), name)?;
    }
    let mut names = HashSet::new();
    for child in &node.children {
        let path = format!("{path}/{}", child.name);
        check_node_name(&path, &child.name)?;
        if !names.insert(&child.name) {
            return Err(format!("{path}: there are two nodes of this name"));
        }
        check_node(child, &path, depth + 1, count)?;
    }
    Ok(())
}

/// Copies the tree out of an FDT that `dtoolkit` has validated.
#[derive(Debug, Default)]
struct Collector {
    count: Count,
    depth: usize,
}

impl Collector {
    fn node(&mut self, node: &FdtNode<'_>, path: &str) -> Result<Node, String> {
        self.depth += 1;
        self.count.node(shown(path), self.depth)?;
        let mut properties = BTreeMap::new();
        for property in node.properties() {
            let name = property.name();
            self.count.property(shown(path), name)?;
            if properties.insert(name.to_owned(), property.value().to_owned()).is_some() {
                return Err(format!("{}: there are two properties `{name}`", shown(path)));
            }
        }
        let mut children = Vec::new();
        for child in node.children() {
            children.push(self.node(&child, &format!("{path}/{}", child.name()))?);
        }
        self.depth -= 1;
        Ok(Node { name: node.name().to_owned(), properties, children })
    }
}

/// Returns the path for an error: the root's path is empty while paths are built, and shown as `/`.
fn shown(path: &str) -> &str {
    if path.is_empty() { "/" } else { path }
}

/// Whether a text is a valid `name` or `name@unit-address`. Stricter than the Devicetree Specification
/// (2.2.1), so that `vm-fdt`, `dtoolkit` and `dtc` all accept it.
fn check_node_name(path: &str, name: &str) -> Result<(), String> {
    let (base, address) = match name.split_once('@') {
        Some((base, address)) => (base, Some(address)),
        None => (name, None),
    };
    let fits = |part: &str| {
        (1..=MAX_NODE_NAME).contains(&part.len())
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b",._+-".contains(&b))
    };
    let starts_well = base.starts_with(|c: char| c.is_ascii_alphabetic());
    if starts_well && fits(base) && address.is_none_or(fits) {
        Ok(())
    } else {
        Err(format!("{path}: a node cannot be called `{name}`"))
    }
}

/// Properties that have a meaning for device tree tools. `dtc` rejects documents in which their values do
/// not have that meaning.
const TAKEN_PROPERTIES: [&str; 3] = ["name", "phandle", "linux,phandle"];

/// Whether a text is a valid property name (Devicetree Specification, 2.2.4.1) that has no meaning for
/// `dtc`.
fn check_property_name(path: &str, name: &str) -> Result<(), String> {
    let fits = !TAKEN_PROPERTIES.contains(&name)
        && (1..=MAX_PROPERTY_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b",._+?#-".contains(&b));
    if fits { Ok(()) } else { Err(format!("{path}: a property cannot be called `{name}`")) }
}
