//! Structs of KVM's interface (uapi), saved as their bytes.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::node::{Node, Reader, StateError};

/// A uapi struct, compared by its bytes. The struct's layout is part of the kernel's interface and
/// does not change, so the layout needs no version.
#[derive(Clone, Copy)]
pub struct Raw<T>(pub T);

impl<T: IntoBytes + Immutable> Raw<T> {
    /// Writes the struct as one property.
    pub fn put(&self, node: &mut Node, property: &str) {
        node.put_bytes(property, self.0.as_bytes());
    }
}

impl<T: FromBytes> Raw<T> {
    /// Reads the struct from a property. Errors unless the property has exactly the struct's size.
    pub fn take(reader: &mut Reader<'_>, property: &str) -> Result<Self, StateError> {
        let bytes = reader.bytes(property)?;
        T::read_from_bytes(bytes).map(Self).map_err(|_| {
            let (found, wanted) = (bytes.len(), size_of::<T>());
            reader.invalid(property, format!("it has {found} bytes, the kernel's struct {wanted}"))
        })
    }
}

impl<T: IntoBytes + Immutable> PartialEq for Raw<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes() == other.0.as_bytes()
    }
}

impl<T: IntoBytes + Immutable> Eq for Raw<T> {}

impl<T> fmt::Debug for Raw<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Raw({} bytes)", size_of::<T>())
    }
}

#[cfg(test)]
impl<T: FromBytes> Raw<T> {
    /// Returns a struct without a zero byte, for samples. Different seeds give different structs.
    pub(crate) fn pattern(seed: u8) -> Self {
        let byte = |at: usize| (at as u8).wrapping_mul(31).wrapping_add(seed.wrapping_mul(2)) | 1;
        let bytes: Vec<u8> = (0..size_of::<T>()).map(byte).collect();
        Self(T::read_from_bytes(&bytes).expect("the struct's own size"))
    }
}
