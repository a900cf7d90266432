//! Tests that drive the device as a driver does, correctly and incorrectly.

use std::io::Write;
use std::os::fd::OwnedFd;

use event_manager::{EventManager, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bus::BusDevice;
use crate::devices::Device;
use crate::devices::virtio::Worker;
use crate::devices::virtio::driver::{
    BAR, INDIRECT, NEXT, Part, Ring, WRITE, ram, resources, start,
};
use crate::devices::virtio::features::RING_INDIRECT_DESC;
use crate::kvm::interrupts::fake::FakeWires;
use crate::kvm::interrupts::pull;

const DATA: u64 = 0x1_0000;

struct Guest {
    function: VirtioPci<Rng>,
    thread: EventManager<Worker<RngWorker>>,
    wires: Arc<FakeWires>,
    memory: GuestMemoryMmap,
    ring: Ring,
}

impl Guest {
    /// A guest whose driver has started the device.
    fn new(source: impl Into<OwnedFd>) -> Self {
        let (memory, wires) = (ram(), Arc::new(FakeWires::default()));
        let resources = resources(&memory, &wires);
        let rng = Rng::new(source.into().into());
        let mut function = VirtioPci::new(rng, resources).unwrap();
        let mut thread = EventManager::new().unwrap();
        thread.add_subscriber(function.worker());
        let ring = Ring::new(&memory, 0x4000, QUEUE_SIZE);
        start(&ring, 0, |at, bytes| function.write(at, bytes));
        Self { function, thread, wires, memory, ring }
    }

    /// Offers a chain and rings the doorbell.
    fn ask(&mut self, parts: &[Part]) {
        self.ring.offer(parts);
        pull(&self.wires.doorbells.lock().unwrap()[&(u64::from(BAR) + 0x3000)]);
        self.run();
    }

    fn run(&mut self) {
        let idle = (0..1000).any(|_| self.thread.run_with_timeout(0).unwrap() == 0);
        assert!(idle, "the device's thread does not become idle");
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

#[test]
fn every_buffer_is_filled_with_different_bytes() {
    let mut guest = Guest::new(File::open("/dev/urandom").unwrap());
    guest.ask(&[(DATA, 64, WRITE), (DATA + 0x100, 64, WRITE)]);
    guest.ask(&[(DATA + 0x200, 64, WRITE)]);
    assert_eq!((guest.ring.used_element(0), guest.ring.used_element(1)), ((0, 128), (2, 64)));
    let given: Vec<Vec<u8>> = (0..3).map(|n| guest.get(DATA + 0x100 * n, 64)).collect();
    assert!(given[0] != given[1] && given[1] != given[2] && given[0] != given[2]);
    assert!(given.iter().all(|bytes| *bytes != [0; 64]));
    assert_eq!(guest.get(DATA + 64, 1), [0], "nothing is written behind a buffer");
}

#[test]
fn a_request_waits_in_the_ring_until_the_source_has_entropy() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut guest = Guest::new(reader);
    guest.ask(&[(DATA, 16, WRITE)]);
    assert_eq!(guest.ring.used_index(), 0);
    // No request is in flight while the device waits for entropy, so it pauses at once.
    guest.function.pause();
    guest.function.drain(std::time::Instant::now()).unwrap();
    writer.write_all(b"0123456789abcdef").unwrap();
    guest.run();
    assert_eq!(guest.ring.used_index(), 0, "a paused device touches no memory");
    guest.function.resume();
    guest.run();
    assert_eq!(guest.ring.used_element(0), (0, 16));
    assert_eq!(guest.get(DATA, 16), b"0123456789abcdef");
    guest.ask(&[(DATA, 16, WRITE)]);
    writer.write_all(b"more").unwrap();
    guest.run();
    assert_eq!(guest.ring.used_element(1), (1, 4), "the available bytes, fewer than requested");
}

#[test]
fn a_request_is_completed_empty_if_the_source_ends_or_fails() {
    for source in [File::open("/dev/null").unwrap(), File::open("/proc/self").unwrap()] {
        let mut guest = Guest::new(source);
        guest.ask(&[(DATA, 16, WRITE)]);
        assert_eq!(guest.ring.used_element(0), (0, 0));
        assert_eq!(guest.get(DATA, 16), [0; 16]);
    }
}

#[test]
fn invalid_chains_are_completed_with_the_bytes_that_could_be_written() {
    let chains: [(&[Part], u32); 7] = [
        (&[(DATA, 16, 0)], 0),
        (&[(DATA, 0, WRITE)], 0),
        (&[(DATA, 16, 0), (DATA, 16, WRITE)], 16),
        (&[(DATA, 16, WRITE), (0x9_0000, 16, WRITE), (DATA, 16, WRITE)], 16),
        (&[(0x7_fff8, 16, WRITE)], 0),
        (&[(u64::MAX - 3, 16, WRITE)], 0),
        (&[(DATA, u32::MAX, WRITE)], REQUEST_MAX as u32),
    ];
    for (chain, written) in chains {
        let mut guest = Guest::new(File::open("/dev/urandom").unwrap());
        guest.ask(chain);
        assert_eq!(guest.ring.used_element(0).1, written, "{chain:x?}");
    }
}

#[test]
fn a_request_gets_at_most_request_max_bytes() {
    let mut guest = Guest::new(File::open("/dev/zero").unwrap());
    guest.memory.write_slice(&[7; 0x2_0000], GuestAddress(DATA)).unwrap();
    guest.ask(&[(DATA, 0x8000, WRITE), (DATA + 0x8000, 0x1_8000, WRITE)]);
    assert_eq!(guest.ring.used_element(0), (0, REQUEST_MAX as u32));
    assert_eq!(guest.get(DATA + 0xffff, 2), [0, 7]);
}

#[test]
fn a_chain_that_is_longer_than_the_queue_is_cut() {
    // A pause would wait for the reads of a whole table, which may have 65535 descriptors.
    let mut guest = Guest::new(File::open("/dev/zero").unwrap());
    guest.function.write(0x14, &[0]);
    guest.ring.set_available_index(0);
    start(&guest.ring, RING_INDIRECT_DESC, |at, bytes| guest.function.write(at, bytes));
    let table = DATA + 0x1000;
    for number in 0..1000 {
        guest.ring.describe(table, number, (DATA, 1, WRITE | NEXT), number + 1);
    }
    guest.ask(&[(table, 16 * 1000, INDIRECT)]);
    assert_eq!(guest.ring.used_element(0), (0, QUEUE_SIZE.into()));
}

#[test]
fn there_is_no_configuration_to_read_or_write() {
    let mut guest = Guest::new(File::open("/dev/zero").unwrap());
    guest.function.write(0x2000, &[7; 4]);
    let mut data = [0xff; 4];
    guest.function.read(0x2000, &mut data);
    assert_eq!(data, [0; 4]);
}
