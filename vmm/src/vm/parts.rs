//! The parts of a machine that KVM provides: the VM, its RAM, its vCPUs, its interrupts. A boot and a restore
//! create them in the same way, because the guest must find the same machine.

use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::Arc;

use guest_mem::{GuestRam, check_segment_of};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::board::{Board, Events, Wires};
use super::{Vm, VmError, calls, memory, ram_layout};
use crate::kvm::clock::KvmClock;
use crate::kvm::interrupts::KvmInterrupts;
use crate::kvm::{self, Attempt, Capabilities};
use crate::link::{Event, Fds, Ram, Role};
use crate::machine::Machine;
use crate::vcpu::{VcpuEvent, VcpuSet};

/// The API version of KVM since Linux 2.6.22 (Documentation/virt/kvm/api.rst 4.1).
const KVM_API_VERSION: i32 = 12;

/// The parts of a machine that KVM provides.
pub(super) struct Parts {
    // Dropped in this order: the memory last.
    pub(super) vcpus: Vec<VcpuFd>,
    pub(super) capabilities: Arc<Capabilities>,
    interrupts: Arc<KvmInterrupts>,
    pub(super) events: Events,
    pub(super) fd: Arc<VmFd>,
    pub(super) ram: GuestRam,
}

impl Parts {
    /// Creates a VM with its RAM, its in-kernel devices and vCPUs after reset.
    pub(super) fn new(
        machine: &Machine,
        ram: Ram,
        fds: &mut Fds,
        events: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Self, VmError> {
        let kvm = open_kvm(fds.take_one(Role::Kvm)?)?;
        kvm::uapi::permit_amx();
        let fd = Arc::new(kvm.create_vm().attempt("create the VM")?);
        kvm::prepare(&fd)?;
        let ram = map_ram(machine, ram, fds)?;
        for (slot, mapped) in (0..).zip(ram.slots()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: mapped.guest_base,
                memory_size: mapped.len,
                userspace_addr: mapped.host_address,
            };
            memory::set_region(&fd, &region).attempt("give the guest its RAM")?;
        }
        let vcpus =
            (0..machine.cpus).map(|id| kvm::create_vcpu(&fd, id)).collect::<Result<Vec<_>, _>>()?;
        let mut capabilities = Capabilities::probe(&kvm, &fd)?;
        if let Some(vcpu) = vcpus.first() {
            capabilities.add_uninterceptable(vcpu)?;
        }
        let capabilities = Arc::new(capabilities);
        let interrupts = Arc::new(KvmInterrupts::new(fd.clone()));
        Ok(Self { fd, ram, vcpus, capabilities, interrupts, events: Arc::new(events) })
    }

    /// Joins the parts and the board to a machine, paused.
    pub(super) fn assemble(self, machine: Machine, mut board: Board) -> Result<Vm, VmError> {
        board.start_threads(&self.events)?;
        let Self { fd, ram, vcpus, capabilities, interrupts: _, events } = self;
        let first = vcpus.first().ok_or(VmError::NoVcpu)?;
        let tsc_khz = first.get_tsc_khz().attempt("read the rate of the TSC")?;
        let on_vcpu = Arc::new(move |event| {
            events(match event {
                VcpuEvent::Reset => Event::Reset,
                VcpuEvent::Failed(why) => Event::Crashed(why),
            });
        });
        let vcpus = VcpuSet::spawn(
            vcpus,
            &capabilities,
            &board.pio,
            &board.mmio,
            on_vcpu,
            &calls::vcpus(&machine),
        )?;
        Ok(Vm { machine, vcpus, board, fd, _ram: ram, tsc_khz, running: false })
    }

    /// Builds devices that set their interrupt routes at once: KVM is told all routes together.
    pub(super) fn wire<T>(&self, build: impl FnOnce(&Wires) -> T) -> T {
        self.interrupts.program_together(|| build(&self.wires()))
    }

    /// Returns the connections for the machine's devices: RAM, interrupts, doorbells, events.
    pub(super) fn wires(&self) -> Wires {
        Wires {
            memory: self.ram.memory().clone(),
            interrupts: self.interrupts.clone(),
            doorbells: self.interrupts.clone(),
            clock: Arc::new(KvmClock(self.fd.clone())),
            events: self.events.clone(),
        }
    }
}

fn open_kvm(fd: OwnedFd) -> Result<Kvm, VmError> {
    let kvm = memory::kvm_from_fd(fd.into_raw_fd());
    match kvm.get_api_version() {
        KVM_API_VERSION => Ok(kvm),
        other => Err(VmError::KvmVersion(other)),
    }
}

fn map_ram(machine: &Machine, kind: Ram, fds: &mut Fds) -> Result<GuestRam, VmError> {
    let layout = ram_layout(machine.ram_bytes)?;
    let plans = layout.segments();
    let fds = fds.take(Role::Segment, plans.len())?;
    let segments = fds
        .into_iter()
        .zip(plans)
        .enumerate()
        .map(|(index, (fd, plan))| check_segment_of(kind.into(), index, fd, plan.len))
        .collect::<Result<_, _>>()?;
    let ram = GuestRam::map(&layout, segments)?;
    if let Some(error) = ram.advice_failure() {
        tracing::warn!("VM `{}` gets no huge pages: {error}", machine.name);
    }
    Ok(ram)
}
