//! Target `guest`: a guest's accesses to the devices of its machine (one of every kind), with live
//! updates in between.
//!
//! | step (mod 8) | operands | action |
//! |---|---|---|
//! | 0 | port u16, size u8 | the guest reads a port |
//! | 1 | port u16, size u8, value u64 | the guest writes a port |
//! | 2 | offset u16, size u8 | the guest reads a register of a PCI function |
//! | 3 | offset u16, size u8, value u64 | the guest writes a register of a PCI function |
//! | 4 | address u32, a long piece | the guest writes to its RAM |
//! | 5 | a piece | input for the devices that take some, a doorbell, then the devices' threads run |
//! | 6 | | a live update, at most `MOST_UPDATES` times; or one of the steps below |
//! | 7 | features u64 | a correct driver initializes a function and its first queues |
//!
//! The step divided by 8 selects the PCI function, and for 6 the step:
//!
//! | step / 8 (mod 8) | operands | action |
//! |---|---|---|
//! | 1 | function u8, register u8, size u8, value u64 | the guest reads and writes its configuration space |
//! | 2 | function u8, queue u8, parts u8, each address u32, length u32, flags u8 | the guest offers a chain |
//! | 3 | a long piece | a frame arrives, or other input |
//! | 4 | function u8, vector u8, address u64, data and mask u64 | the guest writes an entry of an MSI-X table |
//! | 5 | device u8, pieces of offset and value | the guest writes and reads ports of a legacy device |
//! | 6 | u32, u32 | time passes: microseconds of the guest's clock, milliseconds of the host's date |
//!
//! However long a script is, the devices log only a few warnings.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use event_manager::{EventManager, SubscriberOps};
use perennial_fuzz::Script;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::devices::{self, Files};
use crate::arch::x86_64::layout;
use crate::devices::kind::Place;
use crate::devices::pci::bus;
use crate::devices::power;
use crate::devices::virtio::features;
use crate::devices::virtio::pci::BAR_SIZE;
use crate::kvm::interrupts::fake::FakeWires;
use crate::kvm::interrupts::pull;
use crate::machine::Machine as Description;
use crate::state::Schema;
use crate::state::node::read_node;
use crate::vm::board::{Board, Worker};

/// The doorbell of a function's first queue, in its BAR, and the bytes to the next.
const DOORBELL: u64 = 0x3000;
const NEXT_DOORBELL: u64 = 4;
/// The MSI-X table of a function, in its BAR.
const MSIX_TABLE: u64 = 0x4000;
/// The ports of the devices that are no PCI functions: serial port, RTC, ACPI, keyboard controller, PCI bus.
const LEGACY: [u16; 5] =
    [layout::COM1_PORT, layout::RTC_PORT, layout::PM_PORT, power::KEYBOARD_BASE, bus::PORTS_BASE];
/// Two slots with a hole between them. The second has the place of the tables.
const RAM: [(GuestAddress, usize); 2] = [(GuestAddress(0), 0x8_0000), (layout::SMBIOS, 0x2_0000)];
/// Addresses of the rings of a correct driver's first queue: descriptors, available, used.
const RING: [u64; 3] = [0x4000, 0x5000, 0x6000];
/// Queues that a correct driver sets up, and the bytes from the rings of one to those of the next.
const QUEUES: u8 = 3;
const NEXT_RING: u64 = 0x2_0000;
/// Most parts of a chain.
const MOST_PARTS: u8 = 8;
/// Most warnings in the log: each device may report one mistake of its guest, and again after an update.
const MOST_WARNINGS: usize = 64;

/// Most live updates in a script: each takes long, and a fuzzer tends to repeat a step.
const MOST_UPDATES: usize = 3;

/// Runs a script.
pub fn guest(input: &[u8]) {
    let warnings = Warnings::default();
    let writer = warnings.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || play(input));
    let count = warnings.0.load(Ordering::Relaxed);
    assert!(count <= MOST_WARNINGS, "the guest can fill the log: {count} warnings");
}

/// Counts the lines of the log.
#[derive(Clone, Default)]
struct Warnings(Arc<AtomicUsize>);

impl Write for Warnings {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn play(input: &[u8]) {
    let mut script = Script::new(input);
    let mut machine = Machine::new();
    let mut updates = 0;
    while let Some(step) = script.step() {
        match step % 8 {
            6 if matches!(step / 8 % 8, 1..7) => machine.further_step(step / 8 % 8, &mut script),
            6 if updates < MOST_UPDATES => {
                updates += 1;
                machine.live_update();
            }
            _ => machine.step(step, &mut script),
        }
        machine.check();
    }
    machine.live_update();
}

/// The devices of a machine, without KVM. A live update replaces board, wires and thread.
struct Machine {
    description: Description,
    memory: GuestMemoryMmap,
    files: Files,
    peers: Vec<UnixStream>,
    /// The slots that have functions.
    slots: Vec<u16>,
    board: Board,
    wires: Arc<FakeWires>,
    thread: EventManager<Worker>,
}

impl Machine {
    fn new() -> Self {
        let description = devices::machine();
        let memory = GuestMemoryMmap::from_ranges(&RAM).unwrap();
        let (files, peers) = devices::open(&description, None).unwrap();
        let (wires, fake) = devices::wires(&memory);
        let mut board = Board::new(&description, &wires, &mut devices::send(&files)).unwrap();
        let thread = thread(&mut board);
        let in_slots = description.devices.iter();
        let in_slots = in_slots.filter(|device| device.options.kind().place == Place::Slot);
        let slots = in_slots.map(|device| device.address).collect();
        Self { description, memory, files, peers, slots, board, wires: fake, thread }
    }

    /// Returns the slot and the BAR's address of the function that a step selects.
    fn function(&self, step: u8) -> (u32, u64) {
        let slot = self.slots[usize::from(step / 8) % self.slots.len()];
        (slot.into(), layout::PCI_BARS.0 + u64::from(slot - 1) * u64::from(BAR_SIZE))
    }

    fn step(&mut self, step: u8, script: &mut Script<'_>) {
        let (slot, bar) = self.function(step);
        match step % 8 {
            0 => {
                let (port, size) = (script.u16(), size(script));
                self.board.pio.read(port.into(), &mut [0; 8][..size]);
            }
            1 => {
                let (port, size) = (script.u16(), size(script));
                self.board.pio.write(port.into(), &script.u64().to_le_bytes()[..size]);
            }
            2 => {
                let (offset, size) = (script.u16(), size(script));
                self.board.mmio.read(bar + u64::from(offset), &mut [0; 8][..size]);
            }
            3 => {
                let (offset, size) = (script.u16(), size(script));
                let value = script.u64().to_le_bytes();
                self.board.mmio.write(bar + u64::from(offset), &value[..size]);
            }
            4 => {
                let (address, piece) = (script.u32(), script.long_piece());
                // Writes up to the end of the RAM at `address`.
                let _ = self.memory.write(piece, GuestAddress(address.into()));
            }
            5 => {
                let piece = script.piece();
                self.peers.iter_mut().for_each(|peer| drop(peer.write(piece)));
                pull(&self.wires.doorbells.lock().unwrap()[&(bar + DOORBELL)]);
                self.run();
            }
            7 => self.start_driver(slot, bar, script.u64()),
            _ => {}
        }
    }

    fn further_step(&mut self, step: u8, script: &mut Script<'_>) {
        match step {
            1 => {
                let (slot, _) = self.function(script.u8() << 3);
                let register = script.u8();
                let (size, value) = (size(script).min(4), script.u64().to_le_bytes());
                let name = 0x8000_0000 | slot << 11 | u32::from(register & !3);
                self.board.pio.write(bus::PORTS_BASE.into(), &name.to_le_bytes());
                let port = u64::from(bus::PORTS_BASE) + 4 + u64::from(register & 3);
                self.board.pio.read(port, &mut [0; 4][..size]);
                self.board.pio.write(port, &value[..size]);
            }
            2 => self.offer(script),
            3 => {
                let piece = script.long_piece();
                self.peers.iter_mut().for_each(|peer| drop(peer.write(piece)));
                self.run();
            }
            4 => {
                let (_, bar) = self.function(script.u8() << 3);
                let entry = bar + MSIX_TABLE + 16 * u64::from(script.u8());
                self.board.mmio.write(entry, &script.u64().to_le_bytes());
                self.board.mmio.write(entry + 8, &script.u64().to_le_bytes());
            }
            5 => {
                let port = LEGACY[usize::from(script.u8()) % LEGACY.len()];
                for access in script.piece().as_chunks::<2>().0 {
                    let port = u64::from(port) + u64::from(access[0] % 16);
                    self.board.pio.write(port, &access[1..]);
                    self.board.pio.read(port, &mut [0]);
                }
                self.run();
            }
            _ => {
                let (clock, date) = (u64::from(script.u32()), u64::from(script.u32()));
                self.wires.now_ns.fetch_add(clock * 1000, Ordering::Relaxed);
                self.wires.realtime_ns.fetch_add(date * 1_000_000, Ordering::Relaxed);
                self.run();
            }
        }
    }

    /// Makes a chain available and rings the doorbell.
    fn offer(&mut self, script: &mut Script<'_>) {
        let (_, bar) = self.function(script.u8() << 3);
        let queue = u64::from(script.u8() % QUEUES);
        let [table, available, _] = RING.map(|ring| ring + queue * NEXT_RING);
        let count = script.u8() % MOST_PARTS + 1;
        for index in 0..count {
            let (address, len) = (u64::from(script.u32()), script.u32());
            let more = u16::from(index + 1 < count);
            let flags = u16::from(script.u8()) & !1 | more;
            let descriptor = u128::from(address)
                | u128::from(len) << 64
                | u128::from(flags) << 96
                | u128::from(index + 1) << 112;
            let at = GuestAddress(table + 16 * u64::from(index));
            self.memory.write_obj(descriptor.to_le(), at).unwrap();
        }
        let index = GuestAddress(available + 2);
        let next: u16 = self.memory.read_obj(index).unwrap();
        // The chain begins with the first descriptor of the table.
        let at = GuestAddress(available + 4 + 2 * u64::from(next % 256));
        self.memory.write_obj(0_u16, at).unwrap();
        self.memory.write_obj(next.wrapping_add(1), index).unwrap();
        if let Some(doorbell) =
            self.wires.doorbells.lock().unwrap().get(&(bar + DOORBELL + queue * NEXT_DOORBELL))
        {
            pull(doorbell);
        }
        self.run();
    }

    /// Runs the devices' threads until they are idle, which must happen within 100 rounds. A millisecond passes in each:
    /// a timer of the host goes off whether or not the guest's clock has moved, and is set again if it has not.
    fn run(&mut self) {
        let idle = (0..100).any(|_| {
            self.wires.now_ns.fetch_add(1_000_000, Ordering::Relaxed);
            self.wires.realtime_ns.fetch_add(1_000_000, Ordering::Relaxed);
            self.thread.run_with_timeout(0).unwrap() == 0
        });
        assert!(idle, "the devices' threads do not become idle");
        let mut output = [0; 4096];
        for peer in &mut self.peers {
            while peer.read(&mut output).is_ok_and(|count| count > 0) {}
        }
    }

    /// Pauses every device, while the devices' threads complete the requests in flight.
    fn pause(&mut self) {
        let Self { board, thread, .. } = self;
        std::thread::scope(|scope| {
            let paused = scope.spawn(move || board.pause().unwrap());
            while !paused.is_finished() {
                thread.run_with_timeout(1).unwrap();
            }
        });
    }

    /// Saves every device and restores it, as a live update does.
    fn live_update(&mut self) {
        self.pause();
        let state = self.board.save().unwrap();
        let read = read_node(&state.to_node("devices"), "/").unwrap();
        let (wires, fake) = devices::wires(&self.memory);
        let mut fds = devices::send(&self.files);
        let mut board = Board::restore(&self.description, read, &wires, &mut fds).unwrap();
        assert_eq!(board.save().unwrap(), state);
        self.thread = thread(&mut board);
        (self.board, self.wires) = (board, fake);
        self.board.resume();
        self.run();
    }

    /// The initialization sequence (3.1.1), with as many of `features` as are offered.
    fn start_driver(&mut self, slot: u32, bar: u64, features: u64) {
        // Memory space and bus master of the function's command register (0x04).
        let command = 0x8000_0004 | slot << 11;
        self.board.pio.write(bus::PORTS_BASE.into(), &command.to_le_bytes());
        self.board.pio.write(u64::from(bus::PORTS_BASE) + 4, &6_u16.to_le_bytes());
        let write = |at: u64, value: u64, size: usize| {
            self.board.mmio.write(bar + at, &value.to_le_bytes()[..size]);
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
        for queue in 0..u64::from(QUEUES) {
            write(0x16, queue, 2);
            for (at, address) in [0x20, 0x28, 0x30].into_iter().zip(RING) {
                write(at, address + queue * NEXT_RING, 8);
            }
            write(0x1a, queue, 2);
            write(0x1c, 1, 2);
        }
        write(0x14, 15, 1);
    }

    /// Checks that every function still has its vendor ID, whatever the guest did.
    fn check(&mut self) {
        for slot in &self.slots {
            let name = 0x8000_0000 | u32::from(*slot) << 11;
            self.board.pio.write(bus::PORTS_BASE.into(), &name.to_le_bytes());
            let mut vendor = [0; 2];
            self.board.pio.read(u64::from(bus::PORTS_BASE) + 4, &mut vendor);
            assert_eq!(vendor, [0xf4, 0x1a], "a function stays what it is");
        }
    }
}

/// Runs all devices on one thread, so that a script gives the same result each time.
fn thread(board: &mut Board) -> EventManager<Worker> {
    let mut thread = EventManager::new().unwrap();
    for device in board.take_workers() {
        thread.add_subscriber(device.worker);
    }
    thread
}

fn size(script: &mut Script<'_>) -> usize {
    1 << (script.u8() % 4)
}
