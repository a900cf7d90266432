//! How much of what the kernel limits is in use.

use std::fs;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use crate::api::Resources;
use crate::guests::ram;

/// Returns what this process uses, for `status`.
pub(super) fn resources() -> Resources {
    let status = fs::read_to_string("/proc/self/status").ok();
    Resources {
        open_files: open_files(Path::new("/proc/self/fd")),
        most_open_files: getrlimit(Resource::Nofile).current,
        resident_bytes: status.as_deref().and_then(resident_bytes),
        available_bytes: ram::available_bytes().ok(),
    }
}

/// Returns the number of open files that a directory like `/proc/self/fd` shows, without the directory itself, which is
/// open meanwhile.
fn open_files(directory: &Path) -> Option<u64> {
    let shown = fs::read_dir(directory).ok()?.count();
    Some(shown.saturating_sub(1) as u64)
}

/// Returns the resident memory in the text of `/proc/PID/status`.
fn resident_bytes(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_file_more_is_counted() {
        let before = resources();
        assert!(before.resident_bytes.unwrap() > 1 << 20);
        assert!(before.available_bytes.unwrap() > before.resident_bytes.unwrap());
        // Other tests of this process open and close files at the same time, so only these are known.
        let files: Vec<_> = (0..64).map(|_| fs::File::open("/").unwrap()).collect();
        assert!(resources().open_files.unwrap() >= 64);
        drop(files);
        let shown = tempfile::tempdir().unwrap();
        for number in 0..6 {
            fs::write(shown.path().join(number.to_string()), "").unwrap();
            assert_eq!(open_files(shown.path()), Some(number));
        }
        assert_eq!(open_files(Path::new("/nowhere")), None);
        assert_eq!(resident_bytes("VmSize:\t 9 kB\nVmRSS:\t  12 kB\n"), Some(12 << 10));
        assert_eq!(resident_bytes("VmRSS:\t  x kB\n"), None);
    }
}
