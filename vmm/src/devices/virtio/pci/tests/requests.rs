//! Tests of doorbells, requests and interrupts.

use super::*;
use crate::devices::virtio::driver::{INDIRECT, NEXT};

fn served(log: &SharedLog) -> usize {
    log.lock().unwrap().served.len()
}

#[test]
fn a_doorbell_executes_a_request_and_fires_its_vector() {
    let (mut machine, log) = echo();
    let [mut first, mut second] = machine.start(LOUD);
    let head = first.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(log.lock().unwrap().served, [(0, REQUEST.to_vec())]);
    assert_eq!((first.used_index(), first.used_element(0)), (1, (head.into(), 512)));
    assert_eq!([machine.fired(QUEUE_0), machine.fired(QUEUE_1), machine.fired(CONFIG)], [1, 0, 0]);

    let head = second.offer(&REQUEST[..1]);
    machine.ring(1);
    assert!(machine.run());
    assert_eq!((second.used_index(), second.used_element(0)), (1, (head.into(), 0)));
    assert_eq!([machine.fired(QUEUE_0), machine.fired(QUEUE_1), machine.fired(CONFIG)], [0, 1, 0]);
    assert_eq!(machine.wires.route(QUEUE_1), Some(message(QUEUE_1)));
}

#[test]
fn a_doorbell_that_reaches_this_process_counts_as_well() {
    let (mut machine, log) = echo();
    let [_, mut ring] = machine.start(0);
    ring.offer(REQUEST);
    machine.write_u16(NOTIFY + 4, 1);
    machine.write_u16(NOTIFY + 8, 2);
    machine.write_u32(NOTIFY + REGION - 4, 0);
    assert!(machine.run());
    assert_eq!(log.lock().unwrap().served, [(1, REQUEST.to_vec())]);
}

#[test]
fn requests_made_before_driver_ok_are_executed_then_and_not_before() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.rings();
    assert!(machine.negotiate(VERSION_1));
    assert!(machine.set_up(0, &ring, 0));
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(served(&log), 0);
    machine.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert!(machine.run());
    assert_eq!(served(&log), 1);
}

#[test]
fn a_queue_that_is_not_enabled_is_left_alone() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.rings();
    assert!(machine.negotiate(VERSION_1));
    machine.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    ring.offer(REQUEST);
    machine.ring(0);
    machine.ring(1);
    assert!(machine.run());
    assert_eq!((served(&log), ring.used_index()), (0, 0));
}

#[test]
fn a_full_ring_is_executed_in_its_order_by_one_doorbell() {
    let (mut machine, log) = echo();
    let [mut ring, mut other] = machine.start(0);
    // One request more than a batch.
    for number in 0..256 {
        ring.offer(&[(0x1_0000 + number, 1, 0)]);
    }
    machine.ring(0);
    assert!(machine.run());
    let order: Vec<u64> = log.lock().unwrap().served.iter().map(|(_, c)| c[0].0).collect();
    assert_eq!(order, (0x1_0000..0x1_0100).collect::<Vec<_>>());
    assert_eq!((ring.used_index(), machine.fired(QUEUE_0)), (256, 256));

    for round in 1..=20 {
        other.offer(REQUEST);
        machine.ring(1);
        assert!(machine.run());
        assert_eq!(other.used_index(), round, "the ring goes round");
    }
}

#[test]
fn isr_says_what_happened_until_it_is_read() {
    let (mut machine, _) = echo();
    let [mut ring, _] = machine.start(0);
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(machine.read(ISR), [1, 0]);
    assert_eq!(machine.read(ISR), [0]);
    ring.set_available_index(300);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(machine.read(ISR), [2, 0, 0, 0]);
    assert_eq!(machine.read(ISR), [0]);
}

#[test]
fn a_queue_without_a_vector_interrupts_nobody() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(0);
    machine.write_u16(register::QUEUE_SELECT, 0);
    machine.write_u16(register::QUEUE_VECTOR, NO_VECTOR);
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(served(&log), 1);
    assert_eq!([machine.fired(QUEUE_0), machine.fired(QUEUE_1), machine.fired(CONFIG)], [0; 3]);
}

#[test]
fn a_masked_vector_fires_when_it_is_unmasked() {
    let (mut machine, _) = echo();
    let [mut ring, _] = machine.start(0);
    machine.route(QUEUE_0, true);
    for _ in 0..2 {
        ring.offer(REQUEST);
    }
    machine.ring(0);
    assert!(machine.run());
    assert_eq!((machine.fired(QUEUE_0), machine.read_u64(MSIX_PENDING)), (0, 1));
    machine.write_u32(MSIX_TABLE + 12, 0);
    assert_eq!((machine.fired(QUEUE_0), machine.read_u64(MSIX_PENDING)), (1, 0));
}

#[test]
fn a_masked_function_fires_when_it_is_unmasked() {
    let (mut machine, _) = echo();
    let [mut ring, _] = machine.start(0);
    machine.set_msix_control(0xc000);
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!((machine.fired(QUEUE_0), machine.read_u64(MSIX_PENDING)), (0, 1));
    // Writes only the upper byte, as some drivers do.
    let at = machine.msix_control_at();
    machine.function.write_config(at + 1, &[0x80]);
    assert_eq!((machine.fired(QUEUE_0), machine.read_u64(MSIX_PENDING)), (1, 0));
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none_until_it_wants_one_again() {
    let (mut machine, _) = echo();
    let [mut ring, _] = machine.start(0);
    for (flags, fired) in [(1, 0), (1, 0), (0, 1), (1, 0)] {
        ring.set_available_flags(flags);
        let before = ring.used_index();
        ring.offer(REQUEST);
        machine.ring(0);
        assert!(machine.run());
        assert_eq!((ring.used_index() - before, machine.fired(QUEUE_0)), (1, fired), "{flags}");
    }
}

#[test]
fn with_event_idx_only_the_request_that_was_named_interrupts() {
    let (mut machine, _) = echo();
    let [mut ring, _] = machine.start(RING_EVENT_IDX);
    ring.set_used_event(2);
    for (number, fired) in [(0, 0), (1, 0), (2, 1), (3, 0)] {
        ring.offer(REQUEST);
        machine.ring(0);
        assert!(machine.run());
        assert_eq!((ring.used_index(), machine.fired(QUEUE_0)), (number + 1, fired));
    }
    ring.set_used_event(5);
    for _ in 4..8 {
        ring.offer(REQUEST);
    }
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(machine.fired(QUEUE_0), 1, "requests 4 to 7 in one go, 5 among them");
}

#[test]
fn with_event_idx_the_device_names_the_request_of_its_next_doorbell() {
    let (mut machine, _) = echo();
    let [mut ring, _] = machine.start(RING_EVENT_IDX);
    for number in 1..=3 {
        ring.offer(REQUEST);
        machine.ring(0);
        assert!(machine.run());
        assert_eq!(ring.available_event(), number);
    }
}

#[test]
fn a_table_of_descriptors_is_a_chain() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(RING_INDIRECT_DESC);
    ring.describe(0x2_0000, 0, (0x1_0000, 16, NEXT), 1);
    ring.describe(0x2_0000, 1, (0x1_1000, 512, WRITE), 0);
    ring.offer(&[(0x2_0000, 32, INDIRECT)]);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(log.lock().unwrap().served, [(0, REQUEST.to_vec())]);
    assert_eq!(ring.used_element(0), (0, 512));
}

#[test]
fn a_paused_device_touches_no_ring_and_a_resumed_one_handles_every_doorbell() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(RING_EVENT_IDX);
    pause(&mut machine.function);
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!((served(&log), ring.used_index(), ring.available_event()), (0, 0, 0));
    machine.function.resume();
    assert!(machine.run());
    assert_eq!((served(&log), ring.used_index(), ring.available_event()), (1, 1, 1));
}
