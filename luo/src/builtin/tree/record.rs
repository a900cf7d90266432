//! The binary records that both layouts use.
//!
//! Integers are little-endian, in the order and at the offsets of `include/linux/kho/abi/luo.h`
//! (Linux 7.3; the seed has the same records of sessions and files). A name ends with a NUL; the
//! bytes after it are written as zero and ignored when read. The place of records, and the meaning
//! of the numbers in them, are left to the layouts.
//!
//! | record | bytes | fields |
//! |---|---|---|
//! | session | 80 | 0 name\[64\], 64 files u64, 72 count u64 |
//! | file | 64 | 0 compatible\[48\], 48 data u64, 56 token u64 |
//! | flb | 64 | 0 compatible\[48\], 48 data u64, 56 count u64 |

use super::{FileRecord, FlbRecord};
use crate::Token;
use crate::builtin::label::{COMPATIBLE_LENGTH, Compatible, Label, Name};
use crate::uapi::SESSION_NAME_LENGTH;

/// Bytes of a session's record.
pub const SESSION_BYTES: usize = 80;
/// Bytes of a file's record.
pub const FILE_BYTES: usize = 64;
/// Bytes of a shared object's record.
pub const FLB_BYTES: usize = 64;

/// A name field of a record that is empty, or has no NUL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("its name must be 1 to {} bytes, then a NUL", .field - 1)]
pub struct BadName {
    /// Bytes of the field.
    pub field: usize,
}

/// A session's record. The layout decides what `files` means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionEntry {
    /// The name of the session.
    pub name: Name,
    /// The place of its files, as the layout defines it; 0 if it has none.
    pub files: u64,
    /// The number of its files.
    pub count: u64,
}

impl SessionEntry {
    /// Writes the record.
    pub fn to_bytes(self) -> [u8; SESSION_BYTES] {
        let mut bytes = [0; SESSION_BYTES];
        bytes[..64].copy_from_slice(&self.name.to_field());
        bytes[64..72].copy_from_slice(&self.files.to_le_bytes());
        bytes[72..].copy_from_slice(&self.count.to_le_bytes());
        bytes
    }

    /// Reads the record.
    pub fn from_bytes(bytes: &[u8; SESSION_BYTES]) -> Result<Self, BadName> {
        let name = label::<SESSION_NAME_LENGTH>(bytes)?;
        Ok(Self { name, files: u64_at(bytes, 64), count: u64_at(bytes, 72) })
    }
}

impl FileRecord {
    /// Writes the record.
    pub fn to_bytes(self) -> [u8; FILE_BYTES] {
        labelled(self.compatible, self.data, self.token.0)
    }

    /// Reads the record.
    pub fn from_bytes(bytes: &[u8; FILE_BYTES]) -> Result<Self, BadName> {
        let compatible = label::<COMPATIBLE_LENGTH>(bytes)?;
        Ok(Self { compatible, data: u64_at(bytes, 48), token: Token(u64_at(bytes, 56)) })
    }
}

impl FlbRecord {
    /// Writes the record.
    pub fn to_bytes(self) -> [u8; FLB_BYTES] {
        labelled(self.compatible, self.data, self.count)
    }

    /// Reads the record.
    pub fn from_bytes(bytes: &[u8; FLB_BYTES]) -> Result<Self, BadName> {
        let compatible = label::<COMPATIBLE_LENGTH>(bytes)?;
        Ok(Self { compatible, data: u64_at(bytes, 48), count: u64_at(bytes, 56) })
    }
}

fn labelled(compatible: Compatible, first: u64, second: u64) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..48].copy_from_slice(&compatible.to_field());
    bytes[48..56].copy_from_slice(&first.to_le_bytes());
    bytes[56..].copy_from_slice(&second.to_le_bytes());
    bytes
}

/// Reads the label in the first `N` bytes.
fn label<const N: usize>(bytes: &[u8]) -> Result<Label<N>, BadName> {
    bytes.first_chunk().and_then(Label::from_field).ok_or(BadName { field: N })
}

/// Reads the number at offset `at`. Returns 0 beyond the end: callers pass only offsets inside.
pub(in crate::builtin) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u64::from_le_bytes(*field))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_fields_have_the_offsets_of_the_header() {
        let name = Name::new("web").unwrap();
        let bytes = SessionEntry { name, files: 0x1122, count: 0x33 }.to_bytes();
        assert_eq!(&bytes[..4], b"web\0");
        assert_eq!((bytes[64], bytes[65], bytes[72]), (0x22, 0x11, 0x33));

        let compatible = Compatible::new("memfd-v2").unwrap();
        let bytes = FileRecord { compatible, data: 0x44, token: Token(0x55) }.to_bytes();
        assert_eq!((&bytes[..9], bytes[48], bytes[56]), (&b"memfd-v2\0"[..], 0x44, 0x55));
        let bytes = FlbRecord { compatible, data: 0x66, count: 0x77 }.to_bytes();
        assert_eq!((&bytes[..9], bytes[48], bytes[56]), (&b"memfd-v2\0"[..], 0x66, 0x77));
    }

    #[test]
    fn a_record_without_a_name_is_an_error() {
        assert_eq!(SessionEntry::from_bytes(&[0; 80]), Err(BadName { field: 64 }));
        assert_eq!(FileRecord::from_bytes(&[b'x'; 64]), Err(BadName { field: 48 }));
        let error = FlbRecord::from_bytes(&[0; 64]).unwrap_err().to_string();
        assert_eq!(error, "its name must be 1 to 47 bytes, then a NUL");
    }
}
