//! Strict reading of FDT nodes: properties and children are taken one by one, and any that is left
//! is an error.
//!
//! Only this module uses the parser. It parses only with [`Fdt::new`], which checks the whole tree
//! before anything is read. It asks for a node's children only after all properties of the node are
//! taken and known, because the parser interprets some properties itself.

use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::{Node as _, Property as _};

use super::Error;

/// Returns the root of the tree in `bytes`.
pub(in crate::builtin) fn root_node(bytes: &[u8]) -> Result<Node<'_>, Error> {
    let fdt = Fdt::new(bytes).map_err(|error| Error::Fdt { problem: error.to_string() })?;
    Node::new(fdt.root(), "/".to_owned())
}

/// A node, with the properties that are not taken yet.
#[derive(Debug)]
pub(in crate::builtin) struct Node<'a> {
    path: String,
    properties: Vec<(String, Vec<u8>)>,
    node: FdtNode<'a>,
}

impl<'a> Node<'a> {
    fn new(node: FdtNode<'a>, path: String) -> Result<Self, Error> {
        let mut properties: Vec<(String, Vec<u8>)> = Vec::new();
        for property in node.properties() {
            let name = property.name().to_owned();
            if properties.iter().any(|(other, _)| *other == name) {
                return Err(Error::Duplicate { path, name });
            }
            if properties.len() >= Self::MOST_PROPERTIES {
                return Err(Error::UnknownProperty { path, property: name });
            }
            properties.push((name, property.value().to_vec()));
        }
        Ok(Self { path, properties, node })
    }

    /// Most properties that are read of a node. No layout has as many.
    const MOST_PROPERTIES: usize = 16;

    /// The path of the node in the tree.
    pub(in crate::builtin) fn path(&self) -> &str {
        &self.path
    }

    /// Takes a property. Errors if it is missing.
    pub(in crate::builtin) fn bytes(&mut self, property: &'static str) -> Result<Vec<u8>, Error> {
        match self.properties.iter().position(|(name, _)| *name == property) {
            Some(index) => Ok(self.properties.swap_remove(index).1),
            None => Err(Error::MissingProperty { path: self.path.clone(), property }),
        }
    }

    /// Takes a property of `N` bytes. Errors if it is missing or has another length.
    pub(in crate::builtin) fn array<const N: usize>(
        &mut self,
        property: &'static str,
    ) -> Result<[u8; N], Error> {
        let bytes = self.bytes(property)?;
        bytes.try_into().map_err(|bytes: Vec<u8>| Error::Length {
            path: self.path.clone(),
            property,
            found: bytes.len(),
            expected: N as u64,
        })
    }

    /// Takes the property `compatible`. Errors if it is not `known`.
    pub(in crate::builtin) fn expect_compatible(
        &mut self,
        known: &'static str,
    ) -> Result<(), Error> {
        let found = self.bytes("compatible")?;
        if found.strip_suffix(&[0]) == Some(known.as_bytes()) {
            return Ok(());
        }
        let found = found.strip_suffix(&[0]).unwrap_or(&found).escape_ascii().to_string();
        Err(Error::Incompatible { path: self.path.clone(), found, known })
    }

    /// Returns the node's children. Errors if a property is not taken.
    pub(in crate::builtin) fn into_children(self) -> Result<Children<'a>, Error> {
        let Self { path, properties, node } = self;
        if let Some((property, _)) = properties.into_iter().next() {
            return Err(Error::UnknownProperty { path, property });
        }
        Ok(Children { path, nodes: node.children().take(Children::MOST + 1).collect() })
    }
}

/// The children of a node that are not taken yet.
#[derive(Debug)]
pub(in crate::builtin) struct Children<'a> {
    path: String,
    nodes: Vec<FdtNode<'a>>,
}

impl<'a> Children<'a> {
    /// Most children that are read of a node. No layout has as many.
    const MOST: usize = 16;

    fn path_of(&self, name: &str) -> String {
        format!("{}/{name}", self.path.trim_end_matches('/'))
    }

    /// Takes the child of this name, if there is one. Errors if there are two.
    pub(in crate::builtin) fn take(&mut self, name: &str) -> Result<Option<Node<'a>>, Error> {
        let Some(index) = self.nodes.iter().position(|node| node.name() == name) else {
            return Ok(None);
        };
        let node = self.nodes.remove(index);
        if self.nodes.iter().any(|other| other.name() == name) {
            return Err(Error::Duplicate { path: self.path.clone(), name: name.to_owned() });
        }
        Node::new(node, self.path_of(name)).map(Some)
    }

    /// Takes the child of this name. Errors if there is none, or if there are two.
    pub(in crate::builtin) fn require(&mut self, name: &str) -> Result<Node<'a>, Error> {
        let path = self.path_of(name);
        self.take(name)?.ok_or(Error::MissingNode { path })
    }

    /// Errors if a child is not taken.
    pub(in crate::builtin) fn expect_empty(self) -> Result<(), Error> {
        match self.nodes.first() {
            Some(node) => Err(Error::UnknownNode { path: self.path_of(node.name()) }),
            None => Ok(()),
        }
    }
}
