//! The user IDs that processes of VMs run as: no two processes of a machine have the same one, whichever host or
//! `perennial run` they belong to.
//!
//! A host locks byte N of a file while a process of it runs as user N. The kernel drops the locks when the host has
//! ended, however that ends.

#![expect(unsafe_code, reason = "rustix has no locks of open file descriptions")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The file of this machine.
pub(super) const OF_MACHINE: &str = "/run/perennial/users";

/// The locks of one host.
#[derive(Debug)]
pub(super) struct Users(File);

impl Users {
    /// Opens the file at `path`, which only root may do anything with: a user who could lock it could keep hosts from
    /// starting VMs.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        Ok(Self(options.open(path)?))
    }

    /// Reserves the user `id`. Returns whether nobody else has it.
    pub(super) fn reserve(&self, id: u32) -> io::Result<bool> {
        match self.set(libc::F_WRLCK, id) {
            Ok(()) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => Ok(false),
                _ => Err(error),
            },
        }
    }

    pub(super) fn free(&self, id: u32) {
        // Only a lock that splits others needs memory, which this is not.
        let _ = self.set(libc::F_UNLCK, id);
    }

    fn set(&self, kind: i32, id: u32) -> io::Result<()> {
        let wanted = libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: id.into(),
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: the fd is open, and the kernel only reads the structure, which outlives the call.
        match unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_OFD_SETLK, &raw const wanted) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
