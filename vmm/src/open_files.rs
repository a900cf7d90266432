//! The limit of open files of this process, and the half of it that is kept for live updates.
//!
//! ```text
//!   0 ------- open files ------- soft limit ------- reserve ------- hard limit
//!                                VMs boot, clients connect           live update, handover, restore
//! ```
//!
//! A host that has no file left could not leave, and a service that systemd stops would lose its VMs. Leaving holds each
//! file of a VM at most a second time, and has few others, so half of all files is enough.

use std::sync::Mutex;
use std::{fs, io};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::inherited_fd::survives_exec;
use crate::mutex::lock;

/// The most that any process may be allowed, by the kernel's setting.
const MOST_FILES: &str = "/proc/sys/fs/nr_open";

/// Raises the limit of open files as far as this process may: to what the kernel allows at all if it is root's,
/// else to the hard limit. Only warns if that fails.
///
/// A VM has a file for each 64 MiB of its RAM, and one or more for each device; the usual soft limit of 1,024 is
/// there for programs that use select(2).
pub(crate) fn raise() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let most = fs::read_to_string(MOST_FILES).ok().and_then(|text| text.trim().parse().ok());
    // `None` is no limit. The hard limit may be above the kernel's setting, which can be lowered at any time.
    let wanted = maximum.map(|hard: u64| most.map_or(hard, |most: u64| most.max(hard)));
    let raise = |to| setrlimit(Resource::Nofile, Rlimit { current: to, maximum: to });
    if let Err(errno) = raise(wanted).or_else(|_| raise(maximum)) {
        tracing::warn!("cannot raise the limit of open files, {current:?}: {errno}");
    }
}

/// Keeps half of the files that this process may open in reserve, until [`use_reserve`].
pub(crate) fn keep_reserve() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // The soft limit may be lower already.
    let half = maximum.map(|hard| hard / 2);
    set_soft(current.into_iter().chain(half).min());
}

/// The values of [`ReserveInUse`] that exist, and the soft limit before the first of them.
static IN_USE: Mutex<(u32, Option<u64>)> = Mutex::new((0, None));

/// Lets this process open the files that it keeps in reserve, until the last such value is dropped.
pub(crate) fn use_reserve() -> ReserveInUse {
    let mut in_use = lock(&IN_USE);
    if in_use.0 == 0 {
        in_use.1 = getrlimit(Resource::Nofile).current;
        all_files();
    }
    in_use.0 += 1;
    ReserveInUse(())
}

/// Lets this process open as many files as its hard limit allows.
pub(crate) fn all_files() {
    set_soft(getrlimit(Resource::Nofile).maximum);
}

/// The open files of this process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Count {
    /// How many there are.
    pub(crate) open: u64,
    /// How many of them stay open over an exec.
    pub(crate) inherited: u64,
    /// How many there may be. `None` if that is not limited.
    pub(crate) limit: Option<u64>,
}

/// Counts the open files of this process. Errors if it can open no file to find that out.
pub(crate) fn count() -> io::Result<Count> {
    let entries = fs::read_dir("/proc/self/fd")?.collect::<io::Result<Vec<_>>>()?;
    let numbers = entries.iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let inherited = numbers.filter(|number| survives_exec(*number)).count() as u64;
    // Without the one that this look has opened.
    let open = (entries.len() as u64).saturating_sub(1);
    Ok(Count { open, inherited, limit: getrlimit(Resource::Nofile).current })
}

/// The reserve of files is in use. Dropping the last of these sets the limit to what it was.
#[derive(Debug)]
#[must_use = "dropping it ends the use of the reserve"]
pub(crate) struct ReserveInUse(());

impl Drop for ReserveInUse {
    fn drop(&mut self) {
        let mut in_use = lock(&IN_USE);
        in_use.0 -= 1;
        if in_use.0 == 0 {
            set_soft(in_use.1);
        }
    }
}

fn set_soft(current: Option<u64>) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    // No more than the hard limit, which another process may have lowered.
    let current = match (current, maximum) {
        (Some(soft), Some(hard)) => Some(soft.min(hard)),
        (None, hard) => hard,
        (soft, None) => soft,
    };
    if let Err(errno) = setrlimit(Resource::Nofile, Rlimit { current, maximum }) {
        tracing::warn!("cannot set the limit of open files to {current:?}: {errno}");
    }
}
