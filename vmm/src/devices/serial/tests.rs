//! The port as a guest and a terminal see it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::sink::{Peer, Sink};
use super::uart::{DATA, FCR, FIFO, IER, LCR, SCR};
use super::*;
use crate::state::Schema;
use crate::state::node::read_node;

const THR_EMPTY: u8 = 0b10;
const FIFO_MODE: u8 = 1;

fn port(sink: Option<OwnedFd>) -> (Serial, EventFd) {
    let interrupt = event("a test").unwrap();
    let line = interrupt.try_clone().unwrap();
    let mut serial =
        Serial::new(SerialResources { interrupt, sink, listener: None, opened: None, next: None })
            .unwrap();
    serial.write(FCR, &[FIFO_MODE]);
    (serial, line)
}

fn pair() -> (UnixStream, OwnedFd) {
    let (near, far) = UnixStream::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    near.set_nonblocking(true).unwrap();
    (near, far.into())
}

fn send(serial: &mut Serial, text: &[u8]) {
    text.iter().for_each(|byte| serial.write(DATA, &[*byte]));
}

#[test]
fn output_reaches_the_sink_and_input_the_guest() {
    let (mut near, far) = pair();
    let (mut serial, _) = port(Some(far));
    let mut worker = serial.worker();
    send(&mut serial, b"login: ");
    worker.send();
    let mut text = [0; 16];
    assert_eq!(near.read(&mut text).unwrap(), 7);
    assert_eq!(&text[..7], b"login: ");
    near.write_all(b"ro").unwrap();
    worker.receive();
    let mut byte = [0];
    serial.read(DATA, &mut byte);
    assert_eq!(&byte, b"r");
}

#[test]
fn input_beyond_the_fifo_waits_in_the_sink() {
    let (mut near, far) = pair();
    let (mut serial, _) = port(Some(far));
    let mut worker = serial.worker();
    near.write_all(&[7; FIFO + 3]).unwrap();
    worker.receive();
    assert!(worker.input_waits);
    let mut byte = [0];
    for _ in 0..FIFO {
        serial.read(DATA, &mut byte);
    }
    worker.receive();
    assert!(!worker.input_waits);
    let state = serial.save().unwrap();
    assert_eq!(state.registers.received, [7; 3]);
}

#[test]
fn a_sink_that_takes_nothing_loses_the_oldest_output_and_holds_up_nobody() {
    let (_near, far) = pair();
    let (mut serial, _) = port(Some(far));
    let mut worker = serial.worker();
    for _ in 0..64 {
        send(&mut serial, &[b'x'; 8192]);
        worker.send();
    }
    send(&mut serial, b"last");
    let outbox = serial.save().unwrap().outbox;
    assert_eq!(outbox.len(), OUTBOX);
    assert!(outbox.ends_with(b"xlast"));
}

#[test]
fn a_port_goes_on_with_its_registers_its_input_and_its_unsent_output() {
    let (mut near, far) = pair();
    let (mut serial, _) = port(Some(far));
    let mut worker = serial.worker();
    near.write_all(b"in").unwrap();
    worker.receive();
    serial.write(IER, &[THR_EMPTY]);
    serial.write(SCR, &[0x5a]);
    send(&mut serial, b"unsent");
    let state = serial.save().unwrap();
    assert_eq!(state, serial.save().unwrap());
    assert_eq!(read_node(&state.to_node("serial@3f8"), "/"), Ok(state.clone()));

    let (mut near, far) = pair();
    let interrupt = event("a test").unwrap();
    let line = interrupt.try_clone().unwrap();
    let resources =
        SerialResources { interrupt, sink: Some(far), listener: None, opened: None, next: None };
    let mut restored = Serial::restore(state.clone(), resources).unwrap();
    assert_eq!(restored.save().unwrap(), state);
    let mut worker = restored.worker();
    let _ = line.read();
    restored.resume();
    assert!(line.read().is_ok(), "the interrupt that may have been lost is raised again");
    worker.send();
    let mut text = [0; 16];
    assert_eq!(near.read(&mut text).unwrap(), 6);
    assert_eq!(&text[..6], b"unsent");
}

#[test]
fn a_full_fifo_is_kept_and_an_overfull_one_refused() {
    let (serial, _) = port(None);
    let mut state = serial.save().unwrap();
    state.registers.received = vec![1; FIFO].into();
    assert_eq!(read_node(&state.to_node("serial@3f8"), "/"), Ok(state.clone()));
    state.registers.received.push_back(1);
    let error = read_node::<SerialStateV1>(&state.to_node("serial@3f8"), "/").unwrap_err();
    assert!(error.to_string().contains("17 bytes, the FIFO has room for 16"), "{error}");
}

#[test]
fn a_guest_that_sends_without_end_keeps_the_thread_from_no_other_event() {
    let (_near, far) = pair();
    let (mut serial, _) = port(Some(far));
    let mut worker = serial.worker();
    send(&mut serial, &[b'x'; OUTBOX]);
    let rung = |serial: &Serial| serial.outbox.0.doorbell.read().is_ok();
    assert!(rung(&serial));
    let mut goes = 0;
    while !serial.outbox.pending().is_empty() {
        worker.send();
        goes += 1;
        // It goes on after its other events.
        assert_eq!(rung(&serial), !serial.outbox.pending().is_empty());
    }
    assert!(goes > 1, "the thread was kept until there was nothing to send");
}

#[test]
fn output_that_a_full_file_system_does_not_take_waits_until_it_does() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let (mut serial, _) = port(Some(full.into()));
    let mut worker = serial.worker();
    let rung = |serial: &Serial| serial.outbox.0.doorbell.read().is_ok();
    send(&mut serial, b"kernel ");
    assert!(rung(&serial));
    worker.send();
    assert_eq!(serial.save().unwrap().outbox, b"kernel ");
    // Nothing tells when there is room: each byte is another attempt.
    for text in [&b"pan"[..], b"ic"] {
        send(&mut serial, text);
        assert!(rung(&serial));
        worker.send();
    }
    let (mut near, far) = pair();
    worker.console.sink = Some(Sink::new(far, Peer::Fixed));
    send(&mut serial, b"!");
    assert!(rung(&serial));
    worker.send();
    let mut text = [0; 64];
    let count = near.read(&mut text).unwrap();
    assert_eq!(&text[..count], b"kernel panic!");
    // One signal for a burst again.
    send(&mut serial, b"a");
    assert!(rung(&serial));
    send(&mut serial, b"b");
    assert!(!rung(&serial));
}

#[test]
fn a_wide_access_is_one_of_a_byte_to_each_of_its_ports() {
    let (mut near, far) = pair();
    let (mut serial, _) = port(Some(far));
    let mut worker = serial.worker();
    // The divisor, in one access to both halves of it, as some kernels set it.
    serial.write(LCR, &[0x80]);
    serial.write(DATA, &[0x34, 0x12]);
    let mut word = [0; 2];
    serial.read(DATA, &mut word);
    assert_eq!(word, [0x34, 0x12]);
    serial.write(LCR, &[0x03]);
    // Data, and with it the interrupts that the guest wants.
    serial.write(DATA, &[b'x', THR_EMPTY]);
    let mut enabled = [0];
    serial.read(IER, &mut enabled);
    assert_eq!(enabled, [THR_EMPTY]);
    worker.send();
    let mut text = [0; 16];
    assert_eq!(near.read(&mut text).unwrap(), 1);
    assert_eq!(text[0], b'x');
}
