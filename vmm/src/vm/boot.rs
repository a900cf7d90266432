//! Boots a machine: loads its kernel, and sets the first vCPU to the kernel's entry point.

use std::fs::File;

use super::board::Board;
use super::parts::Parts;
use super::{Vm, VmError};
use crate::arch::x86_64::{acpi, boot, cpuid, registers};
use crate::kvm::{Attempt, irqchip};
use crate::link::{Event, Fds, Ram, Role};
use crate::machine::Machine;

impl Vm {
    /// Builds the machine from its description, in the state that the kernel's boot protocol requires.
    pub fn boot(
        machine: Machine,
        ram: Ram,
        fds: &mut Fds,
        events: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Self, VmError> {
        let mut kernel = File::from(fds.take_one(Role::Kernel)?);
        let initramfs =
            fds.take(Role::Initramfs, usize::from(machine.boot.initramfs.is_some()))?.pop();
        let parts = Parts::new(&machine, ram, fds, events)?;
        irqchip::mask_pics(&parts.fd)?;
        let board = Board::new(&machine, &parts.wires(), fds)?;
        let memory = parts.ram.memory();
        let rsdp = acpi::write(memory, machine.cpus)?;
        let mut initramfs = initramfs.map(File::from);
        let entry = boot::load(
            memory,
            machine.ram_bytes,
            &mut kernel,
            initramfs.as_mut(),
            &machine.boot.cmdline,
            rsdp,
        )?;
        for (id, vcpu) in (0..).zip(&parts.vcpus) {
            let mut entries = cpuid::for_vcpu(&parts.capabilities.cpuid, id, machine.cpus);
            let tsc_khz = vcpu.get_tsc_khz().attempt("read the rate of the TSC")?;
            cpuid::add_frequencies(&mut entries, tsc_khz);
            let entries = cpuid::to_kvm(&entries).attempt("set the CPUID")?;
            vcpu.set_cpuid2(&entries).attempt("set the CPUID")?;
            registers::set_up_boot_vcpu(vcpu, id, &entry, memory)?;
        }
        parts.assemble(machine, board)
    }
}
