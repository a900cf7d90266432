//! Names of sessions.
//!
//! The kernel accepts any 1 to 63 bytes without a NUL. A [`SessionName`] must be visible ASCII without `/`,
//! because names appear in logs and paths. The name of systemd's own session is refused.

use std::fmt;
use std::str::FromStr;

use crate::uapi::SESSION_NAME_LENGTH;

/// The name of a session: 1 to 63 bytes of visible ASCII without `/`; not `.`, `..` or `systemd`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionName(String);

/// Why a text is no session name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// The text is empty.
    #[error("a session name cannot be empty")]
    Empty,
    /// More than [`SessionName::MAX_BYTES`].
    #[error("the session name {name:?} has {} bytes, more than {}", name.len(), SessionName::MAX_BYTES)]
    TooLong {
        /// The text.
        name: String,
    },
    /// A byte that is not visible ASCII, or a `/`.
    #[error(
        "the session name {name:?} has {character:?} in it: only visible ASCII without `/` is taken"
    )]
    Character {
        /// The text.
        name: String,
        /// The first character that is refused.
        character: char,
    },
    /// A name with a special meaning.
    #[error("the session name {name:?} is reserved")]
    Reserved {
        /// The text.
        name: String,
    },
}

impl SessionName {
    /// Longest name in bytes: the kernel's array less the terminating NUL.
    pub const MAX_BYTES: usize = SESSION_NAME_LENGTH - 1;

    /// `systemd` is the session of systemd 261 and later; `.` and `..` are not file names.
    const RESERVED: [&str; 3] = ["systemd", ".", ".."];

    /// Checks `name`.
    pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
        let name = name.into();
        if name.is_empty() {
            return Err(NameError::Empty);
        }
        if name.len() > Self::MAX_BYTES {
            return Err(NameError::TooLong { name });
        }
        if let Some(character) = name.chars().find(|c| !c.is_ascii_graphic() || *c == '/') {
            return Err(NameError::Character { name, character });
        }
        if Self::RESERVED.contains(&name.as_str()) {
            return Err(NameError::Reserved { name });
        }
        Ok(Self(name))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as the kernel's array: NUL-terminated, the rest zero.
    pub fn to_array(&self) -> [u8; SESSION_NAME_LENGTH] {
        let mut array = [0; SESSION_NAME_LENGTH];
        array[..self.0.len()].copy_from_slice(self.0.as_bytes());
        array
    }

    /// Reads the kernel's array, up to its first NUL. Bytes that are not UTF-8 are refused like
    /// any other that is not visible ASCII.
    pub fn from_array(array: &[u8; SESSION_NAME_LENGTH]) -> Result<Self, NameError> {
        let end = array.iter().position(|byte| *byte == 0).unwrap_or(array.len());
        Self::new(String::from_utf8_lossy(&array[..end]))
    }
}

impl fmt::Display for SessionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for SessionName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for SessionName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl TryFrom<&str> for SessionName {
    type Error = NameError;

    fn try_from(name: &str) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl TryFrom<String> for SessionName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        Self::new(name)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_rules_for_names_hold_at_their_edges() {
        let longest = "x".repeat(63);
        for good in ["a", "perennial-host", "vm:web.1", "...", "systemd2", "Systemd", &longest] {
            assert_eq!(SessionName::new(good).unwrap().as_str(), good);
        }
        let too_long = "x".repeat(64);
        assert_eq!(SessionName::new(""), Err(NameError::Empty));
        assert_eq!(
            SessionName::new(too_long.as_str()),
            Err(NameError::TooLong { name: too_long.clone() })
        );
        for (bad, refused) in [
            ("a/b", '/'),
            ("a b", ' '),
            ("a\0b", '\0'),
            ("a\n", '\n'),
            ("\x7f", '\x7f'),
            ("é", 'é'),
        ] {
            let error = NameError::Character { name: bad.to_owned(), character: refused };
            assert_eq!(SessionName::new(bad), Err(error));
        }
        for reserved in ["systemd", ".", ".."] {
            let error = NameError::Reserved { name: reserved.to_owned() };
            assert_eq!(SessionName::new(reserved), Err(error));
        }
    }

    #[test]
    fn a_refused_name_appears_escaped_in_its_error() {
        let error = SessionName::new("a\nb").unwrap_err().to_string();
        assert!(error.contains(r"a\nb") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn an_array_is_read_up_to_its_first_nul() {
        let mut array = SessionName::new("web").unwrap().to_array();
        array[4..8].copy_from_slice(b"junk");
        assert_eq!(SessionName::from_array(&array).unwrap().as_str(), "web");
        assert_eq!(SessionName::from_array(&[0; 64]), Err(NameError::Empty));
        assert!(matches!(SessionName::from_array(&[b'x'; 64]), Err(NameError::TooLong { .. })));
        array[0] = 0xff;
        assert!(matches!(SessionName::from_array(&array), Err(NameError::Character { .. })));
    }

    proptest! {
        #[test]
        fn every_text_is_refused_or_survives_the_array(text in any::<String>()) {
            if let Ok(name) = SessionName::new(text.as_str()) {
                prop_assert_eq!(name.as_str(), &text);
                prop_assert_eq!(name.to_array()[63], 0);
                prop_assert_eq!(SessionName::from_array(&name.to_array()).unwrap(), name);
            }
        }

        #[test]
        fn every_array_is_refused_or_read(array in any::<[u8; 32]>()) {
            let mut whole = [0; 64];
            whole[..32].copy_from_slice(&array);
            if let Ok(name) = SessionName::from_array(&whole) {
                prop_assert!(array.starts_with(name.as_str().as_bytes()));
            }
        }
    }
}
