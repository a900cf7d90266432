//! The key of one preserved file.

use std::fmt;

/// The key under which one fd is preserved in a session.
///
/// Any value is allowed, 0 and `u64::MAX` included. A token is unique within its session only. Tokens
/// cannot be listed after the switch: the next program must know them, or read them from a file that is
/// preserved under a token that it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<u64> for Token {
    fn from(value: u64) -> Self {
        Self(value)
    }
}
