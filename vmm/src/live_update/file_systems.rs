//! Syncs the host's file systems, except that of the pool: its files are guest memory, so syncing it
//! would take time in proportion to guest RAM. The pool itself syncs what it needs.
//!
//! A file system may hang, such as one of a network server that is gone. So each is synced by a thread that nobody
//! waits for without a deadline, and one that hangs delays no other.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::mutex::lock;
use crate::signals;
use crate::work::Work;

/// Most threads that sync file systems at a time. A host with containers may have hundreds of file systems.
const THREADS: usize = 32;

/// Instead of a device: all of them.
const ALL: u64 = 0;
/// The same, for the last time: begins also if an earlier sync of all has not ended.
const ALL_AT_LAST: u64 = u64::MAX;

/// The file systems whose sync has begun and not ended, by device. Those of earlier calls are not synced again,
/// because every call would leave one more thread behind.
static UNFINISHED: Mutex<BTreeMap<u64, PathBuf>> = Mutex::new(BTreeMap::new());

/// A file system cannot be synced, or the list of mounts cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot sync {}", path.display())]
pub struct SyncError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Syncs every file system except the one that `pool` is on, for at most `within`. Returns those that were not
/// finished then. Without a pool all of them count as one. Errors if a file system on a block device cannot be synced.
pub fn sync(pool: Option<&Path>, within: Duration) -> Result<Vec<PathBuf>, SyncError> {
    let error = |path: &Path| {
        let path = path.to_owned();
        move |source| SyncError { path, source }
    };
    let all = match pool {
        None => [Mounted::all(ALL)].into(),
        Some(pool) => {
            let pool = std::fs::metadata(pool).map_err(error(pool))?.dev();
            let table = Path::new("/proc/self/mountinfo");
            let text = std::fs::read_to_string(table).map_err(error(table))?;
            file_systems(&text).into_iter().filter(|found| found.device != pool).collect()
        }
    };
    sync_each(all, within)
}

/// Syncs all file systems and block devices, for at most `within`: before a power-off, where one that hangs must not
/// prevent it.
pub fn sync_all(within: Duration) {
    let late = sync_each([Mounted::all(ALL_AT_LAST)].into(), within);
    if late.is_ok_and(|late| !late.is_empty()) {
        let seconds = within.as_secs();
        tracing::error!("not all was synced within {seconds} s: what was written last may be lost");
    }
}

fn sync_each(all: VecDeque<Mounted>, within: Duration) -> Result<Vec<PathBuf>, SyncError> {
    let deadline = Instant::now() + within;
    let results = start(all);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match results.recv_timeout(left) {
            Ok((Mounted { path, on_disk: true, .. }, Err(source))) => {
                return Err(SyncError { path, source });
            }
            // A file system without a block device, such as another user's FUSE mount: an error there
            // does not stop the live update.
            Ok((Mounted { path, .. }, Err(failure))) => {
                tracing::debug!("cannot sync {}: {failure}", path.display());
            }
            Ok((_, Ok(()))) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(lock(&UNFINISHED).values().cloned().collect())
}

type Synced = (Mounted, io::Result<()>);

/// Starts threads that sync `all`. The receiver is disconnected when the last one has ended.
fn start(all: VecDeque<Mounted>) -> std::sync::mpsc::Receiver<Synced> {
    let mut unfinished = lock(&UNFINISHED);
    let all: VecDeque<Mounted> =
        all.into_iter().filter(|found| !unfinished.contains_key(&found.device)).collect();
    unfinished.extend(all.iter().map(|found| (found.device, found.path.clone())));
    drop(unfinished);
    let queued = |found: Mounted| {
        let work = Work::begins(format!("syncing the file system {}", found.path.display()));
        (found, work)
    };
    let all: VecDeque<_> = all.into_iter().map(queued).collect();
    let (sender, results) = channel();
    let threads = all.len().min(THREADS);
    let all = Arc::new(Mutex::new(all));
    for _ in 0..threads {
        let (all, sender) = (all.clone(), sender.clone());
        let started =
            thread::Builder::new().name("sync".to_owned()).spawn(move || work(&all, &sender));
        if let Err(error) = started {
            tracing::warn!("cannot start a thread that syncs file systems: {error}");
        }
    }
    results
}

/// Syncs the file systems of `all` that no other thread has begun.
fn work(all: &Mutex<VecDeque<(Mounted, Work)>>, results: &Sender<Synced>) {
    signals::leave_to_main_thread();
    loop {
        let Some((found, _work)) = lock(all).pop_front() else { return };
        let synced = match found.device {
            ALL | ALL_AT_LAST => {
                rustix::fs::sync();
                Ok(())
            }
            _ => File::open(&found.path).and_then(|file| Ok(rustix::fs::syncfs(file)?)),
        };
        lock(&UNFINISHED).remove(&found.device);
        // If the send fails, nobody waits any more.
        let _ = results.send((found, synced));
    }
}

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mounted {
    device: u64,
    /// One of its mount points.
    path: PathBuf,
    /// Whether it is on a block device.
    on_disk: bool,
}

impl Mounted {
    /// All file systems as one.
    fn all(device: u64) -> Self {
        Self { device, path: "of the host".into(), on_disk: false }
    }
}

/// Returns all mounted file systems, each once (proc_pid_mountinfo(5)). Network file systems are
/// included, because they have files to sync. autofs is left out: it has no files, and opening it would
/// mount something.
fn file_systems(mountinfo: &str) -> Vec<Mounted> {
    let mut found: Vec<Mounted> = Vec::new();
    for line in mountinfo.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let Some(separator) = fields.iter().position(|field| *field == "-") else { continue };
        let (Some(device), Some(target), Some(kind), Some(source)) =
            (fields.get(2), fields.get(4), fields.get(separator + 1), fields.get(separator + 2))
        else {
            continue;
        };
        let numbers = device.split_once(':');
        let numbers =
            numbers.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let Some((major, minor)) = numbers else { continue };
        let device = rustix::fs::makedev(major, minor);
        if *kind != "autofs" && found.iter().all(|known| known.device != device) {
            let on_disk = source.starts_with("/dev/");
            found.push(Mounted { device, path: unescape(target), on_disk });
        }
    }
    found
}

/// Decodes white space and backslashes, which mountinfo writes as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let text = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    text.iter().fold(field.to_owned(), |field, (code, plain)| field.replace(code, plain)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_found_once_each() {
        let text = "20 1 0:4 / /net rw - autofs systemd-1 rw\n\
                    21 1 0:5 / /srv rw shared:2 - nfs4 server:/srv rw\n\
                    30 1 254:0 / /data rw - ext4 /dev/vda rw\n\
                    31 1 254:0 /a /with\\040blank rw - ext4 /dev/vda rw\n\
                    32 1 259:0 / /pool rw shared:1 master:2 - ext4 /dev/pmem0 rw,dax=always\n\
                    nonsense\n";
        let mounted = |device: [u32; 2], path: &str, on_disk| {
            let device = rustix::fs::makedev(device[0], device[1]);
            Mounted { device, path: path.into(), on_disk }
        };
        let [data, pool] = [mounted([254, 0], "/data", true), mounted([259, 0], "/pool", true)];
        assert_eq!(file_systems(text), [mounted([0, 5], "/srv", false), data, pool]);
        assert_eq!(unescape("/with\\040blank"), Path::new("/with blank"));
    }

    /// The tests that sync share the list of what is unfinished.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn this_machine_can_be_synced_beside_a_pool() {
        let _alone = lock(&ALONE);
        let directory = tempfile::tempdir().unwrap();
        let long = Duration::from_secs(600);
        assert_eq!(sync(Some(directory.path()), long).unwrap(), [] as [&Path; 0]);
        let error = sync(Some(Path::new("/nowhere")), long).unwrap_err().to_string();
        assert!(error.contains("/nowhere"), "{error}");
    }

    /// A device number that no file system has.
    const HANGS: u64 = u64::MAX - 1;

    #[test]
    fn a_file_system_that_hangs_is_told_and_not_synced_again() {
        let _alone = lock(&ALONE);
        let directory = tempfile::tempdir().unwrap();
        // Opening a FIFO hangs until somebody writes.
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        let hangs = || Mounted { device: HANGS, path: fifo.clone(), on_disk: false };
        let fine = Mounted { device: HANGS - 1, path: directory.path().into(), on_disk: true };
        let results = start([hangs(), fine.clone()].into());
        assert_eq!(results.recv().unwrap().0, fine);
        assert_eq!(lock(&UNFINISHED).get(&HANGS), Some(&fifo));
        assert!(start([hangs()].into()).recv().is_err(), "no thread was started");
        File::options().write(true).open(&fifo).unwrap();
        results.recv().unwrap().1.unwrap();
        assert_eq!(lock(&UNFINISHED).get(&HANGS), None);
    }

    #[test]
    fn the_last_sync_of_all_does_not_count_on_an_earlier_one_that_hangs() {
        let _alone = lock(&ALONE);
        let within = Duration::from_secs(600);
        lock(&UNFINISHED).insert(ALL, "of the host".into());
        assert_eq!(sync(None, within).unwrap(), [Path::new("of the host")]);
        let last = sync_each([Mounted::all(ALL_AT_LAST)].into(), within).unwrap();
        lock(&UNFINISHED).remove(&ALL);
        assert_eq!(last, [Path::new("of the host")], "only the earlier one is unfinished");
        assert_eq!(sync(None, within).unwrap(), [] as [&Path; 0]);
    }
}
