//! A port over pauses and live updates, with its thread.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use event_manager::{EventManager, SubscriberOps};
use proptest::prelude::*;

use super::uart::{DATA, FCR, FIFO, IER, IIR, LCR, LSR, MCR};
use super::*;
use crate::state::Schema;
use crate::state::node::read_node;

/// Interrupt enable: data received; transmitter empty.
const RECEIVED: u8 = 0b01;
const EMPTY: u8 = 0b10;
/// Interrupt identification in FIFO mode: none; transmitter empty; data received.
const NONE: u8 = 0xc1;
const IS_EMPTY: u8 = 0xc2;
const IS_RECEIVED: u8 = 0xc4;

/// A port, its interrupt line, its thread, and the other end of its line.
struct Machine {
    port: Serial,
    line: EventFd,
    thread: EventManager<SerialWorker>,
    terminal: UnixStream,
    /// The host's fd of the sink, which outlives the port.
    sink: OwnedFd,
}

impl Machine {
    fn new() -> Self {
        let (terminal, sink) = UnixStream::pair().unwrap();
        terminal.set_nonblocking(true).unwrap();
        sink.set_nonblocking(true).unwrap();
        let mut machine =
            Self::with(terminal, sink.into(), |resources| Serial::new(resources).unwrap());
        machine.port.write(FCR, &[1]);
        machine
    }

    fn with(
        terminal: UnixStream,
        sink: OwnedFd,
        make: impl FnOnce(SerialResources) -> Serial,
    ) -> Self {
        let interrupt = event("a test").unwrap();
        let line = interrupt.try_clone().unwrap();
        let other = sink.try_clone().unwrap();
        let mut port = make(SerialResources {
            interrupt,
            sink: Some(other),
            listener: None,
            opened: None,
            next: None,
        });
        let mut thread = EventManager::new().unwrap();
        thread.add_subscriber(port.worker());
        Self { port, line, thread, terminal, sink }
    }

    /// Lets the port's thread do all that it has to do.
    fn run(&mut self) {
        let quiet = (0..1000).any(|_| self.thread.run_with_timeout(0).unwrap() == 0);
        assert!(quiet, "the port's thread has no rest");
    }

    fn read(&mut self, at: u64) -> u8 {
        let mut data = [0xff];
        self.port.read(at, &mut data);
        data[0]
    }

    fn send(&mut self, text: &[u8]) {
        text.iter().for_each(|byte| self.port.write(DATA, &[*byte]));
    }

    /// Whether the guest was interrupted since the last call.
    fn interrupted(&self) -> bool {
        self.line.read().is_ok()
    }

    /// What arrived at the other end.
    fn shown(&mut self) -> Vec<u8> {
        let mut text = Vec::new();
        let error = self.terminal.read_to_end(&mut text).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        text
    }

    /// What the guest reads until there is nothing more.
    fn received(&mut self) -> Vec<u8> {
        let mut text = Vec::new();
        while self.read(LSR) & 1 != 0 {
            text.push(self.read(DATA));
            self.run();
        }
        text
    }

    /// What a live update does from the save on; between it and the jump, `meanwhile` happens.
    fn switch(mut self, meanwhile: impl FnOnce(&mut Self)) -> Self {
        self.port.pause();
        let state = self.port.save().unwrap();
        meanwhile(&mut self);
        self.run();
        assert_eq!(self.port.save().unwrap(), state, "a paused port stands still");
        let Self { port, thread, terminal, sink, line: _ } = self;
        drop((port, thread));
        let read = read_node::<SerialStateV1>(&state.to_node("serial@3f8"), "/").unwrap();
        Self::with(terminal, sink, |resources| {
            let port = Serial::restore(read, resources).unwrap();
            assert_eq!(port.save().unwrap(), state);
            port
        })
    }

    fn resume(&mut self) {
        self.port.resume();
        self.run();
    }
}

#[test]
fn a_paused_port_moves_nothing_and_a_resumed_one_everything() {
    let mut machine = Machine::new();
    machine.run();
    machine.port.pause();
    machine.send(b"out");
    machine.terminal.write_all(b"in").unwrap();
    machine.run();
    assert_eq!((machine.shown(), machine.received()), (b"".to_vec(), b"".to_vec()));
    machine.resume();
    assert_eq!((machine.shown(), machine.received()), (b"out".to_vec(), b"in".to_vec()));
}

#[test]
fn what_is_typed_between_the_save_and_the_jump_arrives_after_it() {
    let mut machine = Machine::new();
    machine.run();
    machine.terminal.write_all(b"before ").unwrap();
    machine.run();
    let mut machine = machine.switch(|m| m.terminal.write_all(b"between ").unwrap());
    machine.terminal.write_all(b"after").unwrap();
    machine.resume();
    assert_eq!(machine.received(), b"before between after");
}

#[test]
fn input_that_had_no_room_arrives_after_the_update() {
    let mut machine = Machine::new();
    let text: Vec<u8> = (0..200).collect();
    machine.terminal.write_all(&text).unwrap();
    machine.run();
    let mut machine = machine.switch(|_| {});
    machine.resume();
    assert_eq!(machine.received(), text);
}

#[test]
fn output_that_had_no_room_is_shown_once() {
    let mut machine = Machine::new();
    let (text, mut shown) = (vec![b'x'; 4096], Vec::new());
    let mut sent = 0;
    while machine.port.save().unwrap().outbox.is_empty() {
        machine.send(&text);
        machine.run();
        sent += text.len();
    }
    // The terminal makes room when the state is taken.
    let mut machine = machine.switch(|m| shown = m.shown());
    machine.run();
    assert!(machine.shown().is_empty(), "nothing is sent before the resume");
    machine.resume();
    shown.extend(machine.shown());
    assert_eq!(shown.len(), sent);
}

#[test]
fn a_transmitter_that_was_busy_interrupts_its_guest_again() {
    let mut machine = Machine::new();
    machine.port.write(IER, &[EMPTY]);
    assert_eq!(machine.read(IIR), IS_EMPTY);
    assert!(machine.interrupted());
    machine.send(b"a");
    // The interrupt is lost in the old kernel.
    assert!(machine.interrupted());
    let mut machine = machine.switch(|_| {});
    machine.resume();
    assert!(machine.interrupted());
    assert_eq!(machine.read(IIR), IS_EMPTY, "the guest finds out why");
    assert_eq!(machine.read(IIR), NONE);
    machine.send(b"b");
    assert!(machine.interrupted(), "and goes on");
    assert_eq!(machine.read(IIR), IS_EMPTY);
    machine.run();
    assert_eq!(machine.shown(), b"ab");
}

#[test]
fn a_guest_that_was_not_told_of_its_input_is_told_again() {
    let mut machine = Machine::new();
    machine.port.write(IER, &[RECEIVED]);
    machine.terminal.write_all(b"x").unwrap();
    machine.run();
    assert!(machine.interrupted());
    let mut machine = machine.switch(|_| {});
    machine.resume();
    assert!(machine.interrupted());
    assert_eq!((machine.read(IIR), machine.read(DATA)), (IS_RECEIVED, b'x'));
    machine.terminal.write_all(b"y").unwrap();
    machine.run();
    assert!(machine.interrupted());
    assert_eq!(machine.read(DATA), b'y');
}

#[test]
fn a_guest_that_is_setting_the_divisor_goes_on() {
    let mut machine = Machine::new();
    machine.port.write(LCR, &[0x80]);
    machine.port.write(DATA, &[0x34]);
    let mut machine = machine.switch(|_| {});
    machine.resume();
    machine.port.write(IER, &[0x12]);
    assert_eq!((machine.read(DATA), machine.read(IER)), (0x34, 0x12));
    machine.port.write(LCR, &[0x03]);
    assert_eq!(machine.read(IER), 0, "the divisor was not the interrupt enable register");
    machine.run();
    assert_eq!(machine.shown(), b"", "nor was it output");
}

#[test]
fn a_guest_that_sends_to_itself_fills_no_more_than_the_fifo() {
    let mut machine = Machine::new();
    machine.port.write(MCR, &[0x10]);
    machine.send(&[7; 1000]);
    machine.terminal.write_all(&[8; 1000]).unwrap();
    machine.run();
    assert_eq!(machine.port.save().unwrap().registers.received.len(), FIFO);
    machine.switch(|_| {}).resume();
}

#[test]
fn a_terminal_that_hangs_up_holds_up_nobody() {
    let mut machine = Machine::new();
    machine.run();
    machine.terminal.shutdown(std::net::Shutdown::Both).unwrap();
    machine.send(b"lost");
    machine.run();
    assert!(machine.port.save().unwrap().outbox.is_empty());
}

#[test]
fn a_sink_that_holds_up_a_write_delays_no_pause_and_the_drain_says_so() {
    // A line that polls as writable but has no room for all: a write waits for it.
    let (mut terminal, mut sink) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&sink, 0).unwrap();
    sink.write_all(b">").unwrap();
    let interrupt = event("a test").unwrap();
    let sink = Some(sink.into());
    let resources = SerialResources { interrupt, sink, listener: None, opened: None, next: None };
    let mut port = Serial::new(resources).unwrap();
    let mut thread = EventManager::new().unwrap();
    thread.add_subscriber(port.worker());
    let text = vec![b'x'; 4096];
    text.iter().for_each(|byte| port.write(DATA, &[*byte]));
    let outbox = port.outbox.clone();
    let thread = std::thread::spawn(move || thread.run().unwrap());
    while !outbox.pending().is_empty() {
        std::thread::yield_now();
    }
    // Before a pause the machine looks at whether the port would keep it waiting.
    let now = Instant::now();
    port.check_answers(now).unwrap();
    let error = port.check_answers(now + STALLED_AFTER).unwrap_err();
    assert_eq!(error.device, "serial@3f8");
    let (sender, paused) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        port.pause();
        sender.send(port).unwrap();
    });
    let mut port = paused.recv_timeout(Duration::from_secs(60)).expect("a pause that waits");
    let error = crate::causes::chain(&port.drain(Instant::now()).unwrap_err()).join(": ");
    assert!(error.contains("serial@3f8") && error.contains("output"), "{error}");
    let mut shown = vec![0; 1 + text.len()];
    terminal.read_exact(&mut shown).unwrap();
    port.drain(Instant::now() + Duration::from_secs(60)).unwrap();
    assert_eq!(shown[1..], text);
    port.check_answers(Instant::now() + STALLED_AFTER).unwrap();
    assert_eq!(port.save().unwrap().outbox, b"");
    thread.join().unwrap();
}

proptest! {
    /// Whatever the guest does with the registers, the port can be saved and restored.
    #[test]
    fn no_sequence_of_accesses_breaks_the_port(
        accesses in prop::collection::vec(
            (0u64..10, 1usize..=8, any::<u64>(), any::<bool>()), 0..200),
        input in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut machine = Machine::new();
        for (number, (at, len, value, write)) in accesses.into_iter().enumerate() {
            let mut data = value.to_le_bytes()[..len].to_vec();
            match write {
                true => machine.port.write(at, &data),
                false => machine.port.read(at, &mut data),
            }
            if number == 50 {
                machine.terminal.write_all(&input).unwrap();
                machine.run();
            }
        }
        machine.run();
        machine.switch(|_| {}).resume();
    }
}
