//! The guest's time over a live update: kvmclock and the TSC, carried on by one measurement.
//!
//! A live update takes seconds, and meanwhile the world's time goes on. A guest whose clocks stood
//! still would be wrong by the blackout: leases, tokens and certificates would be judged by a clock
//! that is late until NTP has slewed it. So all clocks of the guest run on: the TSC, because the
//! physical one does and its offset is kept; kvmclock, because it is set forward by as much. (A
//! snapshot that is restored after a day is another matter: there MONOTONIC must not jump,
//! Firecracker #5809.)
//!
//! How much time has passed is told by the host's TSC, the one clock that a kexec leaves alone.
//! `CLOCK_REALTIME` of a freshly booted kernel comes from the RTC and is right to a second only. It
//! is used where the TSC has been reset after all, which shows by its running backward.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VmFd};
use rustix::time::{ClockId, clock_gettime};

use super::{Attempt, KvmError};
use crate::arch::x86_64::tsc;
use crate::state::{Node, Reader, Schema, StateError};

/// The clocks at one moment while no vCPU ran. `perennial,clock-x86-v1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockStateV1 {
    /// The guest's kvmclock, in nanoseconds.
    pub clock_ns: u64,
    /// Host `CLOCK_REALTIME` at that moment, in nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Host TSC at that moment.
    pub host_tsc: u64,
    /// Rate of the host's TSC, in kHz.
    pub tsc_khz: u32,
}

/// Host TSC and `CLOCK_REALTIME` at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Host TSC.
    pub tsc: u64,
    /// Nanoseconds since 1970.
    pub realtime_ns: u64,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Realtime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
        Self { tsc: tsc::now(), realtime_ns: seconds * 1_000_000_000 + nanoseconds }
    }
}

/// How the clocks go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passage {
    /// Time that has passed since the save, in nanoseconds.
    pub elapsed_ns: u64,
    /// What is added to every vCPU's TSC offset, modulo 2^64; 0 where the TSC ran on.
    pub offset_change: u64,
}

impl ClockStateV1 {
    /// Reads kvmclock. No vCPU runs. `tsc_khz` is the rate of the host's TSC.
    pub fn save(vm: &VmFd, tsc_khz: u32) -> Result<Self, KvmError> {
        let data = vm.get_clock().attempt("read kvmclock")?;
        // KVM gives the three values of one moment only while it derives kvmclock from the TSC
        // (Documentation/virt/kvm/api.rst 4.29); otherwise they are taken one after the other.
        let now = Moment::now();
        let together = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
        let (realtime_ns, host_tsc) = match data.flags & together == together {
            true => (data.realtime, data.host_tsc),
            false => (now.realtime_ns, now.tsc),
        };
        Ok(Self { clock_ns: data.clock, realtime_ns, host_tsc, tsc_khz })
    }

    /// How the clocks go on at `now`.
    pub fn passage(&self, now: Moment) -> Passage {
        if now.tsc >= self.host_tsc {
            let elapsed_ns = tsc::ns(now.tsc - self.host_tsc, self.tsc_khz);
            return Passage { elapsed_ns, offset_change: 0 };
        }
        // The TSC was reset: guest TSC = host TSC + offset must go on by the time that passed
        // (Documentation/virt/kvm/devices/vcpu.rst 4.1). A clock never goes backward.
        let elapsed_ns = now.realtime_ns.saturating_sub(self.realtime_ns);
        let elapsed_ticks = tsc::ticks(elapsed_ns, self.tsc_khz);
        let offset_change = self.host_tsc.wrapping_add(elapsed_ticks).wrapping_sub(now.tsc);
        Passage { elapsed_ns, offset_change }
    }

    /// Sets kvmclock forward. After every vCPU has its TSC offset, before any vCPU runs.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        let now = Moment::now();
        let clock = self.clock_ns.saturating_add(self.passage(now).elapsed_ns);
        // With the time of day beside it KVM adds what passes until it takes the value; this leaves
        // nothing between `now` and the ioctl out.
        let known = u32::try_from(vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        let flags = known & KVM_CLOCK_REALTIME;
        let data = kvm_clock_data { clock, flags, realtime: now.realtime_ns, ..Default::default() };
        vm.set_clock(&data).attempt("set kvmclock")
    }
}

impl Schema for ClockStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,clock-x86-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { clock_ns, realtime_ns, host_tsc, tsc_khz } = self;
        node.put_u64("clock-ns", *clock_ns);
        node.put_u64("realtime-ns", *realtime_ns);
        node.put_u64("host-tsc", *host_tsc);
        node.put_u32("tsc-khz", *tsc_khz);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let state = Self {
            clock_ns: reader.u64("clock-ns")?,
            realtime_ns: reader.u64("realtime-ns")?,
            host_tsc: reader.u64("host-tsc")?,
            tsc_khz: reader.u32("tsc-khz")?,
        };
        match state.tsc_khz {
            0 => Err(reader.invalid("tsc-khz", "a TSC of 0 kHz does not count")),
            _ => Ok(state),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::test_vm::TestVm;
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;
    use std::time::Duration;

    const SAVED: ClockStateV1 = ClockStateV1 {
        clock_ns: 500,
        realtime_ns: 1_000_000_000_000,
        host_tsc: 9_000_000,
        tsc_khz: 2_000_000,
    };

    impl ClockStateV1 {
        pub(crate) fn sample() -> Self {
            SAVED
        }
    }

    contract_tests! {
        ClockStateV1,
        sample: ClockStateV1::sample,
        changes: [
            |s| s.clock_ns += 1,
            |s| s.realtime_ns += 1,
            |s| s.host_tsc += 1,
            |s| s.tsc_khz += 1,
        ],
        golden: "clock-x86-v1",
    }

    #[test]
    fn a_clock_that_does_not_count_is_refused() {
        let stopped = ClockStateV1 { tsc_khz: 0, ..SAVED };
        let error = read_node::<ClockStateV1>(&stopped.to_node("clock"), "/").unwrap_err();
        assert_eq!(error.to_string(), "/clock: property `tsc-khz`: a TSC of 0 kHz does not count");
    }

    #[test]
    fn kvmclock_goes_on_in_another_vm_and_never_backward() {
        let (Some(before), Some(after)) = (TestVm::new(), TestVm::new()) else { return };
        // An hour that every run can tell from the nanoseconds that it takes.
        let hour = Duration::from_secs(3600).as_nanos() as u64;
        let khz = before.vcpu.get_tsc_khz().unwrap();
        before.vm.set_clock(&kvm_clock_data { clock: 3 * hour, ..Default::default() }).unwrap();
        let saved = ClockStateV1::save(&before.vm, khz).unwrap();
        assert!(saved.clock_ns >= 3 * hour, "{saved:?}");
        saved.restore(&after.vm).unwrap();
        let restored = ClockStateV1::save(&after.vm, khz).unwrap();
        assert!(restored.clock_ns >= saved.clock_ns, "{saved:?}, then {restored:?}");
        assert!(restored.host_tsc >= saved.host_tsc, "{saved:?}, then {restored:?}");

        // The same, saved an hour ago: the clock is set forward by it.
        let hours_ticks = tsc::ticks(hour, khz);
        let old = ClockStateV1 { host_tsc: saved.host_tsc.wrapping_sub(hours_ticks), ..saved };
        // A TSC that has not counted for an hour yet goes by the time of day.
        let old = ClockStateV1 { realtime_ns: saved.realtime_ns - hour, ..old };
        old.restore(&after.vm).unwrap();
        let restored = ClockStateV1::save(&after.vm, khz).unwrap();
        assert!(restored.clock_ns >= 4 * hour - 1000, "{old:?}, then {restored:?}");
    }

    #[test]
    fn a_tsc_that_ran_on_tells_the_time_and_offsets_stay() {
        // The time of day is off by most of a second, as after a boot, and does not matter.
        let now = Moment { tsc: 9_000_000 + 4_000_000_000, realtime_ns: 1_001_100_000_000 };
        let passage = SAVED.passage(now);
        assert_eq!(passage, Passage { elapsed_ns: 2_000_000_000, offset_change: 0 });
    }

    #[test]
    fn a_tsc_that_was_reset_is_replaced_by_the_time_of_day() {
        let now = Moment { tsc: 1_000, realtime_ns: 1_003_000_000_000 };
        let passage = SAVED.passage(now);
        assert_eq!(passage.elapsed_ns, 3_000_000_000);
        let offset_before = 77u64;
        let guest_before = SAVED.host_tsc.wrapping_add(offset_before);
        let guest_now = now.tsc.wrapping_add(offset_before).wrapping_add(passage.offset_change);
        assert_eq!(guest_now - guest_before, 6_000_000_000, "3 s at 2 GHz");
    }

    #[test]
    fn no_clock_goes_backward_when_the_time_of_day_does() {
        let now = Moment { tsc: 1_000, realtime_ns: 0 };
        let passage = SAVED.passage(now);
        assert_eq!(passage.elapsed_ns, 0);
        assert_eq!(now.tsc.wrapping_add(passage.offset_change), SAVED.host_tsc);
    }
}
