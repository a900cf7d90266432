//! The three kernels: the host before an update, the host after it, and the guests'.
//!
//! Each is a directory with `bzImage`, `vmlinux`, `config` and `release`. An environment variable
//! may name it (`PERENNIAL_KERNEL_HOST_A`, `_HOST_B`, `_GUEST`); else the recipe in
//! `resources/kernel/build.sh` is asked, which builds it only if its cache has none.

use std::env;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::paths;

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The host's first kernel.
    HostA,
    /// The kernel that a host is updated to: another build.
    HostB,
    /// The kernel inside the VMs.
    Guest,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::HostA => "host-a",
            Self::HostB => "host-b",
            Self::Guest => "guest",
        }
    }

    fn variable(self) -> String {
        format!("PERENNIAL_KERNEL_{}", self.name().to_uppercase().replace('-', "_"))
    }
}

/// A kernel that is there.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The directory that holds it.
    pub directory: PathBuf,
    /// What it calls itself (`uname -r`).
    pub release: String,
}

impl Kernel {
    /// The compressed image.
    pub fn bzimage(&self) -> PathBuf {
        self.directory.join("bzImage")
    }

    /// The ELF image with the PVH entry.
    pub fn vmlinux(&self) -> PathBuf {
        self.directory.join("vmlinux")
    }
}

/// Why there is no kernel.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "no {role} kernel: {problem} (set {variable} to a directory with bzImage, vmlinux, config and release, or see resources/kernel/build.sh)"
)]
pub struct KernelError {
    role: &'static str,
    variable: String,
    problem: String,
}

/// Finds a kernel, once for each process and role.
pub fn find(role: Role) -> Result<&'static Kernel, KernelError> {
    static FOUND: [OnceLock<Result<Kernel, KernelError>>; 3] = [const { OnceLock::new() }; 3];
    FOUND[role as usize].get_or_init(|| look_for(role)).as_ref().map_err(Clone::clone)
}

fn look_for(role: Role) -> Result<Kernel, KernelError> {
    let error = |problem| KernelError { role: role.name(), variable: role.variable(), problem };
    let directory = match env::var_os(role.variable()) {
        Some(directory) => PathBuf::from(directory),
        None => build(role).map_err(|problem| error(problem.to_string()))?,
    };
    for file in ["bzImage", "vmlinux"] {
        if !directory.join(file).is_file() {
            return Err(error(format!("{} has no {file}", directory.display())));
        }
    }
    let release = fs::read_to_string(directory.join("release"))
        .map_err(|problem| error(format!("{}/release: {problem}", directory.display())))?;
    Ok(Kernel { directory, release: release.trim().to_owned() })
}

/// Asks the recipe, whose last line on stdout is the directory.
fn build(role: Role) -> io::Result<PathBuf> {
    let script = paths::workspace().join("resources/kernel/build.sh");
    if !script.is_file() {
        return Err(io::Error::other(format!("{} does not exist", script.display())));
    }
    let output = Command::new(&script).arg(role.name()).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!("{}: {}", script.display(), output.status)));
    }
    let stdout = String::from_utf8_lossy(&output.stdout);
    stdout
        .lines()
        .last()
        .map(PathBuf::from)
        .ok_or_else(|| io::Error::other(format!("{} printed no directory", script.display())))
}
