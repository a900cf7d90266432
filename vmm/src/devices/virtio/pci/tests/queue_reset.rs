//! Tests of the reset of one queue (2.6.1): the driver takes its buffers back and may set the queue up differently,
//! while the device and its other queues go on.

use std::time::Duration;

use super::in_flight::Held;
use super::*;
use crate::devices::virtio::features::RING_RESET;
use crate::devices::virtio::pci::backend::status::NEEDS_RESET;

/// Where these tests put the ring of a queue that was reset.
const ELSEWHERE: u64 = 0xc000;

/// The register that resets the selected queue.
const QUEUE_RESET: u64 = 0x3a;

impl<D: VirtioDevice> Machine<D> {
    fn reset_queue(&mut self, index: u16) {
        self.write_u16(register::QUEUE_SELECT, index);
        self.write_u16(QUEUE_RESET, 1);
    }

    /// What a driver reads that waits for the reset: `queue_reset` and `queue_enable`.
    fn reset_and_enable(&mut self, index: u16) -> [u16; 2] {
        self.write_u16(register::QUEUE_SELECT, index);
        [QUEUE_RESET, register::QUEUE_ENABLE].map(|at| self.read_u16(at))
    }
}

#[test]
fn a_queue_that_was_reset_is_as_after_a_reset_of_the_device_and_works_elsewhere() {
    let (mut machine, log) = echo();
    let [mut ring, mut other] = machine.start(RING_RESET | RING_EVENT_IDX);
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(machine.reset_and_enable(0), [0, 1]);
    machine.reset_queue(0);
    assert_eq!(machine.reset_and_enable(0), [0, 0]);
    assert_eq!(machine.read_u16(register::QUEUE_SIZE), 256);
    assert_eq!(machine.read_u16(register::QUEUE_VECTOR), NO_VECTOR);
    for at in [register::QUEUE_DESCRIPTORS, register::QUEUE_AVAILABLE, register::QUEUE_USED] {
        assert_eq!(machine.read_u64(at), 0);
    }

    // The device does not touch the old ring any more, and serves its other queue.
    ring.offer(REQUEST);
    machine.ring(0);
    other.offer(REQUEST);
    machine.ring(1);
    assert!(machine.run());
    assert_eq!((ring.used_index(), other.used_index()), (1, 1));

    // A smaller ring at another place, which the driver fills before it enables it.
    let mut ring = Ring::new(&machine.memory, ELSEWHERE, 16);
    ring.offer(REQUEST);
    ring.offer(REQUEST);
    machine.fired(QUEUE_0);
    assert!(machine.set_up(0, &ring, QUEUE_0));
    assert_eq!(machine.reset_and_enable(0), [0, 1]);
    assert!(machine.run());
    assert_eq!((ring.used_index(), ring.used_element(0)), (2, (0, 512)));
    assert_eq!(log.lock().unwrap().served.len(), 4);
    assert_eq!(
        machine.fired(QUEUE_0),
        1,
        "the driver asked for one interrupt, at the first request"
    );
    assert_eq!(ring.available_event(), 2, "the device has both features");
}

#[test]
fn a_reset_in_the_middle_of_requests_waits_for_those_of_its_queue_only() {
    let mut test = Held::with(RING_RESET, 2);
    test.rings[1].offer(REQUEST);
    test.machine.ring(1);
    assert!(test.machine.run());
    assert_eq!(test.held(), 3);
    test.machine.reset_queue(0);
    assert_eq!(test.machine.reset_and_enable(0), [1, 1], "the driver waits");
    // The driver changes nothing meanwhile, and no further request is taken.
    test.machine.write_u16(QUEUE_RESET, 0);
    test.machine.write_u64(register::QUEUE_DESCRIPTORS, 0x100);
    test.machine.write_u16(register::QUEUE_ENABLE, 0);
    test.rings[0].offer(REQUEST);
    test.machine.ring(0);
    assert!(test.machine.run());
    assert_eq!(test.held(), 3);
    test.complete(0, 1);
    assert_eq!(test.machine.reset_and_enable(0), [1, 1]);
    test.complete(0, 1);
    assert_eq!(test.machine.reset_and_enable(0), [0, 0]);
    assert_eq!(
        test.rings[0].used_index(),
        2,
        "they were completed in the ring that they came from"
    );
    assert_eq!(test.machine.reset_and_enable(1), [0, 1]);
    test.complete(0, 7);
    assert_eq!(test.rings[1].used_index(), 1);

    let mut ring = Ring::new(&test.machine.memory, ELSEWHERE, 16);
    assert!(test.machine.set_up(0, &ring, QUEUE_0));
    ring.offer(REQUEST);
    test.machine.ring(0);
    assert!(test.machine.run());
    test.complete(0, 9);
    assert_eq!((ring.used_index(), ring.used_element(0)), (1, (0, 9)));
}

#[test]
fn a_pause_in_the_middle_of_a_reset_completes_it_and_a_restored_queue_can_be_enabled() {
    let mut test = Held::with(RING_RESET, 1);
    test.machine.reset_queue(0);
    test.machine.function.pause();
    test.machine.function.drain(Instant::now()).unwrap_err();
    test.complete(0, 1);
    test.machine.function.drain(Instant::now() + Duration::from_secs(60)).unwrap();
    let state = test.machine.function.save().unwrap();
    let [reset, other] = &state.transport.queues[..] else { panic!("{state:?}") };
    assert_eq!((reset.ring.ready, reset.vector, other.ring.ready), (false, NO_VECTOR, true));
    // The reset of a paused device takes effect at once.
    test.machine.reset_queue(1);
    assert_eq!(test.machine.reset_and_enable(1), [0, 0]);

    let (mut machine, log) = echo();
    machine.start(RING_RESET | RING_EVENT_IDX);
    machine.reset_queue(0);
    let mut machine = machine.switch(log.clone());
    machine.function.write_config(4, &6u16.to_le_bytes());
    assert_eq!(machine.reset_and_enable(0), [0, 0]);
    let mut ring = Ring::new(&machine.memory, ELSEWHERE, 16);
    ring.offer(REQUEST);
    assert!(machine.set_up(0, &ring, QUEUE_0));
    assert!(machine.run());
    assert_eq!(ring.used_index(), 0, "a paused device touches no memory");
    machine.function.resume();
    assert!(machine.run());
    assert_eq!(ring.used_index(), 1);
}

#[test]
fn a_reset_of_the_device_includes_that_of_its_queues() {
    let mut test = Held::with(RING_RESET, 1);
    test.machine.reset_queue(0);
    test.machine.set_status(0);
    assert_ne!(test.machine.status(), 0);
    test.complete(0, 1);
    assert_eq!(test.machine.status(), 0);
    assert_eq!(test.machine.reset_and_enable(0), [0, 0]);
    // The next driver finds nothing of it.
    test.rings[0].set_available_index(0);
    test.machine.start(0);
    assert_eq!(test.machine.reset_and_enable(0), [0, 1]);
}

#[test]
fn writes_that_reset_no_queue_change_nothing() {
    let without = |features| {
        let (mut machine, _) = echo();
        machine.start(features);
        machine
    };
    let mut machine = without(0);
    machine.reset_queue(0);
    assert_eq!(machine.reset_and_enable(0), [0, 1], "the driver has not negotiated it");
    let mut machine = without(RING_RESET);
    for bytes in [&[0, 0][..], &[2, 0], &[1, 1], &[1], &[1, 0, 0, 0], &[1, 0, 0, 0, 0, 0, 0, 0]] {
        machine.write(QUEUE_RESET, bytes);
        assert_eq!(machine.reset_and_enable(0), [0, 1], "{bytes:?}");
    }
    for missing in [2, 0xffff] {
        machine.reset_queue(missing);
        assert_eq!(machine.reset_and_enable(missing), [0, 0]);
    }
    assert_eq!([0, 1].map(|queue| machine.reset_and_enable(queue)), [[0, 1]; 2]);
    // Features that were written and not agreed upon.
    let (mut machine, _) = echo();
    machine.write_u32(register::DRIVER_FEATURE_SELECT, 1);
    machine.write_u32(register::DRIVER_FEATURE, u32::MAX);
    machine.write_u16(register::QUEUE_SIZE, 4);
    machine.reset_queue(0);
    assert_eq!(machine.read_u16(register::QUEUE_SIZE), 4);
}

#[test]
fn a_queue_that_was_reset_does_not_heal_a_corrupt_device() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(RING_RESET);
    ring.set_available_index(300);
    machine.ring(0);
    assert!(machine.run());
    machine.reset_queue(0);
    let mut ring = Ring::new(&machine.memory, ELSEWHERE, 16);
    assert!(machine.set_up(0, &ring, QUEUE_0));
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    assert_ne!(machine.status() & NEEDS_RESET, 0);
    assert!(log.lock().unwrap().served.is_empty());
}
