//! The kernels: the host before an update, the host after it, and the guests'.
//!
//! There are two pairs of hosts: built ones with LUO, and a distribution's as they are. Each kernel
//! is a directory with `bzImage` and `release`; a built one has `vmlinux` and `config`, a stock one
//! its modules (`modules/NAME.ko`, and `order`). An environment variable may name it
//! (`PERENNIAL_KERNEL_HOST_A`, `_HOST_B`, `_GUEST`, `_STOCK_A`, `_STOCK_B`); else the recipe in
//! `resources/kernel` is asked, which makes it only if its cache has none.

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
    /// A distribution's kernel, without LUO.
    StockA,
    /// A newer one.
    StockB,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::HostA => "host-a",
            Self::HostB => "host-b",
            Self::Guest => "guest",
            Self::StockA => "stock-a",
            Self::StockB => "stock-b",
        }
    }

    /// The script that makes it, and files that it must have.
    fn recipe(self) -> (&'static str, [&'static str; 2]) {
        match self {
            Self::HostA | Self::HostB | Self::Guest => ("build.sh", ["bzImage", "vmlinux"]),
            Self::StockA | Self::StockB => ("stock.sh", ["bzImage", "order"]),
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
    /// Its modules that a host needs, each after those that it needs.
    pub modules: Vec<String>,
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

    /// The file of a module.
    pub fn module(&self, name: &str) -> PathBuf {
        self.directory.join("modules").join(format!("{name}.ko"))
    }
}

/// Why there is no kernel.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "no {role} kernel: {problem} (set {variable} to a directory that has it, or see resources/kernel/{recipe})"
)]
pub struct KernelError {
    role: &'static str,
    variable: String,
    recipe: &'static str,
    problem: String,
}

/// Whether a variable names this kernel, so that nothing has to be asked or made.
pub fn is_named(role: Role) -> bool {
    env::var_os(role.variable()).is_some()
}

/// Finds a kernel, once for each process and role.
pub fn find(role: Role) -> Result<&'static Kernel, KernelError> {
    static FOUND: [OnceLock<Result<Kernel, KernelError>>; 5] = [const { OnceLock::new() }; 5];
    FOUND[role as usize].get_or_init(|| look_for(role)).as_ref().map_err(Clone::clone)
}

fn look_for(role: Role) -> Result<Kernel, KernelError> {
    let (recipe, files) = role.recipe();
    let error =
        |problem| KernelError { role: role.name(), variable: role.variable(), recipe, problem };
    let directory = match env::var_os(role.variable()) {
        Some(directory) => PathBuf::from(directory),
        None => build(role).map_err(|problem| error(problem.to_string()))?,
    };
    for file in files {
        if !directory.join(file).is_file() {
            return Err(error(format!("{} has no {file}", directory.display())));
        }
    }
    let release = fs::read_to_string(directory.join("release"))
        .map_err(|problem| error(format!("{}/release: {problem}", directory.display())))?;
    // A kernel that is built for the tests has no modules.
    let order = fs::read_to_string(directory.join("order")).unwrap_or_default();
    let modules = order.lines().map(str::to_owned).collect();
    Ok(Kernel { directory, release: release.trim().to_owned(), modules })
}

/// Asks the recipe, whose last line on stdout is the directory.
fn build(role: Role) -> io::Result<PathBuf> {
    let script = paths::workspace().join("resources/kernel").join(role.recipe().0);
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
