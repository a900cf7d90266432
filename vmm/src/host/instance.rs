//! One host a machine: a lock that the host takes before it opens anything else, and keeps until it ends.
//!
//! A second host would boot the same VMs on the same disks. The kernel drops the lock when the process that has it
//! ends, so a host that was killed leaves none behind. A handover passes the lock on, and it is never free in
//! between. A host whose configuration names another lock than the one that was passed on keeps both.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::causes::chain;
use crate::devices::files::open_at_once;

/// Where the lock is, if the configuration does not say.
pub(super) const DEFAULT_LOCK: &str = "/run/perennial/host.lock";
/// No lock is longer, in bytes.
const LONGEST: u64 = 20;

/// The lock cannot be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstanceError {
    /// Another host has it.
    #[error(
        "another host runs on this machine{owner}, it has locked {}: stop that host first. Two hosts \
         with VMs and disks of their own need a `lock` of their own in [host] as well",
        path.display()
    )]
    Taken {
        /// The lock.
        path: PathBuf,
        /// Who has it, in parentheses, if that is known.
        owner: String,
    },
    /// The file is something else.
    #[error(
        "{} is no lock of a host, it has other contents: nothing was changed in it. Give the path of a file of its own \
         as `lock` in [host]",
        path.display()
    )]
    Foreign {
        /// What the configuration calls the lock.
        path: PathBuf,
    },
    /// The file cannot be created or locked.
    #[error("cannot lock {}, which says that a host runs on this machine", path.display())]
    File {
        /// The lock.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The lock, as long as this lives.
#[derive(Debug)]
pub(super) struct Instance {
    lock: File,
    /// The lock that the last host left, if the configuration names another one now.
    _left: Option<File>,
}

impl Instance {
    /// Takes the lock at `path`, or takes over the one that the last host of this process has `left`.
    pub(super) fn take(path: &Path, left: Option<OwnedFd>) -> Result<Self, InstanceError> {
        let Some(left) = left.map(File::from) else {
            return Ok(Self { lock: open_locked(path)?, _left: None });
        };
        let left = locked(left, path)?;
        if is_at(&left, path) {
            return Ok(Self { lock: left, _left: None });
        }
        Ok(match open_locked(path) {
            Ok(lock) => Self { lock, _left: Some(left) },
            // The VMs are here, so the host goes on with what it has.
            Err(error) => {
                tracing::error!("{}", chain(&error).join(": "));
                Self { lock: left, _left: None }
            }
        })
    }

    /// The locked file, to be left to the next host of this process.
    pub(super) fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

/// Whether an open file is the one at a path.
fn is_at(file: &File, path: &Path) -> bool {
    let place = |found: fs::Metadata| (found.dev(), found.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(file), Ok(there)) => place(file) == place(there),
        _ => false,
    }
}

/// Opens the lock at `path`, and locks it.
fn open_locked(path: &Path) -> Result<File, InstanceError> {
    let opened = open(path);
    locked(opened.map_err(|source| InstanceError::File { path: path.to_owned(), source })?, path)
}

/// Locks a file, unless it is something else than a host's lock. Errors name `path`.
fn locked(file: File, path: &Path) -> Result<File, InstanceError> {
    let error = |source| InstanceError::File { path: path.to_owned(), source };
    if !is_of_a_host(&file).map_err(error)? {
        return Err(InstanceError::Foreign { path: path.to_owned() });
    }
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let owner = contents(&file).unwrap_or_default().trim().parse::<u32>();
            let owner = owner.map_or(String::new(), |pid| format!(" (process {pid})"));
            return Err(InstanceError::Taken { path: path.to_owned(), owner });
        }
        Err(errno) => return Err(error(errno.into())),
    }
    // Only for the error of a second host.
    let own = format!("{}\n", std::process::id());
    let _ = file.set_len(0).and_then(|()| file.write_all_at(own.as_bytes(), 0));
    Ok(file)
}

/// Whether a file is what a host writes into its lock: nothing, or the number of a process. A file that an operator
/// names by mistake, an image say, must stay as it is.
fn is_of_a_host(file: &File) -> io::Result<bool> {
    let found = file.metadata()?;
    let is_number = |text: String| text.trim().parse::<u32>().is_ok();
    Ok(found.is_file()
        && (found.len() == 0 || found.len() <= LONGEST && is_number(contents(file)?)))
}

/// The start of a file.
fn contents(file: &File) -> io::Result<String> {
    let mut text = [0; LONGEST as usize];
    let count = file.read_at(&mut text, 0)?;
    Ok(String::from_utf8_lossy(&text[..count]).into_owned())
}

fn open(path: &Path) -> io::Result<File> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    open_at_once(path, OpenOptions::new().read(true).write(true).create(true).truncate(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_host_is_told_who_the_first_one_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/host.lock");
        let first = Instance::take(&path, None).unwrap();
        let error = Instance::take(&path, None).unwrap_err().to_string();
        let own = format!("(process {})", std::process::id());
        assert!(error.contains(&own) && error.contains(path.to_str().unwrap()), "{error}");
        let left = first.lock().try_clone_to_owned().unwrap();
        drop(first);
        // A file has no directory in it.
        let next = Instance::take(&path.join("no"), Some(left)).unwrap();
        assert!(Instance::take(&path, None).is_err());
        drop(next);
        Instance::take(&path, None).unwrap();
    }

    #[test]
    fn a_host_with_another_lock_than_the_last_one_has_both() {
        let directory = tempfile::tempdir().unwrap();
        let [old, new] = ["old", "new"].map(|name| directory.path().join(name));
        let left = Instance::take(&old, None).unwrap().lock().try_clone_to_owned().unwrap();
        let host = Instance::take(&new, Some(left)).unwrap();
        for path in [&old, &new] {
            Instance::take(path, None).unwrap_err();
        }
        // What it leaves is the one that its configuration names.
        let left = host.lock().try_clone_to_owned().unwrap();
        drop(host);
        let next = Instance::take(&new, Some(left)).unwrap();
        Instance::take(&old, None).unwrap();
        Instance::take(&new, None).unwrap_err();
        drop(next);
    }

    #[test]
    fn a_file_that_is_no_lock_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.img");
        for contents in ["an image", "123456789012345678901", "7 and more", "\n"] {
            fs::write(&path, contents).unwrap();
            let error = Instance::take(&path, None).unwrap_err();
            assert!(matches!(error, InstanceError::Foreign { .. }), "{contents}: {error}");
            assert!(error.to_string().contains("web.img"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), contents);
        }
        // Those of hosts that have ended.
        for contents in ["", "4294967295\n", "1"] {
            fs::write(&path, contents).unwrap();
            Instance::take(&path, None).unwrap();
        }
    }

    #[test]
    fn a_lock_that_cannot_be_there_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = Instance::take(directory.path(), None).unwrap_err();
        assert!(matches!(error, InstanceError::File { .. }), "{error}");
    }
}
