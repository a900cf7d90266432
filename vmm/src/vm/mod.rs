//! One machine in its process: built from a description or from a state document, run, and saved.
//!
//! ```text
//!   boot, restore --> paused --resume--> running: sync --pause--> paused: save, sync
//! ```
//!
//! A boot and a restore create the same parts in the same order: `parts` those of KVM, `board` the devices.
//! A boot then loads a kernel; a restore sets the state of every part.

pub mod board;
mod boot;
pub mod calls;
mod memory;
mod parts;
mod restore;
pub mod serve;
mod state;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use guest_mem::{GuestRam, Layout, Slot};
use kvm_ioctls::VmFd;

pub use state::{DevicesStateV1, SavedDevice, VmStateV1};

use crate::arch::x86_64::acpi::AcpiError;
use crate::arch::x86_64::boot::BootError;
use crate::arch::x86_64::cpuid::CpuModel;
use crate::arch::x86_64::layout;
use crate::arch::x86_64::registers::SetUpError;
use crate::boot_disk::BootDiskError;
use crate::devices::DeviceError;
use crate::devices::storage::{OnResized, StorageReport};
use crate::kvm::KvmError;
use crate::kvm::clock::ClockStateV1;
use crate::kvm::platform::PlatformStateV1;
use crate::link::FdsError;
use crate::machine::Machine;
use crate::state::StateError;
use crate::vcpu::{RestoreError, VcpuError, VcpuSet};
use board::{Board, BoardError};

/// The words behind the name of a kernel that has an initramfs.
fn with(initramfs: Option<&Path>) -> String {
    initramfs.map_or(String::new(), |path| format!(" with the initramfs {}", path.display()))
}

/// A machine could not be built, or a request to it failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// The fds of the request are not those that the machine needs.
    #[error(transparent)]
    Fds(#[from] FdsError),
    /// The RAM cannot be mapped.
    #[error("cannot map the guest's RAM")]
    Ram(#[from] guest_mem::Error),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// KVM has another API version, or the fd is not KVM's.
    #[error("the file descriptor for KVM speaks API version {0}, this build knows 12")]
    KvmVersion(i32),
    /// The kernel cannot be loaded.
    #[error("cannot load the guest's kernel {}{}", kernel.display(), with(initramfs.as_deref()))]
    Boot {
        /// The kernel's path on the host.
        kernel: PathBuf,
        /// That of the initramfs, if there is one.
        initramfs: Option<PathBuf>,
        /// Why.
        #[source]
        source: BootError,
    },
    /// The VM boots from its disk, and cannot.
    #[error("cannot boot from {disk}")]
    BootDisk {
        /// The disk, as a node.
        disk: String,
        /// Why.
        #[source]
        source: BootDiskError,
    },
    /// The kernel that the disk has cannot be loaded.
    #[error("cannot load the guest's kernel, {origin} of {disk}")]
    BootFromDisk {
        /// The disk, as a node.
        disk: String,
        /// Which entry of which configuration.
        origin: String,
        /// Why.
        #[source]
        source: BootError,
    },
    /// The file descriptor of the disk to boot from is missing, or cannot be duplicated.
    #[error("cannot boot from a disk: its file cannot be used")]
    BootDiskFile(#[source] std::io::Error),
    /// The first registers cannot be set.
    #[error("cannot set up the vCPUs")]
    SetUp(#[from] SetUpError),
    /// The ACPI tables cannot be written.
    #[error("cannot write the ACPI tables")]
    Acpi(#[from] AcpiError),
    /// A device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The devices cannot be put together.
    #[error("cannot put the machine together")]
    Board(#[from] BoardError),
    /// The host lacks features of the processor that the guest is to find.
    #[error(
        "cpu = \"{cpu}\" needs features that this host cannot offer: {missing}. Give the VM a lower baseline, \
         or another host"
    )]
    Baseline {
        /// The processor.
        cpu: CpuModel,
        /// The names of the features.
        missing: String,
    },
    /// A machine without vCPUs.
    #[error("the machine has no vCPU")]
    NoVcpu,
    /// A machine without a power button.
    #[error("the machine has no power button")]
    NoPowerButton,
    /// No device of that name has a link.
    #[error("the machine has no network device {device}")]
    NoNetworkDevice {
        /// The name, as a node.
        device: String,
    },
    /// The device to resize does not exist or keeps no data.
    #[error("the machine has no device `{0}` that has a size")]
    NoStorage(String),
    /// A vCPU failed.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A vCPU's state cannot be set.
    #[error("cannot restore vCPU {id}")]
    RestoreVcpu {
        /// Which vCPU.
        id: u32,
        /// Why.
        #[source]
        source: RestoreError,
    },
    /// The document describes another machine than the manifest.
    #[error("the state document is of another machine: it has {document}, the host has {host}")]
    Mismatch {
        /// What the document says.
        document: String,
        /// What the manifest says.
        host: String,
    },
    /// A device's state does not fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// The VM is already in the requested state: running or paused.
    #[error("the guest is {0} already")]
    Already(&'static str),
}

/// Returns the layout of `ram_bytes` of guest RAM.
pub fn ram_layout(ram_bytes: u64) -> Result<Layout, guest_mem::Error> {
    let slots: Vec<Slot> = layout::ram(ram_bytes)
        .into_iter()
        .map(|(base, len)| Slot { guest_base: base.0, len })
        .collect();
    Layout::new(&slots, None)
}

/// A machine.
pub struct Vm {
    machine: Machine,
    // Dropped in this order: vCPUs stop before devices are dropped, and the memory is dropped last.
    vcpus: VcpuSet,
    board: Board,
    fd: Arc<VmFd>,
    _ram: GuestRam,
    tsc_khz: u32,
    running: bool,
}

impl Vm {
    /// Starts devices and vCPUs. Returns the host's TSC just before the first vCPU entered the guest.
    pub fn resume(&mut self) -> Result<u64, VmError> {
        if self.running {
            return Err(VmError::Already("running"));
        }
        self.board.resume();
        let first_entry = self.vcpus.resume()?;
        self.running = true;
        Ok(first_entry)
    }

    /// Stops vCPUs, then devices. Returns the host's TSC just after the last vCPU left the guest. If a
    /// device does not stop, resumes the machine and returns that error. If a device is known not to stop, because
    /// its storage or the sink of its output hangs, errors at once and does not stop the machine.
    pub fn pause(&mut self) -> Result<u64, VmError> {
        if !self.running {
            return Err(VmError::Already("paused"));
        }
        self.board.check_answers()?;
        let last_exit = self.vcpus.pause()?;
        self.running = false;
        if let Err(error) = self.board.pause() {
            self.resume()?;
            return Err(error.into());
        }
        Ok(last_exit)
    }

    /// Presses the power button, which asks the guest to shut down. A paused guest notices after the pause.
    pub fn press_power_button(&self) -> Result<(), VmError> {
        match self.board.press_power_button() {
            true => Ok(()),
            false => Err(VmError::NoPowerButton),
        }
    }

    /// Takes the link of a network device up or down.
    pub fn set_link(&self, device: &str, up: bool) -> Result<(), VmError> {
        match self.board.set_link(device, up) {
            true => Ok(()),
            false => Err(VmError::NoNetworkDevice { device: device.to_owned() }),
        }
    }

    /// Returns the state of the storage of each device that has one, by the device's node. Returns at once, also
    /// if a storage hangs.
    pub fn storage_reports(&self) -> Vec<(String, StorageReport)> {
        self.board.storage_reports()
    }

    /// Makes `device` as large as its storage, after growing that to `bytes` if given, and tells the guest. Returns
    /// at once; `on_resized` is called with the size when the storage has answered. Call while running: a paused
    /// guest is told at its resume only of what grew before.
    pub fn resize(
        &self,
        device: &str,
        bytes: Option<u64>,
        on_resized: OnResized,
    ) -> Result<(), VmError> {
        if !self.running {
            return Err(VmError::Already("paused"));
        }
        let storage = self.board.storage(device);
        let storage = storage.ok_or_else(|| VmError::NoStorage(device.to_owned()))?;
        storage.resize(bytes, on_resized);
        Ok(())
    }

    /// Makes durable what the guest wrote to its disks until now. The guest may run meanwhile.
    pub fn sync(&self) -> Result<(), VmError> {
        self.board.check_storages()?;
        Ok(self.board.sync()?)
    }

    /// Returns the machine's state and changes nothing. Call while paused.
    pub fn save(&self) -> Result<VmStateV1, VmError> {
        self.needs_pause()?;
        let Self { machine, vcpus, board, fd, _ram: _, tsc_khz, running: _ } = self;
        // Devices, then controllers, then vCPUs: an interrupt that moves from one to the next during the
        // save is then saved twice instead of being lost.
        let devices = board.save()?;
        let (pit, irqchip) = PlatformStateV1::save_controllers(fd)?;
        let vcpus = vcpus.save()?;
        let clock = ClockStateV1::save(fd, *tsc_khz)?;
        let platform = PlatformStateV1 { clock, irqchip, pit };
        Ok(VmStateV1 { machine: machine.clone(), platform, vcpus, devices })
    }

    fn needs_pause(&self) -> Result<(), VmError> {
        match self.running {
            true => Err(VmError::Already("running")),
            false => Ok(()),
        }
    }
}
