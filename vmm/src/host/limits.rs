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
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let most = fs::read_to_string(MOST_FILES).ok().and_then(|text| text.trim().parse().ok());
    // `None` is no limit. The hard limit may be above the kernel's setting, which can be lowered at any time.
    let wanted = maximum.map(|hard: u64| most.map_or(hard, |most: u64| most.max(hard)));
    let raise = |to| setrlimit(Resource::Nofile, Rlimit { current: to, maximum: to });
    if let Err(errno) = raise(wanted).or_else(|_| raise(maximum)) {
        tracing::warn!("cannot raise the limit of open files, {current:?}: {errno}");
    }
}
