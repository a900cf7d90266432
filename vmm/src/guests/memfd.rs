//! Memfds for documents.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};

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
