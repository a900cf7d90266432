//! A real-time clock, an MC146818 with CMOS memory at ports 0x70 and 0x71, from which a guest without
//! kvmclock knows the date.
//!
//! The date is the host's (`time.rs`). The registers (`registers.rs`) change by the passage of time only, so
//! the device computes them at each access. Its thread waits for the next interrupt that the guest has
//! enabled.

mod calls;
mod date;
mod options;
mod registers;
mod state;
#[cfg(test)]
mod tests;
mod time;
mod worker;

pub use options::RtcOptions;
pub use registers::Registers;
pub use state::RtcStateV1;
pub use time::Seen;
pub use worker::RtcWorker;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use self::registers::{CMOS, Ns};
use self::time::Time;
use super::alarm::Alarm;
use super::claims::Claim;
use super::files::{OpenError, Opened};
use super::kind::{Built, CommandLine, DeviceCalls, Kind, Place, Site};
use super::{Device, DeviceError};
use crate::arch::x86_64::layout;
use crate::bus::BusDevice;
use crate::kvm::clock::GuestClock;
use crate::kvm::interrupts::pull;
use crate::mutex::lock;
use crate::state::Persist;

/// The port of the index register. The other port is that of the register that it selects.
const INDEX: u64 = 0;

/// The device.
pub struct Rtc(Arc<Shared>);

/// What the vCPUs, which access the registers, and the device's thread share.
struct Shared {
    clock: Mutex<Clock>,
    interrupt: EventFd,
    /// Wakes the device's thread at the next interrupt that the guest has enabled.
    alarm: Alarm,
}

/// The registers and the date.
struct Clock {
    registers: Registers,
    time: Time,
    running: bool,
}

/// The device cannot be created or restored.
#[derive(Debug, thiserror::Error)]
#[error("cannot create a timer")]
pub struct RtcError(#[source] io::Error);

/// The connections of the device.
pub struct RtcResources {
    /// Pulses the device's interrupt line.
    pub interrupt: EventFd,
    /// The guest's clock and the host's date.
    pub clock: Arc<dyn GuestClock>,
}

impl Clock {
    /// Looks at the time, and sets the flags of what has happened since the last look. Returns the time.
    fn tick(&mut self) -> Ns {
        let last = self.time.last();
        let now = self.time.now();
        self.registers.tick(last, now);
        now
    }
}

impl Shared {
    /// Lets `access` see or change the registers at a time. Afterwards pulses the interrupt, if one became
    /// pending, and sets the alarm.
    fn access<T>(&self, access: impl FnOnce(&mut Clock, Ns) -> T) -> T {
        let mut clock = lock(&self.clock);
        let was_pending = clock.registers.is_pending();
        let now = clock.tick();
        let result = access(&mut clock, now);
        if clock.registers.is_pending() && !was_pending {
            pull(&self.interrupt);
        }
        if clock.running {
            worker::set_alarm(&self.alarm, clock.registers.next_interrupt(now).map(|at| at - now));
        }
        result
    }
}

impl Rtc {
    /// A clock after power-on, which shows the host's date in UTC.
    pub fn new(resources: RtcResources) -> Result<Self, RtcError> {
        let RtcResources { interrupt, clock } = resources;
        Self::with(Registers::default(), Time::of_host(clock), interrupt, true)
    }

    fn with(
        registers: Registers,
        time: Time,
        interrupt: EventFd,
        running: bool,
    ) -> Result<Self, RtcError> {
        let alarm = Alarm::new().map_err(RtcError)?;
        let clock = Mutex::new(Clock { registers, time, running });
        Ok(Self(Arc::new(Shared { clock, interrupt, alarm })))
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The index register cannot be read: all ones.
        for (_, byte) in (offset..).zip(data).filter(|(offset, _)| *offset != INDEX) {
            *byte = self.0.access(|clock, now| clock.registers.read(now));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (offset, &byte) in (offset..).zip(data) {
            self.0.access(|clock, now| match offset {
                // The highest bit masks NMIs on a PC, of which this machine has none.
                INDEX => clock.registers.index = byte & (CMOS as u8 - 1),
                _ => {
                    if let Some(second) = clock.registers.write(byte, now).set_to {
                        clock.time.set(second);
                    }
                }
            });
        }
    }
}

impl Device for Rtc {
    fn pause(&mut self) {
        let mut clock = lock(&self.0.clock);
        clock.tick();
        clock.running = false;
        self.0.alarm.set(None);
    }

    fn check_answers(&self, _now: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn drain(&mut self, _deadline: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&mut self) {
        {
            let mut clock = lock(&self.0.clock);
            clock.time.resume();
            clock.running = true;
        }
        self.0.access(|clock, _| {
            // Its pulse may have been lost.
            if clock.registers.is_pending() {
                pull(&self.0.interrupt);
            }
        });
    }
}

impl Persist for Rtc {
    type State = RtcStateV1;
    type Resources = RtcResources;
    type Error = RtcError;

    fn save(&self) -> Result<RtcStateV1, RtcError> {
        let Self(shared) = self;
        // The alarm follows from the registers; the interrupt line belongs to the new host.
        let Shared { clock, interrupt: _, alarm: _ } = &**shared;
        // A saved clock is paused.
        let Clock { registers, time, running: _ } = &*lock(clock);
        let (registers, offset_s, seen) = (registers.clone(), time.offset_s(), time.seen());
        Ok(RtcStateV1 { registers, offset_s, seen })
    }

    fn restore(state: RtcStateV1, resources: RtcResources) -> Result<Self, RtcError> {
        let RtcStateV1 { registers, offset_s, seen } = state;
        let RtcResources { interrupt, clock } = resources;
        Self::with(registers, Time::new(clock, offset_s, seen), interrupt, false)
    }
}

impl Kind for Rtc {
    const KEY: &'static str = "rtc";
    const COMMAND_LINE: Option<CommandLine> = None;
    const NAME: &'static str = "rtc";
    const MOST: usize = 1;
    const PLACE: Place = Place::Port(layout::RTC_PORT);
    const CALLS: DeviceCalls = calls::CALLS;

    type Options = RtcOptions;
    type State = RtcStateV1;

    fn parse(text: &str, _vcpus: u32) -> Result<RtcOptions, String> {
        RtcOptions::parse(text)
    }

    /// Every machine has it.
    fn unasked() -> Option<RtcOptions> {
        Some(RtcOptions::On)
    }

    fn claims(_options: &RtcOptions) -> Vec<Claim> {
        Vec::new()
    }

    fn open(_options: &RtcOptions) -> Result<Vec<Opened>, OpenError> {
        Ok(Vec::new())
    }

    fn build(
        _options: &RtcOptions,
        site: &mut Site,
        state: Option<RtcStateV1>,
    ) -> Result<Built<RtcStateV1>, DeviceError> {
        let line = site.interrupts.edge(layout::RTC_IRQ);
        let interrupt = line.map_err(|e| site.error("connect its interrupt", e))?;
        let resources = RtcResources { interrupt, clock: site.clock.clone() };
        let device = match state {
            Some(state) => Self::restore(state, resources).map_err(|e| site.error("restore it", e)),
            None => Self::new(resources).map_err(|e| site.error("create it", e)),
        }?;
        let worker = Box::new(RtcWorker::new(device.0.clone()));
        let device = Arc::new(Mutex::new(device));
        let mut built = Built::new(&site.node, device.clone(), worker);
        built.parts.ports = Some((layout::RTC_PORT.into(), layout::RTC_LEN.into(), device));
        Ok(built)
    }
}
