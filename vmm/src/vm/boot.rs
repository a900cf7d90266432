//! Boots a machine: loads its kernel, and sets the first vCPU to the kernel's entry point.

use std::fs::File;
use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::board::{Board, Events};
use super::parts::Parts;
use super::{Vm, VmError};
use crate::arch::x86_64::boot::{self, Entry};
use crate::arch::x86_64::{acpi, cpuid, registers};
use crate::boot_disk::{self, Booted, LoadError};
use crate::causes::chain;
use crate::kvm::{Attempt, irqchip};
use crate::link::{Event, Fds, Ram, Role};
use crate::machine::{Boot, KernelBoot, Machine};

/// Most bytes of private memory that the process may have while it reads the guest's disk. A disk that makes
/// the readers of file systems ask for more ends the process. Guest RAM is shared and does not count.
const DATA_MAX: u64 = 1 << 30;

impl Vm {
    /// Builds the machine from its description, in the state that the kernel's boot protocol requires. `nested` says
    /// whether its guest may have VMs of its own, if this host's KVM can do that.
    pub fn boot(
        machine: Machine,
        ram: Ram,
        nested: bool,
        fds: &mut Fds,
        events: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Self, VmError> {
        let source = Source::take(&machine, fds)?;
        let parts = Parts::new(&machine, ram, fds, events)?;
        let (cpu, offered) = (machine.cpu, &parts.capabilities.cpuid);
        let mut offered = cpuid::baseline(offered, cpu)
            .map_err(|missing| VmError::Baseline { cpu, missing: missing.join(", ") })?;
        if nested {
            cpuid::add_virtualisation(&mut offered, &parts.capabilities.supported);
        }
        irqchip::mask_pics(&parts.fd)?;
        let board = Board::new(&machine, &parts.wires(), fds)?;
        let memory = parts.ram.memory();
        let rsdp = acpi::write(memory, machine.cpus)?;
        let entry = source.load(memory, machine.ram_bytes, rsdp, &parts.events)?;
        for (id, vcpu) in (0..).zip(&parts.vcpus) {
            let mut entries = cpuid::for_vcpu(&offered, id, machine.cpus);
            let tsc_khz = vcpu.get_tsc_khz().attempt("read the rate of the TSC")?;
            cpuid::add_frequencies(&mut entries, tsc_khz);
            let entries = cpuid::to_kvm(&entries).attempt("set the CPUID")?;
            vcpu.set_cpuid2(&entries).attempt("set the CPUID")?;
            registers::set_up_boot_vcpu(vcpu, id, &entry, memory)?;
        }
        parts.assemble(machine, board)
    }
}

/// Where the kernel comes from.
enum Source {
    /// From files of the host.
    Files { kernel: File, initramfs: Option<File>, boot: KernelBoot },
    /// From the VM's own disk. `cmdline` goes behind the disk's.
    Disk { node: String, file: File, cmdline: String },
}

impl Source {
    /// Takes the files of the kernel. Leaves the disk's to the disk.
    fn take(machine: &Machine, fds: &mut Fds) -> Result<Self, VmError> {
        match &machine.boot {
            Boot::Kernel(boot) => {
                let kernel = fds.take_one(Role::Kernel)?.into();
                let initramfs = fds.take(Role::Initramfs, usize::from(boot.initramfs.is_some()))?;
                let initramfs = initramfs.into_iter().next().map(File::from);
                Ok(Self::Files { kernel, initramfs, boot: boot.clone() })
            }
            Boot::Disk(boot) => {
                let missing = || VmError::BootDiskFile(io::ErrorKind::NotFound.into());
                let (spec, role) = machine.boot_disk().ok_or_else(missing)?;
                let node = spec.node();
                let fd = fds.device_file(&node, role).ok_or_else(missing)?;
                let file = fd.try_clone_to_owned().map_err(VmError::BootDiskFile)?.into();
                Ok(Self::Disk { node, file, cmdline: boot.cmdline.clone() })
            }
        }
    }

    /// Loads the kernel into the guest's RAM.
    fn load(
        self,
        memory: &GuestMemoryMmap,
        ram_bytes: u64,
        rsdp: GuestAddress,
        events: &Events,
    ) -> Result<Entry, VmError> {
        match self {
            Self::Files { mut kernel, mut initramfs, boot } => {
                let KernelBoot { kernel: path, initramfs: initramfs_path, cmdline } = boot;
                let initramfs = initramfs.as_mut();
                boot::load(memory, ram_bytes, &mut kernel, initramfs, &cmdline, rsdp).map_err(
                    |source| VmError::Boot { kernel: path, initramfs: initramfs_path, source },
                )
            }
            Self::Disk { node, file, cmdline } => {
                let (entry, booted) = load_from_disk(node, file, cmdline, memory, ram_bytes, rsdp)?;
                events(booted);
                Ok(entry)
            }
        }
    }
}

/// Finds the kernel on the disk `node`, which is `file`, and loads it. `added` goes behind the command line. Returns also
/// the event that says which entry it is.
fn load_from_disk(
    node: String,
    file: File,
    added: String,
    memory: &GuestMemoryMmap,
    ram_bytes: u64,
    rsdp: GuestAddress,
) -> Result<(Entry, Event), VmError> {
    let (memory, disk) = (memory.clone(), node.clone());
    let limit = DataLimit::set();
    let loaded = boot_disk::boot(file, move |found| {
        let boot_disk::Boot { mut kernel, mut initramfs, mut cmdline, origin } = found;
        if !added.is_empty() {
            cmdline = format!("{cmdline} {added}");
        }
        boot::load(&memory, ram_bytes, &mut kernel, initramfs.as_mut(), &cmdline, rsdp).map_err(
            |source| match source.is_of_the_files() {
                true => LoadError::Damaged(chain(&source).join(": ")),
                false => {
                    LoadError::Other(VmError::BootFromDisk { disk: disk.clone(), origin, source })
                }
            },
        )
    });
    drop(limit);
    let Booted { loaded, origin, warnings } =
        loaded.map_err(|source| VmError::BootDisk { disk: node.clone(), source })??;
    tracing::info!("boots {origin} of {node}");
    for warning in &warnings {
        tracing::warn!("{node}: {warning}");
    }
    Ok((loaded, Event::Booted { entry: format!("{origin} of {node}"), warnings }))
}

/// Limits the process's private memory to [`DATA_MAX`] until it is dropped.
struct DataLimit(Rlimit);

impl DataLimit {
    fn set() -> Self {
        let before = getrlimit(Resource::Data);
        let current = Some(before.current.map_or(DATA_MAX, |current| current.min(DATA_MAX)));
        // Only ever lowers the limit, which is always permitted.
        let _ = setrlimit(Resource::Data, Rlimit { current, maximum: before.maximum });
        Self(before)
    }
}

impl Drop for DataLimit {
    fn drop(&mut self) {
        let _ = setrlimit(Resource::Data, self.0);
    }
}
