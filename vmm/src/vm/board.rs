//! The board of a machine: places its devices on the buses, and has all of them do what is asked of the
//! machine. It knows no kind of device, and nothing of KVM.
//!
//! ```text
//!   Machine.devices --build--> Built --place--> ports, MMIO, PCI slot
//!                                 \--threads--> a thread of its own for each
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vm_memory::GuestMemoryMmap;

use super::state::{DevicesStateV1, SavedDevice};
use crate::arch::x86_64::layout;
use crate::bus::{Bus, Overlap};
use crate::devices::catalog::DeviceState;
use crate::devices::kind::{Built, Save, Site};
use crate::devices::pci::bus::SlotError;
use crate::devices::pci::{HostBridge, PciBus};
use crate::devices::power::{self, KeyboardReset, OnPower, PowerEvent, SleepRegisters};
use crate::devices::virtio::pci::BAR_SIZE;
use crate::devices::{Device, DeviceError, pci};
use crate::kvm::interrupts::{Doorbells, Interrupts};
use crate::link::{Event, Fds};
use crate::machine::{DeviceSpec, Machine};
use crate::mutex::lock;
use crate::state::Persist;

/// How long the devices of a machine may take to finish what their guest has asked for. Longer than
/// a disk that works takes, also on a host that emulates its CPU.
const DRAIN_WITHIN: Duration = Duration::from_secs(20);

/// Where a machine reports what happens to it.
pub type Events = Arc<dyn Fn(Event) + Send + Sync>;

/// What the devices of a machine are connected to.
#[derive(Clone)]
pub struct Wires {
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    /// Interrupts into the guest.
    pub interrupts: Arc<dyn Interrupts>,
    /// Doorbells out of it.
    pub doorbells: Arc<dyn Doorbells>,
    /// Where the devices report what concerns the whole machine.
    pub events: Events,
}

impl Wires {
    fn on_power(&self) -> OnPower {
        let events = self.events.clone();
        Arc::new(move |event| {
            events(match event {
                PowerEvent::Shutdown => Event::Shutdown,
                PowerEvent::Reset => Event::Reset,
            });
        })
    }
}

/// The devices cannot be put together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BoardError {
    /// A device cannot be built.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The state is of other devices than the machine has.
    #[error("the state has the devices {state:?}, the machine has {machine:?}")]
    Devices {
        /// Of the state.
        state: Vec<String>,
        /// Of the machine.
        machine: Vec<String>,
    },
    /// Two devices want one address.
    #[error("a device cannot have its addresses")]
    Overlap(#[from] Overlap),
    /// Two devices want one slot.
    #[error("a device cannot have its slot")]
    Slot(#[from] SlotError),
    /// A device cannot get its thread.
    #[error("cannot start the thread of {device}")]
    Thread {
        /// The device, as a node.
        device: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A device in its place.
struct Placed {
    device: Arc<Mutex<dyn Device>>,
    save: Save<DeviceState>,
    address: u16,
}

/// What the thread of a device runs: it waits for doorbells and for input.
pub type Worker = Box<dyn MutEventSubscriber + Send>;

/// The devices, on their buses.
pub struct Board {
    /// The ports.
    pub pio: Arc<Bus>,
    /// The physical addresses that are no RAM.
    pub mmio: Arc<Bus>,
    pci: Arc<Mutex<PciBus>>,
    devices: Vec<Placed>,
    /// The threads that are not started yet, by the nodes of their devices.
    workers: Vec<(String, Worker)>,
}

impl Board {
    /// The devices of `machine` after reset. `fds` has what the host has opened for them.
    pub fn new(machine: &Machine, wires: &Wires, fds: &mut Fds) -> Result<Self, BoardError> {
        let pci = PciBus::new(power::reset_control(wires.on_power()));
        let mut board = Self::empty(pci, wires)?;
        for spec in &machine.devices {
            let mut site = site(machine, spec, wires, fds);
            let built = spec.options.build(&mut site, None)?;
            board.place(spec, site, built)?;
        }
        Ok(board)
    }

    /// The same devices with the state that they had.
    pub fn restore(
        machine: &Machine,
        state: DevicesStateV1,
        wires: &Wires,
        fds: &mut Fds,
    ) -> Result<Self, BoardError> {
        let (found, wanted) = (state.nodes(), machine.devices.iter().map(DeviceSpec::node));
        let wanted: Vec<String> = wanted.collect();
        if found != wanted {
            return Err(BoardError::Devices { state: found, machine: wanted });
        }
        let DevicesStateV1 { pci, devices } = state;
        let Ok(pci) = PciBus::restore(pci, power::reset_control(wires.on_power()));
        let mut board = Self::empty(pci, wires)?;
        for (spec, saved) in machine.devices.iter().zip(devices) {
            let mut site = site(machine, spec, wires, fds);
            let built = spec.options.build(&mut site, Some(saved.state))?;
            board.place(spec, site, built)?;
        }
        Ok(board)
    }

    /// What every machine has: the PCI bus and the ways to switch off and to reset.
    fn empty(mut pci: PciBus, wires: &Wires) -> Result<Self, BoardError> {
        let mut pio = Bus::default();
        pci.insert(0, Arc::new(Mutex::new(HostBridge::new())))?;
        let pci = Arc::new(Mutex::new(pci));
        let keyboard = Arc::new(Mutex::new(KeyboardReset::new(wires.on_power())));
        let sleep = Arc::new(Mutex::new(SleepRegisters::new(wires.on_power())));
        pio.insert(pci::bus::PORTS_BASE.into(), pci::bus::PORTS_LEN.into(), pci.clone())?;
        pio.insert(power::KEYBOARD_BASE.into(), power::KEYBOARD_LEN.into(), keyboard)?;
        pio.insert(power::SLEEP_BASE.into(), power::SLEEP_LEN.into(), sleep)?;
        let (devices, workers) = (Vec::new(), Vec::new());
        Ok(Self { pio: Arc::new(pio), mmio: Arc::default(), pci, devices, workers })
    }

    fn place(
        &mut self,
        spec: &DeviceSpec,
        site: Site,
        built: Built<DeviceState>,
    ) -> Result<(), BoardError> {
        let Built { device, save, ports, mmio, function, worker } = built;
        let node = site.node.clone();
        let error = |source| DeviceError {
            device: node.clone(),
            attempt: "take the files that the host has opened for it",
            source,
        };
        site.files.finish().map_err(|source| error(source.into()))?;
        for (bus, range) in [(&mut self.pio, ports), (&mut self.mmio, mmio)] {
            if let (Some(bus), Some((base, len, device))) = (Arc::get_mut(bus), range) {
                bus.insert(base, len, device)?;
            }
        }
        if let Some(function) = function {
            lock(&self.pci).insert(site.slot, function)?;
        }
        self.workers.push((site.node, worker));
        self.devices.push(Placed { device, save, address: spec.address });
        Ok(())
    }

    /// What the threads of the devices are to run, with their devices' nodes. Once.
    pub fn take_workers(&mut self) -> Vec<(String, Worker)> {
        std::mem::take(&mut self.workers)
    }

    /// Gives each device a thread of its own. They live as long as the process; one that ends all the
    /// same is reported to `events`, as its device does nothing more.
    pub fn start_threads(&mut self, events: &Events) -> Result<(), BoardError> {
        for (device, worker) in self.take_workers() {
            let events = events.clone();
            let node = device.clone();
            let run = move || {
                let why = catch_unwind(AssertUnwindSafe(|| run(worker)))
                    .unwrap_or_else(|_| "it panicked".to_owned());
                events(Event::Crashed(format!("the thread of {node} ended: {why}")));
            };
            let started = thread::Builder::new().name(device.clone()).spawn(run);
            started.map(drop).map_err(|source| BoardError::Thread { device, source })?;
        }
        Ok(())
    }

    /// Stops all devices side by side, and waits until the last one stands still.
    pub fn pause(&self) -> Result<(), DeviceError> {
        self.devices.iter().for_each(|placed| lock(&placed.device).pause());
        let deadline = Instant::now() + DRAIN_WITHIN;
        self.devices.iter().try_for_each(|placed| lock(&placed.device).drain(deadline))
    }

    /// Makes durable what the guest wrote. The devices are paused.
    pub fn sync(&self) -> Result<(), DeviceError> {
        self.devices.iter().try_for_each(|placed| lock(&placed.device).sync())
    }

    /// Lets all devices go on.
    pub fn resume(&self) {
        self.devices.iter().for_each(|placed| lock(&placed.device).resume());
    }

    /// The state of all devices, which are paused.
    pub fn save(&self) -> Result<DevicesStateV1, DeviceError> {
        let Self {
            // Lead to the devices, and are laid again.
            pio: _,
            mmio: _,
            pci,
            devices,
            // Keep nothing that their devices do not.
            workers: _,
        } = self;
        let Ok(pci) = lock(pci).save();
        let save =
            |placed: &Placed| Ok(SavedDevice { address: placed.address, state: (placed.save)()? });
        Ok(DevicesStateV1 { pci, devices: devices.iter().map(save).collect::<Result<_, _>>()? })
    }
}

/// Where `spec` goes in `machine`, and what there is for it.
fn site(machine: &Machine, spec: &DeviceSpec, wires: &Wires, fds: &mut Fds) -> Site {
    let node = spec.node();
    let kind = spec.options.kind().name;
    let before = machine.devices.iter().take_while(|other| *other != spec);
    let index = before.filter(|other| other.options.kind().name == kind).count();
    let slot = u8::try_from(spec.address).unwrap_or(0);
    let bar = layout::PCI_BARS.0 as u32 + u32::from(slot.saturating_sub(1)) * BAR_SIZE;
    Site {
        label: format!("{}-{index}", machine.name),
        slot,
        bar,
        memory: wires.memory.clone(),
        interrupts: wires.interrupts.clone(),
        doorbells: wires.doorbells.clone(),
        files: fds.take_device(&node),
        node,
    }
}

/// Runs a device's thread. Returns why it cannot go on.
fn run(worker: Worker) -> String {
    let run = || -> Result<(), event_manager::Error> {
        let mut manager = EventManager::<Worker>::new()?;
        manager.add_subscriber(worker);
        loop {
            manager.run()?;
        }
    };
    match run() {
        Ok(()) => "it has no more events".to_owned(),
        Err(error) => format!("it cannot wait for events: {error:?}"),
    }
}

#[cfg(test)]
mod tests;
