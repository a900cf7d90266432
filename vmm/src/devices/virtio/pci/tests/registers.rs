//! Tests of the registers: what a driver reads, and which writes take effect.

use super::*;
use crate::devices::virtio::features::RING_RESET;
use crate::devices::virtio::pci::backend::status::{FAILED, NEEDS_RESET};

const READY: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK;

#[test]
fn a_driver_finds_every_structure_through_the_capabilities() {
    let (mut machine, _) = echo();
    assert_eq!(machine.config(0x00), [0xf4, 0x1a, 0x40 + 42, 0x10]);
    assert_eq!(machine.config(0x08), [1, 0, 0, 0xff]);
    let mut places = Vec::new();
    for (at, id) in machine.capabilities() {
        if id == msix::CAPABILITY {
            assert_eq!(machine.config(at + 2), 2u16.to_le_bytes(), "three vectors, off");
            let table = u32::from_le_bytes(machine.config(at + 4));
            let pending = u32::from_le_bytes(machine.config(at + 8));
            places.extend([(table, 3 * 16), (pending, 8)]);
            continue;
        }
        assert_eq!(id, 0x09);
        let [len, kind, bar, ..]: [u8; 6] = machine.config(at + 2);
        let offset = u32::from_le_bytes(machine.config(at + 8));
        let length = u32::from_le_bytes(machine.config(at + 12));
        if kind == 5 {
            assert_eq!((len, bar, offset, length), (20, 0, 0, 0));
            continue;
        }
        assert_eq!((len, bar), (if kind == 2 { 20 } else { 16 }, 0));
        let expected = match kind {
            1 => (0x0000, 0x3c),
            2 => (0x3000, 0x1000),
            3 => (0x1000, 4),
            4 => (0x2000, 0x1000),
            other => panic!("a capability of type {other}"),
        };
        assert_eq!((offset, length), expected, "type {kind}");
        places.push(expected);
    }
    assert_eq!(places.len(), 6);
    places.sort_unstable();
    assert!(places.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{places:x?}");
    assert!(places.iter().all(|(offset, length)| offset + length <= BAR_SIZE));
}

#[test]
fn every_queue_says_where_its_doorbell_is() {
    let (mut machine, _) = echo();
    assert_eq!(machine.read_u16(register::QUEUES), 2);
    for (queue, size) in [(0, 256), (1, 8)] {
        machine.write_u16(register::QUEUE_SELECT, queue);
        assert_eq!(machine.read_u16(register::QUEUE_SIZE), size);
        let off = machine.read_u16(register::QUEUE_NOTIFY_OFF);
        let address = u64::from(BAR) + NOTIFY + u64::from(off) * 4;
        assert_eq!(off, queue);
        assert!(machine.wires.doorbells.lock().unwrap().contains_key(&address));
    }
    assert_eq!(machine.wires.doorbells.lock().unwrap().len(), 2);
}

#[test]
fn features_are_offered_and_read_back_in_halves() {
    let (mut machine, log) = echo();
    let mut halves = [0; 3];
    for (select, half) in (0u32..).zip(&mut halves) {
        machine.write_u32(register::DEVICE_FEATURE_SELECT, select);
        *half = machine.read_u32(register::DEVICE_FEATURE);
    }
    let offered = LOUD | RING_EVENT_IDX | RING_INDIRECT_DESC | VERSION_1 | RING_RESET;
    assert_eq!(halves, [offered as u32, (offered >> 32) as u32, 0]);

    assert!(machine.negotiate(LOUD | VERSION_1));
    for (select, half) in [(0u32, 1u32), (1, 1), (2, 0), (u32::MAX, 0)] {
        machine.write_u32(register::DRIVER_FEATURE_SELECT, select);
        assert_eq!(machine.read_u32(register::DRIVER_FEATURE), half, "half {select}");
    }
    assert_eq!(log.lock().unwrap().negotiated, [LOUD | VERSION_1]);
}

#[test]
fn a_driver_that_wants_the_wrong_features_is_refused_and_may_try_again() {
    for wrong in [LOUD, 0, VERSION_1 | 1 << 3, VERSION_1 | 1 << 34, u64::MAX] {
        let (mut machine, log) = echo();
        assert!(!machine.negotiate(wrong), "{wrong:#x}");
        assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER);
        assert!(log.lock().unwrap().negotiated.is_empty());
        assert!(machine.negotiate(VERSION_1));
        assert_eq!(log.lock().unwrap().negotiated, [VERSION_1]);
    }
}

#[test]
fn features_cannot_change_after_features_ok() {
    let (mut machine, _) = echo();
    assert!(machine.negotiate(LOUD | VERSION_1));
    machine.write_u32(register::DRIVER_FEATURE_SELECT, 0);
    machine.write_u32(register::DRIVER_FEATURE, u32::MAX);
    assert_eq!(machine.read_u32(register::DRIVER_FEATURE), LOUD as u32);
}

#[test]
fn the_steps_of_the_initialization_cannot_be_skipped() {
    let before: [(&[u8], u8, u8); 9] = [
        (&[], DRIVER, 0),
        (&[], FEATURES_OK, 0),
        (&[], DRIVER_OK, 0),
        (&[ACKNOWLEDGE], ACKNOWLEDGE | FEATURES_OK, ACKNOWLEDGE),
        (&[ACKNOWLEDGE], ACKNOWLEDGE | DRIVER_OK, ACKNOWLEDGE),
        (
            &[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER],
            ACKNOWLEDGE | DRIVER | DRIVER_OK,
            ACKNOWLEDGE | DRIVER,
        ),
        // Bits are only added.
        (&[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER], DRIVER, ACKNOWLEDGE | DRIVER),
        // Undefined bits, and the bit that only the device sets.
        (&[ACKNOWLEDGE], ACKNOWLEDGE | NEEDS_RESET | 0x30, ACKNOWLEDGE),
        (&[], FAILED, FAILED),
    ];
    for (steps, last, expected) in before {
        let (mut machine, _) = echo();
        steps.iter().for_each(|status| machine.set_status(*status));
        machine.set_status(last);
        assert_eq!(machine.status(), expected, "{steps:x?}, then {last:#x}");
    }
}

#[test]
fn a_status_of_all_bits_at_once_is_taken_in_order() {
    let (mut machine, log) = echo();
    machine.write_u32(register::DRIVER_FEATURE_SELECT, 1);
    machine.write_u32(register::DRIVER_FEATURE, 1);
    machine.set_status(READY | DRIVER_OK);
    assert_eq!(machine.status(), READY | DRIVER_OK);
    assert_eq!(log.lock().unwrap().negotiated, [VERSION_1]);
}

#[test]
fn queue_addresses_are_written_and_read_in_every_width() {
    let (mut machine, _) = echo();
    assert!(machine.negotiate(VERSION_1));
    for (at, value) in [
        (register::QUEUE_DESCRIPTORS, 0x1122_3344_5566_7780),
        (register::QUEUE_AVAILABLE, 0x2233_4455_6677_8894),
        (register::QUEUE_USED, 0x3344_5566_7788_99ac),
    ] {
        machine.write_u64(at, value);
        assert_eq!(machine.read_u64(at), value);
        assert_eq!(machine.read_u32(at), value as u32);
        assert_eq!(machine.read_u16(at + 4), (value >> 32) as u16);
        assert_eq!(machine.read_u8(at + 7), (value >> 56) as u8);
        machine.write_u32(at, 0x50);
        assert_eq!(machine.read_u64(at), value >> 32 << 32 | 0x50);
        machine.write_u32(at + 4, 0x60);
        assert_eq!(machine.read_u64(at), 0x60_0000_0050);
    }
}

#[test]
fn writes_of_any_other_width_or_place_change_nothing() {
    let (mut machine, _) = echo();
    assert!(machine.negotiate(VERSION_1));
    machine.write_u16(register::QUEUE_SELECT, 1);
    let before: [u8; common::LEN] = machine.read(0);
    // Offset and width of all writes that have an effect.
    let meaningful = [
        (0x00, 4),
        (0x08, 4),
        (0x0c, 4),
        (0x10, 2),
        (0x14, 1),
        (0x16, 2),
        (0x18, 2),
        (0x1a, 2),
        (0x1c, 2),
        (0x20, 4),
        (0x20, 8),
        (0x24, 4),
        (0x28, 4),
        (0x28, 8),
        (0x2c, 4),
        (0x30, 4),
        (0x30, 8),
        (0x34, 4),
    ];
    for at in 0..REGION {
        for width in 1..=8 {
            if !meaningful.contains(&(at, width)) {
                machine.write(at, &[0x11; 8][..width]);
            }
        }
    }
    assert_eq!(machine.read::<{ common::LEN }>(0), before);
}

#[test]
fn reads_across_the_end_of_the_registers_see_ones() {
    let (mut machine, _) = echo();
    assert_eq!(machine.read(common::LEN as u64 - 2), [0xff; 4]);
    assert_eq!(machine.read(0xffe), [0xff; 4]);
}

#[test]
fn a_queue_that_does_not_exist_has_no_size_and_takes_nothing() {
    let (mut machine, _) = echo();
    let ring = machine.rings()[0].clone();
    assert!(machine.negotiate(VERSION_1));
    let state = machine.function.save().unwrap();
    for index in [2, 3, 0xffff] {
        assert!(!machine.set_up(index, &ring, 0));
        assert_eq!(machine.read(register::QUEUE_SIZE), [0; 0x20]);
    }
    machine.write_u16(register::QUEUE_SELECT, 0);
    assert_eq!(machine.function.save().unwrap(), state);
}

#[test]
fn sizes_that_are_no_power_of_two_or_too_large_are_not_taken() {
    let (mut machine, _) = echo();
    for (wrong, size) in [(0, 256), (3, 256), (257, 256), (512, 256), (0x8000, 256), (64, 64)] {
        machine.write_u16(register::QUEUE_SIZE, wrong);
        assert_eq!(machine.read_u16(register::QUEUE_SIZE), size, "{wrong}");
    }
}

#[test]
fn misaligned_rings_are_not_taken() {
    let (mut machine, _) = echo();
    for (at, wrong) in [
        (register::QUEUE_DESCRIPTORS, 0x1008),
        (register::QUEUE_AVAILABLE, 0x1001),
        (register::QUEUE_USED, 0x1002),
    ] {
        machine.write_u64(at, 0x2000);
        machine.write_u64(at, wrong);
        assert_eq!(machine.read_u64(at), 0x2000);
    }
}

#[test]
fn rings_outside_ram_are_not_enabled() {
    let (mut machine, log) = echo();
    assert!(machine.negotiate(VERSION_1));
    let good = [0x4000, 0x5000, 0x6000];
    let places = [
        0x7_fff0,
        0x8_0000,
        0x9_0000,
        0xf_fff0,
        0x10_fff0,
        0x11_0000,
        u64::from(BAR),
        1 << 32,
        u64::MAX - 0xfff,
        !0xf,
    ];
    for wrong in places {
        for which in 0..3 {
            let mut addresses = good;
            addresses[which] = wrong;
            machine.write_u64(register::QUEUE_DESCRIPTORS, addresses[0]);
            machine.write_u64(register::QUEUE_AVAILABLE, addresses[1]);
            machine.write_u64(register::QUEUE_USED, addresses[2]);
            machine.write_u16(register::QUEUE_ENABLE, 1);
            assert_eq!(machine.read_u16(register::QUEUE_ENABLE), 0, "{addresses:x?}");
        }
    }
    machine.set_status(READY | DRIVER_OK);
    machine.ring(0);
    assert!(machine.run());
    assert!(log.lock().unwrap().served.is_empty());
    // The last address at which the rings of a queue with two entries fit.
    machine.write_u16(register::QUEUE_SIZE, 2);
    machine.write_u64(register::QUEUE_DESCRIPTORS, 0x10_ffe0);
    machine.write_u64(register::QUEUE_AVAILABLE, 0x7_fff6);
    machine.write_u64(register::QUEUE_USED, 0x7_ffe8);
    machine.write_u16(register::QUEUE_ENABLE, 1);
    assert_eq!(machine.read_u16(register::QUEUE_ENABLE), 1);
}

#[test]
fn a_queue_is_enabled_only_after_features_are_agreed_and_closed_then() {
    let (mut machine, _) = echo();
    let [ring, _] = machine.rings();
    machine.set_status(ACKNOWLEDGE);
    machine.set_status(ACKNOWLEDGE | DRIVER);
    assert!(!machine.set_up(0, &ring, 0));
    assert!(machine.negotiate(VERSION_1));
    assert!(machine.set_up(0, &ring, 0));
    let before: [u8; common::LEN] = machine.read(0);
    machine.write_u16(register::QUEUE_SIZE, 2);
    machine.write_u64(register::QUEUE_DESCRIPTORS, 0x100);
    machine.write_u32(register::QUEUE_AVAILABLE, 0x100);
    machine.write_u32(register::QUEUE_USED + 4, 0x100);
    machine.write_u16(register::QUEUE_ENABLE, 0);
    assert_eq!(machine.read::<{ common::LEN }>(0), before);
}

#[test]
fn only_one_enables_a_queue() {
    let (mut machine, _) = echo();
    let [ring, _] = machine.rings();
    assert!(machine.negotiate(VERSION_1));
    assert!(machine.set_up(0, &ring, 0));
    machine.write_u16(register::QUEUE_SELECT, 1);
    for value in [0, 2, 0x101, 0xffff] {
        machine.write_u16(register::QUEUE_ENABLE, value);
        assert_eq!(machine.read_u16(register::QUEUE_ENABLE), 0, "{value:#x}");
    }
}

#[test]
fn a_vector_that_the_function_does_not_have_reads_back_as_none() {
    let (mut machine, _) = echo();
    for (written, read) in [(0, 0), (2, 2), (3, NO_VECTOR), (0x7ff, NO_VECTOR), (1, 1)] {
        for at in [register::CONFIG_VECTOR, register::QUEUE_VECTOR] {
            machine.write_u16(at, written);
            assert_eq!(machine.read_u16(at), read, "{written:#x} at {at:#x}");
        }
    }
}

#[test]
fn accesses_to_the_device_configuration_reach_the_device() {
    let (mut machine, _) = echo();
    machine.write(DEVICE + 1, &[7, 8]);
    assert_eq!(machine.read(DEVICE), [0, 7, 8, 0, 0, 0, 0, 0]);
    assert_eq!(machine.read(DEVICE + REGION - 1), [0; 4]);
}

#[test]
fn a_function_with_memory_space_off_ignores_accesses() {
    let (mut machine, _) = echo();
    machine.function.write_config(4, &[0, 0]);
    machine.set_status(ACKNOWLEDGE);
    assert_eq!(machine.read(register::STATUS), [0xff]);
    machine.function.write_config(4, &[2, 0]);
    assert_eq!(machine.status(), 0);
}

#[test]
fn a_reset_clears_all_settings_of_the_driver() {
    let (mut machine, log) = echo();
    let fresh = machine.function.save().unwrap();
    let [mut ring, _] = machine.start(LOUD | RING_EVENT_IDX);
    machine.route(QUEUE_0, true);
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    machine.write_u32(register::DEVICE_FEATURE_SELECT, 1);
    assert_eq!(machine.read(MSIX_PENDING), [1, 0, 0, 0, 0, 0, 0, 0]);
    machine.set_status(0);
    let reset = machine.function.save().unwrap();
    assert_eq!(reset.transport.msix.pending, [0], "an interrupt for a driver that is gone");
    // MSI-X and the header belong to PCI; a reset of the device does not change them.
    let expected = VirtioPciStateV2 { msix: reset.transport.msix.clone(), ..fresh.transport };
    assert_eq!(reset.transport, expected);
    assert_eq!(log.lock().unwrap().negotiated.last(), Some(&0));
}

#[test]
fn a_function_can_be_driven_again_after_a_reset() {
    let (mut machine, log) = echo();
    for round in 1..=3 {
        // The driver has put a new ring at the address of the old one.
        machine.rings()[0].set_available_index(0);
        let [mut ring, _] = machine.start(LOUD);
        ring.offer(REQUEST);
        machine.ring(0);
        assert!(machine.run());
        assert_eq!(log.lock().unwrap().served.len(), round);
        assert_eq!((ring.used_index(), machine.fired(QUEUE_0)), (1, 1), "{round}");
        machine.set_status(0);
    }
}

/// Has the driver reach the `N` bytes at `offset` of the BAR through the configuration space.
fn choose(machine: &mut Machine<Echo>, offset: u32, length: u32) -> u8 {
    let capabilities = machine.capabilities();
    let (at, _) = *capabilities.last().unwrap();
    assert_eq!(machine.config(at + 3), [5]);
    machine.function.write_config(at + 4, &[0]);
    machine.function.write_config(at + 8, &offset.to_le_bytes());
    machine.function.write_config(at + 12, &length.to_le_bytes());
    at + 16
}

#[test]
fn firmware_reaches_every_register_through_the_configuration_space() {
    let (mut machine, _) = echo();
    // Before the BAR is mapped.
    machine.function.write_config(4, &[0, 0]);
    let status = register::STATUS as u32;
    let data = choose(&mut machine, status, 1);
    machine.function.write_config(data, &[ACKNOWLEDGE]);
    assert_eq!(machine.config(data), [ACKNOWLEDGE]);
    let data = choose(&mut machine, register::QUEUES as u32, 2);
    assert_eq!(machine.config(data), 2u16.to_le_bytes());
    machine.function.write_config(4, &[2, 0]);
    assert_eq!(machine.status(), ACKNOWLEDGE);

    // The choice survives an update.
    let log = SharedLog::default();
    pause(&mut machine.function);
    let saved = machine.function.save().unwrap();
    let resources = resources(&machine.memory, &machine.wires);
    let function = VirtioPci::<Echo>::restore(saved.clone(), (resources, log)).unwrap();
    assert_eq!(function.save().unwrap(), saved);
    let mut machine = Machine::with(function, machine.memory, machine.wires);
    assert_eq!(machine.config(data), 2u16.to_le_bytes());
}

#[test]
fn an_access_through_the_configuration_space_that_reaches_no_register_changes_nothing() {
    let (mut machine, _) = echo();
    machine.set_status(ACKNOWLEDGE);
    let status = register::STATUS as u32;
    for (offset, length) in
        [(status, 0), (status, 3), (status, 8), (status - 2, 4), (BAR_SIZE, 4), (u32::MAX, 1)]
    {
        let data = choose(&mut machine, offset, length);
        machine.function.write_config(data, &[0xff; 4]);
        let _: [u8; 4] = machine.config(data);
        assert_eq!(machine.status(), ACKNOWLEDGE, "{offset:#x} {length}");
    }
    // Writes next to the data choose, and reach nothing.
    let data = choose(&mut machine, status, 1);
    machine.function.write_config(data - 4, &1u32.to_le_bytes());
    let _: [u8; 4] = machine.config(data - 4);
    assert_eq!(machine.status(), ACKNOWLEDGE);
}
