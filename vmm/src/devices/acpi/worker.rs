//! The thread of the ACPI fixed hardware: raises the SCI when the highest bit of the PM timer changes.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};
use vmm_sys_util::epoll::EventSet;

use super::Shared;
use super::registers::Registers;
use crate::mutex::lock;

const NEVER: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Sets the alarm to the next change of the timer's highest bit, or to never if the guest wants no interrupt
/// for that. While the timer catches up after a pause, the alarm is late.
pub(super) fn set_alarm(alarm: &OwnedFd, registers: &mut Registers) {
    if !registers.watches_timer() {
        return stop_alarm(alarm);
    }
    // At most 2.35 s.
    let ns = registers.until_timer_ns() as i64;
    set(alarm, Timespec { tv_sec: ns / 1_000_000_000, tv_nsec: ns % 1_000_000_000 });
}

/// Sets the alarm to never.
pub(super) fn stop_alarm(alarm: &OwnedFd) {
    set(alarm, NEVER);
}

fn set(alarm: &OwnedFd, it_value: Timespec) {
    let when = Itimerspec { it_interval: NEVER, it_value };
    // Fails only for an fd that is no timer, or a time out of range.
    if let Err(error) = timerfd_settime(alarm, TimerfdTimerFlags::empty(), &when) {
        tracing::error!("acpi: cannot set its timer: {error}");
    }
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
        if rustix::io::read(&self.0.alarm, &mut [0; 8]).is_err() {
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
