//! Paths of the workspace and its build output, and locks between test runs.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Time between two attempts to lock a place.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

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

/// Whether the kernels of hosts and guests print all their messages (`PERENNIAL_VERBOSE` is set).
pub fn verbose() -> bool {
    env::var_os("PERENNIAL_VERBOSE").is_some()
}

/// Directory for the results of a command (`demo`, `bench`). Created if absent.
pub fn results(command: &str) -> io::Result<PathBuf> {
    let directory = workspace().join("target").join(command);
    fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// A lock between processes and threads; released when dropped, and when its process ends.
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

    /// Waits for one of `count` places called `name`.
    pub fn acquire_place(name: &str, count: usize) -> io::Result<Self> {
        let directory = target();
        fs::create_dir_all(&directory)?;
        loop {
            for place in 0..count {
                let path = directory.join(format!("perennial-{name}-{place}.lock"));
                let file = File::options().create(true).append(true).open(path)?;
                match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                    Ok(()) => return Ok(Self(file)),
                    Err(Errno::WOULDBLOCK) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            // flock(2) cannot wait for the first free one of several locks.
            thread::sleep(BETWEEN_LOOKS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_places_as_said_and_one_that_is_left_is_taken_again() {
        let name = format!("test-{}", std::process::id());
        let first = Lock::acquire_place(&name, 2).unwrap();
        let second = Lock::acquire_place(&name, 2).unwrap();
        let (sender, taken) = std::sync::mpsc::channel();
        let third = {
            let name = name.clone();
            thread::spawn(move || {
                let place = Lock::acquire_place(&name, 2).unwrap();
                sender.send(()).unwrap();
                drop(place);
            })
        };
        assert!(taken.recv_timeout(3 * BETWEEN_LOOKS).is_err(), "there are two places");
        drop(first);
        taken.recv().unwrap();
        third.join().unwrap();
        drop(second);
        for place in 0..2 {
            fs::remove_file(target().join(format!("perennial-{name}-{place}.lock"))).unwrap();
        }
    }
}
