//! Opens what a VM needs by name, so that the VM's process needs no names.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::init;
use crate::link::Role;
use crate::machine::{Machine, SerialOutput};

/// What a VM's serial port writes to if it is to be a terminal.
const STDOUT: &str = "/dev/stdout";

/// Something that a VM needs cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {what} {}{remedy}", path.display())]
pub struct OpenError {
    what: &'static str,
    path: PathBuf,
    remedy: &'static str,
    #[source]
    source: io::Error,
}

/// Open files with their roles, in the order of the machine.
#[derive(Debug, Default)]
pub struct Files(Vec<(Role, OwnedFd)>);

impl Files {
    /// What every VM needs, booted or restored: KVM, the serial output, the disks.
    pub fn for_machine(machine: &Machine) -> Result<Self, OpenError> {
        let mut files = Self::default();
        let kvm = open("KVM", Path::new("/dev/kvm"), OpenOptions::new().read(true).write(true))
            .map_err(|error| OpenError {
                remedy: ": the kernel needs KVM, the CPU virtualisation (nested, if this is a VM)",
                ..error
            })?;
        files.push(Role::Kvm, kvm);
        if let Some(serial) = open_serial(&machine.serial)? {
            files.push(Role::Serial, serial);
        }
        for disk in &machine.disks {
            let mut options = OpenOptions::new();
            options.read(true).write(!disk.readonly);
            files.push(Role::Disk, open("disk", &disk.path, &options)?);
        }
        Ok(files)
    }

    /// Adds the images that only a boot needs.
    pub fn with_kernel(mut self, machine: &Machine) -> Result<Self, OpenError> {
        let mut options = OpenOptions::new();
        options.read(true);
        self.push(Role::Kernel, open("kernel", &machine.kernel, &options)?);
        if let Some(path) = &machine.initramfs {
            self.push(Role::Initramfs, open("initramfs", path, &options)?);
        }
        Ok(self)
    }

    /// Adds one file.
    pub fn push(&mut self, role: Role, fd: impl Into<OwnedFd>) {
        self.0.push((role, fd.into()));
    }

    /// The files as a request takes them.
    pub fn borrow(&self) -> Vec<(Role, BorrowedFd<'_>)> {
        self.0.iter().map(|(role, fd)| (*role, fd.as_fd())).collect()
    }
}

fn open(what: &'static str, path: &Path, options: &OpenOptions) -> Result<File, OpenError> {
    options.open(path).map_err(|source| OpenError {
        what,
        path: path.to_owned(),
        remedy: "",
        source,
    })
}

fn open_serial(output: &SerialOutput) -> Result<Option<OwnedFd>, OpenError> {
    match output {
        SerialOutput::Off => Ok(None),
        SerialOutput::Tty if io::stdout().is_terminal() => {
            // Opened anew, so that it is non-blocking for this VM alone: a terminal that was stopped
            // (Ctrl-S) says that it has room and then makes a blocking writer wait.
            let mut options = OpenOptions::new();
            options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
            open("serial output", Path::new(STDOUT), &options).map(|file| Some(file.into()))
        }
        SerialOutput::Tty => {
            let path = PathBuf::from(STDOUT);
            let error = |source| OpenError { what: "serial output", path, remedy: "", source };
            io::stdout().as_fd().try_clone_to_owned().map(Some).map_err(error)
        }
        SerialOutput::File(path) => {
            let mut options = OpenOptions::new();
            options.append(true).create(true);
            open("serial output", path, &options).map(|file| Some(file.into()))
        }
        SerialOutput::Port(name) => open_port(name).map(|file| Some(file.into())),
    }
}

/// Opens a virtio-serial port of the host by its name, without blocking.
pub fn open_port(name: &str) -> Result<File, OpenError> {
    let class = Path::new("/sys/class/virtio-ports");
    let error = |source| OpenError {
        what: "virtio-serial port",
        path: name.into(),
        remedy: ": the name is looked up in /sys/class/virtio-ports",
        source,
    };
    let find = || {
        std::fs::read_dir(class).ok()?.flatten().find(|entry| {
            std::fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim_end() == name)
        })
    };
    // Ports get their names some time after their driver was loaded.
    let port = init::wait_for_device(find).ok_or_else(|| error(io::ErrorKind::NotFound.into()))?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let path = Path::new("/dev").join(port.file_name());
    open("virtio-serial port", &path, &options)
}
