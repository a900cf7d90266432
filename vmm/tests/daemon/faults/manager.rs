//! A service manager with one service, whose fd store it keeps as systemd 262 does: `docs/systemd.md` has the facts.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use perennial_doubles::fd_store::{Kept, NotifySocket};
use rustix::fs::fstat;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

use super::service::PATIENCE;

/// The most fds that the store takes, unless a test needs a smaller one.
pub(super) const CAPACITY: usize = 64;
/// Above every fd that a service gets.
const ABOVE: i32 = 400;
/// Tells the version of systemd.
const VERSION: &str = "echo 'systemd 262 (262.1-1)'";
/// A message of the test to the manager.
const SYNC: &str = "SYNC=1";
/// The message with which a service waits until all earlier ones are processed.
const BARRIER: &str = "BARRIER=1";

pub(super) struct Manager {
    directory: PathBuf,
    /// Has what `systemctl show` says. Not in `directory`, whose file system a test fills.
    _said: tempfile::TempDir,
    /// What a service is told at its start that its store takes.
    capacity: usize,
    /// Whether the service is told that it has a store.
    has_store: AtomicBool,
    /// What the store takes.
    real: Arc<AtomicUsize>,
    kept: Arc<Mutex<Kept>>,
    /// Has one for each [`SYNC`] that was received.
    synced: Receiver<()>,
    /// Whether it receives messages and processes none.
    is_stuck: Arc<AtomicBool>,
    /// Has one for each [`BARRIER`] that came while it was stuck.
    asked: Receiver<()>,
}

/// What a service is started with.
pub(super) struct Passed {
    /// A command that puts the fds in their places, and starts the service.
    pub(super) wrapper: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
    _fds: Vec<OwnedFd>,
}

impl Manager {
    /// Starts the manager with its socket in `directory`, and a `systemctl` that tells its version and what is in the
    /// store.
    pub(super) fn start(directory: &Path, capacity: usize) -> Self {
        let systemctl = directory.join("systemctl");
        let said = tempfile::tempdir().unwrap();
        let (path, new) = (said.path().join("show"), said.path().join("new"));
        let script = format!(
            "#!/bin/sh\ncase $1 in show) cat {path:?};; whoami) echo perennial.service;; *) {VERSION};; esac\n"
        );
        fs::write(&systemctl, script).unwrap();
        fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755)).unwrap();
        let socket = NotifySocket::bind(&directory.join("notify"));
        let kept = Arc::<Mutex<Kept>>::default();
        let store = Arc::clone(&kept);
        let real = Arc::new(AtomicUsize::new(capacity));
        let most = Arc::clone(&real);
        let (syncs, synced) = channel();
        let (asks, asked) = channel();
        let is_stuck = Arc::<AtomicBool>::default();
        let waits = Arc::clone(&is_stuck);
        thread::spawn(move || {
            let mut waiting = Vec::new();
            while let Some(message) = socket.receive() {
                let is_barrier = message.text == BARRIER;
                waiting.push(message);
                if waits.load(Ordering::Relaxed) {
                    if is_barrier {
                        asks.send(()).unwrap();
                    }
                    continue;
                }
                let (mut kept, most) = (store.lock().unwrap(), most.load(Ordering::Relaxed));
                for message in waiting.drain(..) {
                    match message.text == SYNC {
                        true => syncs.send(()).unwrap(),
                        false => message.obey(&mut kept, most),
                    }
                }
                let files = kept.len();
                let said = format!("NFileDescriptorStore={files}\nFileDescriptorStoreMax={most}\n");
                // A service may ask at any time, and then gets all of it.
                fs::write(&new, said).unwrap();
                fs::rename(&new, &path).unwrap();
            }
        });
        let (directory, has_store) = (directory.to_owned(), AtomicBool::new(true));
        Self { directory, _said: said, capacity, has_store, real, kept, synced, is_stuck, asked }
    }

    /// Has the manager process no message, until it is told to go on.
    pub(super) fn set_stuck(&self, is_stuck: bool) {
        self.is_stuck.store(is_stuck, Ordering::Relaxed);
    }

    /// Waits until the service asks the manager, which is stuck, whether it has processed all messages.
    pub(super) fn is_asked(&self) {
        self.asked.recv_timeout(PATIENCE).unwrap();
    }

    /// Waits until every message that was sent before is processed: systemd does so before it looks at the end of a
    /// process.
    fn sync(&self) {
        self.send(SYNC).unwrap();
        self.synced.recv().unwrap();
    }

    fn send(&self, text: &str) -> io::Result<usize> {
        UnixDatagram::unbound()?.send_to(text.as_bytes(), self.directory.join("notify"))
    }

    /// Changes what the store takes, as an operator does with `systemctl daemon-reload`. The service does not learn of it.
    pub(super) fn set_capacity(&self, capacity: usize) {
        self.real.store(capacity, Ordering::Relaxed);
        self.sync();
    }

    /// Has the unit lose its store, or get it back. What it holds stays, and is passed to the service.
    pub(super) fn set_store(&self, has_store: bool) {
        self.has_store.store(has_store, Ordering::Relaxed);
    }

    /// The names of what the store holds.
    pub(super) fn names(&self) -> Vec<String> {
        self.sync();
        self.kept.lock().unwrap().iter().map(|(name, _)| name.clone()).collect()
    }

    /// The names of what the store holds, with the number of each file.
    pub(super) fn files(&self) -> BTreeMap<String, u64> {
        self.sync();
        let kept = self.kept.lock().unwrap();
        kept.iter().map(|(name, fd)| (name.clone(), fstat(fd).unwrap().st_ino)).collect()
    }

    /// Turns around every bit of a file in the store. A second time restores it.
    pub(super) fn flip(&self, name: &str) {
        self.sync();
        let kept = self.kept.lock().unwrap();
        let (_, fd) = kept.iter().find(|(other, _)| other == name).unwrap();
        let file = fs::File::from(fd.try_clone().unwrap());
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes.iter_mut().for_each(|byte| *byte = !*byte);
        file.write_all_at(&bytes, 0).unwrap();
    }

    /// What the next process of the service is started with.
    pub(super) fn pass(&self) -> Passed {
        self.sync();
        let kept = self.kept.lock().unwrap();
        let fds: Vec<_> =
            kept.iter().map(|(_, fd)| fcntl_dupfd_cloexec(fd, ABOVE).unwrap()).collect();
        fds.iter().for_each(|fd| fcntl_setfd(fd, FdFlags::empty()).unwrap());
        let places = fds.iter().zip(3..).map(|(fd, place)| {
            let fd = fd.as_raw_fd();
            format!("exec {place}<&{fd} {fd}<&-; ")
        });
        let script = places.collect::<String>() + "LISTEN_PID=$$ exec \"$0\" \"$@\"";
        let names: Vec<_> = kept.iter().map(|(name, _)| name.as_str()).collect();
        let path = std::env::var("PATH").unwrap_or_default();
        let has_store = self.has_store.load(Ordering::Relaxed);
        let store = has_store.then(|| ("FDSTORE", self.capacity.to_string()));
        let environment = [
            ("NOTIFY_SOCKET", self.directory.join("notify").display().to_string()),
            ("LISTEN_FDS", fds.len().to_string()),
            ("LISTEN_FDNAMES", names.join(":")),
            ("PATH", format!("{}:{path}", self.directory.display())),
        ];
        Passed {
            wrapper: ["bash", "-c", &script].map(str::to_owned).to_vec(),
            environment: environment
                .into_iter()
                .chain(store)
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
            _fds: fds,
        }
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = self.send("");
    }
}
