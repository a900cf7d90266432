//! The saved state of a VM: typed values, the tree they become, and the document that carries them.
//!
//! A part of the machine (a vCPU, a device, the clock) saves itself into a plain value of its own
//! type ([`Persist`]), and that value describes itself as one node of a tree ([`Schema`]). Only
//! [`document`] knows that the tree travels as an FDT. Decoding has no side effects: the whole
//! document becomes checked values before the first KVM call is made.

#[cfg(test)]
pub(crate) mod contract;
pub mod document;
#[cfg(test)]
mod documented;
pub mod node;
mod raw;

pub use node::{Node, Reader, StateError};
pub use raw::Raw;

/// A part of the machine whose state outlives the kernel. The trait has no default methods, so that
/// every part has to say how it saves and restores.
pub trait Persist: Sized {
    /// The plain, versioned value (`SerialStateV1`).
    type State: Schema;
    /// What a restored part needs from its new surroundings: fds, guest memory, interrupt lines.
    type Resources;
    /// Why a restore failed.
    type Error: std::error::Error;

    /// Returns the state and changes nothing. While paused, repeated calls return equal values.
    fn save(&self) -> Result<Self::State, Self::Error>;

    /// Builds the part from its state. There is no restore into an existing part.
    fn restore(state: Self::State, resources: Self::Resources) -> Result<Self, Self::Error>;
}

/// A state value that can be written as, and read from, one node of the state document.
pub trait Schema: Sized {
    /// The bindings this type can be read from, newest first; the first is the one it writes.
    const COMPATIBLE: &'static [&'static str];

    /// The bindings that this value is written as, if that depends on the value: a value that an older
    /// binding has as well is written as that, so that programs which know only that one can read it.
    fn bindings(&self) -> &'static [&'static str] {
        Self::COMPATIBLE
    }

    /// Writes every field into `node` (whose `compatible` has been set).
    fn encode(&self, node: &mut Node);

    /// Reads every field. The caller returns an error for properties and nodes that were not read.
    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError>;

    /// Returns this value as a node called `name`, for example `serial@3f8`.
    fn to_node(&self, name: &str) -> Node {
        let mut node = Node::new(name, self.bindings());
        self.encode(&mut node);
        node
    }
}
