//! Tests that drive a function as a driver does, correctly and incorrectly: through its configuration
//! space, its registers, its rings and its doorbells.

mod hostile;
mod in_flight;
mod queue_reset;
mod refusals;
mod registers;
mod requests;
mod restore;

use std::convert::Infallible;
use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, SubscriberOps};
use vm_memory::GuestMemoryMmap;

use super::backend::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use super::*;
use crate::devices::virtio::driver::{BAR, Part, Ring, WRITE, ram, resources};
use crate::devices::virtio::features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1};
use crate::devices::virtio::{VirtioWorker, features};
use crate::kvm::interrupts::MsiMessage;
use crate::kvm::interrupts::fake::FakeWires;
use crate::state::node::read_node;
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// The first feature of [`Echo`].
const LOUD: u64 = 1;
/// The vectors that [`Machine::start`] gives to queue 0, queue 1 and the configuration.
const QUEUE_0: usize = 0;
const QUEUE_1: usize = 1;
const CONFIG: usize = 2;

/// Registers of the common configuration structure.
mod register {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const QUEUES: u64 = 0x12;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub(super) const QUEUE_AVAILABLE: u64 = 0x28;
    pub(super) const QUEUE_USED: u64 = 0x30;
}

/// A record of the calls to a device, kept across live updates.
#[derive(Debug, Default)]
struct Log {
    /// The queue and the chain of every request.
    served: Vec<(usize, Vec<Part>)>,
    negotiated: Vec<u64>,
}

type SharedLog = Arc<Mutex<Log>>;

/// A device with two queues that completes every request and records it.
struct Echo {
    log: SharedLog,
    scratch: [u8; 4],
}

impl VirtioDevice for Echo {
    const NAME: &'static str = "echo";
    const ID: u16 = 42;
    const CLASS: [u8; 3] = [0xff, 0, 0];
    const FEATURES: features::Names = &[(0, "LOUD"), (3, "QUIET")];

    type Worker = EchoWorker;

    fn features(&self) -> u64 {
        LOUD
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 8]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let rest = self.scratch.iter().skip(offset as usize).chain(std::iter::repeat(&0));
        data.iter_mut().zip(rest).for_each(|(byte, value)| *byte = *value);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.scratch.iter_mut().skip(offset as usize).zip(data).for_each(|(b, v)| *b = *v);
    }

    fn negotiated(&mut self, features: u64) {
        self.log.lock().unwrap().negotiated.push(features);
    }

    fn worker(&self) -> EchoWorker {
        EchoWorker(self.log.clone())
    }
}

struct EchoWorker(SharedLog);

impl VirtioWorker for EchoWorker {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn on_doorbell(&mut self, queue: usize, rings: &Rings) {
        rings.serve(queue, |chain| {
            let parts: Vec<Part> =
                chain.map(|d| (d.addr().0, d.len(), d.flags() & WRITE)).collect();
            let written =
                parts.iter().filter(|(_, _, flags)| *flags == WRITE).map(|(_, len, _)| len);
            let written = written.sum();
            self.0.lock().unwrap().served.push((queue, parts));
            written
        });
    }

    fn on_source(&mut self, _source: usize, _rings: &Rings) {}
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct EchoStateV1([u8; 4]);

impl Schema for EchoStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,echo-v1"];

    fn encode(&self, node: &mut Node) {
        node.put_bytes("scratch", &self.0);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        reader.array("scratch").map(Self)
    }
}

impl Persist for Echo {
    type State = EchoStateV1;
    type Resources = SharedLog;
    type Error = Infallible;

    fn save(&self) -> Result<EchoStateV1, Infallible> {
        Ok(EchoStateV1(self.scratch))
    }

    fn restore(EchoStateV1(scratch): EchoStateV1, log: SharedLog) -> Result<Self, Infallible> {
        Ok(Self { log, scratch })
    }
}

/// A function in a machine, with its interrupt lines and doorbells, its memory and its device thread.
struct Machine<D: VirtioDevice> {
    function: VirtioPci<D>,
    memory: GuestMemoryMmap,
    wires: Arc<FakeWires>,
    thread: EventManager<Worker<D::Worker>>,
}

/// Stops a device that has nothing in flight.
fn pause(device: &mut impl Device) {
    device.pause();
    device.drain(Instant::now()).unwrap();
}

/// A machine with an [`Echo`], and its log.
fn echo() -> (Machine<Echo>, SharedLog) {
    let log = SharedLog::default();
    (Machine::new(Echo { log: log.clone(), scratch: [0; 4] }), log)
}

impl<D: VirtioDevice> Machine<D> {
    fn new(device: D) -> Self {
        let (memory, wires) = (ram(), Arc::new(FakeWires::default()));
        let function = VirtioPci::new(device, resources(&memory, &wires)).unwrap();
        Self::with(function, memory, wires)
    }

    fn with(function: VirtioPci<D>, memory: GuestMemoryMmap, wires: Arc<FakeWires>) -> Self {
        let mut thread = EventManager::new().unwrap();
        thread.add_subscriber(function.worker());
        Self { function, memory, wires, thread }
    }

    /// Runs the device thread until it is idle. Returns false if it is still busy after 1000 rounds.
    fn run(&mut self) -> bool {
        (0..1000).any(|_| self.thread.run_with_timeout(0).unwrap() == 0)
    }

    fn read<const N: usize>(&mut self, at: u64) -> [u8; N] {
        let mut data = [0xff; N];
        self.function.read(at, &mut data);
        data
    }

    fn read_u8(&mut self, at: u64) -> u8 {
        u8::from_le_bytes(self.read(at))
    }

    fn read_u16(&mut self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at))
    }

    fn read_u32(&mut self, at: u64) -> u32 {
        u32::from_le_bytes(self.read(at))
    }

    fn read_u64(&mut self, at: u64) -> u64 {
        u64::from_le_bytes(self.read(at))
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        self.function.write(at, data);
    }

    fn write_u16(&mut self, at: u64, value: u16) {
        self.write(at, &value.to_le_bytes());
    }

    fn write_u32(&mut self, at: u64, value: u32) {
        self.write(at, &value.to_le_bytes());
    }

    fn write_u64(&mut self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    fn status(&mut self) -> u8 {
        self.read_u8(register::STATUS)
    }

    fn set_status(&mut self, status: u8) {
        self.write(register::STATUS, &[status]);
    }

    fn config<const N: usize>(&mut self, at: u8) -> [u8; N] {
        let mut data = [0xff; N];
        self.function.read_config(at, &mut data);
        data
    }

    /// Returns offset and ID of each capability, in the order of the list.
    fn capabilities(&mut self) -> Vec<(u8, u8)> {
        let mut found = Vec::new();
        let [mut at] = self.config(0x34);
        while at != 0 {
            let [id, next] = self.config(at);
            found.push((at, id));
            assert!(found.len() < 64, "the list of capabilities has no end");
            at = next;
        }
        found
    }

    /// Returns the offset of MSI-X's control word in the configuration space.
    fn msix_control_at(&mut self) -> u8 {
        let capabilities = self.capabilities();
        capabilities.iter().find(|(_, id)| *id == msix::CAPABILITY).unwrap().0 + 2
    }

    fn set_msix_control(&mut self, control: u16) {
        let at = self.msix_control_at();
        self.function.write_config(at, &control.to_le_bytes());
    }

    /// Gives `vector` its message, and masks it or not.
    fn route(&mut self, vector: usize, masked: bool) {
        let at = MSIX_TABLE + 16 * vector as u64;
        let MsiMessage { address, data } = message(vector);
        self.write_u64(at, address);
        self.write_u32(at + 8, data);
        self.write_u32(at + 12, masked.into());
    }

    /// Has the driver accept `features`. Tells whether the device agrees.
    fn negotiate(&mut self, features: u64) -> bool {
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        for select in 0..2u32 {
            self.write_u32(register::DRIVER_FEATURE_SELECT, select);
            self.write_u32(register::DRIVER_FEATURE, (features >> (32 * select)) as u32);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// Has the driver set up and enable queue `index`. Tells whether the device enabled it.
    fn set_up(&mut self, index: u16, ring: &Ring, vector: usize) -> bool {
        self.write_u16(register::QUEUE_SELECT, index);
        self.write_u16(register::QUEUE_SIZE, ring.size());
        self.write_u16(register::QUEUE_VECTOR, vector as u16);
        self.write_u64(register::QUEUE_DESCRIPTORS, ring.descriptors());
        self.write_u64(register::QUEUE_AVAILABLE, ring.available());
        self.write_u64(register::QUEUE_USED, ring.used());
        self.write_u16(register::QUEUE_ENABLE, 1);
        self.read_u16(register::QUEUE_ENABLE) == 1
    }

    /// The whole initialization sequence (3.1.1) of a driver with MSI-X. Gives its rings.
    fn start(&mut self, features: u64) -> [Ring; 2] {
        assert!(self.negotiate(features | VERSION_1));
        for vector in [QUEUE_0, QUEUE_1, CONFIG] {
            self.route(vector, false);
        }
        self.set_msix_control(0x8000);
        self.write_u16(register::CONFIG_VECTOR, CONFIG as u16);
        let rings = self.rings();
        assert!(self.set_up(0, &rings[0], QUEUE_0));
        assert!(self.set_up(1, &rings[1], QUEUE_1));
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        self.run();
        rings
    }

    fn rings(&self) -> [Ring; 2] {
        [Ring::new(&self.memory, 0x4000, 256), Ring::new(&self.memory, 0x8000, 8)]
    }

    /// Writes to the doorbell of queue `index`, as KVM sees it.
    fn ring(&self, index: u64) {
        let address = u64::from(BAR) + NOTIFY + index * u64::from(NOTIFY_MULTIPLIER);
        pull(&self.wires.doorbells.lock().unwrap()[&address]);
    }

    /// Returns how often `vector` has fired since the last call.
    fn fired(&self, vector: usize) -> u64 {
        self.wires.taken(vector)
    }
}

fn message(vector: usize) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000 + 0x1000 * vector as u64, data: 0x30 + vector as u32 }
}

/// A request with a buffer to read and a buffer to write.
const REQUEST: &[Part] = &[(0x1_0000, 16, 0), (0x1_1000, 512, WRITE)];

impl<D> Machine<D>
where
    D: VirtioDevice<Error: Send + Sync, State: Clone + Debug + PartialEq>,
{
    /// Pauses the function, while its thread completes the requests in flight.
    fn pause(&mut self) {
        let Self { function, thread, .. } = self;
        function.pause();
        std::thread::scope(|scope| {
            let deadline = Instant::now() + std::time::Duration::from_secs(60);
            let drained = scope.spawn(move || function.drain(deadline).unwrap());
            while !drained.is_finished() {
                thread.run_with_timeout(1).unwrap();
            }
        });
    }

    /// Performs the steps of a live update on the function, up to the resume: pause, save, encode,
    /// decode, restore with new interrupt lines and doorbells.
    fn switch(mut self, device: D::Resources) -> Self {
        self.pause();
        let state = self.function.save().unwrap();
        assert_eq!(state, self.function.save().unwrap(), "saving changes nothing");
        let read = read_node(&state.to_node("function@1"), "/devices").unwrap();
        assert_eq!(state, read);
        let wires = Arc::new(FakeWires::default());
        let function = VirtioPci::restore(read, (resources(&self.memory, &wires), device)).unwrap();
        assert_eq!(state, function.save().unwrap(), "a restored function saves the same state");
        Self::with(function, self.memory, wires)
    }
}
