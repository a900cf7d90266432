//! The thread of the ACPI fixed hardware: raises the SCI when the highest bit of the PM timer changes.

use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::Shared;
use super::registers::Registers;
use crate::devices::alarm::Alarm;
use crate::mutex::lock;

/// Sets the alarm to the next change of the timer's highest bit, or to never if the guest wants no interrupt
/// for that. While the timer catches up after a pause, the alarm is late.
pub(super) fn set_alarm(alarm: &Alarm, registers: &mut Registers) {
    let watches = registers.watches_timer();
    alarm.set(watches.then(|| Duration::from_nanos(registers.until_timer_ns())));
}

/// The part of the device that its thread runs.
pub struct AcpiWorker(Arc<Shared>);

impl AcpiWorker {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }
}

impl MutEventSubscriber for AcpiWorker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let mut registers = lock(&self.0.registers);
        // Nothing to read: the alarm was changed since, by a vCPU or a pause.
        if !self.0.alarm.has_gone_off() {
            return;
        }
        registers.tick();
        self.0.update(&mut registers);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.0.alarm, EventSet::IN)) {
            tracing::error!(%error, "acpi: the PM timer will raise no interrupt");
        }
    }
}
