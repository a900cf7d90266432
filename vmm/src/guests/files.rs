//! Opens the files that a VM needs, so that the VM's process gets fds and no names.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

pub use crate::devices::files::OpenError;
use crate::devices::files::open;
use crate::link::Role;
use crate::machine::Machine;

/// Open files with their roles, in the order of the machine's devices.
#[derive(Debug, Default)]
pub struct Files(Vec<(Role, OwnedFd)>);

impl Files {
    /// Opens what a VM needs for a boot and for a restore: KVM and the files of its devices.
    pub fn for_machine(machine: &Machine) -> Result<Self, OpenError> {
        let mut files = Self::default();
        let kvm = open("KVM", Path::new("/dev/kvm"), OpenOptions::new().read(true).write(true))
            .map_err(|error| OpenError {
                remedy: ": the kernel needs KVM, the CPU virtualisation (nested, if this is a VM)",
                ..error
            })?;
        files.push(Role::Kvm, kvm);
        for device in &machine.devices {
            let opened = device.options.open()?.into_iter();
            files.0.extend(opened.map(|file| Role::of_device(&device.node(), file)));
        }
        Ok(files)
    }

    /// Opens and adds the images that only a boot needs: the kernel and the initramfs.
    pub fn with_kernel(mut self, machine: &Machine) -> Result<Self, OpenError> {
        let mut options = OpenOptions::new();
        options.read(true);
        self.push(Role::Kernel, open("kernel", &machine.boot.kernel, &options)?);
        if let Some(path) = &machine.boot.initramfs {
            self.push(Role::Initramfs, open("initramfs", path, &options)?);
        }
        Ok(self)
    }

    /// Adds one file.
    pub fn push(&mut self, role: Role, fd: impl Into<OwnedFd>) {
        self.0.push((role, fd.into()));
    }

    /// Borrows the files, to send with a request.
    pub fn borrow(&self) -> Vec<(Role, BorrowedFd<'_>)> {
        self.0.iter().map(|(role, fd)| (role.clone(), fd.as_fd())).collect()
    }
}
