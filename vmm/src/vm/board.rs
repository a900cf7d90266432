//! The board of a machine: which devices there are, and where they sit on the buses.
//!
//! [`Parts`] is what KVM gives (the VM, its RAM, its vCPUs, its interrupts), [`Board`] what this
//! process emulates. Both are made the same way for a boot and for a restore: a restored machine is
//! the same machine.

use std::fs::File;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use guest_mem::{GuestRam, check_segment_of};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::{Vm, VmError, memory, ram_layout};
use crate::arch::x86_64::layout;
use crate::bus::Bus;
use crate::devices::pci::bus::PciBusStateV1;
use crate::devices::pci::{HostBridge, PciBus};
use crate::devices::power::{self, KeyboardReset, OnPower, PowerEvent, SleepRegisters};
use crate::devices::serial::{Serial, SerialResources, SerialStateV1};
use crate::devices::virtio::pci::BAR_SIZE;
use crate::devices::virtio::{
    Block, Disk, PciResources, VirtioBlkStateV1, VirtioPci, VirtioPciStateV1,
};
use crate::devices::{Device, DeviceError, pci};
use crate::kvm::interrupts::{Interrupts, KvmInterrupts};
use crate::kvm::{self, Attempt, Capabilities};
use crate::link::{Event, Fds, Ram, Role};
use crate::machine::{Machine, SerialOutput};
use crate::state::{Node, Persist, Reader, Schema, StateError};
use crate::vcpu::{VcpuEvent, VcpuSet};

/// The API version of KVM since Linux 2.6.22 (Documentation/virt/kvm/api.rst 4.1).
const KVM_API_VERSION: i32 = 12;
/// The slot of the first disk; 0 is the host bridge.
const FIRST_DISK_SLOT: u8 = 1;

/// How long the devices of a machine may take to finish what their guest has asked for. Longer than
/// a disk that works takes, also on a host that emulates its CPU.
const DRAIN_WITHIN: Duration = Duration::from_secs(20);

/// What KVM gives a machine.
pub(super) struct Parts {
    pub(super) fd: Arc<VmFd>,
    pub(super) ram: GuestRam,
    pub(super) vcpus: Vec<VcpuFd>,
    pub(super) capabilities: Arc<Capabilities>,
    interrupts: Arc<KvmInterrupts>,
    events: Arc<dyn Fn(Event) + Send + Sync>,
}

impl Parts {
    /// A VM with its RAM, its in-kernel devices and fresh vCPUs.
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
        let capabilities = Arc::new(Capabilities::probe(&kvm, &fd)?);
        let interrupts = Arc::new(KvmInterrupts::new(fd.clone()));
        Ok(Self { fd, ram, vcpus, capabilities, interrupts, events: Arc::new(events) })
    }

    /// Puts the machine together, paused.
    pub(super) fn assemble(self, machine: Machine, board: Board) -> Result<Vm, VmError> {
        let Self { fd, ram, vcpus, capabilities, interrupts: _, events } = self;
        let first = vcpus.first().ok_or_else(|| VmError::Board("it has no vCPU".to_owned()))?;
        let tsc_khz = first.get_tsc_khz().attempt("read the rate of the TSC")?;
        let on_vcpu = Arc::new(move |event| {
            events(match event {
                VcpuEvent::Reset => Event::Reset,
                VcpuEvent::Failed(why) => Event::Crashed(why),
            });
        });
        let vcpus = VcpuSet::spawn(vcpus, &capabilities, &board.pio, &board.mmio, on_vcpu)?;
        Ok(Vm { machine, vcpus, board, fd, _ram: ram, tsc_khz, running: false })
    }

    fn on_power(&self) -> OnPower {
        let events = self.events.clone();
        Arc::new(move |event| {
            events(match event {
                PowerEvent::Shutdown => Event::Shutdown,
                PowerEvent::Reset => Event::Reset,
            });
        })
    }

    fn function(&self, slot: u8) -> PciResources {
        PciResources {
            slot,
            bar: layout::PCI_BARS.0 as u32 + u32::from(slot - FIRST_DISK_SLOT) * BAR_SIZE,
            memory: self.ram.memory().clone(),
            interrupts: self.interrupts.clone(),
            doorbells: self.interrupts.clone(),
        }
    }

    fn serial(&self, machine: &Machine, fds: &mut Fds) -> Result<SerialResources, VmError> {
        let wanted = usize::from(machine.serial != SerialOutput::Off);
        let sink = fds.take(Role::Serial, wanted)?.pop();
        let line = self.interrupts.edge(layout::COM1_IRQ);
        let interrupt = line.map_err(|error| VmError::Board(error.to_string()))?;
        Ok(SerialResources { interrupt, sink })
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

/// The disks of a machine, open, in its order.
fn disks(machine: &Machine, fds: &mut Fds) -> Result<Vec<Disk>, VmError> {
    let files = fds.take(Role::Disk, machine.disks.len())?;
    let disk = |(fd, disk): (OwnedFd, &crate::machine::Disk)| Disk {
        file: File::from(fd),
        readonly: disk.readonly,
        path: disk.path.display().to_string(),
    };
    Ok(files.into_iter().zip(&machine.disks).map(disk).collect())
}

/// The devices, on their buses.
pub(super) struct Board {
    pub(super) pio: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pci: Arc<Mutex<PciBus>>,
    serial: Arc<Mutex<Serial>>,
    disks: Vec<Arc<Mutex<VirtioPci<Block>>>>,
}

impl Board {
    /// Devices after reset.
    pub(super) fn new(parts: &Parts, machine: &Machine, fds: &mut Fds) -> Result<Self, VmError> {
        let pci = PciBus::new(power::reset_control(parts.on_power()));
        let serial = Serial::new(parts.serial(machine, fds)?).map_err(board_error)?;
        let functions = (0u32..)
            .zip(disks(machine, fds)?)
            .map(|(index, disk)| {
                let device =
                    Block::new(disk, &format!("{}-{index}", machine.name)).map_err(board_error)?;
                let resources = parts.function(FIRST_DISK_SLOT + index as u8);
                VirtioPci::new(device, resources).map_err(board_error)
            })
            .collect::<Result<Vec<_>, VmError>>()?;
        Self::put_together(parts, pci, serial, functions)
    }

    /// The same devices with the state that they had.
    pub(super) fn restore(
        parts: &Parts,
        machine: &Machine,
        state: BoardStateV1,
        fds: &mut Fds,
    ) -> Result<Self, VmError> {
        let BoardStateV1 { pci, serial, disks: states } = state;
        let Ok(pci) = PciBus::restore(pci, power::reset_control(parts.on_power()));
        let serial = Serial::restore(serial, parts.serial(machine, fds)?).map_err(board_error)?;
        let functions = (FIRST_DISK_SLOT..)
            .zip(states)
            .zip(disks(machine, fds)?)
            .map(|((slot, state), disk)| {
                VirtioPci::restore(state, (parts.function(slot), disk)).map_err(|source| {
                    let device = format!("virtio-blk@{slot:x}");
                    DeviceError { device, attempt: "restore it", source: source.into() }.into()
                })
            })
            .collect::<Result<Vec<_>, VmError>>()?;
        Self::put_together(parts, pci, serial, functions)
    }

    fn put_together(
        parts: &Parts,
        mut pci: PciBus,
        mut serial: Serial,
        functions: Vec<VirtioPci<Block>>,
    ) -> Result<Self, VmError> {
        let (mut pio, mut mmio) = (Bus::default(), Bus::default());
        start_device_thread("serial@3f8".to_owned(), Box::new(serial.worker()))?;
        pci.insert(0, Arc::new(Mutex::new(HostBridge::new()))).map_err(board_error)?;
        let mut disks = Vec::new();
        for (slot, function) in (FIRST_DISK_SLOT..).zip(functions) {
            start_device_thread(format!("virtio-blk@{slot:x}"), Box::new(function.worker()))?;
            let function = Arc::new(Mutex::new(function));
            pci.insert(slot, function.clone()).map_err(board_error)?;
            let bar = parts.function(slot).bar;
            mmio.insert(bar.into(), BAR_SIZE.into(), function.clone()).map_err(board_error)?;
            disks.push(function);
        }
        let serial = Arc::new(Mutex::new(serial));
        let pci = Arc::new(Mutex::new(pci));
        let keyboard = Arc::new(Mutex::new(KeyboardReset::new(parts.on_power())));
        let sleep = Arc::new(Mutex::new(SleepRegisters::new(parts.on_power())));
        let com1 = (layout::COM1_PORT, layout::COM1_LEN);
        pio.insert(com1.0.into(), com1.1.into(), serial.clone()).map_err(board_error)?;
        let ports = (pci::bus::PORTS_BASE, pci::bus::PORTS_LEN);
        pio.insert(ports.0.into(), ports.1.into(), pci.clone()).map_err(board_error)?;
        let keys = (power::KEYBOARD_BASE, power::KEYBOARD_LEN);
        pio.insert(keys.0.into(), keys.1.into(), keyboard).map_err(board_error)?;
        let registers = (power::SLEEP_BASE, power::SLEEP_LEN);
        pio.insert(registers.0.into(), registers.1.into(), sleep).map_err(board_error)?;
        Ok(Self { pio: Arc::new(pio), mmio: Arc::new(mmio), pci, serial, disks })
    }

    /// Every device, for what is asked of all alike.
    fn devices(&self) -> impl Iterator<Item = Arc<Mutex<dyn Device>>> {
        let disks = self.disks.iter().map(|disk| disk.clone() as Arc<Mutex<dyn Device>>);
        std::iter::once(self.serial.clone() as Arc<Mutex<dyn Device>>).chain(disks)
    }

    /// Stops all devices side by side, and waits until the last one stands still.
    pub(super) fn pause(&self) -> Result<(), DeviceError> {
        self.devices().for_each(|device| lock(&device).pause());
        let deadline = Instant::now() + DRAIN_WITHIN;
        self.devices().try_for_each(|device| lock(&device).drain(deadline))
    }

    pub(super) fn sync(&self) -> Result<(), DeviceError> {
        self.devices().try_for_each(|device| lock(&device).sync())
    }

    pub(super) fn resume(&self) {
        self.devices().for_each(|device| lock(&device).resume());
    }

    /// The state of all devices, which are paused.
    pub(super) fn save(&self) -> Result<BoardStateV1, VmError> {
        let Ok(pci) = lock(&self.pci).save();
        let serial = lock(&self.serial).save().map_err(board_error)?;
        let disks = self
            .disks
            .iter()
            .map(|disk| lock(disk).save().map_err(board_error))
            .collect::<Result<_, _>>()?;
        Ok(BoardStateV1 { pci, serial, disks })
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn board_error(error: impl std::error::Error) -> VmError {
    VmError::Board(crate::api::chain(&error).join(": "))
}

type Worker = Box<dyn MutEventSubscriber + Send>;

/// Starts the thread of one device: it waits for doorbells and for input, and lives as long as the
/// process.
fn start_device_thread(name: String, worker: Worker) -> Result<(), VmError> {
    let mut manager =
        EventManager::<Worker>::new().map_err(|e| VmError::Board(format!("{e:?}")))?;
    manager.add_subscriber(worker);
    let thread = name.clone();
    let run = move || {
        loop {
            if let Err(error) = manager.run() {
                tracing::error!("{name}: its thread cannot wait for events: {error:?}");
                return;
            }
        }
    };
    let started = thread::Builder::new().name(thread).spawn(run);
    started.map(drop).map_err(board_error)
}

/// The state of the devices. `perennial,devices-v1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoardStateV1 {
    /// The PCI bus.
    pub pci: PciBusStateV1,
    /// COM1.
    pub serial: SerialStateV1,
    /// The disks, by their slots.
    pub disks: Vec<VirtioPciStateV1<VirtioBlkStateV1>>,
}

impl Schema for BoardStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,devices-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { pci, serial, disks } = self;
        node.push(pci.to_node("pci@cf8"));
        node.push(serial.to_node("serial@3f8"));
        for (slot, disk) in (FIRST_DISK_SLOT..).zip(disks) {
            node.push(disk.to_node(&format!("virtio-blk@{slot:x}")));
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let pci = reader.child("pci@cf8")?;
        let serial = reader.child("serial@3f8")?;
        let disks = reader.children("virtio-blk")?;
        let found: Vec<&str> = disks.iter().map(|(address, _)| address.as_str()).collect();
        let expected: Vec<String> =
            (FIRST_DISK_SLOT..).take(disks.len()).map(|slot| format!("{slot:x}")).collect();
        if found != expected {
            let problem = format!("disks in slots {found:?}, this build puts them in {expected:?}");
            return Err(reader.invalid("virtio-blk", problem));
        }
        Ok(Self { pci, serial, disks: disks.into_iter().map(|(_, disk)| disk).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;

    impl BoardStateV1 {
        /// With the two disks that the sample of a [`Machine`] has.
        pub(crate) fn sample() -> Self {
            let first = VirtioPciStateV1::<VirtioBlkStateV1>::sample();
            let mut second = first.clone();
            second.config.bar_base += BAR_SIZE;
            second.device.readonly = !first.device.readonly;
            Self {
                pci: PciBusStateV1::sample(),
                serial: SerialStateV1::sample(),
                disks: vec![first, second],
            }
        }
    }

    contract_tests! {
        BoardStateV1,
        sample: BoardStateV1::sample,
        changes: [
            |s| s.pci.address += 4,
            |s| s.serial.outbox.clear(),
            |s| s.disks[0].isr += 1,
            |s| s.disks.swap(0, 1),
            |s| s.disks.truncate(1),
            |s| s.disks.clear(),
        ],
        golden: "devices-v1",
    }

    #[test]
    fn a_disk_in_another_slot_is_refused() {
        let mut node = BoardStateV1::sample().to_node("devices");
        node.children[2].name = "virtio-blk@7".to_owned();
        let error = read_node::<BoardStateV1>(&node, "/").unwrap_err().to_string();
        assert!(
            error.contains(r#"slots ["7", "2"], this build puts them in ["1", "2"]"#),
            "{error}"
        );
    }
}
