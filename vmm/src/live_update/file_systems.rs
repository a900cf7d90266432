//! Syncs the host's file systems, except that of the pool: its files are guest memory, so syncing it
//! would take time in proportion to guest RAM. The pool itself syncs what it needs.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A file system cannot be synced, or the list of mounts cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot sync {}", path.display())]
pub struct SyncError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Syncs every file system except the one that `pool` is on. Without a pool, syncs all of them.
pub fn sync(pool: Option<&Path>) -> Result<(), SyncError> {
    let Some(pool) = pool else {
        rustix::fs::sync();
        return Ok(());
    };
    let error = |path: &Path| {
        let path = path.to_owned();
        move |source| SyncError { path, source }
    };
    let pool = std::fs::metadata(pool).map_err(error(pool))?.dev();
    let table = Path::new("/proc/self/mountinfo");
    let text = std::fs::read_to_string(table).map_err(error(table))?;
    for Mounted { device, path, on_disk } in file_systems(&text) {
        if device == pool {
            continue;
        }
        let synced = File::open(&path).and_then(|file| Ok(rustix::fs::syncfs(file)?));
        match synced {
            // A file system without a block device, such as another user's FUSE mount: an error there
            // does not stop the live update.
            Err(failure) if !on_disk => {
                tracing::debug!("cannot sync {}: {failure}", path.display())
            }
            synced => synced.map_err(error(&path))?,
        }
    }
    Ok(())
}

/// A mounted file system.
#[derive(Debug, PartialEq, Eq)]
struct Mounted {
    device: u64,
    /// One of its mount points.
    path: PathBuf,
    /// Whether it is on a block device.
    on_disk: bool,
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

    #[test]
    fn this_machine_can_be_synced_beside_a_pool() {
        let directory = tempfile::tempdir().unwrap();
        sync(Some(directory.path())).unwrap();
        let error = sync(Some(Path::new("/nowhere"))).unwrap_err().to_string();
        assert!(error.contains("/nowhere"), "{error}");
    }
}
