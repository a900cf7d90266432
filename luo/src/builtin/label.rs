//! Short names in fixed fields: names of sessions, and names of file formats.
//!
//! A [`Label`] is a name that the protocol and the handover trees can carry: at least one byte and
//! at most one less than the field has, none of them NUL. The bytes need not be text. Equal labels
//! have equal fields, because the bytes after the name are zero.

use std::fmt;

use crate::SessionName;
use crate::uapi::SESSION_NAME_LENGTH;

/// Size in bytes of the field that names a file's format (`luo_file_ser.compatible`, Linux 7.3).
pub const COMPATIBLE_LENGTH: usize = 48;

/// 1 to `N - 1` bytes without NUL, in a field of `N` bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label<const N: usize>([u8; N]);

/// The name of a session: any 1 to 63 bytes without NUL. [`SessionName`] is narrower.
pub type Name = Label<SESSION_NAME_LENGTH>;

/// The name of the format of a handler or a shared object, such as `memfd-v2`: 1 to 47 bytes.
pub type Compatible = Label<COMPATIBLE_LENGTH>;

impl<const N: usize> Label<N> {
    /// Returns a label of exactly these bytes; `None` if they are empty, too long, or have a NUL.
    pub fn new(bytes: impl AsRef<[u8]>) -> Option<Self> {
        let bytes = bytes.as_ref();
        if bytes.is_empty() || bytes.contains(&0) {
            return None;
        }
        let mut field = [0; N];
        field[..N - 1].get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self(field))
    }

    /// Returns the label in `field`: the bytes up to the first NUL. Later bytes are ignored. `None`
    /// if the first byte is NUL, or no byte is.
    pub fn from_field(field: &[u8; N]) -> Option<Self> {
        let end = field.iter().position(|byte| *byte == 0)?;
        Self::new(&field[..end])
    }

    /// The label's bytes, without NUL.
    pub fn as_bytes(&self) -> &[u8] {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(N);
        &self.0[..end]
    }

    /// Returns the whole field: the label, padded with zeros.
    pub fn to_field(self) -> [u8; N] {
        self.0
    }
}

/// Escapes bytes that are not printable ASCII.
impl<const N: usize> fmt::Display for Label<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().escape_ascii().fmt(f)
    }
}

impl<const N: usize> fmt::Debug for Label<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl From<&SessionName> for Name {
    fn from(name: &SessionName) -> Self {
        Self(name.to_array())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_fits_its_field_with_a_nul() {
        assert_eq!(Label::<4>::new("abc").unwrap().to_field(), *b"abc\0");
        for bad in ["", "abcd", "abcdefgh", "a\0", "\0"] {
            assert_eq!(Label::<4>::new(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn bytes_after_the_nul_are_ignored() {
        let label = Label::from_field(b"ab\0xyz").unwrap();
        assert_eq!(label, Label::new("ab").unwrap());
        assert_eq!(label.as_bytes(), b"ab");
        assert_eq!(Label::from_field(b"abcdef"), None);
        assert_eq!(Label::from_field(b"\0bcdef"), None);
    }

    #[test]
    fn a_label_that_is_no_text_is_shown_escaped() {
        assert_eq!(Name::new(b"a/\n\xff").unwrap().to_string(), r"a/\n\xff");
        assert_eq!(Name::from(&SessionName::new("web").unwrap()).to_string(), "web");
    }
}
