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
//! | 6 | | a live update, at most `MOST_UPDATES` times |
//! | 7 | features u64 | a correct driver initializes a function |
//!
//! The step divided by 8 selects the PCI function.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::{EventManager, SubscriberOps};
use perennial_fuzz::Script;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::devices::{self, Files};
use crate::arch::x86_64::layout;
use crate::devices::kind::Place;
use crate::devices::pci::bus;
use crate::devices::virtio::features;
use crate::devices::virtio::pci::BAR_SIZE;
use crate::kvm::interrupts::fake::FakeWires;
use crate::kvm::interrupts::pull;
use crate::machine::Machine as Description;
use crate::state::Schema;
use crate::state::node::read_node;
use crate::vm::board::{Board, Worker};

/// The doorbell of a function's first queue, in its BAR.
const DOORBELL: u64 = 0x3000;
/// Two slots with a hole between them. The second has the place of the tables.
const RAM: [(GuestAddress, usize); 2] = [(GuestAddress(0), 0x8_0000), (layout::SMBIOS, 0x2_0000)];
/// Addresses of the rings of a correct driver: descriptors, available, used.
const RING: [u64; 3] = [0x4000, 0x5000, 0x6000];

/// Most live updates in a script: each takes long, and a fuzzer tends to repeat a step.
const MOST_UPDATES: usize = 3;

/// Runs a script.
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

    /// Runs the devices' threads until they are idle, which must happen within 100 rounds.
    fn run(&mut self) {
        let idle = (0..100).any(|_| self.thread.run_with_timeout(0).unwrap() == 0);
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
        write(0x16, 0, 2);
        for (at, address) in [0x20, 0x28, 0x30].into_iter().zip(RING) {
            write(at, address, 8);
        }
        write(0x1a, 0, 2);
        write(0x1c, 1, 2);
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
