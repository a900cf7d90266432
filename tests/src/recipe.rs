//! Runs the recipes in `resources/`, which make an artefact or find it in their cache.

use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::paths;

/// Runs the recipe `script`, a path in the workspace. Returns the directory that it prints as its last line on stdout.
pub fn run(script: &str, arguments: &[&str]) -> io::Result<PathBuf> {
    let script = paths::workspace().join(script);
    let output = Command::new(&script).args(arguments).stderr(Stdio::inherit()).output()?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    match stdout.lines().last() {
        Some(directory) if output.status.success() => Ok(directory.into()),
        _ => Err(io::Error::other(format!("{}: {}", script.display(), output.status))),
    }
}
