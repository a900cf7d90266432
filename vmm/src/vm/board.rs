//! The board of a machine: places the devices on the buses, and passes each request to the machine on to all
//! devices. It knows neither kinds of devices nor KVM.
//!
//! ```text
//!   Machine.devices --build--> Built --place--> ports, MMIO, PCI slot
//!                                 \--threads--> one thread for each, or several
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
use crate::causes::panic_message;
use crate::confine::calls::EVENT_LOOP;
use crate::confine::{self, Call};
use crate::devices::catalog::DeviceState;
use crate::devices::kind::{Built, Parts, Save, Site};
use crate::devices::network::{NetworkPort, OnLink};
use crate::devices::pci::bus::SlotError;
use crate::devices::pci::{HostBridge, PciBus};
use crate::devices::power::{self, KeyboardReset, OnPower, PowerButton, PowerEvent};
use crate::devices::storage::{Storage, StorageFailure, StorageReport};
use crate::devices::virtio::pci::BAR_SIZE;
use crate::devices::{Device, DeviceError, pci};
use crate::kvm::clock::GuestClock;
use crate::kvm::interrupts::{Doorbells, Interrupts};
use crate::link::{Event, Fds};
use crate::machine::{DeviceSpec, Machine};
use crate::mutex::lock;
use crate::state::Persist;

/// How long the devices of a machine may take to finish the requests of their guest. A working disk takes
/// less, even on a host with an emulated CPU.
const DRAIN_WITHIN: Duration = Duration::from_secs(20);

/// How long the storages of a machine may take to make data durable.
const SYNC_WITHIN: Duration = Duration::from_secs(20);

/// Function to which a machine reports its events.
pub type Events = Arc<dyn Fn(Event) + Send + Sync>;

/// Connections of the devices of a machine.
#[derive(Clone)]
pub struct Wires {
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    /// Interrupts to the guest.
    pub interrupts: Arc<dyn Interrupts>,
    /// Doorbells from the guest.
    pub doorbells: Arc<dyn Doorbells>,
    /// The guest's clock.
    pub clock: Arc<dyn GuestClock>,
    /// Receives events of the devices that concern the whole machine.
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

    fn on_link(&self, node: &str) -> OnLink {
        let (events, device) = (self.events.clone(), node.to_owned());
        Arc::new(move |link| events(Event::Link { device: device.clone(), link }))
    }
}

/// The board cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BoardError {
    /// A device cannot be built.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The state has other devices than the machine.
    #[error("the state has the devices {state:?}, the machine has {machine:?}")]
    Devices {
        /// Devices in the state.
        state: Vec<String>,
        /// Devices of the machine.
        machine: Vec<String>,
    },
    /// Two devices need the same address.
    #[error("cannot place a device at its addresses")]
    Overlap(#[from] Overlap),
    /// Two devices need the same slot.
    #[error("cannot place a device in its slot")]
    Slot(#[from] SlotError),
    /// The thread of a device cannot be started.
    #[error("cannot start the thread of {device}")]
    Thread {
        /// The device, as a node.
        device: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A device on the board.
struct Placed {
    device: Arc<Mutex<dyn Device>>,
    save: Save<DeviceState>,
    address: u16,
}

/// A thread of a device, which is not started yet.
pub struct DeviceThread {
    /// The device's node, and a number if it is not the device's first thread.
    name: String,
    /// What the thread runs.
    pub worker: Worker,
    /// The system calls that it may make, beyond those of its event loop.
    calls: &'static [&'static [Call]],
}

/// What a thread of a device runs: it waits for doorbells and for input.
pub type Worker = Box<dyn MutEventSubscriber + Send>;

/// The devices, on their buses.
pub struct Board {
    /// The ports.
    pub pio: Arc<Bus>,
    /// The MMIO bus: physical addresses that are not RAM.
    pub mmio: Arc<Bus>,
    pci: Arc<Mutex<PciBus>>,
    devices: Vec<Placed>,
    power_button: Option<PowerButton>,
    /// The devices with a connection to a network, by node.
    network_ports: Vec<(String, Arc<dyn NetworkPort>)>,
    /// The storage of each device that has one, by the device's node.
    storages: Vec<(String, Arc<dyn Storage>)>,
    /// The threads that are not started yet.
    workers: Vec<DeviceThread>,
}

impl Board {
    /// Builds the devices of `machine` after reset. `fds` has the files that the host has opened for them.
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

    /// Builds the devices of `machine` with their saved state, paused.
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

    /// Builds a board without devices: the PCI bus, and the registers for reset.
    fn empty(mut pci: PciBus, wires: &Wires) -> Result<Self, BoardError> {
        let mut pio = Bus::default();
        pci.insert(0, Arc::new(Mutex::new(HostBridge::new())))?;
        let pci = Arc::new(Mutex::new(pci));
        let keyboard = Arc::new(Mutex::new(KeyboardReset::new(wires.on_power())));
        pio.insert(pci::bus::PORTS_BASE.into(), pci::bus::PORTS_LEN.into(), pci.clone())?;
        pio.insert(power::KEYBOARD_BASE.into(), power::KEYBOARD_LEN.into(), keyboard)?;
        let pio = Arc::new(pio);
        Ok(Self {
            pio,
            mmio: Arc::default(),
            pci,
            devices: Vec::new(),
            power_button: None,
            network_ports: Vec::new(),
            storages: Vec::new(),
            workers: Vec::new(),
        })
    }

    fn place(
        &mut self,
        spec: &DeviceSpec,
        site: Site,
        built: Built<DeviceState>,
    ) -> Result<(), BoardError> {
        let Built { save, parts } = built;
        let Parts { device, ports, mmio, function, workers, power_button, network_port, storage } =
            parts;
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
        if power_button.is_some() {
            self.power_button = power_button;
        }
        self.storages.extend(storage.map(|storage| (site.node.clone(), storage)));
        if let Some(port) = network_port {
            (site.on_link)(port.link());
            self.network_ports.push((site.node.clone(), port));
        }
        let calls = spec.options.kind().calls.thread;
        for (number, worker) in workers.into_iter().enumerate() {
            let name = match number {
                0 => site.node.clone(),
                number => format!("{}/{number}", site.node),
            };
            self.workers.push(DeviceThread { name, worker, calls });
        }
        self.devices.push(Placed { device, save, address: spec.address });
        Ok(())
    }

    /// Returns the threads of the devices. The first call returns all of them, a later one none.
    pub fn take_workers(&mut self) -> Vec<DeviceThread> {
        std::mem::take(&mut self.workers)
    }

    /// Starts the threads of the devices. The threads run as long as the process. If a thread ends, its device
    /// stops working, which is reported to `events`.
    pub fn start_threads(&mut self, events: &Events) -> Result<(), BoardError> {
        for DeviceThread { name, worker, calls } in self.take_workers() {
            let events = events.clone();
            let node = name.clone();
            let run = move || {
                let run = || {
                    confine::thread(&[&[EVENT_LOOP], calls].concat());
                    run(worker)
                };
                let why = catch_unwind(AssertUnwindSafe(run))
                    .unwrap_or_else(|panic| format!("it panicked: {}", panic_message(&*panic)));
                events(Event::Crashed(format!("the thread of {node} ended: {why}")));
            };
            let started = thread::Builder::new().name(name.clone()).spawn(run);
            started.map(drop).map_err(|source| BoardError::Thread { device: name, source })?;
        }
        Ok(())
    }

    /// Presses the power button. Returns whether the machine has one.
    pub fn press_power_button(&self) -> bool {
        self.power_button.as_ref().map(|press| press()).is_some()
    }

    /// Returns the state of each storage, by the node of its device. Returns at once, also if one hangs.
    pub fn storage_reports(&self) -> Vec<(String, StorageReport)> {
        let reports = self.storages.iter().map(|(node, storage)| (node.clone(), storage.report()));
        reports.collect()
    }

    /// Returns the storage of the device `node`, if it has one.
    pub fn storage(&self, node: &str) -> Option<&dyn Storage> {
        let found = self.storages.iter().find(|(of, _)| of == node);
        found.map(|(_, storage)| &**storage)
    }

    /// Errors if a device waits for the host for so long that a pause would wait for it in vain.
    pub fn check_answers(&self) -> Result<(), DeviceError> {
        self.check_storages()?;
        let now = Instant::now();
        self.devices.iter().try_for_each(|placed| lock(&placed.device).check_answers(now))
    }

    /// Errors if a storage has not answered for so long that a pause or a sync would wait for it in vain.
    pub fn check_storages(&self) -> Result<(), DeviceError> {
        self.storages.iter().try_for_each(|(node, storage)| {
            let attempt = "finish the requests of its guest";
            storage.check_answers().map_err(|source| storage_error(node, attempt, source))
        })
    }

    /// Stops all devices, then waits until no device has a request in flight.
    pub fn pause(&self) -> Result<(), DeviceError> {
        self.devices.iter().for_each(|placed| lock(&placed.device).pause());
        let deadline = Instant::now() + DRAIN_WITHIN;
        self.devices.iter().try_for_each(|placed| lock(&placed.device).drain(deadline))
    }

    /// Takes the link of a network device up or down. Returns whether there is such a device.
    pub fn set_link(&self, device: &str, up: bool) -> bool {
        let port = self.network_ports.iter().find(|(node, _)| node == device);
        port.map(|(_, port)| port.set_link(up)).is_some()
    }

    /// Makes durable what the guest wrote until now. All storages work at the same time.
    pub fn sync(&self) -> Result<(), DeviceError> {
        self.storages.iter().for_each(|(_, storage)| storage.begin_sync());
        let deadline = Instant::now() + SYNC_WITHIN;
        self.storages.iter().try_for_each(|(node, storage)| {
            let attempt = "make its data durable";
            storage.end_sync(deadline).map_err(|source| storage_error(node, attempt, source))
        })
    }

    /// Resumes all devices.
    pub fn resume(&self) {
        self.devices.iter().for_each(|placed| lock(&placed.device).resume());
    }

    /// Returns the state of all devices. Call while they are paused.
    pub fn save(&self) -> Result<DevicesStateV1, DeviceError> {
        let Self {
            // Lead to the devices, and are laid again.
            pio: _,
            mmio: _,
            pci,
            devices,
            // Keep nothing that their devices do not.
            workers: _,
            power_button: _,
            network_ports: _,
            storages: _,
        } = self;
        let Ok(pci) = lock(pci).save();
        let save =
            |placed: &Placed| Ok(SavedDevice { address: placed.address, state: (placed.save)()? });
        Ok(DevicesStateV1 { pci, devices: devices.iter().map(save).collect::<Result<_, _>>()? })
    }
}

fn storage_error(node: &str, attempt: &'static str, source: StorageFailure) -> DeviceError {
    DeviceError { device: node.to_owned(), attempt, source }
}

/// Returns the place of `spec` in `machine`, with the resources for it.
fn site(machine: &Machine, spec: &DeviceSpec, wires: &Wires, fds: &mut Fds) -> Site {
    let node = spec.node();
    let kind = spec.options.kind().name;
    let before = machine.devices.iter().take_while(|other| *other != spec);
    let index = before.filter(|other| other.options.kind().name == kind).count();
    let slot = u8::try_from(spec.address).unwrap_or(0);
    let bar = layout::PCI_BARS.0 as u32 + u32::from(slot.saturating_sub(1)) * BAR_SIZE;
    Site {
        label: format!("{}-{index}", machine.name),
        machine: machine.name.to_string(),
        slot,
        bar,
        memory: wires.memory.clone(),
        interrupts: wires.interrupts.clone(),
        doorbells: wires.doorbells.clone(),
        clock: wires.clock.clone(),
        on_power: wires.on_power(),
        on_link: wires.on_link(&node),
        files: fds.take_device(&node),
        node,
    }
}

/// Runs a device's thread. Returns the reason for its end.
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
