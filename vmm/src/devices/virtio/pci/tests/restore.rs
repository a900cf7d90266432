//! Tests of a function that continues after a live update at any point of its work.

use super::*;
use crate::devices::virtio::features::RING_RESET;
use crate::devices::virtio::pci::backend::status::NEEDS_RESET;

/// One step of a driver. `rings` is the driver's own state, which stays in the guest.
type Step = fn(&mut Machine<Echo>, &mut [Ring; 2]);

/// Bits 32 and up of the features that are offered.
const OFFERED_HIGH: u32 = ((VERSION_1 | RING_RESET) >> 32) as u32;

/// The initialization sequence and a first request, in steps between which a vCPU may be paused.
const STEPS: [Step; 19] = [
    |m, _| m.set_status(ACKNOWLEDGE),
    |m, _| m.set_status(ACKNOWLEDGE | DRIVER),
    |m, _| m.write_u32(register::DEVICE_FEATURE_SELECT, 1),
    |m, _| assert_eq!(m.read_u32(register::DEVICE_FEATURE), OFFERED_HIGH),
    |m, _| m.write_u32(register::DRIVER_FEATURE, (LOUD | RING_EVENT_IDX) as u32),
    |m, _| m.write_u32(register::DRIVER_FEATURE_SELECT, 1),
    |m, _| m.write_u32(register::DRIVER_FEATURE, 1),
    |m, _| m.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK),
    |m, _| assert_eq!(m.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK),
    |m, _| m.set_msix_control(0x8000),
    |m, _| m.route(QUEUE_1, false),
    |m, _| m.write_u16(register::QUEUE_SELECT, 1),
    |m, _| m.write_u16(register::QUEUE_VECTOR, QUEUE_1 as u16),
    |m, r| m.write_u64(register::QUEUE_DESCRIPTORS, r[1].descriptors()),
    |m, r| m.write_u64(register::QUEUE_AVAILABLE, r[1].available()),
    |m, r| m.write_u64(register::QUEUE_USED, r[1].used()),
    |m, _| m.write_u16(register::QUEUE_ENABLE, 1),
    |m, r| {
        r[1].offer(REQUEST);
        m.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    },
    |m, _| m.ring(1),
];

#[test]
fn a_function_goes_on_from_every_step_of_its_initialization() {
    for cut in 0..=STEPS.len() {
        let (mut machine, log) = echo();
        let mut rings = machine.rings();
        let (before, after) = STEPS.split_at(cut);
        before.iter().for_each(|step| step(&mut machine, &mut rings));
        let mut machine = machine.switch(log.clone());
        machine.function.resume();
        assert!(machine.run());
        after.iter().for_each(|step| step(&mut machine, &mut rings));
        assert!(machine.run());
        assert_eq!(log.lock().unwrap().served, [(1, REQUEST.to_vec())], "cut at step {cut}");
        assert_eq!(rings[1].used_index(), 1);
        assert_ne!(machine.fired(QUEUE_1), 0, "cut at step {cut}");
        assert_eq!(machine.wires.route(QUEUE_1), Some(message(QUEUE_1)));
    }
}

#[test]
fn what_is_in_the_rings_is_executed_after_the_resume_without_a_doorbell() {
    let (mut machine, log) = echo();
    let mut rings = machine.start(LOUD);
    rings[0].offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    pause(&mut machine.function);
    for ring in &mut rings {
        ring.offer(REQUEST);
        ring.offer(REQUEST);
    }
    // The doorbell rings in the old kernel and is lost with it.
    machine.ring(0);
    let mut machine = machine.switch(log.clone());
    machine.ring(1);
    assert!(machine.run());
    assert_eq!(log.lock().unwrap().served.len(), 1, "nothing happens before the resume");
    assert_eq!((rings[0].used_index(), rings[1].used_index()), (1, 0));
    machine.function.resume();
    assert!(machine.run());
    assert_eq!((rings[0].used_index(), rings[1].used_index()), (3, 2));
    assert_eq!(log.lock().unwrap().served.len(), 5, "each once");
}

#[test]
fn an_interrupt_that_may_have_been_lost_is_raised_again() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(LOUD | RING_EVENT_IDX);
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    // The interrupt has fired under the old kernel, and may not have reached the guest.
    let mut machine = machine.switch(log);
    assert_eq!(machine.fired(QUEUE_0), 0, "a restore fires nothing");
    machine.function.resume();
    assert_eq!([machine.fired(QUEUE_0), machine.fired(QUEUE_1)], [1, 1]);
    assert_eq!(machine.fired(CONFIG), 0, "the configuration has not changed");
}

#[test]
fn a_restored_device_signals_needs_reset_again() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(0);
    ring.set_available_index(300);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(machine.fired(CONFIG), 1);
    let mut machine = machine.switch(log);
    machine.function.resume();
    assert!(machine.run());
    assert_ne!(machine.status() & NEEDS_RESET, 0);
    assert_eq!((machine.fired(QUEUE_0), machine.fired(CONFIG)), (0, 1));
}

#[test]
fn routes_are_set_up_before_the_resume() {
    let (mut machine, log) = echo();
    machine.start(0);
    machine.route(CONFIG, true);
    let mut machine = machine.switch(log);
    assert_eq!(machine.wires.route(QUEUE_0), Some(message(QUEUE_0)));
    assert_eq!(machine.wires.route(QUEUE_1), Some(message(QUEUE_1)));
    assert_eq!(machine.wires.route(CONFIG), None, "masked, so not yet");
    machine.route(CONFIG, false);
    assert_eq!(machine.wires.route(CONFIG), Some(message(CONFIG)));
}

#[test]
fn a_pending_vector_fires_when_it_is_unmasked_after_a_restore() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(0);
    machine.route(QUEUE_0, true);
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    let mut machine = machine.switch(log);
    machine.function.resume();
    assert!(machine.run());
    assert_eq!((machine.fired(QUEUE_0), machine.read_u64(MSIX_PENDING)), (0, 1));
    machine.write_u32(MSIX_TABLE + 12, 0);
    assert_eq!((machine.fired(QUEUE_0), machine.read_u64(MSIX_PENDING)), (1, 0));
}

#[test]
fn a_masked_function_stays_masked() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(0);
    machine.set_msix_control(0xc000);
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    let mut machine = machine.switch(log);
    machine.function.resume();
    let at = machine.msix_control_at();
    assert_eq!(machine.config(at), 0xc002u16.to_le_bytes());
    assert_eq!(machine.fired(QUEUE_0), 0);
    machine.set_msix_control(0x8000);
    assert_eq!(machine.fired(QUEUE_0), 1);
}

#[test]
fn interrupts_that_the_driver_suppressed_stay_suppressed_and_the_others_do_not() {
    let (mut machine, log) = echo();
    let [mut ring, _] = machine.start(RING_EVENT_IDX);
    ring.set_used_event(3);
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    assert_eq!(machine.fired(QUEUE_0), 0);
    let mut machine = machine.switch(log);
    machine.function.resume();
    assert!(machine.run());
    assert_eq!(machine.fired(QUEUE_0), 1, "the one of the resume");
    for fired in [0, 0, 1, 0] {
        assert_eq!(ring.available_event(), ring.used_index(), "the device wants a doorbell");
        ring.offer(REQUEST);
        machine.ring(0);
        assert!(machine.run());
        assert_eq!(machine.fired(QUEUE_0), fired, "request {}", ring.used_index());
    }
}

#[test]
fn a_bare_pause_and_resume_loses_nothing() {
    for features in [0, RING_EVENT_IDX] {
        let (mut machine, _) = echo();
        let [mut ring, _] = machine.start(features);
        ring.set_used_event(0);
        pause(&mut machine.function);
        ring.offer(REQUEST);
        machine.ring(0);
        assert!(machine.run());
        machine.function.resume();
        assert!(machine.run());
        assert_eq!(ring.used_index(), 1);
        assert_eq!(machine.fired(QUEUE_0), 2, "one from the resume and one from the request");
        ring.set_used_event(1);
        ring.offer(REQUEST);
        machine.ring(0);
        assert!(machine.run());
        assert_eq!((ring.used_index(), machine.fired(QUEUE_0)), (2, 1));
    }
}

#[test]
fn a_restored_device_gets_the_negotiated_features_again() {
    let (mut machine, log) = echo();
    machine.start(LOUD | RING_EVENT_IDX);
    let fresh = SharedLog::default();
    let mut machine = machine.switch(fresh.clone());
    let agreed = LOUD | RING_EVENT_IDX | VERSION_1;
    assert_eq!(fresh.lock().unwrap().negotiated, [agreed]);
    assert_eq!(log.lock().unwrap().negotiated, [agreed]);
    machine.write_u32(register::DRIVER_FEATURE_SELECT, 0);
    assert_eq!(machine.read_u32(register::DRIVER_FEATURE), agreed as u32);
    // Features that the driver wrote without FEATURES_OK are not agreed upon.
    let (mut machine, log) = echo();
    machine.write_u32(register::DRIVER_FEATURE, u32::MAX);
    let mut machine = machine.switch(log.clone());
    assert!(log.lock().unwrap().negotiated.is_empty());
    assert_eq!(machine.read_u32(register::DRIVER_FEATURE), u32::MAX);
}

#[test]
fn doorbells_are_in_place_with_the_function_and_the_header_is_as_it_was() {
    let (mut machine, log) = echo();
    machine.start(0);
    machine.write(DEVICE, &[1, 2, 3, 4]);
    machine.function.write_config(4, &[0x04, 0x04]);
    machine.function.write_config(0x10, &[0xff; 4]);
    machine.function.write_config(0x3c, &[9]);
    let mut machine = machine.switch(log);
    assert_eq!(machine.wires.doorbells.lock().unwrap().len(), 2);
    assert_eq!(machine.config(0x04), [0x04, 0x04]);
    assert_eq!(machine.config(0x10), (!(BAR_SIZE - 1)).to_le_bytes());
    assert_eq!(machine.config(0x3c), [9]);
    assert_eq!(machine.read(register::STATUS), [0xff], "its memory is off");
    machine.function.write_config(4, &[2, 0]);
    assert_eq!(machine.read(DEVICE), [1, 2, 3, 4]);
}

#[test]
fn a_second_live_update_finds_what_the_first_left() {
    let (mut machine, log) = echo();
    let mut rings = machine.start(LOUD | RING_EVENT_IDX);
    for round in 0..10u16 {
        rings[1].offer(REQUEST);
        machine = machine.switch(log.clone());
        machine.function.resume();
        assert!(machine.run());
        assert_eq!(rings[1].used_index(), round + 1);
    }
    assert_eq!(log.lock().unwrap().served.len(), 10);
}
