//! The serial port COM1: a 16550 whose output goes to a file, a terminal or a port of the host.
//!
//! A vCPU never waits for the sink: what the guest sends goes into an outbox, and the port's thread
//! writes it. A sink that does not take anything for long loses the oldest output, as a real line
//! without flow control would. What is in the outbox at a live update travels with the state. A
//! paused port moves no byte: what it sent after the save it would send again after the restore, and
//! what it received would be lost.

mod options;
#[cfg(test)]
mod pauses;
mod sink;
mod state;
#[cfg(test)]
mod tests;
mod worker;

pub use options::{SerialOptions, open_port};
pub use state::SerialStateV1;
pub use worker::SerialWorker;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use self::sink::Sink;
use super::kind::{Built, Kind, Place, Site};
use super::{Device, DeviceError, files};
use crate::arch::x86_64::layout;
use crate::bus::BusDevice;
use crate::kvm::interrupts::{InterruptError, event, pull};
use crate::mutex::lock;
use crate::state::Persist;

/// Most output that waits for the sink, in bytes.
const OUTBOX: usize = 64 << 10;
/// Bytes of the receive FIFO (vm-superio's).
const FIFO: usize = 64;

/// The interrupt line as vm-superio wants it.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        pull(&self.0);
        Ok(())
    }
}

/// Output that waits, and the doorbell that tells the port's thread of it.
#[derive(Clone)]
struct Outbox(Arc<Shared>);

struct Shared {
    pending: Mutex<VecDeque<u8>>,
    doorbell: EventFd,
    /// Not paused. The port's thread holds it while it moves bytes.
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
        // One ring for a burst: the port's thread takes all that is there.
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
    /// There is room for input again, which the port's thread may hold back.
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

    /// What the port's thread is to run. The first call has the sink.
    pub fn worker(&mut self) -> SerialWorker {
        SerialWorker::new(self.registers.clone(), self.outbox.clone(), self.sink.take())
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }
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

impl Persist for Serial {
    type State = SerialStateV1;
    type Resources = SerialResources;
    type Error = SerialError;

    fn save(&self) -> Result<SerialStateV1, SerialError> {
        // Interrupt and sink are the new host's.
        let Self { registers, outbox, interrupt: _, sink: _ } = self;
        let registers = lock(registers).state();
        let outbox = outbox.pending().iter().copied().collect();
        Ok(SerialStateV1 { registers, outbox })
    }

    fn restore(state: SerialStateV1, resources: SerialResources) -> Result<Self, SerialError> {
        let SerialStateV1 { registers, outbox } = state;
        Self::from_state(&registers, Outbox::new(outbox, false)?, resources)
    }
}

impl Kind for Serial {
    const KEY: &'static str = "serial";
    const NAME: &'static str = "serial";
    const MOST: usize = 1;
    const PLACE: Place = Place::Port(layout::COM1_PORT);

    type Options = SerialOptions;
    type State = SerialStateV1;

    fn parse(text: &str) -> Result<SerialOptions, String> {
        SerialOptions::parse(text)
    }

    /// Every machine has the port; by default nobody hears it.
    fn unasked() -> Option<SerialOptions> {
        Some(SerialOptions::Off)
    }

    fn open(options: &SerialOptions) -> Result<Vec<files::Opened>, files::OpenError> {
        options.open()
    }

    fn build(
        options: &SerialOptions,
        site: &mut Site,
        state: Option<SerialStateV1>,
    ) -> Result<Built<SerialStateV1>, DeviceError> {
        let sink = match options {
            SerialOptions::Off => None,
            _ => Some(site.files.take(options::SINK).map_err(|e| site.files_error(e))?),
        };
        let line = site.interrupts.edge(layout::COM1_IRQ);
        let interrupt = line.map_err(|e| site.error("connect its interrupt", e))?;
        let resources = SerialResources { interrupt, sink };
        let mut port = match state {
            Some(state) => Self::restore(state, resources).map_err(|e| site.error("restore it", e)),
            None => Self::new(resources).map_err(|e| site.error("create it", e)),
        }?;
        let worker = Box::new(port.worker());
        let port = Arc::new(Mutex::new(port));
        let mut built = Built::new(&site.node, port.clone(), worker);
        built.ports = Some((layout::COM1_PORT.into(), layout::COM1_LEN.into(), port));
        Ok(built)
    }
}
