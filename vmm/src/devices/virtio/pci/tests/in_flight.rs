//! Tests of requests in flight: they are completed later and out of order, and a pause and a reset
//! wait for them.

use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::devices::virtio::pci::backend::status::NEEDS_RESET;

/// A device that takes requests and holds them until a test completes them.
pub(super) struct Slow {
    held: Arc<Mutex<Vec<Request>>>,
    /// An event source of its own, and how often it woke the worker.
    source: Arc<OwnedFd>,
    woken: Arc<Mutex<usize>>,
}

pub(super) struct SlowWorker {
    held: Arc<Mutex<Vec<Request>>>,
    source: Arc<OwnedFd>,
    woken: Arc<Mutex<usize>>,
}

impl VirtioDevice for Slow {
    const NAME: &'static str = "slow";
    const ID: u16 = 42;
    const CLASS: [u8; 3] = [0xff, 0, 0];
    const FEATURES: features::Names = &[];

    type Worker = SlowWorker;

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 8]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn negotiated(&mut self, _features: u64) {}

    fn worker(&self) -> SlowWorker {
        let Self { held, source, woken } = self;
        SlowWorker { held: held.clone(), source: source.clone(), woken: woken.clone() }
    }
}

impl VirtioWorker for SlowWorker {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.source.as_fd()]
    }

    fn on_doorbell(&mut self, queue: usize, rings: &Rings) {
        while let Some(request) = rings.take(queue) {
            self.held.lock().unwrap().push(request);
        }
    }

    fn on_source(&mut self, source: usize, _rings: &Rings) {
        assert_eq!(source, 0);
        *self.woken.lock().unwrap() += 1;
    }
}

impl Persist for Slow {
    type State = EchoStateV1;
    type Resources = Infallible;
    type Error = Infallible;

    fn save(&self) -> Result<EchoStateV1, Infallible> {
        Ok(EchoStateV1([0; 4]))
    }

    fn restore(_: EchoStateV1, never: Infallible) -> Result<Self, Infallible> {
        match never {}
    }
}

pub(super) struct Held {
    pub(super) machine: Machine<Slow>,
    pub(super) rings: [Ring; 2],
    held: Arc<Mutex<Vec<Request>>>,
    source: Arc<OwnedFd>,
    woken: Arc<Mutex<usize>>,
}

impl Held {
    /// A device that holds `count` requests of its first queue.
    fn new(count: u64) -> Self {
        Self::with(0, count)
    }

    /// As [`new`](Self::new), with a driver that has negotiated `features`.
    pub(super) fn with(features: u64, count: u64) -> Self {
        let held = Arc::new(Mutex::new(Vec::new()));
        let source = Arc::new(eventfd(0, EventfdFlags::empty()).unwrap());
        let woken = Arc::new(Mutex::new(0));
        let slow = Slow { held: held.clone(), source: source.clone(), woken: woken.clone() };
        let mut machine = Machine::new(slow);
        let mut rings = machine.start(features);
        for number in 0..count {
            rings[0].offer(&[(0x1_0000 + number, 1, WRITE)]);
        }
        machine.ring(0);
        assert!(machine.run());
        assert_eq!(held.lock().unwrap().len() as u64, count);
        Self { machine, rings, held, source, woken }
    }

    /// Returns the number of requests that the device holds.
    pub(super) fn held(&self) -> usize {
        self.held.lock().unwrap().len()
    }

    /// Completes the held request at `index`.
    pub(super) fn complete(&self, index: usize, written: u32) {
        let request = self.held.lock().unwrap().remove(index);
        self.rings_of_device().complete(request, written);
    }

    fn rings_of_device(&self) -> Rings {
        Rings(self.machine.function.shared.clone())
    }
}

#[test]
fn requests_are_completed_later_and_in_any_order() {
    let test = Held::new(3);
    assert_eq!((test.rings[0].used_index(), test.machine.fired(QUEUE_0)), (0, 0));
    for (index, written) in [(1, 10), (1, 20), (0, 30)] {
        test.complete(index, written);
    }
    let used: Vec<_> = (0..3).map(|number| test.rings[0].used_element(number)).collect();
    assert_eq!(used, [(1, 10), (2, 20), (0, 30)]);
    assert_eq!((test.rings[0].used_index(), test.machine.fired(QUEUE_0)), (3, 3));
}

#[test]
fn a_drain_waits_for_the_requests_in_flight_and_no_longer_than_it_may() {
    let mut test = Held::new(2);
    test.machine.function.pause();
    test.rings[0].offer(REQUEST);
    test.machine.ring(0);
    assert!(test.machine.run());
    let error = test.machine.function.drain(Instant::now()).unwrap_err();
    let said = crate::causes::chain(&error).join(": ");
    assert!(said.contains("slow@1") && said.contains("2 requests"), "{said}");

    let (held, rings) = (test.held.clone(), test.rings_of_device());
    let completes = thread::spawn(move || {
        for request in held.lock().unwrap().drain(..) {
            rings.complete(request, 7);
        }
    });
    test.machine.function.drain(Instant::now() + Duration::from_secs(60)).unwrap();
    completes.join().unwrap();
    assert_eq!(
        test.rings[0].used_index(),
        2,
        "requests made after the pause are still in the ring"
    );
    test.machine.function.resume();
    assert!(test.machine.run());
    assert_eq!(test.held.lock().unwrap().len(), 1);
}

#[test]
fn a_device_that_did_not_drain_goes_on() {
    let mut test = Held::new(1);
    test.machine.function.pause();
    test.machine.function.drain(Instant::now()).unwrap_err();
    test.machine.function.resume();
    test.complete(0, 1);
    test.rings[0].offer(REQUEST);
    test.machine.ring(0);
    assert!(test.machine.run());
    test.complete(0, 2);
    assert_eq!(test.rings[0].used_index(), 2);
}

#[test]
fn registers_answer_while_requests_are_in_flight() {
    let mut test = Held::new(1);
    assert_eq!(test.machine.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(test.machine.read_u32(DEVICE), 0);
}

#[test]
fn a_reset_is_complete_when_the_last_request_is() {
    let mut test = Held::new(2);
    test.machine.set_status(0);
    assert_ne!(test.machine.status(), 0, "the driver waits");
    test.machine.set_status(ACKNOWLEDGE);
    test.complete(0, 1);
    assert_ne!(test.machine.status(), 0);
    test.complete(0, 1);
    assert_eq!(test.machine.status(), 0);
    assert_eq!(test.machine.read_u16(register::QUEUE_ENABLE), 0);

    test.rings[0].set_available_index(0);
    test.rings[0] = test.machine.start(0)[0].clone();
    test.rings[0].offer(REQUEST);
    test.machine.ring(0);
    assert!(test.machine.run());
    assert_eq!(test.held.lock().unwrap().len(), 1, "the device works for its next driver");
}

#[test]
fn more_requests_in_flight_than_the_ring_holds_are_a_mistake_of_the_driver() {
    let mut test = Held::new(0);
    let [_, ring] = &mut test.rings;
    for _ in 0..2 {
        for _ in 0..8 {
            ring.offer(&[(0x1_0000, 1, WRITE)]);
        }
        test.machine.ring(1);
        assert!(test.machine.run());
    }
    assert_eq!(test.held.lock().unwrap().len(), 8);
    assert_ne!(test.machine.status() & NEEDS_RESET, 0);
    // The requests in flight can still be completed, and then the device can be reset.
    while !test.held.lock().unwrap().is_empty() {
        test.complete(0, 1);
    }
    assert_eq!(test.rings[1].used_index(), 0, "a broken ring is left alone");
    test.machine.set_status(0);
    assert_eq!(test.machine.status(), 0);
}

#[test]
fn a_source_of_its_own_wakes_the_worker() {
    let mut test = Held::new(0);
    rustix::io::write(&test.source, &1u64.to_ne_bytes()).unwrap();
    assert!(test.machine.run());
    assert_eq!(*test.woken.lock().unwrap(), 1);
}
