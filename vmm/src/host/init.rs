//! What only PID 1 does: mount, name the host, reap, and switch the machine off.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot, sethostname};

use super::format::{self, Contents, FormatError};
use crate::config::Mount;
use crate::devices::files::wait_for_device;

/// What every Perennial host has mounted: source, target, type.
const ESSENTIAL: [(&str, &str, &str); 6] = [
    ("proc", "/proc", "proc"),
    ("sysfs", "/sys", "sysfs"),
    ("devtmpfs", "/dev", "devtmpfs"),
    ("tmpfs", "/run", "tmpfs"),
    ("tmpfs", "/tmp", "tmpfs"),
    ("debugfs", "/sys/kernel/debug", "debugfs"),
];

/// A file system cannot be mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The kernel refuses.
    #[error("cannot mount {fs} {from} on {}", target.display())]
    Mount {
        /// The file system's name.
        fs: String,
        /// What it is on.
        from: String,
        /// Where it was to be.
        target: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its device cannot be formatted.
    #[error("cannot mount anything on {}", target.display())]
    Format {
        /// Where it was to be.
        target: PathBuf,
        /// Why.
        #[source]
        source: FormatError,
    },
}

/// Whether this process is the first of the machine.
pub fn is_pid_1() -> bool {
    rustix::process::getpid().is_init()
}

/// Mounts what every host needs and gives this process a console. What cannot be mounted is
/// reported: a host without debugfs still hosts.
pub fn set_up() {
    for (source, target, fs) in ESSENTIAL {
        let mount = Mount {
            source: source.into(),
            target: target.into(),
            fs: fs.into(),
            options: String::new(),
            format_from: None,
        };
        if let Err(error) = attach(&mount) {
            tracing::warn!("{}", crate::causes::chain(&error).join(": "));
        }
    }
}

/// Mounts what the configuration lists. Returns the mounts that failed. `fresh` says that no VM can be
/// preserved in a pool. Where a file system is missing nothing can be written: it would go into the
/// image, which is memory, and be gone with the kernel.
pub fn mount_all(mounts: &[Mount], fresh: bool) -> Vec<MountError> {
    let mut failed = Vec::new();
    for entry in mounts {
        if entry.source.starts_with("/dev/") {
            wait_for_device(|| Path::new(&entry.source).exists().then_some(()));
        }
        if let Err(error) = format(entry, fresh).and_then(|()| attach(entry)) {
            if let Err(errno) = mount("none", &entry.target, "tmpfs", MountFlags::RDONLY, None) {
                tracing::warn!(
                    "cannot keep {} from being written: {errno}",
                    entry.target.display()
                );
            }
            failed.push(error);
        }
    }
    failed
}

/// Puts a file system on the device first, if it has none that counts and the configuration wants that.
fn format(entry: &Mount, fresh: bool) -> Result<(), MountError> {
    let Some(image) = &entry.format_from else { return Ok(()) };
    let error = |source| MountError::Format { target: entry.target.clone(), source };
    let device = Path::new(&entry.source);
    let contents = match fresh && format::is_reserved_memory(Path::new("/"), device) {
        true => Contents::OfAnotherBoot,
        false => Contents::Unknown,
    };
    if format::format(device, image, contents).map_err(error)? {
        tracing::info!("{} is a copy of {} now", entry.source, image.display());
    }
    Ok(())
}

fn attach(entry: &Mount) -> Result<(), MountError> {
    let Mount { source, target, fs, options, format_from: _ } = entry;
    let error = |cause: io::Error| MountError::Mount {
        fs: fs.clone(),
        from: source.clone(),
        target: target.clone(),
        source: cause,
    };
    fs::create_dir_all(target).map_err(error)?;
    let data = std::ffi::CString::new(options.as_str()).map_err(|e| error(e.into()))?;
    match mount(source.as_str(), target, fs.as_str(), MountFlags::empty(), Some(data.as_c_str())) {
        Ok(()) => Ok(()),
        // The kernel has mounted it before us (devtmpfs), or a restarted host did.
        Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(errno) => Err(error(errno.into())),
    }
}

/// Gives the host its name.
pub fn set_hostname(name: &str) {
    if let Err(error) = sethostname(name.as_bytes()) {
        tracing::warn!("cannot set the host's name to `{name}`: {error}");
    }
}

/// Switches the machine off, with everything written.
pub fn power_off() -> ! {
    rustix::fs::sync();
    let error = reboot(RebootCommand::PowerOff).expect_err("power-off does not return");
    tracing::error!("cannot switch the machine off: {error}");
    loop {
        // PID 1 must not return: the kernel would panic. There is nothing left to do.
        std::thread::park();
    }
}
