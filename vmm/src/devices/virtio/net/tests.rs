//! The device as its guest's driver drives it, and as no driver should, with a socket in place of the
//! tap; and on a real tap, where there can be one.

mod control;
mod hostile;
mod link;
mod macvtap;
mod receive;
mod restore;
mod tap;
mod transmit;

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;

use event_manager::{EventManager, SubscriberOps};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::bus::BusDevice;
use crate::devices::Device;
use crate::devices::virtio::driver::{BAR, INDIRECT, NEXT, Part, Ring, WRITE, ram, resources};
use crate::devices::virtio::features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1};
use crate::devices::virtio::{VirtioWorker, Worker};
use crate::kvm::interrupts::fake::FakeWires;
use crate::kvm::interrupts::pull;
use crate::state::Persist;
use crate::state::Schema;
use crate::state::node::read_node;

const STATUS: u64 = 0x14;
const DEVICE: u64 = 0x2000;
/// Where these tests have data in guest memory, behind the rings.
const DATA: u64 = 0x4_0000;

const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);

/// What a driver like Linux's accepts, if it is offered.
const LINUX: u64 = u64::MAX >> 8 & !(RING_EVENT_IDX | RING_INDIRECT_DESC) | VERSION_1;

struct Guest {
    function: VirtioPci<Net>,
    thread: EventManager<Worker<NetWorker>>,
    wires: Arc<FakeWires>,
    memory: GuestMemoryMmap,
    /// The ends of the wire, one for each pair.
    wire: Vec<UnixDatagram>,
    rings: BTreeMap<u16, Ring>,
    shared: Arc<Shared>,
}

/// A wire of sockets, and its other ends.
fn wire(pairs: usize) -> (Wire, Vec<UnixDatagram>) {
    let ends = (0..pairs).map(|_| UnixDatagram::pair().unwrap());
    let (taps, ends): (Vec<_>, Vec<_>) = ends.unzip();
    for end in taps.iter().chain(&ends) {
        end.set_nonblocking(true).unwrap();
    }
    let taps = taps.into_iter().map(|end| Tap::new(end.into()).unwrap()).collect();
    (Wire { name: "vm0".to_owned(), taps, on_link: Arc::new(|_| ()) }, ends)
}

impl Guest {
    /// A guest without a driver.
    fn new(pairs: usize) -> Self {
        let (wire, ends) = wire(pairs);
        Self::with(Net::new(wire, MAC, Some(1400)).unwrap(), ends)
    }

    fn with(net: Net, wire: Vec<UnixDatagram>) -> Self {
        let (memory, wires) = (ram(), Arc::new(FakeWires::default()));
        let function = VirtioPci::new(net, resources(&memory, &wires)).unwrap();
        Self::around(function, memory, wires, wire)
    }

    fn around(
        mut function: VirtioPci<Net>,
        memory: GuestMemoryMmap,
        wires: Arc<FakeWires>,
        wire: Vec<UnixDatagram>,
    ) -> Self {
        use crate::devices::pci::PciFunction;
        // Memory space and bus master.
        function.write_config(4, &6_u16.to_le_bytes());
        let mut thread = EventManager::new().unwrap();
        let worker = function.worker();
        let shared = worker.worker().shared.clone();
        thread.add_subscriber(worker);
        for worker in function.more_workers() {
            thread.add_subscriber(worker);
        }
        Self { function, thread, wires, memory, wire, rings: BTreeMap::new(), shared }
    }

    /// A guest with one pair of queues whose driver accepts these of the features that are offered.
    fn started(features: u64) -> Self {
        let mut guest = Self::new(1);
        guest.start(features, &[0, 1, 2]);
        guest
    }

    fn write(&mut self, at: u64, value: u64, size: usize) {
        self.function.write(at, &value.to_le_bytes()[..size]);
    }

    fn read<const N: usize>(&mut self, at: u64) -> [u8; N] {
        let mut data = [0xff; N];
        self.function.read(at, &mut data);
        data
    }

    /// Starts the driver with these queues.
    fn start(&mut self, features: u64, queues: &[u16]) {
        self.start_with(features, queues, QUEUE_SIZE);
    }

    /// The same with queues of `size` entries.
    fn start_with(&mut self, features: u64, queues: &[u16], size: u16) {
        let mut offered = 0;
        for select in 0..2 {
            self.write(0x00, select, 4);
            offered |= u64::from(u32::from_le_bytes(self.read(0x04))) << (32 * select);
        }
        let features = features & offered | VERSION_1;
        for status in [0, 1, 3] {
            self.write(STATUS, status, 1);
        }
        for select in 0..2 {
            self.write(0x08, select, 4);
            self.write(0x0c, features >> (32 * select), 4);
        }
        self.write(STATUS, 11, 1);
        queues.iter().for_each(|queue| self.set_up(*queue, size));
        self.write(STATUS, 15, 1);
        assert_eq!(self.read(STATUS), [15], "the device accepts what it offers");
        self.run();
    }

    /// Gives a queue an empty ring of `size` entries.
    fn set_up(&mut self, queue: u16, size: u16) {
        let base = 0x4000 + 0x3000 * u64::from(queue);
        self.put(base, &[0; 0x3000]);
        let ring = Ring::new(&self.memory, base, size);
        self.write(0x16, queue.into(), 2);
        self.write(0x18, size.into(), 2);
        self.write(0x20, ring.descriptors(), 8);
        self.write(0x28, ring.available(), 8);
        self.write(0x30, ring.used(), 8);
        self.write(0x1c, 1, 2);
        self.rings.insert(queue, ring);
    }

    fn ring(&mut self, queue: u16) -> &mut Ring {
        self.rings.get_mut(&queue).unwrap()
    }

    /// Offers a chain and rings the doorbell.
    fn offer(&mut self, queue: u16, parts: &[Part]) {
        self.ring(queue).offer(parts);
        self.ring_doorbell(queue);
    }

    fn ring_doorbell(&mut self, queue: u16) {
        let address = u64::from(BAR) + 0x3000 + 4 * u64::from(queue);
        pull(&self.wires.doorbells.lock().unwrap()[&address]);
        self.run();
    }

    fn run(&mut self) {
        let idle = (0..1000).any(|_| self.thread.run_with_timeout(0).unwrap() == 0);
        assert!(idle, "the device's thread has no end of work");
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// A frame arrives at the tap, with a header that asks for nothing.
    fn arrives(&mut self, frame: &[u8]) {
        self.arrives_with([0; header::LEN], frame);
    }

    fn arrives_with(&mut self, header: [u8; header::LEN], frame: &[u8]) {
        self.wire[0].send(&[&header[..], frame].concat()).unwrap();
        self.run();
    }

    /// The next frame that the device sent through the tap of a pair, with its header. Skips announcements,
    /// which are repeated by a timer.
    fn sent_by(&self, pair: usize) -> Option<Vec<u8>> {
        std::iter::from_fn(|| self.any_sent_by(pair)).find(|sent| sent[24..26] != RARP)
    }

    fn any_sent_by(&self, pair: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; header::LEN + FRAME_MAX + 1];
        let len = self.wire[pair].recv(&mut bytes).ok()?;
        bytes.truncate(len);
        Some(bytes)
    }

    fn sent(&self) -> Option<Vec<u8>> {
        self.sent_by(0)
    }

    fn config(&mut self) -> [u8; 12] {
        self.read(DEVICE)
    }

    fn link_status(&mut self) -> u16 {
        u16::from_le_bytes(self.read(DEVICE + 6))
    }
}

/// What the log says, from warnings on, while `act` runs.
fn logged(act: impl FnOnce()) -> Vec<String> {
    let log = tempfile::tempfile().unwrap();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(Arc::new(log.try_clone().unwrap()))
        .with_ansi(false)
        .finish();
    tracing::subscriber::with_default(subscriber, act);
    let mut text = String::new();
    std::io::Seek::rewind(&mut &log).unwrap();
    std::io::Read::read_to_string(&mut &log, &mut text).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// What is announced: destination, source and EtherType of the next frame.
fn announced(guest: &Guest) -> Option<(Mac, Mac, [u8; 2])> {
    let sent = guest.any_sent_by(0)?;
    let mac = |at| Mac(sent[at..at + 6].try_into().unwrap());
    assert_eq!(sent[..header::LEN], [0; header::LEN]);
    Some((mac(12), mac(18), [sent[24], sent[25]]))
}

const RARP: [u8; 2] = [0x80, 0x35];

/// A frame to `destination` of `len` bytes.
fn frame(destination: Mac, len: usize) -> Vec<u8> {
    let mut frame = destination.0.to_vec();
    frame.extend(OTHER.0);
    frame.extend([8, 0]);
    frame.extend((frame.len()..len).map(|at| at as u8));
    frame
}

#[test]
fn the_configuration_says_what_the_device_is() {
    let mut guest = Guest::new(4);
    let [mac @ .., s0, s1, p0, p1, m0, m1] = guest.config();
    assert_eq!(Mac(mac), MAC);
    assert_eq!([s0, s1, p0, p1], [1, 0, 4, 0]);
    assert_eq!(u16::from_le_bytes([m0, m1]), 1400);
    // It cannot be written, and there is nothing behind it.
    guest.write(DEVICE, u64::MAX, 8);
    assert_eq!(guest.read::<8>(DEVICE + 12), [0; 8]);
    assert_eq!(Mac(guest.read(DEVICE)), MAC);
}

#[test]
fn features_depend_on_what_the_device_is() {
    let offered = |pairs, mtu| {
        let (wire, _ends) = wire(pairs);
        Net::new(wire, MAC, mtu).unwrap().features() & (F_MQ | F_MTU)
    };
    assert_eq!(offered(1, None), 0);
    assert_eq!(offered(2, None), F_MQ);
    assert_eq!(offered(1, Some(9000)), F_MTU);
}
