//! The host's time stamp counter: the only clock that a kexec does not reset.
//!
//! Nothing resets the TSC between two kernels of one machine, so readings before and after a kexec
//! can be compared. The kernels' own clocks cannot. It counts at a fixed rate on every processor
//! that KVM calls stable (Intel SDM 3B 18.17; AMD APM 2, 13.2.4).

#![expect(unsafe_code, reason = "rdtsc and cpuid are unsafe intrinsics")]

/// The counter's name in documents.
pub const NAME: &str = "x86-tsc";

/// Nanoseconds of a millisecond. A TSC of `k` kHz counts `k` ticks in this time.
const NS_PER_MS: u128 = 1_000_000;

/// Reads the TSC of the CPU that this thread runs on, in ticks. The read is not serializing: its
/// error is some dozens of ticks.
pub fn now() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux does not set CR4.TSD for this process.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Whether the CPU tells the rate of its TSC (CPUID leaf 0x15, Intel SDM 3A 20.7.3), so that no kernel has to
/// measure it.
#[allow(unused_unsafe, reason = "the intrinsic is unsafe in older releases of Rust only")]
pub fn rate_is_in_cpuid() -> bool {
    const LEAF: u32 = 0x15;
    // SAFETY: every x86-64 processor has CPUID; leaf 0 gives the highest leaf.
    let highest = unsafe { core::arch::x86_64::__cpuid(0) }.eax;
    if highest < LEAF {
        return false;
    }
    // SAFETY: as above, and the leaf exists.
    let leaf = unsafe { core::arch::x86_64::__cpuid(LEAF) };
    // Denominator and numerator of the ratio to the crystal clock, and the rate of that in Hz.
    leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0
}

/// Nanoseconds of `ticks` at `khz`, rounded down; saturates after 584 years. A rate of 0 gives 0.
pub fn ns(ticks: u64, khz: u32) -> u64 {
    if khz == 0 {
        return 0;
    }
    let ns = u128::from(ticks) * NS_PER_MS / u128::from(khz);
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// Ticks at `khz` in `ns` nanoseconds, rounded down; saturates.
pub fn ticks(ns: u64, khz: u32) -> u64 {
    let ticks = u128::from(ns) * u128::from(khz) / NS_PER_MS;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_become_nanoseconds_without_overflow() {
        assert_eq!(ns(2_500_000, 2_500_000), 1_000_000);
        assert_eq!(ns(u64::MAX, 1_000_000), u64::MAX);
        assert_eq!(ns(u64::MAX, 2_000_000), u64::MAX / 2);
        assert_eq!(ns(u64::MAX, 1), u64::MAX);
        assert_eq!(ns(5, 0), 0);
        assert_eq!(ticks(u64::MAX, 1_000_000), u64::MAX);
        assert_eq!(ticks(1_000_000, 2_994_375), 2_994_375);
        assert_eq!(ticks(u64::MAX, u32::MAX), u64::MAX);
    }

    #[test]
    fn the_counter_counts() {
        let before = now();
        assert!((0..1_000_000).any(|_| now() > before));
    }
}
