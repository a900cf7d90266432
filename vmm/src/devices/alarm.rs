//! A timer that wakes the thread of a device once.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// The alarm is set at most this far ahead.
const LONGEST: Duration = Duration::from_secs(86_400);
const NEVER: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// An alarm, which is readable from the moment when it goes off.
#[derive(Debug)]
pub struct Alarm(OwnedFd);

impl Alarm {
    /// Creates an alarm that is not set.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Sets the alarm to go off after this time, or after a day if that is sooner. `None` switches it off.
    pub fn set(&self, after: Option<Duration>) {
        // A time of 0 would switch it off.
        let after = after.map(|after| after.clamp(Duration::from_nanos(1), LONGEST));
        let it_value = after.map_or(NEVER, |after| {
            Timespec::try_from(after).expect("a day is within the range of a timer")
        });
        let once = Itimerspec { it_interval: NEVER, it_value };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)
            .expect("a timer accepts a time within its range");
    }

    /// Returns whether the alarm has gone off since it was set or asked last.
    pub fn has_gone_off(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    #[test]
    fn an_alarm_goes_off_once_and_only_if_it_is_set() {
        let alarm = Alarm::new().unwrap();
        assert!(!alarm.has_gone_off());
        for soon in [Duration::ZERO, Duration::from_millis(1)] {
            alarm.set(Some(soon));
            poll(&mut [PollFd::new(&alarm, PollFlags::IN)], None).unwrap();
            assert!(alarm.has_gone_off() && !alarm.has_gone_off());
        }
        alarm.set(Some(Duration::MAX));
        alarm.set(None);
        assert!(!alarm.has_gone_off());
    }
}
