//! The ACPI PM timer (ACPI 6.5, 4.8.3.3): counts at 3.579545 MHz, in 24 bits.
//!
//! The timer shows the guest's clock, so it goes on over a pause and a live update. Guests read it at least
//! every 2.1 s and add up the differences, modulo 2^24 ticks (4.69 s). After a longer pause, a guest with no
//! better clock would lose multiples of 4.69 s. So the timer does not jump over a long pause: it moves half
//! of its range at once, and then counts at twice its rate until it has caught up.
//!
//! ```text
//!  time              ____/       value(now) = the lesser of
//!                   /  .'            now, in ticks
//!       pause     / .'               value at the pause + 2^23 + 2 * ticks since the resume
//!      _______  /.'
//! ```

use std::sync::Arc;

use crate::kvm::clock::GuestClock;

/// Ticks in a second.
const HERTZ: u64 = 3_579_545;
/// Ticks between two changes of the highest bit, which set the timer's status bit.
const HALF: u64 = 1 << 23;
/// The bits that the guest sees.
const MASK: u64 = (1 << 24) - 1;
const NS_PER_S: u64 = 1_000_000_000;

/// The timer.
pub(super) struct PmTimer {
    clock: Arc<dyn GuestClock>,
    /// Value and time at the last resume, both in ticks.
    resumed: (u64, u64),
    /// Newest value that the guest may have seen, of which it sees the low 24 bits.
    newest: u64,
}

impl PmTimer {
    /// A stopped timer with this value.
    pub(super) fn new(clock: Arc<dyn GuestClock>, value: u64) -> Self {
        Self { clock, resumed: (value, 0), newest: value }
    }

    /// Returns the value now, in ticks since the machine was built.
    pub(super) fn now(&mut self) -> u64 {
        let time = ticks(self.clock.now_ns());
        let (value, at) = self.resumed;
        let since = time.saturating_sub(at);
        let most = value.saturating_add(HALF).saturating_add(since.saturating_mul(2));
        // Never back, whatever the clock does.
        self.newest = self.newest.max(time.min(most));
        self.newest
    }

    /// Returns the value at the last call of [`now`](Self::now).
    pub(super) fn newest(&self) -> u64 {
        self.newest
    }

    /// Goes on after a pause. The last call of [`now`](Self::now) was at the pause.
    pub(super) fn resume(&mut self) {
        self.resumed = (self.newest, ticks(self.clock.now_ns()));
    }
}

/// Returns the register for a value.
pub(super) fn register(value: u64) -> u32 {
    // 24 bits.
    (value & MASK) as u32
}

/// Returns how many times the highest bit has changed up to a value.
pub(super) fn halves(value: u64) -> u64 {
    value / HALF
}

/// Returns the nanoseconds from a value to the next change of the highest bit, at the timer's usual rate.
pub(super) fn until_next_half_ns(value: u64) -> u64 {
    (HALF - value % HALF) * NS_PER_S / HERTZ + 1
}

fn ticks(ns: u64) -> u64 {
    // At most 2^64 * 0.0036.
    (u128::from(ns) * u128::from(HERTZ) / u128::from(NS_PER_S)) as u64
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::kvm::interrupts::fake::FakeWires;

    fn timer() -> (PmTimer, Arc<FakeWires>) {
        let clock = Arc::new(FakeWires::default());
        (PmTimer::new(clock.clone(), 0), clock)
    }

    fn advance(clock: &FakeWires, ns: u64) {
        clock.now_ns.fetch_add(ns, Ordering::Relaxed);
    }

    #[test]
    fn a_second_has_3579545_ticks_and_a_day_is_exact() {
        let (mut timer, clock) = timer();
        timer.resume();
        let mut seen = 0;
        for _ in 0..24 * 3600 {
            advance(&clock, NS_PER_S);
            assert_eq!(timer.now() - seen, HERTZ);
            seen = timer.now();
        }
        assert_eq!(u64::from(register(seen)), 24 * 3600 * HERTZ % (1 << 24));
    }

    #[test]
    fn a_guest_that_reads_it_every_2_seconds_loses_no_time_over_a_pause_of_any_length() {
        for pause_ms in [0, 1, 2000, 2343, 2344, 4687, 5000, 9374, 60_000, 3_600_000] {
            let (mut timer, clock) = timer();
            timer.resume();
            advance(&clock, NS_PER_S);
            let (mut guest, mut last) = (HERTZ, register(timer.now()));
            // The guest has been idle for 2 s when it is paused, and reads right after the pause.
            advance(&clock, 2 * NS_PER_S);
            timer.now();
            advance(&clock, pause_ms * 1_000_000);
            timer.resume();
            let mut steps = 0;
            loop {
                let now = register(timer.now());
                guest += u64::from(now.wrapping_sub(last)) & MASK;
                last = now;
                if guest == ticks(clock.now_ns()) {
                    break;
                }
                steps += 1;
                assert!(steps < 3_600, "{pause_ms} ms: {guest} of {}", ticks(clock.now_ns()));
                advance(&clock, 2 * NS_PER_S);
            }
            let behind = (pause_ms * HERTZ / 1000).saturating_sub(HALF);
            assert!(steps <= behind / (2 * HERTZ) + 1, "{pause_ms} ms: {steps} steps");
        }
    }

    #[test]
    fn it_goes_on_from_its_saved_value_and_never_back() {
        let (mut timer, clock) = timer();
        timer.resume();
        advance(&clock, 1234 * NS_PER_S);
        // As if it had read the clock a little later before the update.
        let saved = timer.now() + 5;
        let mut restored = PmTimer::new(clock.clone(), saved);
        restored.resume();
        assert_eq!(restored.now(), saved);
        advance(&clock, NS_PER_S);
        assert_eq!(restored.now(), 1235 * HERTZ);
        clock.now_ns.store(0, Ordering::Relaxed);
        assert_eq!(restored.now(), 1235 * HERTZ);
    }

    #[test]
    fn the_next_change_of_the_highest_bit_is_not_earlier_than_told() {
        for value in [0, 1, HALF - 1, HALF, 7 * HALF + 12345] {
            let ns = until_next_half_ns(value);
            assert!(value % HALF + ticks(ns) + 1 >= HALF, "{value}");
            assert!(ns <= 2_343_500_000, "{value}: {ns}");
        }
    }
}
