//! The device as a guest sees it: interrupt, power-off, and the same state after a live update.

use std::sync::atomic::Ordering;

use event_manager::{EventManager, SubscriberOps};

use super::registers::{POWER_BUTTON, TIMER};
use super::*;
use crate::kvm::interrupts::fake::FakeWires;
use crate::state::Schema;
use crate::state::node::read_node;

const STATUS: u64 = 0;
const ENABLE: u64 = 2;
const CONTROL: u64 = 4;
const PM_TIMER: u64 = 8;
const S5: u16 = 5 << 10 | 1 << 13;

type Asked = Arc<Mutex<Vec<PowerEvent>>>;

fn resources() -> (AcpiResources, Arc<FakeWires>, Asked) {
    let (wires, asked) = (Arc::new(FakeWires::default()), Asked::default());
    let sink = asked.clone();
    let on_power: OnPower = Arc::new(move |event| sink.lock().unwrap().push(event));
    let resources = AcpiResources { interrupts: wires.clone(), clock: wires.clone(), on_power };
    (resources, wires, asked)
}

fn device() -> (Acpi, Arc<FakeWires>, Asked) {
    let (resources, wires, asked) = resources();
    (Acpi::new(resources).unwrap(), wires, asked)
}

fn write(device: &mut Acpi, offset: u64, value: u16) {
    device.write(offset, &value.to_le_bytes());
}

fn read(device: &mut Acpi, offset: u64) -> u16 {
    let mut data = [0xff; 2];
    device.read(offset, &mut data);
    u16::from_le_bytes(data)
}

fn timer(device: &mut Acpi) -> u32 {
    let mut data = [0xff; 4];
    device.read(PM_TIMER, &mut data);
    u32::from_le_bytes(data)
}

fn sci(wires: &FakeWires) -> bool {
    wires.levels.lock().unwrap()[&layout::SCI_IRQ]
}

/// The device after a live update, with other connections.
fn updated(mut device: Acpi) -> (Acpi, Arc<FakeWires>) {
    device.pause();
    let state = device.save().unwrap();
    assert_eq!(state, device.save().unwrap(), "a save changes nothing");
    let state = read_node(&state.to_node("acpi@600"), "/").unwrap();
    let (resources, wires, _) = resources();
    let mut restored = Acpi::restore(state, resources).unwrap();
    restored.resume();
    (restored, wires)
}

#[test]
fn the_button_raises_the_sci_when_it_is_enabled_until_the_guest_clears_it() {
    let (mut device, wires, _) = device();
    device.press();
    assert_eq!(read(&mut device, STATUS), POWER_BUTTON);
    assert!(!sci(&wires), "not enabled");
    write(&mut device, ENABLE, POWER_BUTTON);
    assert!(sci(&wires));
    write(&mut device, STATUS, TIMER);
    assert!(sci(&wires), "another bit was cleared");
    // Byte by byte, as a guest may.
    device.write(STATUS + 1, &[1]);
    assert_eq!(read(&mut device, STATUS), 0);
    assert!(!sci(&wires));
}

#[test]
fn a_button_that_was_pressed_before_an_update_is_pressed_after_it() {
    let (mut device, _, _) = device();
    write(&mut device, ENABLE, POWER_BUTTON);
    device.press();
    let (mut device, wires) = updated(device);
    assert!(sci(&wires));
    assert_eq!(read(&mut device, STATUS), POWER_BUTTON);
    assert_eq!(read(&mut device, ENABLE), POWER_BUTTON);
    write(&mut device, STATUS, POWER_BUTTON);
    let (_, wires) = updated(device);
    assert!(!sci(&wires), "the line is low in the new interrupt controllers");
}

#[test]
fn only_sleep_type_5_with_enable_powers_off_in_words_and_in_bytes() {
    let (mut device, _, asked) = device();
    for value in (0..=u16::MAX).filter(|value| value & 0x3c00 != S5) {
        write(&mut device, CONTROL, value);
    }
    device.write(CONTROL, &[0x34]);
    write(&mut device, STATUS, S5);
    write(&mut device, ENABLE, S5);
    assert_eq!(*asked.lock().unwrap(), []);
    write(&mut device, CONTROL, S5);
    device.write(CONTROL + 1, &[0x34]);
    // Together with the registers before it.
    device.write(ENABLE, &[0, 0, 0, 0x34]);
    assert_eq!(*asked.lock().unwrap(), [PowerEvent::Shutdown; 3]);
    assert_eq!(read(&mut device, CONTROL), 0x1401, "no enable bit, and SCI_EN");
}

#[test]
fn accesses_of_every_width_and_place_give_the_same_bytes() {
    let (mut device, wires, _) = device();
    wires.now_ns.store(1_000_000_000, Ordering::Relaxed);
    write(&mut device, ENABLE, POWER_BUTTON);
    let bytes: Vec<u8> = (0..16)
        .map(|offset| {
            let mut byte = [0xff];
            device.read(offset, &mut byte);
            byte[0]
        })
        .collect();
    assert_eq!(bytes, [0, 0, 0, 1, 1, 0, 0, 0, 0x99, 0x9e, 0x36, 0, 0, 0, 0, 0]);
    for width in [2, 4, 8] {
        for offset in 0..=16 - width {
            let mut data = vec![0xff; width];
            device.read(offset as u64, &mut data);
            assert_eq!(data, bytes[offset..offset + width], "{width} at {offset}");
            // Writing zeros clears nothing, and the timer is read-only.
            device.write(offset as u64, &vec![0; width]);
            write(&mut device, ENABLE, POWER_BUTTON);
        }
    }
    assert_eq!(timer(&mut device), 3_579_545);
}

#[test]
fn the_timer_goes_on_over_an_update_as_the_clock_does() {
    let (mut device, wires, _) = device();
    wires.now_ns.store(10_000_000_000, Ordering::Relaxed);
    let before = timer(&mut device);
    device.pause();
    let state = device.save().unwrap();
    let (resources, wires, _) = resources();
    let mut restored = Acpi::restore(state, resources).unwrap();
    // The clock is set after the devices are restored, before they resume.
    wires.now_ns.store(12_000_000_000, Ordering::Relaxed);
    restored.resume();
    assert_eq!(timer(&mut restored).wrapping_sub(before) & 0xff_ffff, 2 * 3_579_545);
}

#[test]
fn the_timers_bit_raises_the_sci_by_the_devices_thread() {
    let (mut device, wires, _) = device();
    let mut thread = EventManager::new().unwrap();
    thread.add_subscriber(AcpiWorker::new(device.0.clone()));
    write(&mut device, ENABLE, TIMER);
    assert!(!sci(&wires));
    // The clock is ahead of the alarm; so the alarm is set again, to come at once.
    wires.now_ns.store(2_343_499_000, Ordering::Relaxed);
    write(&mut device, ENABLE, TIMER);
    wires.now_ns.store(2_343_600_000, Ordering::Relaxed);
    while !sci(&wires) {
        thread.run().unwrap();
    }
    assert_eq!(read(&mut device, STATUS), TIMER);
    write(&mut device, STATUS, TIMER);
    assert!(!sci(&wires));
    // A change that happened while nobody looked is in the saved state.
    wires.now_ns.store(2 * 2_343_600_000, Ordering::Relaxed);
    let (mut device, wires) = updated(device);
    assert!(sci(&wires));
    assert_eq!(read(&mut device, STATUS), TIMER);
}
