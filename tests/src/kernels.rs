//! The kernels: the host before an update, the host after it, and the guests'.
//!
//! There are two pairs of host kernels: one pair built with LUO, and one pair of a distribution's
//! unchanged kernels. Each kernel is a directory with `bzImage` and `release`; a built kernel also has
//! `vmlinux` and `config`, a stock kernel its modules (`modules/NAME.ko`, and `order`) and `modules.builtin`. An environment
//! variable may name the directory (`PERENNIAL_KERNEL_HOST_A`, `_HOST_B`, `_GUEST`, `_STOCK_A`,
//! `_STOCK_B`); otherwise the recipe in `resources/kernel` makes it, or finds it in its cache.

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

    /// The script that makes the kernel, and files that its directory must have.
    fn recipe(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::HostA | Self::HostB | Self::Guest => ("build.sh", &["bzImage", "vmlinux"]),
            Self::StockA | Self::StockB => ("stock.sh", &["bzImage", "order", "modules.builtin"]),
        }
    }

    fn variable(self) -> String {
        format!("PERENNIAL_KERNEL_{}", self.name().to_uppercase().replace('-', "_"))
    }
}

/// An available kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The directory that holds it.
    pub directory: PathBuf,
    /// Its release (`uname -r`).
    pub release: String,
    /// The modules that a host needs, each after the modules that it depends on.
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

    /// The list of what the kernel has built in, if it is a distribution's.
    pub fn built_in(&self) -> PathBuf {
        self.directory.join("modules.builtin")
    }

    /// The file of a module.
    pub fn module(&self, name: &str) -> PathBuf {
        self.directory.join("modules").join(format!("{name}.ko"))
    }
}

/// Why a kernel is not available.
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

/// Whether an environment variable names this kernel, so that no recipe has to run.
pub fn is_named(role: Role) -> bool {
    env::var_os(role.variable()).is_some()
}

/// Returns the package of the distribution's kernel [`Role::StockA`] as it was downloaded, and the kernel's release.
pub fn package() -> Result<(PathBuf, String), String> {
    let release = find(Role::StockA).map_err(|error| error.to_string())?.release.clone();
    let cache = env::var_os("PERENNIAL_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cache");
        env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("perennial")
    });
    let directory = cache.join("downloads/stock-a");
    let name = format!("linux-image-{release}_");
    let files = fs::read_dir(&directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files = files.filter(|path| {
        path.file_name().is_some_and(|file| file.as_encoded_bytes().starts_with(name.as_bytes()))
    });
    let missing = || format!("{} has no package {name}*.deb", directory.display());
    files.next().map(|path| (path, release)).ok_or_else(missing)
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
    // A kernel that was built for the tests has no modules.
    let order = fs::read_to_string(directory.join("order")).unwrap_or_default();
    let modules = order.lines().map(str::to_owned).collect();
    Ok(Kernel { directory, release: release.trim().to_owned(), modules })
}

/// Runs the recipe, whose last line on stdout is the directory.
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
