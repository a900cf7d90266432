//! The thread of the serial port: writes output to the sink, and reads input from it.

use std::io::{self, ErrorKind, Read};
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::console::{Accepted, Console};
use super::sink::{Peer, Written};
use super::uart::FIFO;
use super::{OUTBOX, Outbox, Registers, pull};

/// Most bytes of one write to the sink.
const CHUNK: usize = 4096;
/// Most writes, and most reads, before the thread handles its other events: a guest may send without end, and its
/// log is to be replaced when it is full.
const BATCH: usize = 4;

/// The part of the port that its thread runs: writes output, reads input.
pub struct SerialWorker {
    registers: Arc<Registers>,
    outbox: Outbox,
    pub(super) console: Console,
    /// Whether a client may wait for the console.
    client_waits: bool,
    /// Whether the sink has input for which the FIFO had no room.
    pub(super) input_waits: bool,
}

impl SerialWorker {
    pub(super) fn new(registers: Arc<Registers>, outbox: Outbox, console: Console) -> Self {
        Self { registers, outbox, console, client_waits: false, input_waits: false }
    }

    const DOORBELL: u32 = 0;

    pub(super) fn send(&mut self) {
        let keeps_output = self.console.keeps_output();
        let Some(sink) = self.console.output() else {
            if !keeps_output {
                self.outbox.pending().clear();
            }
            return;
        };
        for _ in 0..BATCH {
            let chunk = self.outbox.take(CHUNK);
            if chunk.is_empty() {
                return;
            }
            match sink.write(&chunk) {
                Written::Bytes(count) => {
                    if self.outbox.note_fails(false) {
                        tracing::info!("the serial port's output is written again");
                    }
                    self.outbox.put_back(&chunk[count..]);
                }
                // An event of the sink follows when it has room.
                Written::Full => return self.outbox.put_back(&chunk),
                // The next client gets it. What this one has sent before it left is still read.
                Written::Failed(_) if sink.peer == Peer::Client => {
                    sink.peer = Peer::LeavingClient;
                    self.input_waits = true;
                    return self.outbox.put_back(&chunk);
                }
                // Nobody is at the other end of a pipe or a line any more, and nobody will be.
                Written::Failed(error) if is_hung_up(&error) => self.outbox.pending().clear(),
                // A file system that is full, say. No event tells when it has room: the guest's next byte rings.
                Written::Failed(error) => {
                    if !self.outbox.note_fails(true) {
                        tracing::warn!(
                            "the serial port's output cannot be written, and the latest {} KiB of it wait: {error}",
                            OUTBOX >> 10
                        );
                    }
                    return self.outbox.put_back(&chunk);
                }
            }
        }
        if !self.outbox.pending().is_empty() {
            self.outbox.ring();
        }
    }

    /// Reads input. Returns whether the sink is a client that has left.
    pub(super) fn receive(&mut self) -> bool {
        let sink = self.console.sink.as_mut();
        let Some(sink) = sink.filter(|sink| sink.reads) else { return false };
        let is_client = matches!(sink.peer, Peer::Client | Peer::LeavingClient);
        self.input_waits = false;
        for _ in 0..BATCH {
            let mut uart = self.registers.uart();
            let room = uart.room();
            if room == 0 {
                // The guest's next read of a byte rings the doorbell.
                self.input_waits = true;
                return false;
            }
            let mut bytes = [0; FIFO];
            match sink.file.read(&mut bytes[..room]) {
                Ok(count) if count > 0 => {
                    if uart.receive(&bytes[..count]) {
                        pull(&self.registers.interrupt);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                // The other end is closed, or not open yet.
                _ => return is_client,
            }
        }
        self.input_waits = true;
        self.outbox.ring();
        false
    }
}

impl SerialWorker {
    /// Handles an event of a port that is not paused.
    fn serve(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.data() == Console::OPENED {
            self.console.read_opened();
        }
        if events.data() == Console::LISTENER || self.client_waits {
            self.client_waits = self.console.accept(ops) == Accepted::Some;
            if self.client_waits {
                self.outbox.ring();
            }
        }
        self.send();
        if (events.data() == Console::SINK || self.input_waits) && self.receive() {
            self.console.detach(ops);
        }
    }
}

fn is_hung_up(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}

impl MutEventSubscriber for SerialWorker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.data() == Self::DOORBELL {
            let _ = self.outbox.0.doorbell.read();
        }
        if events.data() == Console::NEXT {
            self.console.take_next();
        }
        let outbox = self.outbox.clone();
        if !outbox.move_bytes(|| self.serve(events, ops)) {
            // The event is edge-triggered and does not come again. The resume rings the doorbell.
            self.input_waits |= events.data() == Console::SINK;
            self.client_waits |= events.data() == Console::LISTENER;
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let doorbell = Events::with_data(&self.outbox.0.doorbell, Self::DOORBELL, EventSet::IN);
        if let Err(error) = ops.add(doorbell) {
            tracing::error!(%error, "the serial port will write nothing");
        }
        self.console.watch(ops);
    }
}
