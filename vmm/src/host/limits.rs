//! What the kernel limits and a host with many VMs needs more of, and how much of it is in use.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::api::Resources;
use crate::guests::ram;

/// The most that any process may be allowed, by the kernel's setting.
const MOST_FILES: &str = "/proc/sys/fs/nr_open";

/// Raises the limit of open files as far as this process may: to what the kernel allows at all if it is root's,
/// else to the hard limit. Only warns if that fails.
///
/// A VM has a file for each 64 MiB of its RAM, and one or more for each device; the usual soft limit of 1,024 is
/// there for programs that use select(2).
pub(super) fn raise_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let most = fs::read_to_string(MOST_FILES).ok().and_then(|text| text.trim().parse().ok());
    // `None` is no limit. The hard limit may be above the kernel's setting, which can be lowered at any time.
    let wanted = maximum.map(|hard: u64| most.map_or(hard, |most: u64| most.max(hard)));
    let raise = |to| setrlimit(Resource::Nofile, Rlimit { current: to, maximum: to });
    if let Err(errno) = raise(wanted).or_else(|_| raise(maximum)) {
        tracing::warn!("cannot raise the limit of open files, {current:?}: {errno}");
    }
}

/// Returns what this process uses, for `status`.
pub(super) fn resources() -> Resources {
    // One of them is the directory itself.
    let open_files = fs::read_dir("/proc/self/fd").ok();
    let open_files = open_files.map(|files| files.count().saturating_sub(1) as u64);
    let status = fs::read_to_string("/proc/self/status").ok();
    Resources {
        open_files,
        most_open_files: getrlimit(Resource::Nofile).current,
        resident_bytes: status.as_deref().and_then(resident_bytes),
        available_bytes: ram::available_bytes().ok(),
    }
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
        let files: Vec<_> = (0..64).map(|_| fs::File::open("/").unwrap()).collect();
        // Other tests of this process open and close files at the same time.
        assert!(resources().open_files.unwrap() > before.open_files.unwrap() + 32);
        drop(files);
        assert_eq!(resident_bytes("VmSize:\t 9 kB\nVmRSS:\t  12 kB\n"), Some(12 << 10));
        assert_eq!(resident_bytes("VmRSS:\t  x kB\n"), None);
    }
}
