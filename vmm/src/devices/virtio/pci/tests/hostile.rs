//! Tests with a hostile guest that tries to break out or to break the device.

use super::*;
use crate::devices::identity::Identity;
use crate::devices::virtio::block::{Block, BlockOptions, Image};
use crate::devices::virtio::driver::{INDIRECT, NEXT};
use crate::devices::virtio::features::RING_RESET;
use crate::devices::virtio::pci::backend::status::NEEDS_RESET;
use proptest::prelude::*;
use proptest::sample::select;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn a_corrupt_ring_stops_the_device_until_it_is_reset() {
    type Twist = fn(&mut Ring);
    let twists: [(&str, Twist); 4] = [
        ("more requests than the ring holds", |ring| ring.set_available_index(257)),
        ("an index that went back", |ring| ring.set_available_index(0xffff)),
        ("a head that the ring does not have", |ring| ring.offer_head(256)),
        ("the last head of all", |ring| ring.offer_head(0xffff)),
    ];
    for (what, twist) in twists {
        let (mut machine, log) = echo();
        let [mut ring, mut other] = machine.start(0);
        twist(&mut ring);
        machine.ring(0);
        assert!(machine.run());
        assert_ne!(machine.status() & NEEDS_RESET, 0, "{what}");
        assert_eq!([machine.fired(QUEUE_0), machine.fired(CONFIG)], [0, 1], "{what}");
        assert_eq!(ring.used_index(), 0, "{what}");
        other.offer(REQUEST);
        machine.ring(1);
        assert!(machine.run());
        assert!(log.lock().unwrap().served.is_empty(), "{what}: the other queue stops too");

        machine.set_status(0);
        ring.set_available_index(0);
        other.set_available_index(0);
        let [mut ring, _] = machine.start(0);
        ring.offer(REQUEST);
        machine.ring(0);
        assert!(machine.run());
        assert_eq!(log.lock().unwrap().served.len(), 1, "{what}: after the reset");
    }
}

#[test]
fn a_driver_cannot_clear_needs_reset_except_by_a_reset() {
    let (mut machine, _) = echo();
    let [mut ring, _] = machine.start(0);
    ring.set_available_index(300);
    machine.ring(0);
    assert!(machine.run());
    let status = machine.status();
    for value in [status & !NEEDS_RESET, status, ACKNOWLEDGE, 0x7f] {
        machine.set_status(value);
        assert_eq!(machine.status(), status, "{value:#x}");
    }
}

#[test]
fn a_loop_of_descriptors_ends_after_as_many_as_the_queue_has() {
    let (mut machine, log) = echo();
    let [mut ring, mut other] = machine.start(0);
    ring.describe(ring.descriptors(), 7, (0x1_0000, 1, NEXT), 7);
    ring.offer_head(7);
    machine.ring(0);
    other.describe(other.descriptors(), 0, (0x1_0000, 1, NEXT), 1);
    other.describe(other.descriptors(), 1, (0x1_0000, 1, NEXT), 0);
    other.offer_head(0);
    machine.ring(1);
    assert!(machine.run());
    let lengths: Vec<usize> = log.lock().unwrap().served.iter().map(|(_, c)| c.len()).collect();
    assert_eq!(lengths, [256, 8], "as many as the queue has");
    assert_eq!((ring.used_index(), other.used_index()), (1, 1));
}

#[test]
fn invalid_indirect_tables_are_empty_chains() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(RING_INDIRECT_DESC);
    // A table at a valid address whose descriptor refers to the table itself.
    ring.describe(0x2_0000, 0, (0x2_0000, 16, INDIRECT), 0);
    let tables: [Part; 8] = [
        (0x2_0000, 16, INDIRECT),
        (0x3_0000, 0, INDIRECT),
        (0x3_0000, 15, INDIRECT),
        (0x3_0000, 17, INDIRECT),
        (0x3_0000, u32::MAX, INDIRECT),
        (0x9_0000, 16, INDIRECT),
        (0x7_fff8, 16, INDIRECT),
        (u64::MAX - 7, 16, INDIRECT),
    ];
    for table in tables {
        ring.offer(&[table]);
    }
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(usize::from(ring.used_index()), tables.len());
    assert!(log.lock().unwrap().served.iter().all(|(_, chain)| chain.is_empty()));
}

#[test]
fn an_indirect_chain_ends_at_the_end_of_its_table() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(RING_INDIRECT_DESC);
    ring.describe(0x2_0000, 0, (0x1_0000, 1, NEXT), 1);
    ring.describe(0x2_0000, 1, (0x1_0000, 1, NEXT), 2);
    ring.describe(0x2_0000, 2, (0x1_0000, 1, NEXT), 0);
    ring.offer(&[(0x2_0000, 32, INDIRECT)]);
    ring.offer(&[(0x2_0000, 48, INDIRECT)]);
    machine.ring(0);
    assert!(machine.run());
    let lengths: Vec<usize> = log.lock().unwrap().served.iter().map(|(_, c)| c.len()).collect();
    assert_eq!(lengths, [2, 3]);
}

#[test]
fn a_chain_of_more_than_4_gib_is_cut() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(0);
    ring.offer(&[(0, u32::MAX, 0), (0, 1, 0), (0, u32::MAX, WRITE)]);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(log.lock().unwrap().served, [(0, vec![(0, u32::MAX, 0)])]);
}

#[test]
fn a_device_with_overlapping_rings_can_be_saved_and_reset() {
    for (available, used) in
        [(0x4000, 0x4000), (0x4000, 0x4004), (0x5000, 0x4ffc), (0x5000, 0x5000)]
    {
        let (mut machine, log) = echo();
        assert!(machine.negotiate(VERSION_1));
        machine.write_u64(register::QUEUE_DESCRIPTORS, 0x4000);
        machine.write_u64(register::QUEUE_AVAILABLE, available);
        machine.write_u64(register::QUEUE_USED, used);
        machine.write_u16(register::QUEUE_ENABLE, 1);
        assert_eq!(machine.read_u16(register::QUEUE_ENABLE), 1);
        let fill: Vec<u8> = (0..0x2000u32).map(|at| [1, 0][at as usize % 2]).collect();
        machine.memory.write_slice(&fill, GuestAddress(0x4000)).unwrap();
        machine.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        machine.run();
        // The device may stay busy, but it can be paused, saved and reset.
        let mut machine = machine.switch(log.clone());
        machine.function.resume();
        machine.run();
        machine.set_status(0);
        assert!(machine.run(), "the thread is idle after a reset");
    }
}

/// An action of a guest on a function, or a live update.
#[derive(Debug, Clone)]
enum Act {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    ReadConfig(u8, usize),
    WriteConfig(u8, Vec<u8>),
    /// An access through the configuration space: the place in the BAR, its length, the data if it is a write.
    Window(u32, u32, Option<Vec<u8>>),
    /// A message of a vector, and whether the vector is masked.
    Message(u16, u64, bool),
    MsixControl(u16),
    Memory(u64, Vec<u8>),
    Offer(Vec<Part>),
    Available(u16),
    Doorbell,
    Start(u64),
    ResetQueue(u16),
    Reset,
    LiveUpdate,
}

fn offset() -> impl Strategy<Value = u64> {
    let region = select(vec![COMMON, ISR, DEVICE, NOTIFY, MSIX_TABLE, MSIX_PENDING]);
    prop_oneof![
        4 => 0..common::LEN as u64,
        2 => (region, 0u64..64).prop_map(|(region, at)| region + at),
        1 => 0..u64::from(BAR_SIZE),
    ]
}

/// Addresses near and far from the edges of RAM, including those of rings and buffers.
fn address() -> impl Strategy<Value = u64> {
    let edges =
        vec![0u64, 0x4000, 0x5000, 0x6000, 0x1_0000, 0x8_0000, 0x10_0000, 0x11_0000, 1 << 32];
    prop_oneof![
        8 => (select(edges), -32i64..32).prop_map(|(edge, by)| edge.wrapping_add_signed(by)),
        2 => 0..0x8_0000u64,
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![select(vec![0u32, 1, 16, 17, 512, 513, 4096, u32::MAX]), any::<u32>()]
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let value = prop_oneof![select(vec![0u64, 1, 3, 8, 15, 0x100, u64::MAX]), any::<u64>()];
    (value, select(vec![1usize, 2, 4, 8, 3, 5, 6, 7]))
        .prop_map(|(value, len)| value.to_le_bytes()[..len].to_vec())
}

fn act() -> impl Strategy<Value = Act> {
    let part = (address(), length(), 0u16..8);
    prop_oneof![
        6 => (offset(), 1usize..=8).prop_map(|(at, len)| Act::Read(at, len)),
        12 => (offset(), bytes()).prop_map(|(at, data)| Act::Write(at, data)),
        1 => (any::<u8>(), select(vec![1usize, 2, 4])).prop_map(|(at, len)| Act::ReadConfig(at, len)),
        2 => (any::<u8>(), bytes()).prop_map(|(at, data)| Act::WriteConfig(at, data)),
        4 => (offset(), 0u32..6, prop::option::of(bytes()))
            .prop_map(|(at, len, data)| Act::Window(at as u32, len, data)),
        2 => (0u16..4, address(), any::<bool>())
            .prop_map(|(vector, address, masked)| Act::Message(vector, address, masked)),
        1 => any::<u16>().prop_map(Act::MsixControl),
        4 => (address(), bytes()).prop_map(|(at, data)| Act::Memory(at, data)),
        6 => prop::collection::vec(part, 1..5).prop_map(Act::Offer),
        1 => any::<u16>().prop_map(Act::Available),
        4 => Just(Act::Doorbell),
        6 => select(vec![0, RING_RESET, RING_RESET | RING_EVENT_IDX, RING_EVENT_IDX, RING_INDIRECT_DESC | 1 << 9, 1 << 50])
            .prop_map(Act::Start),
        1 => Just(Act::Reset),
        2 => (0..3u16).prop_map(Act::ResetQueue),
        2 => Just(Act::LiveUpdate),
    ]
}

/// What no guest can change of a function: its IDs, its class and its list of capabilities, read in every width.
fn identity<D: VirtioDevice>(machine: &mut Machine<D>) -> (Vec<u8>, Vec<(u8, u8)>) {
    let mut ids = Vec::new();
    for at in [0x00, 0x08, 0x2c] {
        let double: [u8; 4] = machine.config(at);
        let words: [[u8; 2]; 2] = [at, at + 2].map(|at| machine.config(at));
        let bytes: [[u8; 1]; 4] = std::array::from_fn(|n| machine.config(at + n as u8));
        assert_eq!(
            (double, words.as_flattened()),
            (bytes.as_flattened().try_into().unwrap(), &double[..])
        );
        ids.extend(double);
    }
    (ids, machine.capabilities())
}

impl<D: VirtioDevice> Machine<D> {
    /// Reads or writes the BAR through the capability for accesses through the configuration space.
    fn window(&mut self, at: u32, len: u32, data: Option<&[u8]>) {
        let capability = self.function.access_capability;
        self.function.write_config(capability + 8, &at.to_le_bytes());
        self.function.write_config(capability + 12, &len.to_le_bytes());
        match data {
            Some(data) => self.function.write_config(capability + 16, &data[..data.len().min(4)]),
            None => self.function.read_config(capability + 16, &mut [0; 4]),
        }
    }
}

fn disk(file: &tempfile::NamedTempFile) -> Image {
    let file = file.reopen().unwrap();
    let identity = Identity::of(&file).unwrap();
    Image { file, cached: None, identity, options: BlockOptions::default() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// No sequence of actions makes the function panic or hang, and afterwards the function can be
    /// saved, encoded, decoded and restored.
    #[test]
    fn no_sequence_of_accesses_breaks_a_disk(acts in prop::collection::vec(act(), 1..60)) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let mut machine = Machine::new(Block::new(disk(&file), "hostile").unwrap());
        let [mut ring, _] = machine.rings();
        let known = identity(&mut machine);
        for act in acts {
            match act {
                Act::Read(at, len) => machine.function.read(at, &mut [0xff; 8][..len]),
                Act::Write(at, data) => machine.function.write(at, &data),
                Act::ReadConfig(at, len) => machine.function.read_config(at, &mut [0; 4][..len]),
                Act::WriteConfig(at, data) => machine.function.write_config(at, &data),
                Act::Window(at, len, data) => machine.window(at, len, data.as_deref()),
                Act::Message(vector, address, masked) => {
                    let at = MSIX_TABLE + 16 * u64::from(vector);
                    machine.write_u64(at, address);
                    machine.write_u64(at + 8, u64::from(masked) << 32 | 0x30);
                }
                Act::MsixControl(control) => machine.set_msix_control(control),
                Act::Memory(at, data) => drop(machine.memory.write_slice(&data, GuestAddress(at))),
                Act::Offer(parts) => drop(ring.offer(&parts)),
                Act::Available(index) => ring.set_available_index(index),
                Act::Doorbell => machine.ring(0),
                Act::Start(features) => {
                    machine.negotiate(features | VERSION_1);
                    machine.set_up(0, &ring, QUEUE_0);
                    machine.set_msix_control(0x8000);
                    machine.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
                }
                Act::ResetQueue(index) => {
                    machine.write_u16(register::QUEUE_SELECT, index);
                    machine.write_u16(0x3a, 1);
                }
                Act::Reset => {
                    machine.set_status(0);
                    ring.set_available_index(0);
                }
                Act::LiveUpdate => {
                    machine = machine.switch(disk(&file));
                    machine.function.resume();
                }
            }
            machine.run();
            prop_assert_eq!(&identity(&mut machine), &known, "a function stays what it is");
        }
        machine.switch(disk(&file));
        prop_assert_eq!(file.as_file().metadata().unwrap().len(), 8192, "the disk did not grow");
    }
}
