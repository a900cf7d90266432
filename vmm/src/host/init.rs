//! The duties of PID 1: mounts file systems, sets the host name, switches the machine off. (The host's
//! main loop reaps children.)

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot, sethostname};

use super::format::{self, Contents, FormatError};
use crate::config::Mount;
use crate::devices::files::wait_for_device;
use crate::live_update::file_systems;

/// The mounts of every Perennial host: source, target, type.
const ESSENTIAL: [(&str, &str, &str); 7] = [
    ("proc", "/proc", "proc"),
    ("sysfs", "/sys", "sysfs"),
    ("devtmpfs", "/dev", "devtmpfs"),
    ("devpts", "/dev/pts", "devpts"),
    ("tmpfs", "/run", "tmpfs"),
    ("tmpfs", "/tmp", "tmpfs"),
    ("debugfs", "/sys/kernel/debug", "debugfs"),
];

/// A file system cannot be mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The kernel refuses the mount.
    #[error("cannot mount {fs} {from} on {}", target.display())]
    Mount {
        /// The file system's name.
        fs: String,
        /// The source, such as a device.
        from: String,
        /// The mount point.
        target: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The device cannot be formatted.
    #[error("cannot format the device to mount on {}", target.display())]
    Format {
        /// The mount point.
        target: PathBuf,
        /// Why.
        #[source]
        source: FormatError,
    },
}

/// Whether this process is PID 1.
pub fn is_pid_1() -> bool {
    rustix::process::getpid().is_init()
}

/// Mounts the file systems of `ESSENTIAL`, and lets Ctrl-Alt-Del reset nothing. Only warns if that fails: a host without
/// debugfs, for example, still runs VMs.
pub fn set_up() {
    // By default, whoever has the machine's keyboard resets it under all VMs. Now the keys are SIGINT, which does nothing.
    if let Err(errno) = reboot(RebootCommand::CadOff) {
        tracing::warn!("Ctrl-Alt-Del still resets this machine: {errno}");
    }
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

/// Mounts the file systems that the configuration lists. Returns the mounts that failed. `fresh` says
/// that no VM can be preserved in a pool. A mount point whose mount failed becomes read-only: data written
/// there would be in the host's image, which is in memory, and be lost with the kernel.
/// `is_first` says that no host of this kernel can have mounted them. Otherwise what is there stays: another mount would hide
/// the files of VMs.
pub fn mount_all(mounts: &[Mount], fresh: bool, is_first: bool) -> Vec<(Mount, MountError)> {
    let mut failed = Vec::new();
    let there = match is_first {
        true => String::new(),
        false => fs::read_to_string("/proc/self/mounts").unwrap_or_default(),
    };
    for entry in mounts.iter().filter(|entry| !is_mounted(entry, &there)) {
        if entry.source.starts_with("/dev/") {
            wait_for_device(|| Path::new(&entry.source).exists().then_some(()));
        }
        if let Err(error) = format(entry, fresh).and_then(|()| attach(entry)) {
            cover(entry);
            failed.push((entry.clone(), error));
        }
    }
    failed
}

/// Whether an entry is in a list of mounts, as `/proc/self/mounts` is one.
fn is_mounted(entry: &Mount, there: &str) -> bool {
    // In the list, blanks of a path are octal numbers (Linux `mangle_path`).
    let escaped = |path: &str| path.replace('\\', "\\134").replace(' ', "\\040");
    let (source, target) = (escaped(&entry.source), escaped(&entry.target.to_string_lossy()));
    let wanted = [source.as_str(), target.trim_end_matches('/'), entry.fs.as_str()];
    there.lines().any(|line| line.split(' ').take(3).eq(wanted))
}

/// Makes the mount point of a mount that failed read-only.
fn cover(entry: &Mount) {
    if let Err(errno) = mount("none", &entry.target, "tmpfs", MountFlags::RDONLY, None) {
        tracing::warn!("cannot make {} read-only: {errno}", entry.target.display());
    }
}

/// Tries again a mount of [`mount_all`] that failed, on top of the read-only mount point.
pub fn mount_again(entry: &Mount) -> Result<(), MountError> {
    format(entry, false).and_then(|()| attach(entry))
}

/// Copies the image `format_from`, if the configuration names one, onto the device, unless the device
/// already has a file system that may be needed.
fn format(entry: &Mount, fresh: bool) -> Result<(), MountError> {
    let Some(image) = &entry.format_from else { return Ok(()) };
    let error = |source| MountError::Format { target: entry.target.clone(), source };
    let device = Path::new(&entry.source);
    let contents = match fresh && format::is_reserved_memory(Path::new("/"), device) {
        true => Contents::OfAnotherBoot,
        false => Contents::Unknown,
    };
    if format::format(device, image, contents).map_err(error)? {
        tracing::info!("copied {} to {}", image.display(), entry.source);
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
        // Already mounted: by the kernel (devtmpfs), or before this host was restarted.
        Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(errno) => Err(error(errno.into())),
    }
}

/// Sets the host name. Only warns on an error.
pub fn set_hostname(name: &str) {
    if let Err(error) = sethostname(name.as_bytes()) {
        tracing::warn!("cannot set the host's name to `{name}`: {error}");
    }
}

/// How long the file systems may take to be synced before the machine is switched off.
const SYNC_WITHIN: Duration = Duration::from_secs(60);

/// Syncs all file systems and switches the machine off.
pub fn power_off() -> ! {
    file_systems::sync_all(SYNC_WITHIN);
    let error = reboot(RebootCommand::PowerOff).expect_err("power-off does not return");
    tracing::error!("cannot switch the machine off: {error}");
    loop {
        // PID 1 must not return, because the kernel would panic.
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_last_host_mounted_is_known_by_source_target_and_type() {
        let entry = |source: &str, target: &str, fs: &str| Mount {
            source: source.into(),
            target: target.into(),
            fs: fs.into(),
            options: String::new(),
            format_from: None,
        };
        let there =
            "/dev/vda /data ext4 rw 0 0\nvms /vm\\040s tmpfs rw 0 0\nnone /gone tmpfs ro 0 0\n";
        assert!(is_mounted(&entry("/dev/vda", "/data", "ext4"), there));
        assert!(is_mounted(&entry("/dev/vda", "/data/", "ext4"), there));
        assert!(is_mounted(&entry("vms", "/vm s", "tmpfs"), there));
        assert!(!is_mounted(&entry("/dev/vdb", "/data", "ext4"), there));
        assert!(!is_mounted(&entry("/dev/vda", "/dat", "ext4"), there));
        // Covered, because the mount failed.
        assert!(!is_mounted(&entry("/dev/vdc", "/gone", "ext4"), there));
    }
}
