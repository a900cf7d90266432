//! The thread of the real-time clock, which raises its interrupts.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};
use vmm_sys_util::epoll::EventSet;

use super::Shared;
use super::registers::Ns;

const NS_PER_S: i64 = 1_000_000_000;
const NEVER: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// The alarm is set at most this far ahead, because the host's date may be set meanwhile.
const MOST_NS: Ns = 60 * NS_PER_S as Ns;

/// Sets the alarm to this many nanoseconds from now; `None`: to never.
pub(super) fn set_alarm(alarm: &OwnedFd, after_ns: Option<Ns>) {
    let it_value = after_ns.map_or(NEVER, |ns| {
        // Fits: at most a minute.
        let ns = ns.clamp(1, MOST_NS) as i64;
        Timespec { tv_sec: ns / NS_PER_S, tv_nsec: ns % NS_PER_S }
    });
    let when = Itimerspec { it_interval: NEVER, it_value };
    // Fails only for an fd that is no timer, or a time out of range.
    if let Err(error) = timerfd_settime(alarm, TimerfdTimerFlags::empty(), &when) {
        tracing::error!("rtc: cannot set its timer: {error}");
    }
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
        if rustix::io::read(&self.0.alarm, &mut [0; 8]).is_ok() {
            self.0.access(|_, _| ());
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.0.alarm, EventSet::IN)) {
            tracing::error!(%error, "rtc: it will raise no interrupts");
        }
    }
}
