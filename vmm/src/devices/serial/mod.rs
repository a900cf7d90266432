//! The serial port COM1: a 16550A (`uart.rs`) whose output goes to a sink: a file, a terminal or a port of
//! the host.
//!
//! A vCPU never waits for the sink: a byte that the guest sends goes into an outbox, and the port's
//! thread writes the outbox to the sink. If the sink takes nothing for long, the oldest output is lost, as
//! on a real line without flow control. The outbox is part of the saved state. A paused port moves no
//! byte: a byte sent after the save would be sent again after the restore, and a byte received after the
//! save would be lost.

mod calls;
#[cfg(test)]
mod clients;
mod console;
mod log;
#[cfg(test)]
mod logs;
mod options;
#[cfg(test)]
mod pauses;
mod pty;
mod sink;
mod state;
#[cfg(test)]
mod tests;
mod uart;
mod worker;

pub use log::LogOptions;
pub(super) use options::SINK;
pub use options::{SerialOptions, open_port, open_port_now};
pub use state::SerialStateV1;
pub use uart::Uart;
pub use worker::SerialWorker;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use self::console::Console;
use self::uart::Written;
use super::claims::Claim;
use super::kind::{Built, CommandLine, DeviceCalls, Kind, Place, Site};
use super::needs::HostNeed;
use super::storage::STALLED_AFTER;
use super::{Device, DeviceError, files};
use crate::arch::x86_64::layout;
use crate::bus::BusDevice;
use crate::kvm::interrupts::{InterruptError, event, pull};
use crate::mutex::lock;
use crate::state::Persist;

/// Most bytes of output that wait for the sink.
const OUTBOX: usize = 64 << 10;
/// Output that waits for the sink, and the doorbell that wakes the port's thread.
#[derive(Clone)]
struct Outbox(Arc<Shared>);

struct Shared {
    pending: Mutex<VecDeque<u8>>,
    /// Whether the last write to the sink failed, so that what is pending is not written until another one is tried.
    fails: AtomicBool,
    doorbell: EventFd,
    motion: Mutex<Motion>,
    /// Notified when the port's thread has stopped to move bytes.
    still: Condvar,
}

/// Whether bytes move.
struct Motion {
    paused: bool,
    /// Since when the port's thread moves bytes. `None` if it does not. A pause waits for it in the drain, which has a
    /// deadline: a sink may hold up a write for long.
    moving: Option<Instant>,
}

impl Outbox {
    fn new(pending: Vec<u8>, running: bool) -> Result<Self, InterruptError> {
        let doorbell = event("the serial port's output")?;
        let motion = Mutex::new(Motion { paused: !running, moving: None });
        let (pending, still) = (Mutex::new(pending.into()), Condvar::new());
        let fails = AtomicBool::new(false);
        Ok(Self(Arc::new(Shared { pending, fails, doorbell, motion, still })))
    }

    /// Moves bytes on the port's thread, unless the port is paused. Returns whether it did.
    fn move_bytes(&self, how: impl FnOnce()) -> bool {
        {
            let mut motion = lock(&self.0.motion);
            if motion.paused {
                return false;
            }
            motion.moving = Some(Instant::now());
        }
        how();
        lock(&self.0.motion).moving = None;
        self.0.still.notify_all();
        true
    }

    fn pending(&self) -> MutexGuard<'_, VecDeque<u8>> {
        lock(&self.0.pending)
    }

    /// Takes the oldest bytes out, at most `count`, so that no vCPU waits for the lock while they are
    /// written.
    fn take(&self, count: usize) -> Vec<u8> {
        let mut pending = self.pending();
        let count = count.min(pending.len());
        pending.drain(..count).collect()
    }

    /// Appends a byte. The oldest byte is lost if there are too many.
    fn push(&self, byte: u8) {
        let mut pending = self.pending();
        // One signal for a burst: the port's thread takes all bytes.
        if pending.is_empty() || self.0.fails.load(Ordering::Relaxed) {
            self.ring();
        }
        pending.push_back(byte);
        if pending.len() > OUTBOX {
            pending.pop_front();
        }
    }

    /// Notes whether the last write to the sink failed, while the bytes of that write are not pending. Returns whether the
    /// write before it did.
    fn note_fails(&self, fails: bool) -> bool {
        self.0.fails.swap(fails, Ordering::Relaxed)
    }

    /// Wakes the port's thread.
    fn ring(&self) {
        pull(&self.0.doorbell);
    }

    /// Puts bytes that were not written back, as many as there is room for.
    fn put_back(&self, bytes: &[u8]) {
        let mut pending = self.pending();
        let room = OUTBOX.saturating_sub(pending.len()).min(bytes.len());
        bytes[bytes.len() - room..].iter().rev().for_each(|byte| pending.push_front(*byte));
    }
}

/// Registers and interrupt line: shared by the vCPUs, which access the registers, and the port's thread,
/// which receives input.
struct Registers {
    uart: Mutex<Uart>,
    interrupt: EventFd,
}

impl Registers {
    fn uart(&self) -> MutexGuard<'_, Uart> {
        lock(&self.uart)
    }
}

/// The serial port.
pub struct Serial {
    registers: Arc<Registers>,
    outbox: Outbox,
    console: Option<Console>,
}

/// A serial port cannot be created or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SerialError {
    /// The eventfd for its output cannot be created.
    #[error(transparent)]
    Wiring(#[from] InterruptError),
}

/// The connections of the port.
pub struct SerialResources {
    /// Pulses the port's interrupt line.
    pub interrupt: EventFd,
    /// File for the output. Input is read from it if it is non-blocking and open for reading and writing.
    pub sink: Option<OwnedFd>,
    /// A socket on which clients connect. Each takes the place of the sink.
    pub listener: Option<OwnedFd>,
    /// An inotify instance that is readable when a program has opened the sink, a pseudoterminal.
    pub opened: Option<OwnedFd>,
    /// A socket on which the host sends the sinks that follow the first.
    pub next: Option<OwnedFd>,
}

impl Serial {
    /// A port after reset.
    pub fn new(resources: SerialResources) -> Result<Self, SerialError> {
        Ok(Self::with(Uart::default(), Outbox::new(Vec::new(), true)?, resources))
    }

    fn with(uart: Uart, outbox: Outbox, resources: SerialResources) -> Self {
        let SerialResources { interrupt, sink, listener, opened, next } = resources;
        let registers = Arc::new(Registers { uart: Mutex::new(uart), interrupt });
        Self { registers, outbox, console: Some(Console::new(sink, listener, opened, next)) }
    }

    /// Returns the worker of the port's thread. The first call passes the console on to it.
    pub fn worker(&mut self) -> SerialWorker {
        let console = self.console.take().unwrap_or_default();
        SerialWorker::new(self.registers.clone(), self.outbox.clone(), console)
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            let read = self.registers.uart().read(offset);
            *byte = read.value;
            if read.room {
                // The port's thread may hold input back.
                self.outbox.ring();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (offset, byte) in (offset..).zip(data) {
            let Written { sent, interrupt, room } = self.registers.uart().write(offset, *byte);
            if let Some(byte) = sent {
                self.outbox.push(byte);
            }
            if room {
                self.outbox.ring();
            }
            if interrupt {
                pull(&self.registers.interrupt);
            }
        }
    }
}

/// The error of a port whose thread waits for the sink.
fn held_up() -> DeviceError {
    DeviceError {
        device: format!("{}@{:x}", Serial::NAME, layout::COM1_PORT),
        attempt: "stop",
        source: "the file or terminal that takes its output does not answer".into(),
    }
}

impl Device for Serial {
    fn pause(&mut self) {
        lock(&self.outbox.0.motion).paused = true;
    }

    fn check_answers(&self, now: Instant) -> Result<(), DeviceError> {
        let since = lock(&self.outbox.0.motion).moving;
        match since.is_some_and(|since| now.saturating_duration_since(since) >= STALLED_AFTER) {
            true => Err(held_up()),
            false => Ok(()),
        }
    }

    /// Waits until no byte moves. No vCPU runs.
    fn drain(&mut self, deadline: Instant) -> Result<(), DeviceError> {
        let Shared { motion, still, .. } = &*self.outbox.0;
        let mut motion = lock(motion);
        while motion.moving.is_some() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(held_up());
            }
            motion = still.wait_timeout(motion, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn resume(&mut self) {
        // An interrupt that was on its way is lost. Raise one in any case: the guest reads in IIR whether
        // one is pending. Without it a transmitter could wait without end (Firecracker #5764).
        lock(&self.outbox.0.motion).paused = false;
        pull(&self.registers.interrupt);
        self.outbox.ring();
    }
}

impl Persist for Serial {
    type State = SerialStateV1;
    type Resources = SerialResources;
    type Error = SerialError;

    fn save(&self) -> Result<SerialStateV1, SerialError> {
        // The new host opens the console anew.
        let Self { registers, outbox, console: _ } = self;
        // The interrupt line as well.
        let Registers { uart, interrupt: _ } = &**registers;
        let registers = lock(uart).clone();
        let outbox = outbox.pending().iter().copied().collect();
        Ok(SerialStateV1 { registers, outbox })
    }

    fn restore(state: SerialStateV1, resources: SerialResources) -> Result<Self, SerialError> {
        let SerialStateV1 { registers, outbox } = state;
        Ok(Self::with(registers, Outbox::new(outbox, false)?, resources))
    }
}

impl Kind for Serial {
    const KEY: &'static str = "serial";
    const COMMAND_LINE: Option<CommandLine> = Some(CommandLine {
        usage: "The serial port ttyS0: tty, pty, socket=PATH, file=FILE, port=NAME or off",
        default: Some("tty"),
        is_path: false,
        foreign: &[],
        harmless: &[],
    });
    const NAME: &'static str = "serial";
    const MOST: usize = 1;
    const PLACE: Place = Place::Port(layout::COM1_PORT);
    const CALLS: DeviceCalls = calls::CALLS;

    type Options = SerialOptions;
    type State = SerialStateV1;

    fn parse(text: &str, _vcpus: u32) -> Result<SerialOptions, String> {
        SerialOptions::parse(text)
    }

    /// Every machine has the port; by default its output is dropped.
    fn unasked() -> Option<SerialOptions> {
        Some(SerialOptions::Off)
    }

    fn claims(options: &SerialOptions) -> Vec<Claim> {
        options.claims()
    }

    fn needs(options: &SerialOptions) -> Vec<HostNeed> {
        options.needs()
    }

    fn check_before_boot(options: &SerialOptions) -> Result<(), files::OpenError> {
        match options {
            SerialOptions::File(log) => log.check_directory(std::process::id() == 1),
            _ => Ok(()),
        }
    }

    fn open(options: &SerialOptions) -> Result<Vec<files::Opened>, files::OpenError> {
        options.open()
    }

    fn build(
        options: &SerialOptions,
        site: &mut Site,
        state: Option<SerialStateV1>,
    ) -> Result<Built<SerialStateV1>, DeviceError> {
        let [sink, listener, opened, next] = options.roles().map(|role| {
            let taken = role.map(|role| site.files.take(role));
            taken.transpose().map_err(|e| site.files_error(e))
        });
        let (sink, listener, opened, next) = (sink?, listener?, opened?, next?);
        let line = site.interrupts.edge(layout::COM1_IRQ);
        let interrupt = line.map_err(|e| site.error("connect its interrupt", e))?;
        let resources = SerialResources { interrupt, sink, listener, opened, next };
        let mut port = match state {
            Some(state) => Self::restore(state, resources).map_err(|e| site.error("restore it", e)),
            None => Self::new(resources).map_err(|e| site.error("create it", e)),
        }?;
        let worker = Box::new(port.worker());
        let port = Arc::new(Mutex::new(port));
        let mut built = Built::new(&site.node, port.clone(), worker);
        built.parts.ports = Some((layout::COM1_PORT.into(), layout::COM1_LEN.into(), port));
        Ok(built)
    }
}
