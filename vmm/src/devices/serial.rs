//! The serial port COM1: a 16550 whose output goes to a file, a terminal or a port of the host.
//!
//! A vCPU never waits for the sink: what the guest sends goes into an outbox, and the device thread
//! writes it. A sink that does not take anything for long loses the oldest output, as a real line
//! without flow control would. What is in the outbox at a live update travels with the state. A
//! paused port moves no byte: what it sent after the save it would send again after the restore, and
//! what it received would be lost.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::time::Timespec;
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::devices::{Device, DeviceError};
use crate::kvm::interrupts::{InterruptError, event, pull};
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// Most output that waits for the sink, in bytes.
const OUTBOX: usize = 64 << 10;
/// Bytes of the receive FIFO (vm-superio's).
const FIFO: usize = 64;
/// Most that is written to the sink at a time.
const CHUNK: usize = 4096;

/// The interrupt line as vm-superio wants it.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        pull(&self.0);
        Ok(())
    }
}

/// Output that waits, and the doorbell that tells the device thread of it.
#[derive(Clone)]
struct Outbox(Arc<Shared>);

struct Shared {
    pending: Mutex<VecDeque<u8>>,
    doorbell: EventFd,
    /// Not paused. The device thread holds it while it moves bytes.
    running: Mutex<bool>,
}

impl Outbox {
    fn new(pending: Vec<u8>, running: bool) -> Result<Self, InterruptError> {
        let doorbell = event("the serial port's output")?;
        let (pending, running) = (Mutex::new(pending.into()), Mutex::new(running));
        Ok(Self(Arc::new(Shared { pending, doorbell, running })))
    }

    fn pending(&self) -> MutexGuard<'_, VecDeque<u8>> {
        lock(&self.0.pending)
    }

    /// The oldest bytes, at most `count`. They are taken out, so that no vCPU waits for the lock
    /// while they are written.
    fn take(&self, count: usize) -> Vec<u8> {
        let mut pending = self.pending();
        let count = count.min(pending.len());
        pending.drain(..count).collect()
    }

    /// Takes back what was not written, as far as there is still room for it.
    fn put_back(&self, bytes: &[u8]) {
        let mut pending = self.pending();
        let room = OUTBOX.saturating_sub(pending.len()).min(bytes.len());
        bytes[bytes.len() - room..].iter().rev().for_each(|byte| pending.push_front(*byte));
    }
}

impl Write for Outbox {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut pending = self.pending();
        // One ring for a burst: the device thread takes all that is there.
        if pending.is_empty() {
            pull(&self.0.doorbell);
        }
        pending.extend(bytes);
        let excess = pending.len().saturating_sub(OUTBOX);
        pending.drain(..excess);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialEvents for Outbox {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    /// There is room for input again, which the device thread may hold back.
    fn in_buffer_empty(&self) {
        pull(&self.0.doorbell);
    }
}

type Registers = Uart<Line, Outbox, Outbox>;

/// The serial port.
pub struct Serial {
    registers: Arc<Mutex<Registers>>,
    outbox: Outbox,
    interrupt: EventFd,
    sink: Option<Sink>,
}

/// A serial port cannot be made, or a saved one does not fit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SerialError {
    /// No eventfd for its output.
    #[error(transparent)]
    Wiring(#[from] InterruptError),
    /// An fd cannot be duplicated.
    #[error("cannot duplicate an fd of the serial port")]
    Duplicate(#[source] io::Error),
    /// The registers cannot be.
    #[error("the serial port's registers cannot be restored: {0}")]
    Registers(String),
}

/// What the port is connected to.
pub struct SerialResources {
    /// Pulses the port's interrupt line.
    pub interrupt: EventFd,
    /// Takes the output; gives input if it is non-blocking and open for both.
    pub sink: Option<OwnedFd>,
}

impl Serial {
    /// A port after reset.
    pub fn new(resources: SerialResources) -> Result<Self, SerialError> {
        let outbox = Outbox::new(Vec::new(), true)?;
        Self::from_state(&SerialState::default(), outbox, resources)
    }

    fn from_state(
        state: &SerialState,
        outbox: Outbox,
        resources: SerialResources,
    ) -> Result<Self, SerialError> {
        let SerialResources { interrupt, sink } = resources;
        let line = Line(interrupt.try_clone().map_err(SerialError::Duplicate)?);
        let registers = Uart::from_state(state, line, outbox.clone(), outbox.clone())
            .map_err(|error| SerialError::Registers(format!("{error:?}")))?;
        let registers = Arc::new(Mutex::new(registers));
        Ok(Self { registers, outbox, interrupt, sink: sink.map(Sink::new) })
    }

    /// What the device thread is to run. The first call has the sink.
    pub fn worker(&mut self) -> SerialWorker {
        SerialWorker {
            registers: self.registers.clone(),
            outbox: self.outbox.clone(),
            sink: self.sink.take(),
            input_waits: false,
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The port has byte registers; wider accesses read ones.
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.registers().read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // The outbox takes everything, and the line cannot fail.
            let _ = self.registers().write(offset, *byte);
        }
    }
}

impl Device for Serial {
    fn pause(&mut self) {
        // No vCPU runs; when the port's thread has let go, nothing moves any more.
        *lock(&self.outbox.0.running) = false;
    }

    fn drain(&mut self, _deadline: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn sync(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&mut self) {
        // An interrupt that was on its way is gone; the guest finds out by itself whether there is
        // anything to do. A UART that waits for one for ever is what Firecracker #5764 was.
        *lock(&self.outbox.0.running) = true;
        pull(&self.interrupt);
        pull(&self.outbox.0.doorbell);
    }
}

/// The port as the device thread sees it: writes output, reads input.
pub struct SerialWorker {
    registers: Arc<Mutex<Registers>>,
    outbox: Outbox,
    sink: Option<Sink>,
    /// The sink has input that the FIFO had no room for.
    input_waits: bool,
}

impl SerialWorker {
    const DOORBELL: u32 = 0;
    const SINK: u32 = 1;

    fn send(&mut self) {
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
                // The sink says when it takes more.
                Written::Full => return self.outbox.put_back(&chunk),
                Written::Broken => self.outbox.pending().clear(),
            }
        }
    }

    fn receive(&mut self) {
        let Some(sink) = self.sink.as_mut().filter(|sink| sink.reads) else { return };
        self.input_waits = false;
        loop {
            let mut registers = lock(&self.registers);
            let room = registers.fifo_capacity().min(FIFO);
            if room == 0 {
                // The guest's next read of the last byte rings the doorbell.
                self.input_waits = true;
                return;
            }
            let mut bytes = [0; FIFO];
            match sink.file.read(&mut bytes[..room]) {
                Ok(count) if count > 0 => {
                    let _ = registers.enqueue_raw_bytes(&bytes[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing there, or nobody at the other end yet.
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
            // The sink tells only once. The resume rings the doorbell.
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
            // A regular file cannot be waited for, and never makes anybody wait.
            let _ = ops.add(Events::with_data(&sink.file, Self::SINK, when));
        }
    }
}

/// Where output goes.
struct Sink {
    file: File,
    nonblocking: bool,
    /// It can be read without a wait, so it is.
    reads: bool,
}

enum Written {
    Bytes(usize),
    Full,
    Broken,
}

impl Sink {
    fn new(fd: OwnedFd) -> Self {
        let flags = fcntl_getfl(&fd).unwrap_or(OFlags::empty());
        let nonblocking = flags.contains(OFlags::NONBLOCK);
        let reads = nonblocking && flags.contains(OFlags::RDWR);
        Self { file: fd.into(), nonblocking, reads }
    }

    fn write(&mut self, bytes: &[u8]) -> Written {
        if !self.nonblocking && !self.is_writable() {
            return Written::Full;
        }
        match self.file.write(bytes) {
            Ok(0) => Written::Full,
            Ok(count) => Written::Bytes(count),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => Written::Bytes(0),
                io::ErrorKind::WouldBlock => Written::Full,
                _ => {
                    tracing::debug!("serial output on fd {}: {error}", self.file.as_raw_fd());
                    Written::Broken
                }
            },
        }
    }

    /// Whether a blocking sink, such as a pipe, takes something without a wait.
    fn is_writable(&self) -> bool {
        let mut fds = [PollFd::new(&self.file, PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }
}

/// `perennial,serial-v1`: the registers by their names in the 16550's data sheet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialStateV1 {
    /// Registers and receive FIFO.
    pub registers: SerialState,
    /// Output that the sink has not taken.
    pub outbox: Vec<u8>,
}

impl Schema for SerialStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,serial-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { registers, outbox } = self;
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = registers;
        node.put_u32("dll", (*baud_divisor_low).into());
        node.put_u32("dlm", (*baud_divisor_high).into());
        node.put_u32("ier", (*interrupt_enable).into());
        node.put_u32("iir", (*interrupt_identification).into());
        node.put_u32("lcr", (*line_control).into());
        node.put_u32("lsr", (*line_status).into());
        node.put_u32("mcr", (*modem_control).into());
        node.put_u32("msr", (*modem_status).into());
        node.put_u32("scr", (*scratch).into());
        node.put_bytes("receive-fifo", in_buffer);
        node.put_bytes("outbox", outbox);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let in_buffer = reader.bytes("receive-fifo")?.to_vec();
        if in_buffer.len() > FIFO {
            let problem = format!("{} bytes, the FIFO has {FIFO}", in_buffer.len());
            return Err(reader.invalid("receive-fifo", problem));
        }
        let outbox = reader.bytes("outbox")?.to_vec();
        if outbox.len() > OUTBOX {
            let problem = format!("{} bytes, at most {OUTBOX}", outbox.len());
            return Err(reader.invalid("outbox", problem));
        }
        let registers = SerialState {
            baud_divisor_low: reader.narrow("dll")?,
            baud_divisor_high: reader.narrow("dlm")?,
            interrupt_enable: reader.narrow("ier")?,
            interrupt_identification: reader.narrow("iir")?,
            line_control: reader.narrow("lcr")?,
            line_status: reader.narrow("lsr")?,
            modem_control: reader.narrow("mcr")?,
            modem_status: reader.narrow("msr")?,
            scratch: reader.narrow("scr")?,
            in_buffer,
        };
        Ok(Self { registers, outbox })
    }
}

impl Persist for Serial {
    type State = SerialStateV1;
    type Resources = SerialResources;
    type Error = SerialError;

    fn save(&self) -> Result<SerialStateV1, SerialError> {
        let registers = self.registers().state();
        let outbox = self.outbox.pending().iter().copied().collect();
        Ok(SerialStateV1 { registers, outbox })
    }

    fn restore(state: SerialStateV1, resources: SerialResources) -> Result<Self, SerialError> {
        let SerialStateV1 { registers, outbox } = state;
        Self::from_state(&registers, Outbox::new(outbox, false)?, resources)
    }
}

#[cfg(test)]
mod pauses;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;
    use std::os::unix::net::UnixStream;

    impl SerialStateV1 {
        pub(crate) fn sample() -> Self {
            let registers = SerialState {
                baud_divisor_low: 0x0c,
                baud_divisor_high: 0x01,
                interrupt_enable: 0x03,
                interrupt_identification: 0xc1,
                line_control: 0x13,
                line_status: 0x61,
                modem_control: 0x08,
                modem_status: 0xb0,
                scratch: 0x5a,
                in_buffer: b"ls\n".to_vec(),
            };
            Self { registers, outbox: b"login: ".to_vec() }
        }
    }

    contract_tests! {
        SerialStateV1,
        sample: SerialStateV1::sample,
        changes: [
            |s| s.registers.baud_divisor_low += 1,
            |s| s.registers.baud_divisor_high += 1,
            |s| s.registers.interrupt_enable += 1,
            |s| s.registers.interrupt_identification += 1,
            |s| s.registers.line_control += 1,
            |s| s.registers.line_status += 1,
            |s| s.registers.modem_control += 1,
            |s| s.registers.modem_status += 1,
            |s| s.registers.scratch += 1,
            |s| s.registers.in_buffer = vec![1; FIFO],
            |s| s.registers.in_buffer.clear(),
            |s| s.outbox = vec![1; 3 * FIFO],
            |s| s.outbox.clear(),
        ],
        golden: "serial-v1",
    }

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const THR_EMPTY: u8 = 0b10;

    fn port(sink: Option<OwnedFd>) -> (Serial, EventFd) {
        let interrupt = event("a test").unwrap();
        let line = interrupt.try_clone().unwrap();
        (Serial::new(SerialResources { interrupt, sink }).unwrap(), line)
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
        assert_eq!(state.registers.in_buffer, [7; 3]);
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
        serial.write(7, &[0x5a]);
        send(&mut serial, b"unsent");
        let state = serial.save().unwrap();
        assert_eq!(state, serial.save().unwrap());
        assert_eq!(read_node(&state.to_node("serial@3f8"), "/"), Ok(state.clone()));

        let (mut near, far) = pair();
        let interrupt = event("a test").unwrap();
        let line = interrupt.try_clone().unwrap();
        let resources = SerialResources { interrupt, sink: Some(far) };
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
        state.registers.in_buffer = vec![1; FIFO];
        assert_eq!(read_node(&state.to_node("serial@3f8"), "/"), Ok(state.clone()));
        state.registers.in_buffer.push(1);
        let error = read_node::<SerialStateV1>(&state.to_node("serial@3f8"), "/").unwrap_err();
        assert!(error.to_string().contains("65 bytes, the FIFO has 64"), "{error}");
    }

    #[test]
    fn wide_accesses_are_ignored() {
        let (mut serial, _) = port(None);
        let before = serial.save().unwrap();
        serial.write(IER, &[1, 2]);
        serial.write(DATA, &[1, 2, 3, 4]);
        assert_eq!(serial.save().unwrap(), before);
    }
}
