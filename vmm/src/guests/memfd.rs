//! Memfds for documents.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::state::document;

/// A memfd of `bytes` bytes that LUO can carry: executable, because LUO would bring a
/// `MFD_NOEXEC_SEAL` one back unwritable.
pub fn document_memfd(name: &str, bytes: &[u8]) -> io::Result<File> {
    let fd = match memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::EXEC) {
        // Linux before 6.3 does not know MFD_EXEC, and makes every memfd executable.
        Err(rustix::io::Errno::INVAL) => memfd_create(name, MemfdFlags::CLOEXEC),
        made => made,
    }?;
    let file = File::from(fd);
    file.write_all_at(bytes, 0)?;
    Ok(file)
}

/// CRC-32 of the first `bytes` bytes of a document that another process may have written. Errors if
/// there are fewer, or more than a document can have.
pub fn document_digest(file: &File, bytes: u64) -> io::Result<u32> {
    if bytes > document::MAX_BYTES as u64 {
        let problem = format!("{bytes} bytes, at most {} are possible", document::MAX_BYTES);
        return Err(io::Error::other(problem));
    }
    let mut contents = vec![0; bytes as usize];
    file.read_exact_at(&mut contents, 0)?;
    Ok(crc32fast::hash(&contents))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_of_the_document_and_of_nothing_larger_or_shorter() {
        let file = document_memfd("a test", b"a document and more").unwrap();
        assert_eq!(document_digest(&file, 10).unwrap(), crc32fast::hash(b"a document"));
        document_digest(&file, 20).unwrap_err();
        let error = document_digest(&file, u64::MAX).unwrap_err().to_string();
        assert!(error.contains("at most 16777216"), "{error}");
    }
}
