//! The rate of this computer's TSC.

#![expect(unsafe_code, reason = "rdtsc is an unsafe intrinsic")]

use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

/// How long the rate is measured.
const MEASURED_FOR: Duration = Duration::from_millis(200);

/// Returns the rate in kHz, which is measured once for each process.
pub(crate) fn khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let (start, first) = clocks();
        thread::sleep(MEASURED_FOR);
        let (end, last) = clocks();
        (u128::from(last - first) * 1_000_000 / (end - start).as_nanos()) as u64
    })
}

/// Both clocks at the same moment: of some attempts, the one that took the least time. Others may have been
/// interrupted in the middle.
fn clocks() -> (Instant, u64) {
    // SAFETY: the instruction has no requirements; user mode may execute it unless the kernel forbids it,
    // which Linux does only for programs that ask for that.
    let tsc = || unsafe { core::arch::x86_64::_rdtsc() };
    let attempts = (0..100).map(|_| {
        let before = tsc();
        (Instant::now(), before, tsc())
    });
    let best = attempts.min_by_key(|(_, before, after)| after.wrapping_sub(*before));
    best.map_or((Instant::now(), tsc()), |(now, before, after)| (now, before.midpoint(after)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_a_cpu_and_stays() {
        let rate = khz();
        assert!((100_000..20_000_000).contains(&rate), "{rate} kHz");
        assert_eq!(khz(), rate);
    }
}
