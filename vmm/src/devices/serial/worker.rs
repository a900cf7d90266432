//! The thread of the serial port: writes output to the sink, and reads input from it.

use std::io::{self, Read};
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::sink::{Sink, Written};
use super::uart::FIFO;
use super::{Outbox, Registers, lock, pull};

/// Most bytes of one write to the sink.
const CHUNK: usize = 4096;

/// The part of the port that its thread runs: writes output, reads input.
pub struct SerialWorker {
    registers: Arc<Registers>,
    outbox: Outbox,
    sink: Option<Sink>,
    /// Whether the sink has input for which the FIFO had no room.
    pub(super) input_waits: bool,
}

impl SerialWorker {
    pub(super) fn new(registers: Arc<Registers>, outbox: Outbox, sink: Option<Sink>) -> Self {
        Self { registers, outbox, sink, input_waits: false }
    }

    const DOORBELL: u32 = 0;
    const SINK: u32 = 1;

    pub(super) fn send(&mut self) {
        let Some(sink) = &mut self.sink else {
            self.outbox.pending().clear();
            return;
        };
        loop {
            let chunk = self.outbox.take(CHUNK);
            if chunk.is_empty() {
                return;
            }
            match sink.write(&chunk) {
                Written::Bytes(count) => self.outbox.put_back(&chunk[count..]),
                // An event of the sink follows when it has room.
                Written::Full => return self.outbox.put_back(&chunk),
                Written::Broken => self.outbox.pending().clear(),
            }
        }
    }

    pub(super) fn receive(&mut self) {
        let Some(sink) = self.sink.as_mut().filter(|sink| sink.reads) else { return };
        self.input_waits = false;
        loop {
            let mut uart = self.registers.uart();
            let room = uart.room();
            if room == 0 {
                // The guest's next read of a byte rings the doorbell.
                self.input_waits = true;
                return;
            }
            let mut bytes = [0; FIFO];
            match sink.file.read(&mut bytes[..room]) {
                Ok(count) if count > 0 => {
                    if uart.receive(&bytes[..count]) {
                        pull(&self.registers.interrupt);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // No input, or the other end is not open yet.
                _ => return,
            }
        }
    }
}

impl MutEventSubscriber for SerialWorker {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.data() == Self::DOORBELL {
            let _ = self.outbox.0.doorbell.read();
        }
        let shared = self.outbox.0.clone();
        let running = lock(&shared.running);
        if !*running {
            // The event is edge-triggered and does not come again. The resume rings the doorbell.
            self.input_waits |= events.data() == Self::SINK;
            return;
        }
        self.send();
        if events.data() == Self::SINK || self.input_waits {
            self.receive();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let doorbell = Events::with_data(&self.outbox.0.doorbell, Self::DOORBELL, EventSet::IN);
        if let Err(error) = ops.add(doorbell) {
            tracing::error!(%error, "the serial port will write nothing");
        }
        if let Some(sink) = &self.sink {
            let when = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            // epoll refuses a regular file, whose writes never wait.
            let _ = ops.add(Events::with_data(&sink.file, Self::SINK, when));
        }
    }
}
