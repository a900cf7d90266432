//! The clock as a guest sees it.

use std::sync::atomic::Ordering;

use event_manager::{EventManager, SubscriberOps};

use super::registers::{
    A, ALARM, B, BINARY, C, CENTURY, D, DAY, HOURS, HOURS_24, HOURS_ALARM, MINUTES, MINUTES_ALARM,
    MONTH, PERIODIC, SECOND, SECONDS, SECONDS_ALARM, SET, UPDATING, WEEKDAY, YEAR,
};
use super::*;
use crate::kvm::interrupts::event;
use crate::kvm::interrupts::fake::FakeWires;
use crate::state::Schema;
use crate::state::node::read_node;

const DATA: u64 = 1;
const NS: u64 = 1_000_000_000;
/// 2026-11-26 13:47:09 UTC, a Thursday.
const NOW_S: u64 = 1_795_700_829;

struct Machine {
    rtc: Rtc,
    wires: Arc<FakeWires>,
    interrupt: EventFd,
}

impl Machine {
    fn new() -> Self {
        let wires = Arc::new(FakeWires::default());
        wires.realtime_ns.store(NOW_S * NS, Ordering::Relaxed);
        let (resources, interrupt) = resources(&wires);
        Self { rtc: Rtc::new(resources).unwrap(), wires, interrupt }
    }

    fn read(&mut self, register: usize) -> u8 {
        self.rtc.write(INDEX, &[register as u8]);
        let mut byte = [0xff];
        self.rtc.read(DATA, &mut byte);
        byte[0]
    }

    fn write(&mut self, register: usize, value: u8) {
        self.rtc.write(INDEX, &[register as u8]);
        self.rtc.write(DATA, &[value]);
    }

    /// Century, year, month, day, hour, minute, second as the registers have them.
    fn date(&mut self) -> [u8; 7] {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].map(|register| self.read(register))
    }

    fn advance(&self, ns: u64) {
        self.wires.realtime_ns.fetch_add(ns, Ordering::Relaxed);
        self.wires.now_ns.fetch_add(ns, Ordering::Relaxed);
    }

    fn pulses(&self) -> u64 {
        self.interrupt.read().unwrap_or(0)
    }

    /// The same clock after a live update, on a host whose date is `realtime_s`, `after_s` later.
    fn updated(mut self, realtime_s: u64, after_s: u64) -> Self {
        self.rtc.pause();
        let state = self.rtc.save().unwrap();
        assert_eq!(state, self.rtc.save().unwrap(), "a save changes nothing");
        let read = read_node(&state.to_node("rtc@70"), "/").unwrap();
        let wires = Arc::new(FakeWires::default());
        let clock_ns = self.wires.now_ns.load(Ordering::Relaxed);
        wires.now_ns.store(clock_ns + after_s * NS, Ordering::Relaxed);
        wires.realtime_ns.store(realtime_s * NS, Ordering::Relaxed);
        let (resources, interrupt) = resources(&wires);
        let mut rtc = Rtc::restore(read, resources).unwrap();
        assert_eq!(state, rtc.save().unwrap(), "a restored clock is the saved one");
        rtc.resume();
        Self { rtc, wires, interrupt }
    }
}

fn resources(wires: &Arc<FakeWires>) -> (RtcResources, EventFd) {
    let interrupt = event("a test").unwrap();
    let line = interrupt.try_clone().unwrap();
    (RtcResources { interrupt, clock: wires.clone() }, line)
}

#[test]
fn the_date_is_the_hosts_in_each_format_of_the_registers() {
    let mut machine = Machine::new();
    assert_eq!(machine.date(), [0x20, 0x26, 0x11, 0x26, 0x13, 0x47, 0x09]);
    assert_eq!(machine.read(WEEKDAY), 5, "Thursday");
    assert_eq!(machine.read(D), 0x80);
    machine.write(B, HOURS_24 | BINARY);
    assert_eq!(machine.date(), [20, 26, 11, 26, 13, 47, 9]);
    machine.write(B, 0);
    assert_eq!(machine.read(HOURS), 0x81, "1 in the afternoon");
    machine.advance(11 * 3600 * NS);
    assert_eq!(machine.read(HOURS), 0x12, "midnight");
    machine.advance(12 * 3600 * NS);
    assert_eq!(machine.read(HOURS), 0x92, "noon");
    assert_eq!(machine.date()[..4], [0x20, 0x26, 0x11, 0x27]);
}

#[test]
fn a_guest_sets_the_date_and_keeps_it_over_updates() {
    let mut machine = Machine::new();
    machine.write(B, SET | HOURS_24);
    let registers = [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS];
    for (register, value) in registers.into_iter().zip([0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]) {
        machine.write(register, value);
        // Stands still meanwhile.
        machine.advance(NS);
    }
    assert_eq!(machine.date(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
    machine.write(B, HOURS_24);
    machine.advance(NS);
    assert_eq!(machine.date(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    // The next host is 1 s later; a last one does not know the date.
    let host_s = machine.wires.realtime_ns.load(Ordering::Relaxed) / NS;
    let machine = machine.updated(host_s + 1, 1);
    let mut machine = machine.updated(17, 2);
    assert_eq!(machine.date(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x02]);
    // A single register, without stopping the clock.
    machine.write(HOURS, 0x12);
    assert_eq!(machine.date(), [0x20, 0x00, 0x01, 0x01, 0x12, 0x00, 0x02]);
}

#[test]
fn a_date_that_is_being_set_is_still_being_set_after_an_update() {
    let mut machine = Machine::new();
    machine.write(B, SET | HOURS_24);
    machine.write(YEAR, 0x30);
    let mut machine = machine.updated(NOW_S + 60, 60);
    machine.write(MONTH, 0x02);
    machine.write(B, HOURS_24);
    assert_eq!(machine.date(), [0x20, 0x30, 0x02, 0x26, 0x13, 0x47, 0x09]);
}

#[test]
fn registers_of_any_contents_make_some_date() {
    let mut machine = Machine::new();
    for format in [0, BINARY, HOURS_24, BINARY | HOURS_24] {
        for value in 0..=255 {
            machine.write(B, SET | format);
            for register in [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY] {
                machine.write(register, value);
                machine.write(register + usize::from(value) % 2, value);
            }
            machine.write(B, format | PERIODIC | ALARM | SECOND);
            machine.advance(NS);
            let [_, _, month, day, ..] = machine.date();
            assert!(month >= 1 && day >= 1);
        }
    }
}

#[test]
fn the_update_bit_is_set_before_a_second_ends() {
    let mut machine = Machine::new();
    assert_eq!(machine.read(A) & UPDATING, 0);
    machine.advance(NS - 244_001);
    assert_eq!(machine.read(A) & UPDATING, 0);
    machine.advance(1);
    assert_eq!(machine.read(A) & UPDATING, UPDATING);
    machine.write(B, SET);
    assert_eq!(machine.read(A) & UPDATING, 0, "not while the date is being set");
    machine.write(A, 0xff);
    assert_eq!(machine.read(A), 0x7f);
}

#[test]
fn an_alarm_comes_at_its_second_and_once_until_the_guest_reads_it() {
    let mut machine = Machine::new();
    for (register, value) in [(HOURS_ALARM, 0x13), (MINUTES_ALARM, 0x48), (SECONDS_ALARM, 0x01)] {
        machine.write(register, value);
    }
    machine.read(C);
    machine.write(B, HOURS_24 | ALARM);
    machine.advance(51 * NS);
    assert_eq!(machine.read(SECONDS), 0x00);
    assert_eq!(machine.pulses(), 0);
    machine.advance(NS);
    assert_eq!(machine.read(SECONDS), 0x01);
    machine.advance(24 * 3600 * NS);
    machine.read(SECONDS);
    assert_eq!(machine.pulses(), 1, "it is pending, and no second one comes");
    assert_eq!(machine.read(C), 0x80 | ALARM | SECOND | PERIODIC);
    assert_eq!(machine.read(C), 0);
    // Any hour and minute.
    machine.write(HOURS_ALARM, 0xff);
    machine.write(MINUTES_ALARM, 0xc0);
    machine.advance(60 * NS);
    machine.read(SECONDS);
    assert_eq!(machine.pulses(), 1);
}

#[test]
fn a_pending_interrupt_is_raised_again_after_an_update_and_so_is_one_that_came_meanwhile() {
    let mut machine = Machine::new();
    machine.write(B, HOURS_24 | SECOND);
    machine.advance(NS);
    machine.read(SECONDS);
    assert_eq!(machine.pulses(), 1);
    let mut machine = machine.updated(NOW_S + 1, 0);
    assert_eq!(machine.pulses(), 1);
    machine.read(C);
    let machine = machine.updated(NOW_S + 60, 59);
    assert_ne!(machine.pulses(), 0);
}

#[test]
fn the_devices_thread_raises_interrupts_that_nobody_looks_for() {
    let mut machine = Machine::new();
    let mut thread = EventManager::new().unwrap();
    thread.add_subscriber(RtcWorker::new(machine.rtc.0.clone()));
    // The shortest period, 1/8192 s; rate 6 is the usual.
    machine.write(A, 0x23);
    machine.write(B, HOURS_24 | PERIODIC);
    machine.advance(NS / 8192 + 1);
    let mut pulses = 0;
    while pulses == 0 {
        thread.run().unwrap();
        pulses += machine.pulses();
    }
    assert_eq!(pulses, 1);
    assert_eq!(machine.read(C), 0x80 | PERIODIC);
}

#[test]
fn the_index_register_reads_ones_and_a_wide_access_is_one_to_each_port() {
    let mut machine = Machine::new();
    machine.write(0x40, 0x5a);
    let mut index = [0xff];
    machine.rtc.read(INDEX, &mut index);
    assert_eq!(index, [0xff]);
    // Index and data in one access, as firmware writes them.
    machine.rtc.write(INDEX, &[0x41, 0x77]);
    let mut word = [0xff; 2];
    machine.rtc.read(INDEX, &mut word);
    assert_eq!(word, [0xff, 0x77]);
    assert_eq!(machine.read(0x40), 0x5a);
    assert_eq!(machine.read(0x41), 0x77);
    // The NMI bit is no part of the index.
    assert_eq!(machine.read(0xc0), 0x5a);
}
