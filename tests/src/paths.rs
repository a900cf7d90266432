//! Where things are: the workspace, its build output, the locks that runs share.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// Cargo's build output: `CARGO_TARGET_DIR`, or `target` in the workspace.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(directory) => workspace().join(directory),
        None => workspace().join("target"),
    }
}

/// Whether the kernels, the hosts' and the guests', are to say all that they have to say
/// (`PERENNIAL_VERBOSE`).
pub fn verbose() -> bool {
    env::var_os("PERENNIAL_VERBOSE").is_some()
}

/// Where a command leaves its results (`demo`, `bench`); made if absent.
pub fn results(command: &str) -> io::Result<PathBuf> {
    let directory = workspace().join("target").join(command);
    fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// A lock between processes and threads; held until dropped, and by no one who died.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub struct Lock(#[expect(dead_code, reason = "closing it releases the lock")] File);

impl Lock {
    /// Waits for the lock called `name`.
    pub fn acquire(name: &str) -> io::Result<Self> {
        let directory = target();
        fs::create_dir_all(&directory)?;
        let path = directory.join(format!("perennial-{name}.lock"));
        let file = File::options().create(true).append(true).open(path)?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(Self(file))
    }
}
