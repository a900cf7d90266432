//! The ACPI fixed hardware (ACPI 6.5, 4.8): power-off, the power button, and the PM timer, by which a
//! guest without kvmclock measures time.
//!
//! The tables in `arch/x86_64/acpi.rs` tell the guest where the registers are. All events share one
//! level-triggered interrupt, the SCI. It is high exactly while an enabled status bit is set, so no event is
//! lost over a live update: the restored device sets the line as its registers say.

mod calls;
mod options;
mod registers;
mod state;
#[cfg(test)]
mod tests;
mod timer;
mod worker;

pub use options::AcpiOptions;
pub use state::AcpiStateV1;
pub use worker::AcpiWorker;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use self::registers::{Contents, Registers};
use super::alarm::Alarm;
use super::claims::Claim;
use super::files::{OpenError, Opened};
use super::kind::{Built, CommandLine, DeviceCalls, Kind, Place, Site};
use super::power::{OnPower, PowerEvent};
use super::{Device, DeviceError};
use crate::arch::x86_64::layout;
use crate::bus::BusDevice;
use crate::kvm::clock::GuestClock;
use crate::kvm::interrupts::Interrupts;
use crate::mutex::lock;
use crate::state::Persist;

/// The device.
pub struct Acpi(Arc<Shared>);

/// What the vCPUs, which access the registers, and the device's thread share.
struct Shared {
    registers: Mutex<Registers>,
    interrupts: Arc<dyn Interrupts>,
    on_power: OnPower,
    /// Wakes the device's thread when the PM timer's highest bit changes, if the guest wants an interrupt
    /// for that.
    alarm: Alarm,
}

/// The device cannot be created or restored.
#[derive(Debug, thiserror::Error)]
#[error("cannot create a timer")]
pub struct AcpiError(#[source] io::Error);

/// The connections of the device.
pub struct AcpiResources {
    /// The interrupt controllers.
    pub interrupts: Arc<dyn Interrupts>,
    /// The guest's clock.
    pub clock: Arc<dyn GuestClock>,
    /// Called when the guest powers its machine off.
    pub on_power: OnPower,
}

impl Shared {
    /// Sets interrupt and alarm as the registers say.
    fn update(&self, registers: &mut Registers) {
        if let Err(error) = self.interrupts.set_level(layout::SCI_IRQ, registers.raises_sci()) {
            tracing::error!("acpi: {error}");
        }
        worker::set_alarm(&self.alarm, registers);
    }

    /// Presses the power button. The guest of a paused machine notices after the pause.
    fn press(&self) {
        let mut registers = lock(&self.registers);
        registers.press();
        self.update(&mut registers);
    }
}

impl Acpi {
    /// A device after reset.
    pub fn new(resources: AcpiResources) -> Result<Self, AcpiError> {
        let mut device = Self::with(Contents::RESET, resources)?;
        device.resume();
        Ok(device)
    }

    fn with(contents: Contents, resources: AcpiResources) -> Result<Self, AcpiError> {
        let AcpiResources { interrupts, clock, on_power } = resources;
        let alarm = Alarm::new().map_err(AcpiError)?;
        let registers = Mutex::new(Registers::new(contents, clock));
        Ok(Self(Arc::new(Shared { registers, interrupts, on_power, alarm })))
    }

    #[cfg(test)]
    fn press(&self) {
        self.0.press();
    }
}

impl BusDevice for Acpi {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.0.registers).read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut registers = lock(&self.0.registers);
        if registers.write(offset, data) {
            (self.0.on_power)(PowerEvent::Shutdown);
        }
        self.0.update(&mut registers);
    }
}

impl Device for Acpi {
    fn pause(&mut self) {
        let mut registers = lock(&self.0.registers);
        registers.tick();
        self.0.alarm.set(None);
    }

    fn check_answers(&self, _now: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn drain(&mut self, _deadline: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&mut self) {
        let mut registers = lock(&self.0.registers);
        registers.resume();
        self.0.update(&mut registers);
    }
}

impl Persist for Acpi {
    type State = AcpiStateV1;
    type Resources = AcpiResources;
    type Error = AcpiError;

    fn save(&self) -> Result<AcpiStateV1, AcpiError> {
        let Self(shared) = self;
        // The alarm follows from the registers; the rest belongs to the new host.
        let Shared { registers, interrupts: _, on_power: _, alarm: _ } = &**shared;
        Ok(AcpiStateV1 { contents: lock(registers).contents() })
    }

    fn restore(state: AcpiStateV1, resources: AcpiResources) -> Result<Self, AcpiError> {
        let AcpiStateV1 { contents } = state;
        Self::with(contents, resources)
    }
}

impl Kind for Acpi {
    const KEY: &'static str = "acpi";
    const COMMAND_LINE: Option<CommandLine> = None;
    const NAME: &'static str = "acpi";
    const MOST: usize = 1;
    const PLACE: Place = Place::Port(layout::PM_PORT);
    const CALLS: DeviceCalls = calls::CALLS;

    type Options = AcpiOptions;
    type State = AcpiStateV1;

    fn parse(text: &str, _vcpus: u32) -> Result<AcpiOptions, String> {
        AcpiOptions::parse(text)
    }

    /// Every machine has it.
    fn unasked() -> Option<AcpiOptions> {
        Some(AcpiOptions::On)
    }

    fn claims(_options: &AcpiOptions) -> Vec<Claim> {
        Vec::new()
    }

    fn open(_options: &AcpiOptions) -> Result<Vec<Opened>, OpenError> {
        Ok(Vec::new())
    }

    fn build(
        _options: &AcpiOptions,
        site: &mut Site,
        state: Option<AcpiStateV1>,
    ) -> Result<Built<AcpiStateV1>, DeviceError> {
        let resources = AcpiResources {
            interrupts: site.interrupts.clone(),
            clock: site.clock.clone(),
            on_power: site.on_power.clone(),
        };
        let device = match state {
            Some(state) => Self::restore(state, resources).map_err(|e| site.error("restore it", e)),
            None => Self::new(resources).map_err(|e| site.error("create it", e)),
        }?;
        let worker = Box::new(AcpiWorker::new(device.0.clone()));
        let shared = device.0.clone();
        let device = Arc::new(Mutex::new(device));
        let mut built = Built::new(&site.node, device.clone(), worker);
        built.parts.ports = Some((layout::PM_PORT.into(), layout::PM_LEN.into(), device));
        built.parts.power_button = Some(Box::new(move || shared.press()));
        Ok(built)
    }
}
