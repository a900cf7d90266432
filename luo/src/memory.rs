//! Memory that a kernel's LUO or a keeper can preserve: memfds.

use std::os::fd::OwnedFd;

use rustix::fs::MemfdFlags;
use rustix::io::Errno;

use crate::Error;

/// Creates a memfd of `len` bytes, without any allocated page.
///
/// The memfd is executable, because Linux 7.3 returns a memfd that is sealed against execution as sealed
/// against writing too. It cannot be sealed. Its size is set here once, because LUO freezes the size of a
/// preserved memfd. Errors name the memory and its length.
pub fn memfd(name: &str, len: u64) -> Result<OwnedFd, Error> {
    let error = |errno| Error::CreateMemory { name: name.to_owned(), len, errno };
    let fd = executable_memfd(name, MemfdFlags::CLOEXEC).map_err(error)?;
    rustix::fs::ftruncate(&fd, len).map_err(error)?;
    Ok(fd)
}

/// An empty memfd with these flags and MFD_EXEC, where the kernel has that flag. Linux before 6.3 does
/// not have it, and makes every memfd executable.
pub(crate) fn executable_memfd(name: &str, flags: MemfdFlags) -> Result<OwnedFd, Errno> {
    match rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        created => created,
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::SealFlags;

    use super::*;

    #[test]
    fn memory_is_a_hole_in_an_executable_memfd_that_nobody_can_seal() {
        let fd = memfd("vm", 1 << 20).unwrap();
        let stat = rustix::fs::fstat(&fd).unwrap();
        assert_eq!((stat.st_size, stat.st_blocks, stat.st_mode & 0o111), (1 << 20, 0, 0o111));
        assert_eq!(rustix::fs::fcntl_get_seals(&fd).unwrap(), SealFlags::SEAL);
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
