//! Memory that a kernel's LUO or a keeper can preserve: memfds.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::Error;

/// Creates a memfd of `len` bytes, without any allocated page.
///
/// The memfd is executable, because Linux 7.3 returns a memfd that is sealed against execution as sealed
/// against writing too. Its size is sealed, because LUO freezes the size of a preserved memfd and takes memory for
/// every byte of it: a process that is given the memfd must not be able to change that. No other seal can follow.
/// Errors name the memory and its length.
pub fn memfd(name: &str, len: u64) -> Result<OwnedFd, Error> {
    let error = |errno| Error::CreateMemory { name: name.to_owned(), len, errno };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = executable_memfd(name, flags).map_err(error)?;
    rustix::fs::ftruncate(&fd, len).map_err(error)?;
    let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&fd, seals).map_err(error)?;
    Ok(fd)
}

/// An empty memfd with these flags and MFD_EXEC, where the kernel has that flag. Linux before 6.3 does
/// not have it, and makes every memfd executable.
pub fn executable_memfd(name: &str, flags: MemfdFlags) -> Result<OwnedFd, Errno> {
    match rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        created => created,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_a_hole_in_an_executable_memfd_whose_size_and_seals_stay() {
        let fd = memfd("vm", 1 << 20).unwrap();
        let stat = rustix::fs::fstat(&fd).unwrap();
        assert_eq!((stat.st_size, stat.st_blocks, stat.st_mode & 0o111), (1 << 20, 0, 0o111));
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        assert_eq!(rustix::fs::fcntl_get_seals(&fd).unwrap(), seals);
        rustix::fs::ftruncate(&fd, 1 << 40).unwrap_err();
        rustix::io::pwrite(&fd, b"x", 1 << 40).unwrap_err();
        rustix::io::pwrite(&fd, b"x", 0).unwrap();
    }

    #[test]
    fn memory_that_cannot_be_created_is_named_in_the_error() {
        for (name, len) in [("x".repeat(250), 1), ("vm".to_owned(), u64::MAX)] {
            let error = memfd(&name, len).unwrap_err();
            assert!(matches!(error, Error::CreateMemory { len: found, .. } if found == len));
            assert!(error.to_string().contains(&name), "{error}");
        }
    }
}
