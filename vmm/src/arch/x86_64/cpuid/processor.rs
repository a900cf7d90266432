//! What the CPUID instruction says here.

#![expect(unsafe_code, reason = "cpuid is an unsafe intrinsic in older releases of Rust")]

use std::arch::x86_64::{__cpuid_count, CpuidResult};
use std::collections::BTreeSet;

use kvm_bindings::kvm_cpuid_entry2;

use super::features::GROUPS;

/// Returns the leaves of the table of features as this processor has them.
pub fn of_this_processor() -> Vec<kvm_cpuid_entry2> {
    let leaves: BTreeSet<_> = GROUPS.iter().map(|group| (group.leaf, group.subleaf)).collect();
    // The first leaf of each range has the number of its last one.
    let is_there = |leaf: u32| leaf <= leaf_of(leaf & 0xffff_0000, 0).eax;
    let there = leaves.into_iter().filter(|(leaf, _)| is_there(*leaf));
    there
        .map(|(function, index)| {
            let CpuidResult { eax, ebx, ecx, edx } = leaf_of(function, index);
            kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
        })
        .collect()
}

/// Returns the number of bits of this processor's physical addresses, and so of a guest's (Intel SDM 2A, CPUID,
/// 80000008H: 36 if the leaf is not there): 36 to 52.
pub fn physical_address_bits() -> u32 {
    const LEAF: u32 = 0x8000_0008;
    match leaf_of(LEAF & 0xffff_0000, 0).eax {
        last if last >= LEAF => (leaf_of(LEAF, 0).eax & 0xff).clamp(36, 52),
        _ => 36,
    }
}

#[allow(unused_unsafe, reason = "the intrinsic is unsafe in older releases of Rust only")]
fn leaf_of(leaf: u32, subleaf: u32) -> CpuidResult {
    // SAFETY: every x86-64 processor has the CPUID instruction, and answers any leaf.
    unsafe { __cpuid_count(leaf, subleaf) }
}
