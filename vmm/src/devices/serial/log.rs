//! `serial = "file=PATH"`: a log on the host that stays bounded and that other programs may rename.
//!
//! The VM's process has an open file and no path. So a thread of the host watches the path, and sends the
//! VM's process another open file when the log is full or has another name:
//!
//! ```text
//!   the log has max_size bytes   --> PATH is renamed to PATH.1, PATH.1 to PATH.2, ... up to PATH.keep
//!   logrotate has renamed it     --> a new log is opened at PATH, at once
//! ```
//!
//! The thread ends with the VM's process.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};
use rustix::time::Timespec;
use serde::{Deserialize, Serialize};

use super::options::{NEXT, SINK};
use crate::devices::claims::Claim;
use crate::devices::files::{OpenError, Opened, open};
use crate::options::{Options, parse_size};

/// Default size of a log, in bytes. With its predecessors a log then takes at most 256 MiB.
const DEFAULT_MAX_SIZE: u64 = 64 << 20;
/// Default number of predecessors.
const DEFAULT_KEEP: u32 = 3;
/// Least size of a log. With less, each line of a guest would rename files.
const LEAST_MAX_SIZE: u64 = 64 << 10;
/// Most predecessors: each is renamed at every rotation.
const MOST_KEEP: u32 = 100;

/// Time until another attempt to replace a log, in case that an attempt failed.
const AGAIN_AFTER: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A log that the serial port writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOptions {
    /// Its path.
    pub path: PathBuf,
    /// Size at which it is renamed, in bytes. 0: it grows without bound.
    pub max_size: u64,
    /// Number of renamed logs that are kept.
    pub keep: u32,
}

impl LogOptions {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let nameless = || "it must name a path: file=PATH".to_owned();
        if !text.starts_with("file=") {
            return Err(nameless());
        }
        let options = Options::parse(text, &["file", "max_size", "keep"])?;
        let path = options.get("file").filter(|path| !path.is_empty()).ok_or_else(nameless)?.into();
        let max_size = options.get("max_size").map(parse_size).transpose();
        let max_size = match max_size.map_err(|problem| format!("max_size: {problem}"))? {
            None => DEFAULT_MAX_SIZE,
            Some(size @ 1..LEAST_MAX_SIZE) => {
                return Err(format!(
                    "max_size is at least {} K, or 0 for a log without bound; not {size}",
                    LEAST_MAX_SIZE >> 10
                ));
            }
            Some(size) => size,
        };
        let keep = match options.get("keep") {
            None => DEFAULT_KEEP,
            Some(number) => number.parse().ok().filter(|n| *n <= MOST_KEEP).ok_or_else(|| {
                format!("keep is a number of old logs, 0 to {MOST_KEEP}, not `{number}`")
            })?,
        };
        Ok(Self { path, max_size, keep })
    }

    /// The log and its predecessors.
    pub(super) fn claims(&self) -> Vec<Claim> {
        let all = [self.path.clone()].into_iter().chain((1..=self.keep).map(|n| self.old(n)));
        all.map(|path| Claim::path("serial log", path)).collect()
    }

    pub(super) fn open(&self) -> Result<Vec<Opened>, OpenError> {
        let error = |source| OpenError {
            what: "serial output",
            path: self.path.clone(),
            remedy: "",
            source,
        };
        let file = self.open_log().map_err(error)?;
        let pair = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        );
        let (ours, next) = pair.map_err(|errno| error(errno.into()))?;
        let clone = file.try_clone().map_err(error)?;
        let keeper = Keeper::new(self.clone(), clone, ours).map_err(error)?;
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || keeper.run())
            .map_err(error)?;
        let opened = |role, fd| Opened { role, fd, identity: None };
        Ok(vec![opened(SINK, file.into()), opened(NEXT, next)])
    }

    /// Errors if more than the last directory of the path is missing: the path is then probably mistyped, or on a file
    /// system that is not mounted. A host that `is_pid_1` makes all directories: an initramfs has none.
    pub(super) fn check_directory(&self, is_pid_1: bool) -> Result<(), OpenError> {
        let above = self.path.parent().and_then(Path::parent);
        let Some(above) = above.filter(|above| !above.as_os_str().is_empty()) else {
            return Ok(());
        };
        if is_pid_1 || !matches!(above.try_exists(), Ok(false)) {
            return Ok(());
        }
        let problem = format!("there is no directory {}", above.display());
        Err(OpenError {
            what: "serial output",
            path: self.path.clone(),
            remedy: ": make the directory, or name another path",
            source: io::Error::new(io::ErrorKind::NotFound, problem),
        })
    }

    /// Opens the log. Creates missing directories: a VM that goes on after a live update must not fail because the next
    /// kernel's root or `/run` has none.
    fn open_log(&self) -> io::Result<File> {
        if let Some(directory) = self.path.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut options = OpenOptions::new();
        options.append(true).create(true);
        open("serial output", &self.path, &options).map_err(|error| error.source)
    }

    /// Renames the log and its predecessors. The oldest is replaced.
    fn rotate(&self) -> io::Result<()> {
        if self.keep == 0 {
            return fs::remove_file(&self.path);
        }
        for number in (1..self.keep).rev() {
            match fs::rename(self.old(number), self.old(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(&self.path, self.old(1))
    }

    fn old(&self, number: u32) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(format!(".{number}"));
        name.into()
    }
}

/// The host's thread for one log.
struct Keeper {
    options: LogOptions,
    /// The log that the VM's process writes.
    log: File,
    /// Where the VM's process gets the next one; closed when that process has ended.
    vm: OwnedFd,
    changes: OwnedFd,
    /// Whether the last attempt to open another log failed, which is said once.
    failed: bool,
}

impl Keeper {
    fn new(options: LogOptions, log: File, vm: OwnedFd) -> io::Result<Self> {
        let changes = watch(&log)?;
        Ok(Self { options, log, vm, changes, failed: false })
    }

    fn run(mut self) {
        let path = self.options.path.display().to_string();
        loop {
            match self.follow() {
                // What happened before the new log was watched is looked at again.
                Ok(true) => continue,
                Ok(false) => self.failed = false,
                Err(error) => {
                    if !std::mem::replace(&mut self.failed, true) {
                        tracing::error!("the log {path} stays as it is: {error}");
                    }
                }
            }
            match self.wait() {
                Ok(true) => {}
                // The VM's process has ended.
                Ok(false) => return,
                Err(errno) => return tracing::error!("the log {path} is not watched: {errno}"),
            }
        }
    }

    /// Waits for a change of the log, or a while if it cannot be replaced now. Returns whether the VM's process still runs.
    fn wait(&self) -> rustix::io::Result<bool> {
        let mut fds =
            [PollFd::new(&self.vm, PollFlags::empty()), PollFd::new(&self.changes, PollFlags::IN)];
        match poll(&mut fds, self.failed.then_some(&AGAIN_AFTER)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        if !fds[0].revents().is_empty() {
            return Ok(false);
        }
        let mut events = [0; 4096];
        while rustix::io::read(&self.changes, &mut events).is_ok_and(|count| count > 0) {}
        Ok(true)
    }

    /// Gives the VM's process another log if this one is full, or is not at its path any more. Returns whether
    /// it did.
    fn follow(&mut self) -> io::Result<bool> {
        let here = self.log.metadata()?;
        let is_here = match fs::metadata(&self.options.path) {
            Ok(found) => is_same(&found, &here),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        let is_full = self.options.max_size > 0 && here.len() >= self.options.max_size;
        if is_here && !is_full {
            return Ok(false);
        }
        if is_here {
            self.options.rotate()?;
        }
        let log = self.options.open_log()?;
        let changes = watch(&log)?;
        send(&self.vm, &log)?;
        (self.log, self.changes) = (log, changes);
        Ok(true)
    }
}

fn is_same(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Watches an open log for another name, its removal, and output.
fn watch(log: &File) -> io::Result<OwnedFd> {
    let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    // The removal of a file that is open is a change of its attributes: it has one name less.
    let when = WatchFlags::MODIFY | WatchFlags::ATTRIB | WatchFlags::MOVE_SELF;
    // The file itself, whatever is at its path by now.
    inotify::add_watch(&watch, format!("/proc/self/fd/{}", log.as_raw_fd()), when)?;
    Ok(watch)
}

/// Sends a file.
fn send(socket: &OwnedFd, file: &File) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [file.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(socket, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}
