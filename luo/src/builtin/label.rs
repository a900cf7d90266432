//! Short texts in fixed fields: names of sessions, and what handlers call their formats.
//!
//! A [`Label`] is what the protocol and the handover trees can carry: at least one byte and at most
//! one less than its field, none of them NUL. Nothing else is asked of the bytes: they need not be
//! text at all. Equal labels have equal fields, because what follows the NUL is zero.

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

/// What a handler or a shared object calls its format, such as `memfd-v2`: 1 to 47 bytes.
pub type Compatible = Label<COMPATIBLE_LENGTH>;

impl<const N: usize> Label<N> {
    /// The label with exactly these bytes; `None` if there are none, too many, or a NUL in them.
    pub fn new(bytes: impl AsRef<[u8]>) -> Option<Self> {
        let bytes = bytes.as_ref();
        if bytes.is_empty() || bytes.contains(&0) {
            return None;
        }
        let mut field = [0; N];
        field[..N - 1].get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self(field))
    }

    /// The label in `field`, up to its first NUL. What follows is ignored. `None` if the field is
    /// empty or has no NUL.
    pub fn from_field(field: &[u8; N]) -> Option<Self> {
        let end = field.iter().position(|byte| *byte == 0)?;
        Self::new(&field[..end])
    }

    /// The label's bytes, without NUL.
    pub fn as_bytes(&self) -> &[u8] {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(N);
        &self.0[..end]
    }

    /// The whole field: the label, and zeros.
    pub fn to_field(self) -> [u8; N] {
        self.0
    }
}

/// Bytes that are not visible ASCII appear escaped.
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
    fn what_follows_the_nul_does_not_matter() {
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
