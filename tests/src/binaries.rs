//! The static binaries that go into the images, built by cargo once for each run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::paths::{self, Lock};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The directory with the static binaries.
#[derive(Debug, Clone)]
pub struct Binaries {
    directory: PathBuf,
}

impl Binaries {
    /// The host: `perennial`.
    pub fn perennial(&self) -> PathBuf {
        self.directory.join("perennial")
    }

    /// The guests' PID 1.
    pub fn guest_init(&self) -> PathBuf {
        self.directory.join("guest-init")
    }

    /// PID 1 of the conformance suite's machines, and every process that a case starts on them.
    pub fn conformance_agent(&self) -> PathBuf {
        self.directory.join("conformance-agent")
    }

    /// PID 1 of the machine on which `perennial run` is tried.
    pub fn foreground_init(&self) -> PathBuf {
        self.directory.join("foreground-init")
    }

    /// PID 1 of the machine in which VMMs are measured side by side, and of its guests.
    pub fn side_by_side_init(&self) -> PathBuf {
        self.directory.join("side-by-side-init")
    }

    /// Loads a kernel over the one that a host has loaded.
    pub fn load_over(&self) -> PathBuf {
        self.directory.join("load-over")
    }

    /// PID 1 of the machine that checks whether an accelerator offers nested KVM.
    pub fn probe_init(&self) -> PathBuf {
        self.directory.join("probe-init")
    }
}

/// Builds the binaries, once for each process. The error has cargo's messages.
///
/// If `PERENNIAL_STATIC_BINARIES` names a directory, the binaries in it are used instead.
pub fn build() -> Result<&'static Binaries, &'static str> {
    static BUILT: OnceLock<Result<Binaries, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| match std::env::var_os("PERENNIAL_STATIC_BINARIES") {
        Some(directory) => Ok(Binaries { directory: directory.into() }),
        None => {
            cargo_build().map_err(|error| format!("cannot build the images' binaries: {error}"))
        }
    });
    built.as_ref().map_err(String::as_str)
}

/// Builds `perennial` with all its features, the LUO emulator included, for this computer, and returns
/// its path. The profile is that of the running program, so that cargo reuses the workspace's build.
pub fn with_tools() -> Result<&'static Path, &'static str> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let release = !cfg!(debug_assertions);
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let output = Command::new(cargo)
            .current_dir(paths::workspace())
            .args(["build", "--quiet", "--package", "vmm", "--bin", "perennial"])
            .args(release.then_some("--release"))
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let profile = if release { "release" } else { "debug" };
                Ok(paths::target().join(profile).join("perennial"))
            }
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            Err(error) => Err(format!("cannot build perennial: {error}")),
        }
    });
    built.as_deref().map_err(String::as_str)
}

/// Name of the program for hosts that do damage themselves.
const WITH_FAULTS: &str = "perennial-with-faults";

/// Builds `perennial` for hosts that do damage themselves, and returns its path. `PERENNIAL_STATIC_BINARIES` has it too.
pub fn with_faults() -> Result<&'static Path, &'static str> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| match std::env::var_os("PERENNIAL_STATIC_BINARIES") {
        Some(directory) => Ok(PathBuf::from(directory).join(WITH_FAULTS)),
        None => build_with_faults()
            .map_err(|error| format!("cannot build a perennial with faults: {error}")),
    });
    built.as_deref().map_err(String::as_str)
}

fn build_with_faults() -> io::Result<PathBuf> {
    let _lock = Lock::acquire("static-build")?;
    let target = paths::target().join("static");
    let copy = target.join(WITH_FAULTS);
    let perennial = ["--package", "vmm", "--bin", "perennial", "--no-default-features"];
    cargo(&target, &[&perennial[..], &["--features", "faults"]].concat())?;
    fs::copy(target.join(TARGET).join("release").join("perennial"), &copy)?;
    // The other one takes its place again.
    cargo(&target, &perennial)?;
    Ok(copy)
}

/// Builds in a separate target directory: these flags differ from the workspace's, and in a shared
/// directory each of the two builds would discard the other's results.
fn cargo_build() -> io::Result<Binaries> {
    let _lock = Lock::acquire("static-build")?;
    let target = paths::target().join("static");
    // A separate build: cargo would unify the features, and the other binaries need features of
    // `luo` that the host's binary must not have.
    cargo(&target, &["--package", "vmm", "--no-default-features", "--bin", "perennial"])?;
    let bins = [
        "guest-init",
        "probe-init",
        "conformance-agent",
        "foreground-init",
        "side-by-side-init",
        "load-over",
    ];
    let bins: Vec<&str> = bins.iter().flat_map(|bin| ["--bin", bin]).collect();
    cargo(&target, &[&["--package", "perennial-tests"], &bins[..]].concat())?;
    Ok(Binaries { directory: target.join(TARGET).join("release") })
}

fn cargo(target: &Path, what: &[&str]) -> io::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(paths::workspace())
        .args(["build", "--release", "--quiet", "--target", TARGET])
        .args(what)
        .env("CARGO_TARGET_DIR", target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned())),
    }
}

/// Reads a file that goes into an image. The error names the file.
pub(crate) fn contents(path: &Path) -> io::Result<Vec<u8>> {
    fs::read(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}
