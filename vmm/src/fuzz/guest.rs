//! Everything that a guest can do to the devices of its machine, and updates of the host in between.
//!
//! | step (mod 8) | what follows | what is done |
//! |---|---|---|
//! | 0 | port u16, size u8 | the guest reads a port |
//! | 1 | port u16, size u8, value u64 | it writes one |
//! | 2 | offset u16, size u8 | it reads a register of the disk |
//! | 3 | offset u16, size u8, value u64 | it writes one |
//! | 4 | address u32, a long piece | it writes to its RAM |
//! | 5 | a piece | the device thread runs, after input for the serial port, and a doorbell |
//! | 6 | | a live update, if there were not many |
//! | 7 | features u64 | a driver starts the disk as it should |

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use perennial_fuzz::Script;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::arch::x86_64::layout;
use crate::bus::Bus;
use crate::devices::Device;
use crate::devices::pci::{HostBridge, PciBus, PciFunction, bus};
use crate::devices::power::{self, KeyboardReset, SleepRegisters};
use crate::devices::serial::{Serial, SerialResources};
use crate::devices::virtio::pci::BAR_SIZE;
use crate::devices::virtio::{Block, Disk, PciResources, VirtioPci, features};
use crate::kvm::interrupts::fake::FakeWires;
use crate::kvm::interrupts::{event, pull};
use crate::state::node::read_node;
use crate::state::{Persist, Schema};

const BAR: u32 = layout::PCI_BARS.0 as u32;
const DOORBELL: u64 = BAR as u64 + 0x3000;
const DISK_BYTES: u64 = 64 * 512;
/// Two slots with a hole between them.
const RAM: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 0x8_0000), (GuestAddress(0x10_0000), 0x1_0000)];
/// Where a driver that starts as it should has its ring: descriptors, available, used.
const RING: [u64; 3] = [0x4000, 0x5000, 0x6000];

/// Most live updates in a script: they take long, and a fuzzer likes to repeat itself.
const MOST_UPDATES: usize = 3;

type Worker = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Plays a script.
pub fn guest(input: &[u8]) {
    let mut script = Script::new(input);
    let mut machine = Machine::new();
    let mut updates = 0;
    while let Some(step) = script.step() {
        match step % 8 {
            6 if updates < MOST_UPDATES => {
                updates += 1;
                machine.live_update();
            }
            step => machine.step(step, &mut script),
        }
        machine.check();
    }
    machine.live_update();
}

/// The devices of a machine with one disk, without KVM.
struct Machine {
    memory: GuestMemoryMmap,
    /// Stays what it is over updates.
    disk: File,
    console: UnixStream,
    pio: Bus,
    mmio: Bus,
    wires: Arc<FakeWires>,
    thread: EventManager<Worker>,
    pci: Arc<Mutex<PciBus>>,
    serial: Arc<Mutex<Serial>>,
    function: Arc<Mutex<VirtioPci<Block>>>,
}

/// The devices, before they are on their buses.
struct Parts {
    pci: PciBus,
    serial: Serial,
    function: VirtioPci<Block>,
}

fn disk(file: &File) -> Disk {
    Disk { file: file.try_clone().unwrap(), readonly: false, path: "fuzz".to_owned() }
}

fn resources(memory: &GuestMemoryMmap, wires: &Arc<FakeWires>) -> PciResources {
    PciResources {
        slot: 1,
        bar: BAR,
        memory: memory.clone(),
        interrupts: wires.clone(),
        doorbells: wires.clone(),
    }
}

/// The serial port's surroundings, and the other end of its line.
fn line() -> (SerialResources, UnixStream) {
    let (here, there) = UnixStream::pair().unwrap();
    here.set_nonblocking(true).unwrap();
    there.set_nonblocking(true).unwrap();
    (SerialResources { interrupt: event("COM1").unwrap(), sink: Some(there.into()) }, here)
}

impl Machine {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&RAM).unwrap();
        let file = memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, DISK_BYTES).unwrap();
        let file = File::from(file);
        let wires = Arc::new(FakeWires::default());
        let block = Block::new(disk(&file), "fuzz").unwrap();
        let (line, console) = line();
        let parts = Parts {
            pci: PciBus::new(power::reset_control(Arc::new(|_| ()))),
            serial: Serial::new(line).unwrap(),
            function: VirtioPci::new(block, resources(&memory, &wires)).unwrap(),
        };
        Self::put_together(parts, memory, file, console, wires)
    }

    fn put_together(
        parts: Parts,
        memory: GuestMemoryMmap,
        disk: File,
        console: UnixStream,
        wires: Arc<FakeWires>,
    ) -> Self {
        let Parts { mut pci, mut serial, function } = parts;
        let mut thread = EventManager::<Worker>::new().unwrap();
        thread.add_subscriber(Arc::new(Mutex::new(serial.worker())));
        thread.add_subscriber(Arc::new(Mutex::new(function.worker())));
        let function = Arc::new(Mutex::new(function));
        pci.insert(0, Arc::new(Mutex::new(HostBridge::new()))).unwrap();
        pci.insert(1, function.clone()).unwrap();
        let (pci, serial) = (Arc::new(Mutex::new(pci)), Arc::new(Mutex::new(serial)));
        let (mut pio, mut mmio) = (Bus::default(), Bus::default());
        let keyboard = Arc::new(Mutex::new(KeyboardReset::new(Arc::new(|_| ()))));
        let sleep = Arc::new(Mutex::new(SleepRegisters::new(Arc::new(|_| ()))));
        let mut insert = |base: u16, len: u16, device| pio.insert(base.into(), len.into(), device);
        insert(layout::COM1_PORT, layout::COM1_LEN, serial.clone()).unwrap();
        insert(bus::PORTS_BASE, bus::PORTS_LEN, pci.clone()).unwrap();
        insert(power::KEYBOARD_BASE, power::KEYBOARD_LEN, keyboard).unwrap();
        insert(power::SLEEP_BASE, power::SLEEP_LEN, sleep).unwrap();
        mmio.insert(BAR.into(), BAR_SIZE.into(), function.clone()).unwrap();
        Self { memory, disk, console, pio, mmio, wires, thread, pci, serial, function }
    }

    fn step(&mut self, step: u8, script: &mut Script<'_>) {
        match step {
            0 => {
                let (port, size) = (script.u16(), size(script));
                self.pio.read(port.into(), &mut [0; 8][..size]);
            }
            1 => {
                let (port, size) = (script.u16(), size(script));
                self.pio.write(port.into(), &script.u64().to_le_bytes()[..size]);
            }
            2 => {
                let (offset, size) = (script.u16(), size(script));
                self.mmio.read(u64::from(BAR) + u64::from(offset), &mut [0; 8][..size]);
            }
            3 => {
                let (offset, size) = (script.u16(), size(script));
                let value = script.u64().to_le_bytes();
                self.mmio.write(u64::from(BAR) + u64::from(offset), &value[..size]);
            }
            4 => {
                let (address, piece) = (script.u32(), script.long_piece());
                // As far as there is RAM.
                let _ = self.memory.write(piece, GuestAddress(address.into()));
            }
            5 => {
                let _ = self.console.write(script.piece());
                pull(&self.wires.doorbells.lock().unwrap()[&DOORBELL]);
                self.run();
            }
            7 => self.start_driver(script.u64()),
            _ => {}
        }
    }

    /// Lets the device thread do what there is to do, which comes to an end.
    fn run(&mut self) {
        let idle = (0..100).any(|_| self.thread.run_with_timeout(0).unwrap() == 0);
        assert!(idle, "the device thread has no end of work");
        let mut output = [0; 4096];
        while self.console.read(&mut output).is_ok_and(|count| count > 0) {}
    }

    /// Saves every device and restores it, as another host would.
    fn live_update(&mut self) {
        let wires = Arc::new(FakeWires::default());
        let (line, console) = line();
        self.function.lock().unwrap().pause();
        self.serial.lock().unwrap().pause();
        let pci = {
            let Ok(state) = self.pci.lock().unwrap().save();
            let Ok(pci) = PciBus::restore(over(&state), Box::new(|_| ()));
            assert_eq!(pci.save(), Ok(state));
            pci
        };
        let state = self.serial.lock().unwrap().save().unwrap();
        let serial = Serial::restore(over(&state), line).unwrap();
        assert_eq!(serial.save().unwrap(), state);
        let state = self.function.lock().unwrap().save().unwrap();
        let resources = (resources(&self.memory, &wires), disk(&self.disk));
        let function = VirtioPci::<Block>::restore(over(&state), resources).unwrap();
        assert_eq!(function.save().unwrap(), state);
        let parts = Parts { pci, serial, function };
        let (memory, disk) = (self.memory.clone(), self.disk.try_clone().unwrap());
        *self = Self::put_together(parts, memory, disk, console, wires);
        self.serial.lock().unwrap().resume();
        self.function.lock().unwrap().resume();
        self.run();
    }

    /// The initialization sequence (3.1.1), with as many of `features` as are offered.
    fn start_driver(&mut self, features: u64) {
        // Memory space and bus master of the function's command register (0x04).
        self.pio.write(bus::PORTS_BASE.into(), &0x8000_0804_u32.to_le_bytes());
        self.pio.write(u64::from(bus::PORTS_BASE) + 4, &6_u16.to_le_bytes());
        let write = |at: u64, value: u64, size: usize| {
            self.mmio.write(u64::from(BAR) + at, &value.to_le_bytes()[..size]);
        };
        for status in [0, 1, 3] {
            write(0x14, status, 1);
        }
        let features = features | features::VERSION_1;
        for (select, half) in [(0, features), (1, features >> 32)] {
            write(0x08, select, 4);
            write(0x0c, half, 4);
        }
        write(0x14, 11, 1);
        write(0x16, 0, 2);
        for (at, address) in [0x20, 0x28, 0x30].into_iter().zip(RING) {
            write(at, address, 8);
        }
        write(0x1a, 0, 2);
        write(0x1c, 1, 2);
        write(0x14, 15, 1);
    }

    /// What holds whatever the guest did.
    fn check(&mut self) {
        assert_eq!(self.disk.metadata().unwrap().len(), DISK_BYTES, "a disk keeps its size");
        let mut identity = [0; 4];
        let mut function = self.function.lock().unwrap();
        function.read_config(0, &mut identity);
        assert_eq!(u32::from_le_bytes(identity), 0x1042_1af4, "a function stays what it is");
    }
}

fn size(script: &mut Script<'_>) -> usize {
    1 << (script.u8() % 4)
}

/// A state after the way from one host to the next.
fn over<S: Schema>(state: &S) -> S {
    read_node(&state.to_node("device@0"), "/devices").unwrap()
}
