//! The thread of the real-time clock, which raises its interrupts.

use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::Shared;
use super::registers::Ns;
use crate::devices::alarm::Alarm;

/// The alarm is set at most this far ahead, because the host's date may be set meanwhile.
const MOST_NS: Ns = 60_000_000_000;

/// Sets the alarm to this many nanoseconds from now; `None`: to never.
pub(super) fn set_alarm(alarm: &Alarm, after_ns: Option<Ns>) {
    // Fits: at most a minute.
    alarm.set(after_ns.map(|ns| Duration::from_nanos(ns.clamp(1, MOST_NS) as u64)));
}

/// The part of the device that its thread runs.
pub struct RtcWorker(Arc<Shared>);

impl RtcWorker {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }
}

impl MutEventSubscriber for RtcWorker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // Nothing to read: the alarm was changed since, by a vCPU or a pause.
        if self.0.alarm.has_gone_off() {
            self.0.access(|_, _| ());
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.0.alarm, EventSet::IN)) {
            tracing::error!(%error, "rtc: it will raise no interrupts");
        }
    }
}
