//! Makes the host's file systems durable, without the pool: its files are guest memory, and writing
//! that out would take longer the more of it there is. The pool syncs what it needs itself.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What is mounted cannot be found out, or not written.
#[derive(Debug, thiserror::Error)]
#[error("cannot sync {}", path.display())]
pub struct SyncError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Syncs every file system but the one that `pool` is on. Without a pool: everything.
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
    for (device, path) in block_devices(&text) {
        if device == pool {
            continue;
        }
        let failed = error(&path);
        File::open(&path).and_then(|file| Ok(rustix::fs::syncfs(file)?)).map_err(failed)?;
    }
    Ok(())
}

/// One mount point of each file system that is on a block device (proc_pid_mountinfo(5)).
fn block_devices(mountinfo: &str) -> Vec<(u64, PathBuf)> {
    let mut found: Vec<(u64, PathBuf)> = Vec::new();
    for line in mountinfo.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let Some(separator) = fields.iter().position(|field| *field == "-") else { continue };
        let (Some(device), Some(target), Some(source)) =
            (fields.get(2), fields.get(4), fields.get(separator + 2))
        else {
            continue;
        };
        let numbers = device.split_once(':');
        let numbers =
            numbers.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let Some((major, minor)) = numbers else { continue };
        let device = rustix::fs::makedev(major, minor);
        if source.starts_with("/dev/") && found.iter().all(|(known, _)| *known != device) {
            found.push((device, unescape(target)));
        }
    }
    found
}

/// Blanks and the like are written as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let text = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    text.iter().fold(field.to_owned(), |field, (code, plain)| field.replace(code, plain)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_on_devices_are_found_once_each() {
        let text = "21 1 0:5 / /dev rw shared:2 - devtmpfs devtmpfs rw\n\
                    30 1 254:0 / /data rw - ext4 /dev/vda rw\n\
                    31 1 254:0 /a /with\\040blank rw - ext4 /dev/vda rw\n\
                    32 1 259:0 / /pool rw shared:1 master:2 - ext4 /dev/pmem0 rw,dax=always\n\
                    nonsense\n";
        let data = (rustix::fs::makedev(254, 0), PathBuf::from("/data"));
        let pool = (rustix::fs::makedev(259, 0), PathBuf::from("/pool"));
        assert_eq!(block_devices(text), [data, pool]);
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
