//! A memory cgroup for a process, which shows how much memory is charged to it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use luo::Errno;

/// The mount point of cgroup2.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn own() -> PathBuf {
    Path::new(ROOT).join(std::process::id().to_string())
}

/// Creates the cgroup of this process and enters it. The cgroup is never removed.
pub(super) fn enter() -> Result<(), Errno> {
    fs::write(Path::new(ROOT).join("cgroup.subtree_control"), "+memory").map_err(errno)?;
    fs::create_dir(own()).map_err(errno)?;
    fs::write(own().join("cgroup.procs"), std::process::id().to_string()).map_err(errno)
}

/// `memory.current` of that cgroup.
pub(super) fn charged_bytes() -> Result<i64, Errno> {
    let text = fs::read_to_string(own().join("memory.current")).map_err(errno)?;
    text.trim().parse().map_err(|_| Errno::IO)
}
