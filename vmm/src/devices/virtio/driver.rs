//! A driver of virtio devices and its side of a split ring (2.7), for tests of devices. It also does things that no correct
//! driver would do.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::PciResources;
use super::features::VERSION_1;
use crate::kvm::interrupts::fake::FakeWires;

/// Descriptor flag: the chain continues with another descriptor.
pub(crate) const NEXT: u16 = 1;
/// Descriptor flag: the device writes to the buffer; otherwise it reads.
pub(crate) const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// The layout of RAM in these tests: two ranges with a hole between them, as on a PC.
pub(crate) const RAM: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 0x8_0000), (GuestAddress(0x10_0000), 0x1_0000)];

/// Guest RAM of the layout [`RAM`], all zero.
pub(crate) fn ram() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&RAM).unwrap()
}

/// The guest physical address of a device's BAR in these tests.
pub(crate) const BAR: u32 = 0xc000_0000;

/// Resources of a device in slot 1 whose BAR is at [`BAR`].
pub(crate) fn resources(memory: &GuestMemoryMmap, wires: &Arc<FakeWires>) -> PciResources {
    PciResources {
        slot: 1,
        bar: BAR,
        memory: memory.clone(),
        interrupts: wires.clone(),
        doorbells: wires.clone(),
    }
}

/// Starts a device with `ring` as its first queue, as a driver does (3.1.1): negotiates VERSION_1 and
/// `features`, which are below bit 32. `write` writes to the common configuration.
pub(crate) fn start(ring: &Ring, features: u64, write: impl FnMut(u64, &[u8])) {
    start_queues(&[ring], features, write);
}

/// As [`start`], with `rings` as the device's first queues.
pub(crate) fn start_queues(rings: &[&Ring], features: u64, mut write: impl FnMut(u64, &[u8])) {
    let negotiation = [
        (0x14, 1, 1),
        (0x14, 3, 1),
        (0x08, 0, 4),
        (0x0c, features, 4),
        (0x08, 1, 4),
        (0x0c, VERSION_1 >> 32, 4),
        (0x14, 11, 1),
    ];
    let queue = |(index, ring): (u64, &&Ring)| {
        [
            (0x16, index, 2),
            (0x18, ring.size().into(), 2),
            (0x20, ring.descriptors(), 8),
            (0x28, ring.available(), 8),
            (0x30, ring.used(), 8),
            (0x1c, 1, 2),
        ]
    };
    let queues = (0..).zip(rings).flat_map(queue);
    for (at, value, size) in negotiation.into_iter().chain(queues).chain([(0x14, 15, 1)]) {
        write(at, &u64::to_le_bytes(value)[..size]);
    }
}

/// A piece of guest memory: address, length, and flags of its descriptor.
pub(crate) type Part = (u64, u32, u16);

/// A ring in guest memory, as its driver sees it.
#[derive(Debug, Clone)]
pub(crate) struct Ring {
    memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    /// Requests that were made available.
    offered: u16,
    next_descriptor: u16,
}

impl Ring {
    /// A ring of `size` (at most 256) entries that takes 12 KiB from `base` on.
    pub(crate) fn new(memory: &GuestMemoryMmap, base: u64, size: u16) -> Self {
        assert!(size.is_power_of_two() && size <= 256);
        Self { memory: memory.clone(), base, size, offered: 0, next_descriptor: 0 }
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn descriptors(&self) -> u64 {
        self.base
    }

    pub(crate) fn available(&self) -> u64 {
        self.base + 0x1000
    }

    pub(crate) fn used(&self) -> u64 {
        self.base + 0x2000
    }

    /// Writes descriptor `index` of the table at `table`.
    pub(crate) fn describe(&self, table: u64, index: u16, (address, len, flags): Part, next: u16) {
        let at = table + 16 * u64::from(index);
        let fields = u128::from(address)
            | u128::from(len) << 64
            | u128::from(flags) << 96
            | u128::from(next) << 112;
        self.memory.write_slice(&fields.to_le_bytes(), GuestAddress(at)).unwrap();
    }

    /// Makes a chain of `parts` available. Returns its head.
    pub(crate) fn offer(&mut self, parts: &[Part]) -> u16 {
        let head = self.next_descriptor;
        for (number, (address, len, flags)) in parts.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = if number + 1 < parts.len() { NEXT } else { 0 };
            let part = (*address, *len, flags | more);
            self.describe(self.descriptors(), index, part, self.next_descriptor);
        }
        self.offer_head(head);
        head
    }

    /// Makes the chain that starts at descriptor `head` available.
    pub(crate) fn offer_head(&mut self, head: u16) {
        let at = self.available() + 4 + 2 * u64::from(self.offered % self.size);
        self.put(at, head);
        self.offered = self.offered.wrapping_add(1);
        self.set_available_index(self.offered);
    }

    /// Sets the available index: the number of requests that were ever made available.
    pub(crate) fn set_available_index(&mut self, index: u16) {
        self.offered = index;
        self.put(self.available() + 2, index);
    }

    /// Returns the used index: the number of requests that the device has ever used.
    pub(crate) fn used_index(&self) -> u16 {
        self.get(self.used() + 2)
    }

    /// Returns head and length of the `number`th request that the device used.
    pub(crate) fn used_element(&self, number: u16) -> (u32, u32) {
        let at = self.used() + 4 + 8 * u64::from(number % self.size);
        let element: u64 = self.memory.read_obj(GuestAddress(at)).unwrap();
        (element as u32, (element >> 32) as u32)
    }

    /// Sets the flags of the available ring (2.7.6).
    pub(crate) fn set_available_flags(&self, flags: u16) {
        self.put(self.available(), flags);
    }

    /// Asks for an interrupt when the device has used request `number` (2.7.10).
    pub(crate) fn set_used_event(&self, number: u16) {
        self.put(self.available() + 4 + 2 * u64::from(self.size), number);
    }

    /// Returns the number of the request at which the device wants its next doorbell (2.7.10).
    pub(crate) fn available_event(&self) -> u16 {
        self.get(self.used() + 4 + 8 * u64::from(self.size))
    }

    fn put(&self, at: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64) -> u16 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }
}
