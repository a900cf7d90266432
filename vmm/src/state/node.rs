//! The tree of the state document as plain data: nodes, properties, and a strict reader.
//!
//! This module does not know how the tree is serialized. Integers are big-endian, as in a device tree, so
//! that `dtc` prints them as cells. A [`Reader`] gives each property and child once. At its end every
//! property or child that was not read is an error: otherwise a guest would be restored with part of its
//! state missing.

use std::collections::BTreeMap;

use super::Schema;

/// Longest property name that a device tree allows.
pub const MAX_PROPERTY_NAME: usize = 31;

/// What is wrong with a state document. Every variant names the node by its path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A property that the binding requires is missing.
    #[error("{path}: property `{property}` is missing")]
    MissingProperty {
        /// Path of the node.
        path: String,
        /// Name of the property.
        property: String,
    },
    /// A child node that the binding requires is missing.
    #[error("{path}: child node `{child}` is missing")]
    MissingNode {
        /// Path of the parent.
        path: String,
        /// Name of the child.
        child: String,
    },
    /// A property or child that this build does not know.
    #[error("{path}: the document has {what}, which this build does not know")]
    Leftover {
        /// Path of the node.
        path: String,
        /// The property or node, with its kind.
        what: String,
    },
    /// The node has a binding that this build cannot read.
    #[error("{path}: the document has `{found}`, this build knows {known}")]
    Incompatible {
        /// Path of the node.
        path: String,
        /// The `compatible` strings of the document.
        found: String,
        /// The bindings of this build.
        known: String,
    },
    /// A value has the wrong length, is out of bounds or contradicts another value.
    #[error("{path}: property `{property}`: {problem}")]
    Invalid {
        /// Path of the node.
        path: String,
        /// Name of the property.
        property: String,
        /// What is wrong, with both sides.
        problem: String,
    },
    /// The document as a whole cannot be read.
    #[error("the state document is damaged: {0}")]
    Damaged(String),
    /// The value could not be written as a document.
    #[error("cannot encode the state document: {0}")]
    Encode(String),
}

/// One node of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// `name@unit-address`; the address is the one that the guest uses for the part.
    pub name: String,
    /// Raw values of the properties, by name.
    pub properties: BTreeMap<String, Vec<u8>>,
    /// Children in order.
    pub children: Vec<Node>,
}

impl Node {
    /// Creates a node with this name and `compatible`.
    pub fn new(name: &str, compatible: &[&str]) -> Self {
        let mut node =
            Self { name: name.to_owned(), properties: BTreeMap::new(), children: Vec::new() };
        node.put_strings("compatible", compatible);
        node
    }

    /// Sets a property to raw bytes: a KVM uapi struct, a register file.
    pub fn put_bytes(&mut self, property: &str, value: &[u8]) {
        debug_assert!(property.len() <= MAX_PROPERTY_NAME, "{property} is too long");
        let previous = self.properties.insert(property.to_owned(), value.to_owned());
        debug_assert!(previous.is_none(), "{property} is set twice in {}", self.name);
    }

    /// Sets a property to one 32-bit cell.
    pub fn put_u32(&mut self, property: &str, value: u32) {
        self.put_bytes(property, &value.to_be_bytes());
    }

    /// Sets a property to one 64-bit value.
    pub fn put_u64(&mut self, property: &str, value: u64) {
        self.put_bytes(property, &value.to_be_bytes());
    }

    /// Sets a property to a boolean, as a cell of 0 or 1.
    pub fn put_bool(&mut self, property: &str, value: bool) {
        self.put_u32(property, value.into());
    }

    /// Sets a property to a list of 64-bit values.
    pub fn put_u64s(&mut self, property: &str, values: &[u64]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_be_bytes()).collect();
        self.put_bytes(property, &bytes);
    }

    /// Sets a property to a NUL-terminated string. `value` must not contain a NUL.
    pub fn put_str(&mut self, property: &str, value: &str) {
        self.put_strings(property, &[value]);
    }

    /// Sets a property to a list of NUL-terminated strings. No value may contain a NUL.
    pub fn put_strings(&mut self, property: &str, values: &[&str]) {
        let mut bytes = Vec::new();
        for value in values {
            debug_assert!(!value.contains('\0'));
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        }
        self.put_bytes(property, &bytes);
    }

    /// Whether `compatible` of the node lists `binding`.
    pub fn is_compatible(&self, binding: &str) -> bool {
        let names = self.properties.get("compatible").map(Vec::as_slice).unwrap_or_default();
        names.split(|byte| *byte == 0).any(|name| name == binding.as_bytes())
    }

    /// Returns a reader of this node, a child of the node at `parent` (empty for the root).
    pub fn reader(&self, parent: &str) -> Result<Reader<'_>, StateError> {
        Reader::new(self, &path_of(self, parent))
    }

    /// Returns the error that this node, a child of the node at `parent` (empty for the root), has none of
    /// the `known` bindings.
    pub fn incompatible(&self, parent: &str, known: &[&str]) -> StateError {
        let names = self.properties.get("compatible").map(Vec::as_slice).unwrap_or_default();
        let found = String::from_utf8_lossy(names.strip_suffix(&[0]).unwrap_or(names));
        StateError::Incompatible {
            path: path_of(self, parent),
            found: found.replace('\0', "`, `"),
            known: format!("`{}`", known.join("`, `")),
        }
    }

    /// Adds a child. No other child may have the same name.
    pub fn push(&mut self, child: Node) {
        debug_assert!(self.children.iter().all(|c| c.name != child.name), "two {}", child.name);
        self.children.push(child);
    }
}

/// Reads one node; each property and child can be read once.
#[derive(Debug)]
pub struct Reader<'a> {
    path: String,
    compatible: Vec<String>,
    properties: BTreeMap<&'a str, &'a [u8]>,
    children: Vec<&'a Node>,
}

impl<'a> Reader<'a> {
    /// Returns a reader of `node`, whose path is `path` (`/` for the root).
    pub fn new(node: &'a Node, path: &str) -> Result<Self, StateError> {
        let mut reader = Self {
            path: path.to_owned(),
            compatible: Vec::new(),
            properties: node.properties.iter().map(|(k, v)| (k.as_str(), v.as_slice())).collect(),
            children: node.children.iter().collect(),
        };
        reader.compatible = reader.strings("compatible")?;
        Ok(reader)
    }

    /// The path of this node, for errors.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether `compatible` of the node lists `binding`. Decides between versions of a schema.
    pub fn is_compatible(&self, binding: &str) -> bool {
        self.compatible.iter().any(|c| c == binding)
    }

    /// Returns an error about one property of this node.
    pub fn invalid(&self, property: &str, problem: impl Into<String>) -> StateError {
        StateError::Invalid {
            path: self.path.clone(),
            property: property.to_owned(),
            problem: problem.into(),
        }
    }

    /// Takes a property as raw bytes.
    pub fn bytes(&mut self, property: &str) -> Result<&'a [u8], StateError> {
        self.optional_bytes(property).ok_or_else(|| StateError::MissingProperty {
            path: self.path.clone(),
            property: property.to_owned(),
        })
    }

    /// Takes a property that may be absent.
    pub fn optional_bytes(&mut self, property: &str) -> Option<&'a [u8]> {
        self.properties.remove(property)
    }

    /// Takes a property of exactly `N` bytes.
    pub fn array<const N: usize>(&mut self, property: &str) -> Result<[u8; N], StateError> {
        let bytes = self.bytes(property)?;
        bytes.try_into().map_err(|_| {
            self.invalid(property, format!("it has {} bytes, the binding says {N}", bytes.len()))
        })
    }

    /// Takes one 32-bit cell.
    pub fn u32(&mut self, property: &str) -> Result<u32, StateError> {
        Ok(u32::from_be_bytes(self.array(property)?))
    }

    /// Takes one 32-bit cell that must fit `T`, such as a `u8` register.
    pub fn narrow<T: TryFrom<u32>>(&mut self, property: &str) -> Result<T, StateError> {
        let value = self.u32(property)?;
        T::try_from(value).map_err(|_| self.invalid(property, format!("{value} is out of range")))
    }

    /// Takes one 64-bit value.
    pub fn u64(&mut self, property: &str) -> Result<u64, StateError> {
        Ok(u64::from_be_bytes(self.array(property)?))
    }

    /// Takes a boolean: a cell that is 0 or 1.
    pub fn bool(&mut self, property: &str) -> Result<bool, StateError> {
        match self.u32(property)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.invalid(property, format!("{other} is neither 0 nor 1"))),
        }
    }

    /// Takes a list of 64-bit values.
    pub fn u64s(&mut self, property: &str) -> Result<Vec<u64>, StateError> {
        let bytes = self.bytes(property)?;
        let (chunks, rest) = bytes.as_chunks::<8>();
        if !rest.is_empty() {
            let problem = format!("{} bytes are not a list of 64-bit values", bytes.len());
            return Err(self.invalid(property, problem));
        }
        Ok(chunks.iter().map(|c| u64::from_be_bytes(*c)).collect())
    }

    /// Takes one string.
    pub fn str(&mut self, property: &str) -> Result<String, StateError> {
        let mut strings = self.strings(property)?;
        match (strings.pop(), strings.len()) {
            (Some(only), 0) => Ok(only),
            (_, more) => Err(self.invalid(property, format!("{} strings, not one", more + 1))),
        }
    }

    /// Whether the property exists and was not taken yet.
    pub fn has(&self, property: &str) -> bool {
        self.properties.contains_key(property)
    }

    /// Takes one string that may be absent.
    pub fn optional_str(&mut self, property: &str) -> Result<Option<String>, StateError> {
        match self.has(property) {
            true => self.str(property).map(Some),
            false => Ok(None),
        }
    }

    /// Takes a list of at least one string.
    pub fn strings(&mut self, property: &str) -> Result<Vec<String>, StateError> {
        let bytes = self.bytes(property)?;
        let Some(text) = bytes.strip_suffix(&[0]) else {
            return Err(self.invalid(property, "the string is not terminated"));
        };
        text.split(|byte| *byte == 0)
            .map(|part| String::from_utf8(part.to_owned()))
            .collect::<Result<_, _>>()
            .map_err(|_| self.invalid(property, "the string is not UTF-8"))
    }

    /// Takes a list of strings. The list may be empty; the property then has no bytes.
    pub fn string_list(&mut self, property: &str) -> Result<Vec<String>, StateError> {
        match self.properties.get(property) {
            Some([]) => self.bytes(property).map(|_| Vec::new()),
            _ => self.strings(property),
        }
    }

    /// Takes the child called exactly `name` and decodes it.
    pub fn child<S: Schema>(&mut self, name: &str) -> Result<S, StateError> {
        self.optional_child(name)?.ok_or_else(|| StateError::MissingNode {
            path: self.path.clone(),
            child: name.to_owned(),
        })
    }

    /// Takes the child called exactly `name`, if it exists, and decodes it.
    pub fn optional_child<S: Schema>(&mut self, name: &str) -> Result<Option<S>, StateError> {
        match self.children.iter().position(|c| c.name == name) {
            Some(index) => {
                let node = self.children.remove(index);
                read_node(node, &self.path).map(Some)
            }
            None => Ok(None),
        }
    }

    /// Takes all children called `prefix@<unit-address>`, in the document's order, as pairs of unit
    /// address and value.
    pub fn children<S: Schema>(&mut self, prefix: &str) -> Result<Vec<(String, S)>, StateError> {
        let (taken, rest) = std::mem::take(&mut self.children)
            .into_iter()
            .partition(|c| c.name.split_once('@').is_some_and(|(name, _)| name == prefix));
        self.children = rest;
        let taken: Vec<&Node> = taken;
        taken
            .into_iter()
            .map(|node| {
                let address = node.name.split_once('@').map_or("", |(_, address)| address);
                Ok((address.to_owned(), read_node(node, &self.path)?))
            })
            .collect()
    }

    /// Takes all children called `prefix@0`, `prefix@1`, ... (hexadecimal). Errors if they are out of order
    /// or a number is missing.
    pub fn sequence<S: Schema>(&mut self, prefix: &str) -> Result<Vec<S>, StateError> {
        let children = self.children(prefix)?;
        for (index, (address, _)) in children.iter().enumerate() {
            if *address != format!("{index:x}") {
                return Err(StateError::MissingNode {
                    path: self.path.clone(),
                    child: format!("{prefix}@{index:x}"),
                });
            }
        }
        Ok(children.into_iter().map(|(_, value)| value).collect())
    }

    /// Takes all remaining children, in the document's order. For lists of nodes whose bindings decide their
    /// kinds.
    pub fn rest(&mut self) -> Vec<&'a Node> {
        std::mem::take(&mut self.children)
    }

    /// Errors if a property or child was not taken.
    pub fn finish(self) -> Result<(), StateError> {
        let what = match (self.properties.keys().next(), self.children.first()) {
            (Some(property), _) => format!("a property `{property}`"),
            (None, Some(child)) => format!("a node `{}`", child.name),
            (None, None) => return Ok(()),
        };
        Err(StateError::Leftover { path: self.path, what })
    }
}

/// Returns the path of `node`, a child of the node at `parent` (empty for the root).
fn path_of(node: &Node, parent: &str) -> String {
    match parent {
        "" => "/".to_owned(),
        "/" => format!("/{}", node.name),
        parent => format!("{parent}/{}", node.name),
    }
}

/// Decodes `node`, a child of the node at `parent` (empty for the root). Errors if a part of it is not read.
pub fn read_node<S: Schema>(node: &Node, parent: &str) -> Result<S, StateError> {
    let mut reader = node.reader(parent)?;
    if !S::COMPATIBLE.iter().any(|known| reader.is_compatible(known)) {
        return Err(node.incompatible(parent, S::COMPATIBLE));
    }
    let value = S::decode(&mut reader)?;
    reader.finish()?;
    Ok(value)
}

#[cfg(test)]
mod tests;
