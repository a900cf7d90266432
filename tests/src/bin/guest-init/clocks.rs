//! Reads the guest's clocks so that their values can be compared.

#![expect(unsafe_code, reason = "the TSC has no other way to be read")]

use core::arch::x86_64::_rdtsc;

use rustix::time::{ClockId, clock_gettime};

/// Most microseconds between readings that count as simultaneous. Readings that are not interrupted
/// take a few.
const CLOSE_US: u64 = 1000;

/// Most attempts. After these, the attempt with the closest readings is used.
const ATTEMPTS: usize = 100;

/// The TSC of the vCPU that this thread runs on.
pub(crate) fn tsc() -> u64 {
    // SAFETY: the instruction only reads a counter, and Linux lets every program execute it.
    unsafe { _rdtsc() }
}

/// CLOCK_MONOTONIC and CLOCK_REALTIME in microseconds, at the same time. On a busy vCPU the thread may
/// be preempted for a tenth of a second between two readings, and the wall clock would then seem to
/// have moved.
pub(crate) fn now() -> (u64, u64) {
    of_one_moment(|id| {
        let now = clock_gettime(id);
        now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
    })
}

/// Reads the wall clock between two readings of the monotonic clock, which show how long that took.
fn of_one_moment(mut read: impl FnMut(ClockId) -> u64) -> (u64, u64) {
    let mut closest = (u64::MAX, (0, 0));
    for _ in 0..ATTEMPTS {
        let monotonic = read(ClockId::Monotonic);
        let realtime = read(ClockId::Realtime);
        // Saturates if the clock went backward, which `watch_clocks` detects.
        let apart = read(ClockId::Monotonic).saturating_sub(monotonic);
        if apart < closest.0 {
            closest = (apart, (monotonic, realtime));
        }
        if apart <= CLOSE_US {
            break;
        }
    }
    closest.1
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: u64 = 1_800_000_000_000_000;

    /// What is read if so much time passes before each reading, and none after the last of them.
    fn read(pauses: &[u64]) -> (u64, u64) {
        let mut pauses = pauses.iter();
        let mut now = 0;
        of_one_moment(|id| {
            now += pauses.next().copied().unwrap_or_default();
            now + if id == ClockId::Realtime { EPOCH } else { 0 }
        })
    }

    #[test]
    fn an_interrupted_look_is_repeated() {
        assert_eq!(read(&[5, 2, 3]), (5, EPOCH + 7));
        assert_eq!(read(&[5, 118_000, 3, 4, 2, 2]), (118_012, EPOCH + 118_014), "before");
        assert_eq!(read(&[5, 2, 118_000, 4, 2, 2]), (118_011, EPOCH + 118_013), "after");
    }

    #[test]
    fn always_interrupted_the_closest_look_counts() {
        let mut pauses = vec![70_000; 3 * ATTEMPTS];
        pauses[31] = 3000;
        let (monotonic, realtime) = read(&pauses);
        assert_eq!((monotonic, realtime - EPOCH - monotonic), (31 * 70_000, 3000));
    }
}
