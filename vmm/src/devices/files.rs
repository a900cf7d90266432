//! Passes files to devices. The host opens each file by path; the device gets an open file
//! descriptor and identifies it by its role, a name that the device's kind defines.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::identity::Identity;

/// A file that a device needs, opened by the host.
#[derive(Debug)]
pub struct Opened {
    /// The purpose of the file, unique in the device.
    pub role: &'static str,
    /// The open file.
    pub fd: OwnedFd,
    /// The identity of the file, if the device needs it.
    pub identity: Option<Identity>,
}

/// A file that a device needs cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {what} {}{remedy}", path.display())]
pub struct OpenError {
    /// What the file is for, such as `disk`.
    pub what: &'static str,
    /// Its path on the host.
    pub path: PathBuf,
    /// What to do, with a colon in front; or empty.
    pub remedy: &'static str,
    /// The cause.
    #[source]
    pub source: io::Error,
}

/// Opens `path`. The error text calls the file `what`.
pub fn open(what: &'static str, path: &Path, options: &OpenOptions) -> Result<File, OpenError> {
    let opened = open_at_once(path, options);
    opened.map_err(|source| OpenError { what, path: path.to_owned(), remedy: "", source })
}

/// Opens `path`. Errors if that would wait for a program at the other end of a FIFO.
pub fn open_at_once(path: &Path, options: &OpenOptions) -> io::Result<File> {
    match std::fs::metadata(path) {
        // The host would wait, and with it all VMs.
        Ok(found) if found.file_type().is_fifo() => {
            Err(io::Error::other("it is a FIFO, which only a program at its other end could open"))
        }
        _ => options.open(path),
    }
}

/// How long PID 1 waits for devices of the host to appear.
const DEVICES_WITHIN: Duration = Duration::from_secs(5);
/// When a device was waited for first.
static WAITING_SINCE: OnceLock<Instant> = OnceLock::new();

/// Calls `find` until it finds a device of the host. Under PID 1 drivers may still be probing, and a process without
/// netlink is not notified when they are done; guests that are to be resumed stand still meanwhile, so all devices
/// have five seconds together, from the first call on. Any other process calls `find` once: the host has finished
/// booting.
pub fn wait_for_device<T>(find: impl Fn() -> Option<T>) -> Option<T> {
    let deadline = *WAITING_SINCE.get_or_init(Instant::now) + DEVICES_WITHIN;
    loop {
        let found = find();
        if found.is_some() || std::process::id() != 1 || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The files of one device in the VM's process. The device takes each of them once.
#[derive(Debug, Default)]
pub struct DeviceFiles(Vec<(String, OwnedFd, Option<Identity>)>);

/// A device was not given exactly the files that it needs.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilesError {
    /// A file is missing.
    #[error("the host passed no file for its role `{0}`")]
    Missing(&'static str),
    /// A file has no identity.
    #[error("the host passed the file for its role `{0}` without an identity")]
    Unidentified(&'static str),
    /// A file has a role that the device does not have.
    #[error("the host passed a file for the role `{0}`, which it does not have")]
    Leftover(String),
}

impl DeviceFiles {
    /// Adds a file.
    pub fn push(&mut self, role: String, fd: OwnedFd, identity: Option<Identity>) {
        self.0.push((role, fd, identity));
    }

    /// Takes the file of `role`, if there is one.
    pub fn take_optional(&mut self, role: &str) -> Option<OwnedFd> {
        let index = self.0.iter().position(|(found, _, _)| found == role)?;
        Some(self.0.remove(index).1)
    }

    /// Takes the file of `role`. Errors if there is none.
    pub fn take(&mut self, role: &'static str) -> Result<OwnedFd, FilesError> {
        self.take_optional(role).ok_or(FilesError::Missing(role))
    }

    /// Takes the file of `role` with its identity. Errors if either is missing.
    pub fn take_identified(
        &mut self,
        role: &'static str,
    ) -> Result<(OwnedFd, Identity), FilesError> {
        let index = self.0.iter().position(|(found, _, _)| found == role);
        let (_, fd, identity) = self.0.remove(index.ok_or(FilesError::Missing(role))?);
        Ok((fd, identity.ok_or(FilesError::Unidentified(role))?))
    }

    /// Errors if any file was not taken.
    pub fn finish(self) -> Result<(), FilesError> {
        match self.0.into_iter().next() {
            Some((role, _, _)) => Err(FilesError::Leftover(role)),
            None => Ok(()),
        }
    }
}

/// Turns the files as the host opened them into those that the device takes.
impl From<Vec<Opened>> for DeviceFiles {
    fn from(opened: Vec<Opened>) -> Self {
        let file = |Opened { role, fd, identity }| (role.to_owned(), fd, identity);
        Self(opened.into_iter().map(file).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifo_is_refused_and_keeps_nobody_waiting() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let error = open("kernel", &path, OpenOptions::new().read(true)).unwrap_err();
        let said = crate::causes::chain(&error).join(": ");
        assert!(said.starts_with("cannot open kernel") && said.contains("it is a FIFO"), "{said}");
    }

    #[test]
    fn each_file_is_taken_once_by_its_role() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let identity = Identity::File { file_system: 1, inode: 2, born: None };
        let mut files = DeviceFiles::default();
        files.push("image".to_owned(), null(), Some(identity.clone()));
        files.push("log".to_owned(), null(), None);
        assert_eq!(files.take_identified("log").unwrap_err(), FilesError::Unidentified("log"));
        assert_eq!(files.take_identified("image").unwrap().1, identity);
        assert_eq!(files.take("image").unwrap_err(), FilesError::Missing("image"));
        files.push("log".to_owned(), null(), None);
        assert_eq!(files.finish(), Err(FilesError::Leftover("log".to_owned())));
    }
}
