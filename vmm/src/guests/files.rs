//! Opens the files that a VM needs, so that the VM's process gets fds and no names.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

pub use crate::devices::files::OpenError;
use crate::devices::files::open;
use crate::link::Role;
use crate::machine::{Boot, Machine};

/// Open files with their roles, in the order of the machine's devices.
#[derive(Debug, Default)]
pub struct Files(Vec<(Role, OwnedFd)>);

/// Where programs of the host attach to an open file: the path of a listening socket, or of the slave of a
/// pseudoterminal's master. `None` for any other file.
fn place_of(fd: &OwnedFd) -> Option<PathBuf> {
    if let Ok(slave) = rustix::pty::ptsname(fd, Vec::new()) {
        return Some(PathBuf::from(slave.into_string().ok()?));
    }
    let listener = UnixListener::from(fd.try_clone().ok()?);
    std::path::absolute(listener.local_addr().ok()?.as_pathname()?).ok()
}

/// Opens a kernel or an initramfs. Errors if it is a directory or a device, whose length means nothing.
fn open_image(what: &'static str, path: &Path) -> Result<File, OpenError> {
    let file = open(what, path, OpenOptions::new().read(true))?;
    let error = match file.metadata() {
        Ok(found) if found.is_file() => return Ok(file),
        Ok(found) if found.is_dir() => io::Error::other("it is a directory"),
        Ok(_) => io::Error::other("it is a device"),
        Err(error) => error,
    };
    let remedy = ": it must be a file";
    Err(OpenError { what, path: path.to_owned(), remedy, source: error })
}

impl Files {
    /// Opens KVM.
    pub fn kvm() -> Result<Self, OpenError> {
        let kvm = open("KVM", Path::new("/dev/kvm"), OpenOptions::new().read(true).write(true))
            .map_err(|error| {
                let remedy = match error.source.kind() {
                    ErrorKind::PermissionDenied => {
                        ": start `perennial` as a member of the group that owns it (usually kvm), or as root"
                    }
                    _ => ": the kernel needs KVM, the CPU virtualisation (nested, if this is a VM)",
                };
                OpenError { remedy, ..error }
            })?;
        Ok(Self(vec![(Role::Kvm, kvm.into())]))
    }

    /// Opens what a VM needs for a boot and for a restore: KVM and the files of its devices.
    pub fn for_machine(machine: &Machine) -> Result<Self, OpenError> {
        let mut files = Self::kvm()?;
        for device in &machine.devices {
            let opened = device.options.open()?.into_iter();
            files.0.extend(opened.map(|file| Role::of_device(&device.node(), file)));
        }
        Ok(files)
    }

    /// Opens and adds the images that only a boot needs: the kernel and the initramfs.
    pub fn with_kernel(mut self, machine: &Machine) -> Result<Self, OpenError> {
        // A VM that boots from its disk reads the images there itself.
        let Boot::Kernel(boot) = &machine.boot else { return Ok(self) };
        self.push(Role::Kernel, open_image("kernel", &boot.kernel)?);
        if let Some(path) = &boot.initramfs {
            self.push(Role::Initramfs, open_image("initramfs", path)?);
        }
        Ok(self)
    }

    /// Adds one file.
    pub fn push(&mut self, role: Role, fd: impl Into<OwnedFd>) {
        self.0.push((role, fd.into()));
    }

    /// Where programs attach to the machine's console, if they can.
    pub fn console(&self) -> Option<PathBuf> {
        let of_devices = self.0.iter().filter(|(role, _)| matches!(role, Role::Device { .. }));
        of_devices.filter_map(|(_, fd)| place_of(fd)).next()
    }

    /// Borrows the files, to send with a request.
    pub fn borrow(&self) -> Vec<(Role, BorrowedFd<'_>)> {
        self.0.iter().map(|(role, fd)| (role.clone(), fd.as_fd())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::catalog::DeviceOptions;
    use crate::devices::serial::SerialOptions;
    use crate::machine::place;

    fn console(serial: SerialOptions) -> Option<PathBuf> {
        let device = &place(vec![DeviceOptions::Serial(serial)])[0];
        let opened = device.options.open().unwrap().into_iter();
        let files = opened.map(|file| Role::of_device(&device.node(), file)).collect();
        Files(files).console()
    }

    #[test]
    fn a_kernel_and_an_initramfs_are_files() {
        let directory = tempfile::tempdir().unwrap();
        let said = |path: &Path| {
            let error = open_image("initramfs", path).unwrap_err();
            crate::causes::chain(&error).join(": ")
        };
        let refused = said(directory.path());
        assert!(refused.ends_with(": it must be a file: it is a directory"), "{refused}");
        assert!(
            said(Path::new("/dev/null")).ends_with("/dev/null: it must be a file: it is a device")
        );
        assert!(said(&directory.path().join("none")).contains("No such file"));
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        open_image("kernel", &file).unwrap();
    }

    #[test]
    fn a_console_is_where_a_program_attaches_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        assert_eq!(console(SerialOptions::Socket(path.clone())), Some(path.clone()));
        assert!(console(SerialOptions::Pty).unwrap().starts_with("/dev/pts"));
        assert_eq!(console(SerialOptions::Tty), None);
        assert_eq!(console(SerialOptions::Off), None);
    }
}
