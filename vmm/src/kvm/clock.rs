//! The guest's clocks over a live update: kvmclock and the TSC both advance by the elapsed time.
//!
//! If the guest's clocks stood still during the blackout, they would be late afterwards, and the
//! guest would judge leases, tokens and certificates by a late clock until NTP has corrected it. So
//! the guest's clocks advance: the TSC, because the host's TSC keeps counting and the vCPU's TSC
//! offset is kept; kvmclock, because the restore sets it forward by the elapsed time. (This does
//! not fit a snapshot that is restored a day later: there MONOTONIC must not jump, Firecracker
//! #5809.)
//!
//! The elapsed time is measured with the host's TSC, the only clock that a kexec does not reset.
//! `CLOCK_REALTIME` of a freshly booted kernel comes from the RTC and is accurate to one second
//! only. It is used only if the TSC was reset, which shows as a TSC below the saved one.

use std::sync::Arc;

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VmFd};
use rustix::time::{ClockId, clock_gettime};

use super::{Attempt, KvmError};
use crate::arch::x86_64::tsc;
use crate::state::{Node, Reader, Schema, StateError};

/// The clocks at one moment while no vCPU runs. Binding `perennial,clock-x86-v1`.
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

/// How often clocks are read that have to be read at one moment.
const ATTEMPTS: usize = 5;

/// Returns the TSC, and what `read` returned at that moment. This thread, or the whole machine, may lose its CPU between
/// two reads, and a guest's clock would be wrong by that time. So of some attempts the shortest counts.
fn at_one_moment<T>(mut tsc: impl FnMut() -> u64, mut read: impl FnMut() -> T) -> (u64, T) {
    let mut attempt = || {
        let (before, value, after) = (tsc(), read(), tsc());
        (after.saturating_sub(before), before.midpoint(after), value)
    };
    let mut shortest = attempt();
    for _ in 1..ATTEMPTS {
        let next = attempt();
        if next.0 < shortest.0 {
            shortest = next;
        }
    }
    (shortest.1, shortest.2)
}

fn realtime_ns() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds * 1_000_000_000 + nanoseconds
}

impl Moment {
    /// Reads both clocks now.
    pub fn now() -> Self {
        let (tsc, realtime_ns) = at_one_moment(tsc::now, realtime_ns);
        Self { tsc, realtime_ns }
    }
}

/// The clocks of a guest, for devices that measure time.
pub trait GuestClock: Send + Sync {
    /// Returns the time since the machine was built, in nanoseconds. It goes on over a pause and over a live
    /// update, and never goes backward.
    fn now_ns(&self) -> u64;

    /// Returns the host's date, in nanoseconds since 1970. Somebody may set it at any time, and a host that was
    /// just entered may not know it.
    fn realtime_ns(&self) -> u64;
}

/// The kvmclock of one VM. So devices and a guest with kvmclock measure the same time.
#[derive(Debug)]
pub struct KvmClock(pub Arc<VmFd>);

impl GuestClock for KvmClock {
    fn now_ns(&self) -> u64 {
        // KVM_GET_CLOCK cannot fail on a VM's fd. Devices take a time that is too early as no progress.
        self.0.get_clock().map_or(0, |data| data.clock)
    }

    fn realtime_ns(&self) -> u64 {
        realtime_ns()
    }
}

/// By how much the guest's clocks advance at a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passage {
    /// Time since the save, in nanoseconds.
    pub elapsed_ns: u64,
    /// Ticks to add to every vCPU's TSC offset, modulo 2^64; 0 unless the host's TSC was reset.
    pub offset_change: u64,
}

impl ClockStateV1 {
    /// Reads kvmclock. Call while no vCPU runs. `tsc_khz` is the rate of the host's TSC.
    pub fn save(vm: &VmFd, tsc_khz: u32) -> Result<Self, KvmError> {
        let (tsc, (data, realtime_ns)) =
            at_one_moment(tsc::now, || (vm.get_clock(), realtime_ns()));
        let data = data.attempt("read kvmclock")?;
        // KVM returns all three values for one moment only while it derives kvmclock from the TSC
        // (Documentation/virt/kvm/api.rst 4.29). Otherwise the host's two were read with it.
        let together = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
        let (realtime_ns, host_tsc) = match data.flags & together == together {
            true => (data.realtime, data.host_tsc),
            false => (realtime_ns, tsc),
        };
        Ok(Self { clock_ns: data.clock, realtime_ns, host_tsc, tsc_khz })
    }

    /// Returns by how much the clocks have to advance if they are restored at `now`.
    pub fn passage(&self, now: Moment) -> Passage {
        if now.tsc >= self.host_tsc {
            let elapsed_ns = tsc::ns(now.tsc - self.host_tsc, self.tsc_khz);
            return Passage { elapsed_ns, offset_change: 0 };
        }
        // The TSC was reset: guest TSC = host TSC + offset must advance by the elapsed time
        // (Documentation/virt/kvm/devices/vcpu.rst 4.1). A time of day that went backward counts as
        // no elapsed time, so that no guest clock goes backward.
        let elapsed_ns = now.realtime_ns.saturating_sub(self.realtime_ns);
        let elapsed_ticks = tsc::ticks(elapsed_ns, self.tsc_khz);
        let offset_change = self.host_tsc.wrapping_add(elapsed_ticks).wrapping_sub(now.tsc);
        Passage { elapsed_ns, offset_change }
    }

    /// Sets kvmclock forward by the elapsed time. Call when every vCPU has its TSC offset and
    /// before any vCPU runs.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        let now = Moment::now();
        let clock = self.clock_ns.saturating_add(self.passage(now).elapsed_ns);
        // Given the time of day, KVM also adds the time between `now` and the ioctl.
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
    fn clocks_between_whose_reads_the_cpu_was_lost_do_not_count() {
        use std::cell::Cell;

        // Each read takes 10 ticks. The CPU is lost for a million ticks before or after the first, second and fourth read
        // of the other clock.
        let (now, reads) = (Cell::new(0), Cell::new(0));
        let tick = || now.replace(now.get() + 10);
        let read = || {
            let number = reads.replace(reads.get() + 1);
            let lost = if [0, 1, 3].contains(&number) { 1_000_000 } else { 0 };
            let (before, after) = if number == 1 { (0, lost) } else { (lost, 0) };
            now.set(now.get() + before);
            let value = tick();
            now.set(now.get() + after);
            value
        };
        let (tsc, other) = at_one_moment(tick, read);
        assert!(tsc.abs_diff(other) <= 10, "{tsc} and {other}");
        assert_eq!(reads.get(), ATTEMPTS);
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
        // One hour: far longer than the test runs.
        let hour = Duration::from_secs(3600).as_nanos() as u64;
        let khz = before.vcpu.get_tsc_khz().unwrap();
        before.vm.set_clock(&kvm_clock_data { clock: 3 * hour, ..Default::default() }).unwrap();
        let saved = ClockStateV1::save(&before.vm, khz).unwrap();
        assert!(saved.clock_ns >= 3 * hour, "{saved:?}");
        saved.restore(&after.vm).unwrap();
        let restored = ClockStateV1::save(&after.vm, khz).unwrap();
        assert!(restored.clock_ns >= saved.clock_ns, "{saved:?}, then {restored:?}");
        assert!(restored.host_tsc >= saved.host_tsc, "{saved:?}, then {restored:?}");

        // The same state, saved an hour ago: the clock is set forward by an hour.
        let hours_ticks = tsc::ticks(hour, khz);
        let old = ClockStateV1 { host_tsc: saved.host_tsc.wrapping_sub(hours_ticks), ..saved };
        // If the host's TSC has counted for less than an hour, the time of day is used.
        let old = ClockStateV1 { realtime_ns: saved.realtime_ns - hour, ..old };
        old.restore(&after.vm).unwrap();
        let restored = ClockStateV1::save(&after.vm, khz).unwrap();
        assert!(restored.clock_ns >= 4 * hour - 1000, "{old:?}, then {restored:?}");
    }

    #[test]
    fn a_tsc_that_ran_on_tells_the_time_and_offsets_stay() {
        // The time of day is wrong by most of a second, as after a boot. It is not used.
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
