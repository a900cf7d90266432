//! What the kernel limits, and a host with many VMs needs more of.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The most that any process may be allowed, by the kernel's setting.
const MOST_FILES: &str = "/proc/sys/fs/nr_open";

/// Raises the limit of open files as far as this process may: to what the kernel allows at all if it is root's,
/// else to the hard limit. Only warns if that fails.
///
/// A VM has a file for each 64 MiB of its RAM, and one or more for each device; the usual soft limit of 1,024 is
/// there for programs that use select(2).
pub(super) fn raise_open_files() {
    let now = getrlimit(Resource::Nofile);
    let most = fs::read_to_string(MOST_FILES).ok().and_then(|text| text.trim().parse().ok());
    let raise = |most| setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most });
    let raised = match most {
        Some(_) if now.maximum < most && now.maximum.is_some() => raise(most),
        _ => Err(rustix::io::Errno::PERM),
    };
    if let Err(errno) = raised.or_else(|_| raise(now.maximum)) {
        tracing::warn!("cannot raise the limit of open files, {:?}: {errno}", now.current);
    }
}
