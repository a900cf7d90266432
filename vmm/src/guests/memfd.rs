//! Memfds for documents.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::MemfdFlags;

use crate::state::document;

/// Creates a memfd that LUO can preserve, and writes `bytes` to it.
pub fn document_memfd(name: &str, bytes: &[u8]) -> io::Result<File> {
    let file = File::from(luo::memfd(name, bytes.len() as u64).map_err(io::Error::other)?);
    file.write_all_at(bytes, 0)?;
    Ok(file)
}

/// Creates an empty memfd that another process writes to. Nothing may rely on its size.
pub fn scratch_memfd(name: &str) -> io::Result<File> {
    Ok(luo::executable_memfd(name, MemfdFlags::CLOEXEC)?.into())
}

/// Returns the CRC-32 of the first `bytes` bytes of a document that another process may have written.
/// Errors if the file is shorter, or if `bytes` is more than the largest document.
pub fn document_digest(file: &File, bytes: u64) -> io::Result<u32> {
    Ok(crc32fast::hash(&read_document(file, bytes)?))
}

/// Returns the first `bytes` bytes of such a document. Errors likewise.
pub fn read_document(file: &File, bytes: u64) -> io::Result<Vec<u8>> {
    if bytes > document::MAX_BYTES as u64 {
        let problem = format!("{bytes} bytes, at most {} are possible", document::MAX_BYTES);
        return Err(io::Error::other(problem));
    }
    let mut contents = zeroed(bytes as usize)?;
    file.read_exact_at(&mut contents, 0)?;
    Ok(contents)
}

/// Returns so many bytes. Errors if there is no memory for them, where `vec!` would end this process and all VMs.
pub fn zeroed(bytes: usize) -> io::Result<Vec<u8>> {
    let mut zeroed = Vec::new();
    zeroed.try_reserve_exact(bytes).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    zeroed.resize(bytes, 0);
    Ok(zeroed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_of_the_document_and_of_nothing_larger_or_shorter() {
        let file = document_memfd("a test", b"a document and more").unwrap();
        assert_eq!(document_digest(&file, 10).unwrap(), crc32fast::hash(b"a document"));
        document_digest(&file, 20).unwrap_err();
        assert_eq!(zeroed(isize::MAX as usize).unwrap_err().kind(), io::ErrorKind::OutOfMemory);
        let error = document_digest(&file, u64::MAX).unwrap_err().to_string();
        assert!(error.contains("at most 16777216"), "{error}");
    }
}
