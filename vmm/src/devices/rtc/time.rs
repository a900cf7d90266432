//! The date of the real-time clock: the host's, plus what the guest's own setting differs from it by.
//!
//! A host that was just entered may not know the date: a kexec'd kernel takes it from the machine's own RTC,
//! and without one it is in 1970 until somebody sets it. So after a pause or a live update, a host's date
//! that is too early is not believed: the clock then goes on by the guest's clock, until the host's date has
//! caught up. A date that somebody sets back while the guest runs is followed.

use std::sync::Arc;

use super::registers::Ns;
use super::state::MOST_OFFSET_S;
use crate::kvm::clock::GuestClock;

/// How much too early the host's date may be after a live update. A kernel reads it from an RTC, which shows
/// whole seconds.
const TOLERANCE_NS: u64 = 2_000_000_000;
const NS_PER_S: Ns = 1_000_000_000;

/// Two clocks at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The host's date as the clock took it, in nanoseconds since 1970.
    pub realtime_ns: u64,
    /// The guest's clock.
    pub clock_ns: u64,
}

/// The date of one clock.
pub(super) struct Time {
    clock: Arc<dyn GuestClock>,
    offset_s: i64,
    seen: Seen,
    /// The host's date is not believed, because it was too early when the guest was resumed.
    doubts_host: bool,
}

impl Time {
    pub(super) fn new(clock: Arc<dyn GuestClock>, offset_s: i64, seen: Seen) -> Self {
        Self { clock, offset_s, seen, doubts_host: false }
    }

    /// A time that is the host's.
    pub(super) fn of_host(clock: Arc<dyn GuestClock>) -> Self {
        let seen = Seen { realtime_ns: clock.realtime_ns(), clock_ns: clock.now_ns() };
        Self::new(clock, 0, seen)
    }

    pub(super) fn offset_s(&self) -> i64 {
        self.offset_s
    }

    /// The clocks at the last look.
    pub(super) fn seen(&self) -> Seen {
        self.seen
    }

    /// The date at the last look, in nanoseconds since 1970.
    pub(super) fn last(&self) -> Ns {
        Ns::from(self.seen.realtime_ns) + Ns::from(self.offset_s) * NS_PER_S
    }

    /// Looks at the clocks. Returns the date.
    pub(super) fn now(&mut self) -> Ns {
        let (realtime_ns, clock_ns) = (self.clock.realtime_ns(), self.clock.now_ns());
        let went_on = self.continued(clock_ns);
        self.doubts_host &= is_too_early(realtime_ns, went_on);
        let realtime_ns = if self.doubts_host { went_on } else { realtime_ns };
        self.seen = Seen { realtime_ns, clock_ns };
        self.last()
    }

    /// Decides after a pause whether to believe the host's date.
    pub(super) fn resume(&mut self) {
        let went_on = self.continued(self.clock.now_ns());
        self.doubts_host = is_too_early(self.clock.realtime_ns(), went_on);
        if self.doubts_host {
            tracing::warn!(
                "rtc: the host's date is too early, as if it had not been set after the live update: the \
                 guest's goes on without it"
            );
        }
    }

    /// Sets the date at the last look to this second since 1970. How much of the second has passed stays as it
    /// is.
    pub(super) fn set(&mut self, second: i64) {
        // At most 2^64 / 10^9.
        let realtime_s = (Ns::from(self.seen.realtime_ns) / NS_PER_S) as i64;
        self.offset_s = (second - realtime_s).clamp(-MOST_OFFSET_S, MOST_OFFSET_S);
    }

    /// The host's date if it had gone on as the guest's clock did.
    fn continued(&self, clock_ns: u64) -> u64 {
        let Seen { realtime_ns, clock_ns: then } = self.seen;
        realtime_ns.saturating_add(clock_ns.saturating_sub(then))
    }
}

fn is_too_early(realtime_ns: u64, expected_ns: u64) -> bool {
    realtime_ns.saturating_add(TOLERANCE_NS) < expected_ns
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::kvm::interrupts::fake::FakeWires;

    const S: u64 = 1_000_000_000;
    const NOW: u64 = 1_795_000_000 * S;

    fn time() -> (Time, Arc<FakeWires>) {
        let clock = Arc::new(FakeWires::default());
        clock.realtime_ns.store(NOW, Ordering::Relaxed);
        (Time::of_host(clock.clone()), clock)
    }

    fn at(clock: &FakeWires, realtime_ns: u64, now_ns: u64) {
        clock.realtime_ns.store(realtime_ns, Ordering::Relaxed);
        clock.now_ns.store(now_ns, Ordering::Relaxed);
    }

    /// The same time after a live update.
    fn updated(time: &Time, clock: &Arc<FakeWires>) -> Time {
        let mut time = Time::new(clock.clone(), time.offset_s(), time.seen());
        time.resume();
        time
    }

    #[test]
    fn it_is_the_hosts_date_wherever_somebody_sets_that_while_the_guest_runs() {
        let (mut time, clock) = time();
        for realtime in [NOW + 1, NOW + 86_400 * S, NOW - 86_400 * S] {
            at(&clock, realtime, 1);
            assert_eq!(time.now(), Ns::from(realtime));
        }
    }

    #[test]
    fn a_host_that_does_not_know_the_date_after_an_update_is_not_believed_until_it_does() {
        let (mut time, clock) = time();
        at(&clock, NOW + 60 * S, 60 * S);
        time.now();
        time.set((NOW / S) as i64 + 60 + 3600);
        // The next kernel begins in 1970, 5 s later.
        at(&clock, 7 * S, 65 * S);
        let mut time = updated(&time, &clock);
        let hour = Ns::from(3600 * S);
        assert_eq!(time.now(), Ns::from(NOW + 65 * S) + hour);
        at(&clock, 8 * S, 66 * S);
        assert_eq!(time.now(), Ns::from(NOW + 66 * S) + hour);
        // A second update while that is so.
        let mut time = updated(&time, &clock);
        assert_eq!(time.now(), Ns::from(NOW + 66 * S) + hour);
        // Somebody sets the host's date, half a second late.
        at(&clock, NOW + 70 * S, 70 * S + S / 2);
        assert_eq!(time.now(), Ns::from(NOW + 70 * S) + hour);
        at(&clock, NOW, 71 * S);
        assert_eq!(time.now(), Ns::from(NOW) + hour, "followed again");
    }

    #[test]
    fn a_host_that_is_ahead_or_a_second_late_after_an_update_is_believed() {
        for realtime in [NOW - S, NOW, NOW + S, NOW + 100 * S] {
            let (time, clock) = time();
            at(&clock, realtime, 0);
            assert_eq!(updated(&time, &clock).now(), Ns::from(realtime));
        }
    }
}
