//! Which model-specific registers are a vCPU's state, and which are not, with the reason.
//!
//! The list is the host's own (`KVM_GET_MSR_INDEX_LIST`), asked when it is needed: a list written
//! down here would lose the registers of the next kernel. Added to it is what KVM emulates but does
//! not list; taken from it is what must not be played back.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

/// The guest's time stamp counter.
pub const IA32_TSC: u32 = 0x10;
/// Feature enables; bit 0 is fast string operation.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// [`IA32_MISC_ENABLE`]: fast `rep movs`.
pub const MISC_ENABLE_FAST_STRING: u64 = 1;
/// Default memory type and the MTRRs' enable.
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
/// [`MTRR_DEF_TYPE`]: enabled (bit 11), write back (6).
pub const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// The TSC at which the LAPIC timer fires, in deadline mode; 0 is disarmed.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// An inclusive range of MSRs, with the reason why it is treated specially.
struct Range {
    first: u32,
    last: u32,
    reason: &'static str,
}

const fn range(first: u32, last: u32, reason: &'static str) -> Range {
    Range { first, last, reason }
}

/// State that KVM emulates without listing it (`arch/x86/kvm/msrs.c`: `msrs_to_save_base` and
/// `emulated_msrs_all` do not have these, `kvm_get_msr_common` does).
const UNLISTED: &[Range] = &[
    range(0x200, 0x20f, "variable MTRRs (KVM_NR_VAR_MTRR is 8)"),
    range(0x250, 0x250, "fixed MTRR, 64 KiB"),
    range(0x258, 0x259, "fixed MTRRs, 16 KiB"),
    range(0x268, 0x26f, "fixed MTRRs, 4 KiB"),
    range(MTRR_DEF_TYPE, MTRR_DEF_TYPE, "default memory type"),
    range(0x400, 0x47f, "machine check banks: 32 of 4 registers (KVM_MAX_MCE_BANKS)"),
    range(0x4b56_4d02, 0x4b56_4d06, "KVM's own; kernels before 5.10 list only some of them"),
];

/// What is on the list and is not played back.
const EXCLUDED: &[Range] = &[
    range(IA32_TSC, IA32_TSC, "the TSC is carried as an offset: a value would lose the blackout"),
    range(
        IA32_TSC_DEADLINE,
        IA32_TSC_DEADLINE,
        "means something only after the LAPIC is in deadline mode: kept on its own",
    ),
    range(0x11, 0x12, "old names of 0x4b564d00 and 0x4b564d01, one state under two numbers"),
    range(
        0x4b56_4d00,
        0x4b56_4d00,
        "setting it writes the wall clock into guest memory, which the guest asked for once, at \
         boot, and may have put to other use since (Documentation/virt/kvm/x86/msr.rst)",
    ),
    range(0x4b56_4d07, 0x4b56_4d07, "asynchronous page fault acknowledge: a command, reads as 0"),
    range(0x4000_0000, 0x4000_01ff, "Hyper-V: its CPUID leaves are not offered"),
    range(0xc000_0302, 0xc000_0303, "AMD PMU status clear and set: commands, read as 0"),
];

/// The MSRs that make up a vCPU's state on this host, ascending. The system-wide ioctl is asked
/// each time; which of them a vCPU with its CPUID really has shows when they are read.
pub fn indices_to_save(kvm: &Kvm) -> Result<Vec<u32>, kvm_ioctls::Error> {
    Ok(select(kvm.get_msr_index_list()?.as_slice()))
}

fn select(listed: &[u32]) -> Vec<u32> {
    let unlisted = UNLISTED.iter().flat_map(|range| range.first..=range.last);
    let mut indices: Vec<u32> = listed.iter().copied().chain(unlisted).collect();
    indices.retain(|index| exclusion(*index).is_none());
    indices.sort_unstable();
    indices.dedup();
    indices
}

/// Why this MSR is not among those played back, if it is not.
pub fn exclusion(index: u32) -> Option<&'static str> {
    EXCLUDED.iter().find(|r| (r.first..=r.last).contains(&index)).map(|r| r.reason)
}

/// One MSR with its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msr {
    /// Number of the register.
    pub index: u32,
    /// Its value.
    pub data: u64,
}

/// Returns those of `indices` that the vCPU has, in the order of `indices`.
///
/// KVM reads in bulk and stops at the first MSR that it refuses (because of the guest's CPUID, or
/// because the vCPU does not have the MSR). This function skips that MSR and continues after it.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, kvm_ioctls::Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> =
            batch.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = wrap(&entries)?;
        let read = vcpu.get_msrs(&mut msrs)?;
        found.extend(msrs.as_slice()[..read].iter().map(|e| Msr { index: e.index, data: e.data }));
        // KVM refused the MSR at index `read`, unless it read all.
        rest = &rest[(read + 1).min(batch.len())..];
    }
    Ok(found)
}

/// KVM refused the value of an MSR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the document has MSR {:#x} = {:#x}, which this host's KVM does not take", .0.index, .0.data)]
pub struct Refused(pub Msr);

/// Why MSRs could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// KVM refused a value that is not 0.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The ioctl failed as a whole.
    #[error("cannot write MSRs")]
    Kvm(#[source] kvm_ioctls::Error),
}

/// Writes those of `values` that the vCPU does not have yet, in order. Errors if this host refuses a value
/// that is not 0. A refused 0 is skipped: a register at its reset value is the same as a missing register.
///
/// A value that the vCPU has already is not written, because KVM logs a line in the host's kernel log for
/// some registers that it does not emulate, whatever the value (AMD: DEBUGCTL, `svm_set_msr` in
/// `arch/x86/kvm/svm/svm.c`).
pub fn write(vcpu: &VcpuFd, values: &[Msr]) -> Result<(), WriteError> {
    let indices: Vec<u32> = values.iter().map(|msr| msr.index).collect();
    let present = read(vcpu, &indices).map_err(WriteError::Kvm)?;
    let values: Vec<Msr> =
        values.iter().copied().filter(|value| !present.contains(value)).collect();
    let mut rest = values.as_slice();
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> = batch
            .iter()
            .map(|msr| kvm_msr_entry { index: msr.index, data: msr.data, ..Default::default() })
            .collect();
        let msrs = wrap(&entries).map_err(WriteError::Kvm)?;
        let written = vcpu.set_msrs(&msrs).map_err(WriteError::Kvm)?;
        match batch.get(written) {
            Some(refused) if refused.data != 0 => return Err(Refused(*refused).into()),
            Some(_) => rest = &rest[written + 1..],
            None => rest = &rest[batch.len()..],
        }
    }
    Ok(())
}

fn wrap(entries: &[kvm_msr_entry]) -> Result<Msrs, kvm_ioctls::Error> {
    Msrs::from_entries(entries).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_the_hosts_with_what_it_forgets_and_without_what_must_not_be_replayed() {
        let indices = select(&[0x174, IA32_TSC, 0x4b56_4d02, 0x4b56_4d07, 0xc000_0081, 0x1234]);
        for kept in [0x174, 0xc000_0081, 0x1234, MTRR_DEF_TYPE, 0x400, 0x4b56_4d02, 0x4b56_4d06] {
            assert!(indices.contains(&kept), "{kept:#x}");
        }
        for left_out in [IA32_TSC, IA32_TSC_DEADLINE, 0x4b56_4d00, 0x4b56_4d07] {
            assert!(!indices.contains(&left_out), "{left_out:#x}");
        }
        assert!(indices.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn every_special_range_is_a_range_and_has_a_reason() {
        for range in UNLISTED.iter().chain(EXCLUDED) {
            assert!(range.first <= range.last && !range.reason.is_empty());
        }
    }
}
