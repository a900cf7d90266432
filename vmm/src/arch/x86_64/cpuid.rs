//! The CPUID of guests, and whether another host has all features of it.
//!
//! A new guest gets all features that KVM supports, except those whose state this VMM cannot carry over a
//! live update (nested virtualization, SGX). Its topology is one socket of single-threaded cores. A restored
//! guest keeps exactly the CPUID that it booted with; [`missing_features`] lists the features of it that a
//! new host lacks. Register layouts: Intel SDM 2A `CPUID`, AMD APM 3 appendix E.

use std::fmt;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

/// One of the four result registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut i = 0;
    while i < list.len() {
        mask |= 1 << list[i];
        i += 1;
    }
    mask
}

/// Features that no guest gets: (leaf, subleaf, register, mask).
const WITHHELD: &[(u32, u32, Register, u32)] = &[
    // VMX and SVM: nested state is not saved, so no guest may have any.
    (1, 0, Ecx, bits(&[5])),
    (0x8000_0001, 0, Ecx, bits(&[2])),
    // SGX and its launch control: no VMM can read the key that encrypts enclave memory, so enclaves cannot
    // be saved.
    (7, 0, Ebx, bits(&[2])),
    (7, 0, Ecx, bits(&[30])),
];

/// Leaves that no guest gets.
const DROPPED: &[u32] = &[
    0x12,        // SGX
    0x1f,        // topology v2: leaf 0xb has the whole topology
    0x8000_000a, // SVM
    0x8000_0026, // AMD extended topology: leaves 0xb and 0x8000001e have the whole topology
];

/// Registers in which every bit is a feature that a new host must have: (leaf, subleaf, register, bits that
/// are not compared). Bits that are not compared follow the guest's own state or its topology.
const FEATURES: &[(u32, u32, Register, u32)] = &[
    (1, 0, Ecx, bits(&[27])),    // OSXSAVE follows CR4
    (1, 0, Edx, bits(&[9, 28])), // APIC follows IA32_APIC_BASE; HTT is topology
    (6, 0, Eax, 0),
    (7, 0, Ebx, 0),
    (7, 0, Ecx, bits(&[4])), // OSPKE follows CR4
    (7, 0, Edx, 0),
    (7, 1, Eax, 0),
    (7, 1, Ebx, 0),
    (7, 1, Ecx, 0),
    (7, 1, Edx, 0),
    (7, 2, Edx, 0),
    (0xd, 0, Eax, 0),
    (0xd, 0, Edx, 0),
    (0xd, 1, Eax, 0),
    (0xd, 1, Ecx, 0),
    (0xd, 1, Edx, 0),
    (0x4000_0001, 0, Eax, 0),
    (0x8000_0001, 0, Ecx, bits(&[1])), // CmpLegacy is topology
    (0x8000_0001, 0, Edx, bits(&[9])), // as leaf 1, on AMD
    (0x8000_0007, 0, Ebx, 0),
    (0x8000_0007, 0, Edx, 0),
    (0x8000_0008, 0, Ebx, 0),
    (0x8000_0021, 0, Eax, 0),
];

/// The range of the hypervisor's leaves, and its name.
const HYPERVISOR: u32 = 0x4000_0000;
/// The rates of TSC and LAPIC timer, in kHz.
const FREQUENCIES: u32 = 0x4000_0010;
/// Rate of KVM's LAPIC timer before its divider: one tick is a nanosecond (`APIC_BUS_CYCLE_NS_DEFAULT` in
/// arch/x86/kvm/lapic.h).
const LAPIC_TIMER_KHZ: u32 = 1_000_000;

fn get(entry: &kvm_cpuid_entry2, register: Register) -> u32 {
    match register {
        Eax => entry.eax,
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    }
}

fn get_mut(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Eax => &mut entry.eax,
        Ebx => &mut entry.ebx,
        Ecx => &mut entry.ecx,
        Edx => &mut entry.edx,
    }
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|e| e.function == leaf && e.index == subleaf)
}

/// Returns the CPUID that this build offers guests on this host, without the topology of a vCPU.
pub fn template(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, kvm_ioctls::Error> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    Ok(offer(supported.as_slice(), kvm.check_extension(Cap::TscDeadlineTimer)))
}

fn offer(supported: &[kvm_cpuid_entry2], tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let mut entries = supported.to_vec();
    entries.retain(|e| !DROPPED.contains(&e.function));
    for entry in &mut entries {
        for &(leaf, subleaf, register, mask) in WITHHELD {
            if entry.function == leaf && entry.index == subleaf {
                *get_mut(entry, register) &= !mask;
            }
        }
        if entry.function == 1 {
            // A hypervisor is present. Without this bit Linux does not look for a paravirtual clock.
            entry.ecx |= bits(&[31]);
            // KVM always emulates the x2APIC if the LAPIC is in the kernel.
            entry.ecx |= bits(&[21]);
            // Some kernels do not list the bit as supported; the capability says whether it works
            // (Documentation/virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID).
            entry.ecx = entry.ecx & !bits(&[24]) | if tsc_deadline { bits(&[24]) } else { 0 };
        }
    }
    entries
}

/// Returns the CPUID of vCPU `id` of `count`, made from [`template`]'s entries. `id` is the APIC id.
pub fn for_vcpu(template: &[kvm_cpuid_entry2], id: u32, count: u32) -> Vec<kvm_cpuid_entry2> {
    let mut entries = template.to_vec();
    let amd = is_amd(template);
    // Width of the core field of an APIC id: enough bits for the largest id.
    let core_bits = u32::BITS - count.saturating_sub(1).leading_zeros();
    for entry in &mut entries {
        match entry.function {
            1 => {
                let logical = if count > 1 { 1 << core_bits.min(7) } else { 0 };
                entry.ebx = entry.ebx & 0xffff | logical << 16 | (id & 0xff) << 24;
                set(&mut entry.edx, 28, count > 1);
            }
            4 => cache_sharing(entry, count, core_bits),
            0x8000_001d if amd => cache_sharing_amd(entry, count),
            0x8000_0001 if amd => set(&mut entry.ecx, 1, count > 1),
            0x8000_0008 if amd => {
                entry.ecx = entry.ecx & !0xf0ff | (count - 1).min(0xff) | core_bits << 12;
            }
            0x8000_001e if amd => {
                entry.eax = id;
                entry.ebx = id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    if find(template, 0, 0).is_some_and(|leaf| leaf.eax >= 0xb) {
        entries.retain(|e| e.function != 0xb);
        entries.extend(topology(id, count, core_bits));
        entries.sort_by_key(|e| (e.function, e.index));
    }
    entries
}

/// Adds the leaf of frequencies, by which a guest can know the rates of its TSC and its LAPIC timer without
/// measuring them. VMware defined it, and FreeBSD and others read it under every hypervisor. Leaves 0x15 and
/// 0x16 stay as KVM has them, empty: a rate in leaf 0x15 that fits the LAPIC timer of KVM makes Linux
/// compute the TSC's rate in 32 bits, which only multiples of 1 MHz fit.
pub fn add_frequencies(entries: &mut Vec<kvm_cpuid_entry2>, tsc_khz: u32) {
    entries.retain(|e| e.function != FREQUENCIES);
    if let Some(range) = entries.iter_mut().find(|e| e.function == HYPERVISOR) {
        range.eax = range.eax.max(FREQUENCIES);
        entries.push(kvm_cpuid_entry2 {
            function: FREQUENCIES,
            eax: tsc_khz,
            ebx: LAPIC_TIMER_KHZ,
            ..Default::default()
        });
        entries.sort_by_key(|e| (e.function, e.index));
    }
}

fn set(register: &mut u32, bit: u32, value: bool) {
    *register = *register & !(1 << bit) | u32::from(value) << bit;
}

fn is_amd(entries: &[kvm_cpuid_entry2]) -> bool {
    let vendor = find(entries, 0, 0).map(|e| [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes).concat());
    matches!(vendor.as_deref(), Some(b"AuthenticAMD" | b"HygonGenuine"))
}

/// Leaf 4 (Intel): each core has its own caches of the first two levels; the package shares the third.
fn cache_sharing(entry: &mut kvm_cpuid_entry2, count: u32, core_bits: u32) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let shared = if entry.eax >> 5 & 7 >= 3 { (1 << core_bits) - 1 } else { 0 };
    let cores = if count > 1 { ((1u32 << core_bits) - 1).min(63) } else { 0 };
    entry.eax = entry.eax & 0x3fff | (shared & 0xfff) << 14 | cores << 26;
}

/// Leaf 0x8000001d (AMD): the same, as the number of vCPUs that share a cache.
fn cache_sharing_amd(entry: &mut kvm_cpuid_entry2, count: u32) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let shared = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
    entry.eax = entry.eax & !(0xfff << 14) | (shared & 0xfff) << 14;
}

/// Leaf 0xb: one thread to a core, all cores in one package.
fn topology(id: u32, count: u32, core_bits: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index, shift, number, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: number,
        ecx: index | kind << 8,
        edx: id,
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, core_bits, count, 2), level(2, 0, 0, 0)]
}

/// Returns the entries in the form that KVM takes.
pub fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, kvm_ioctls::Error> {
    CpuId::from_entries(entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

/// CPU features of a saved guest that this host lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MissingFeature {
    leaf: u32,
    subleaf: u32,
    register: Register,
    document: u32,
    host: u32,
    missing: u32,
}

impl fmt::Display for MissingFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { leaf, subleaf, register, document, host, missing } = self;
        write!(
            f,
            "CPUID leaf {leaf:#x} subleaf {subleaf} {register:?}: the document has {document:#010x}, \
             this host offers {host:#010x}, bits {missing:#010x} are missing"
        )
    }
}

/// Returns the features in `document` that `template` (of this host) lacks. Empty if the guest can run on
/// this host.
pub fn missing_features(
    document: &[kvm_cpuid_entry2],
    template: &[kvm_cpuid_entry2],
) -> Vec<MissingFeature> {
    let compare = |&(leaf, subleaf, register, ignored): &(u32, u32, Register, u32)| {
        let document = get(find(document, leaf, subleaf)?, register);
        let host = find(template, leaf, subleaf).map_or(0, |entry| get(entry, register));
        let missing = document & !host & !ignored;
        (missing != 0).then_some(MissingFeature {
            leaf,
            subleaf,
            register,
            document,
            host,
            missing,
        })
    };
    FEATURES.iter().filter_map(compare).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn amd() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            entry(1, 0, [0, 0x1234_0800, bits(&[0, 5, 27]), bits(&[9])]),
            entry(4, 0, [3 << 5 | 1, 0, 0, 0]),
            entry(0x12, 0, [1, 1, 1, 1]),
            entry(0x1f, 0, [0, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, bits(&[2, 22]), 0]),
            entry(0x8000_0008, 0, [0x3030, 0, 0xffff, 0]),
            entry(0x8000_000a, 0, [1, 1, 1, 1]),
            entry(0x8000_001d, 0, [1 << 5 | 1 | 7 << 14, 0, 0, 0]),
            entry(0x8000_001d, 3, [3 << 5 | 3, 0, 0, 0]),
            entry(0x8000_001e, 0, [9, 9, 9, 9]),
        ]
    }

    #[test]
    fn nested_virtualization_and_sgx_are_not_offered() {
        let offered = offer(&amd(), false);
        let leaf1 = find(&offered, 1, 0).unwrap();
        assert_eq!(leaf1.ecx, bits(&[0, 21, 27, 31]));
        assert_eq!(find(&offered, 0x8000_0001, 0).unwrap().ecx, bits(&[22]));
        for leaf in [0x12, 0x1f, 0x8000_000a] {
            assert!(find(&offered, leaf, 0).is_none(), "{leaf:#x}");
        }
        assert!(find(&offer(&amd(), true), 1, 0).unwrap().ecx & bits(&[24]) != 0);
    }

    #[test]
    fn every_vcpu_finds_its_own_apic_id_in_every_leaf_that_has_one() {
        let template = offer(&amd(), true);
        for id in [0, 2, 5] {
            let entries = for_vcpu(&template, id, 6);
            assert_eq!(find(&entries, 1, 0).unwrap().ebx, id << 24 | 8 << 16 | 0x800);
            assert!(find(&entries, 1, 0).unwrap().edx & bits(&[28]) != 0);
            let smt = find(&entries, 0xb, 0).unwrap();
            assert_eq!([smt.eax, smt.ebx, smt.ecx, smt.edx], [0, 1, 0x100, id]);
            let core = find(&entries, 0xb, 1).unwrap();
            assert_eq!([core.eax, core.ebx, core.ecx, core.edx], [3, 6, 0x201, id]);
            assert_eq!(find(&entries, 0x8000_001e, 0).unwrap().eax, id);
            assert_eq!(find(&entries, 0x8000_0008, 0).unwrap().ecx, 0x0f00 | 3 << 12 | 5);
            assert_eq!(find(&entries, 0x8000_001d, 0).unwrap().eax >> 14, 0);
            assert_eq!(find(&entries, 0x8000_001d, 3).unwrap().eax >> 14, 5);
        }
    }

    #[test]
    fn sixteen_vcpus_are_the_cores_of_one_package_by_every_leaf_on_both_vendors() {
        let mut intel = amd();
        // GenuineIntel; caches of the first and the third level.
        intel[0] = entry(0, 0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);
        intel.insert(3, entry(4, 3, [3 << 5 | 3, 0, 0, 0]));
        let (amd, intel) = (offer(&amd(), true), offer(&intel, true));
        let mut found = Vec::new();
        for id in 0..16 {
            for template in [&amd, &intel] {
                let entries = for_vcpu(template, id, 16);
                let [thread, core] = [0, 1].map(|level| *find(&entries, 0xb, level).unwrap());
                assert_eq!((thread.eax, thread.ebx), (0, 1), "one thread to a core");
                assert_eq!((core.eax, core.ebx, core.edx), (4, 16, id));
                assert_eq!(core.edx >> core.eax, 0, "one package");
                assert!(find(&entries, 0x1f, 0).is_none(), "no other leaf that could disagree");
                assert_eq!(find(&entries, 1, 0).unwrap().ebx >> 16 & 0xff, 16);
            }
            let entries = for_vcpu(&intel, id, 16);
            let cache = |level| find(&entries, 4, level).unwrap().eax;
            assert_eq!([cache(0) >> 26, cache(3) >> 26], [15, 15], "cores of the package");
            assert_eq!(cache(3) >> 14 & 0xfff, 15, "all share the third level");
            let entries = for_vcpu(&amd, id, 16);
            assert_eq!(find(&entries, 0x8000_0008, 0).unwrap().ecx & 0xf0ff, 4 << 12 | 15);
            let node = find(&entries, 0x8000_001e, 0).unwrap();
            assert_eq!((node.eax, node.ebx, node.ecx), (id, id, 0), "core, one thread, one node");
            found.push(node.eax);
        }
        assert_eq!(found, (0..16).collect::<Vec<_>>());
    }

    #[test]
    fn the_rates_of_tsc_and_lapic_timer_are_told_within_the_range_of_leaves() {
        let mut entries = amd();
        add_frequencies(&mut entries, 2_994_375);
        assert!(find(&entries, FREQUENCIES, 0).is_none(), "there is no hypervisor");
        entries.push(entry(HYPERVISOR, 0, [0x4000_0001, 1, 2, 3]));
        for khz in [2_994_375, 3_000_000] {
            add_frequencies(&mut entries, khz);
            let found: Vec<_> = entries.iter().filter(|e| e.function == FREQUENCIES).collect();
            assert_eq!(
                found.iter().map(|e| (e.eax, e.ebx)).collect::<Vec<_>>(),
                [(khz, 1_000_000)]
            );
        }
        assert_eq!(find(&entries, HYPERVISOR, 0).unwrap().eax, FREQUENCIES);
    }

    #[test]
    fn one_vcpu_is_not_hyperthreaded() {
        let entries = for_vcpu(&offer(&amd(), true), 0, 1);
        assert_eq!(find(&entries, 1, 0).unwrap().edx & bits(&[28]), 0);
        assert_eq!(find(&entries, 0x8000_0001, 0).unwrap().ecx & 2, 0);
        assert_eq!(find(&entries, 4, 0).unwrap().eax >> 14, 0);
    }

    #[test]
    fn a_host_that_offers_what_the_guest_has_is_accepted() {
        let template = offer(&amd(), true);
        assert_eq!(missing_features(&for_vcpu(&template, 1, 2), &template), []);
        assert_eq!(missing_features(&[], &template), []);
    }

    #[test]
    fn a_feature_that_the_host_lacks_is_named_with_both_sides() {
        let template = offer(&amd(), true);
        let mut document = for_vcpu(&template, 0, 1);
        document.push(entry(7, 0, [0, bits(&[16]), 0, 0]));
        let missing = missing_features(&document, &template);
        assert_eq!(missing.len(), 1);
        assert_eq!(
            missing[0].to_string(),
            "CPUID leaf 0x7 subleaf 0 Ebx: the document has 0x00010000, this host offers \
             0x00000000, bits 0x00010000 are missing"
        );
    }

    #[test]
    fn bits_that_follow_the_guests_own_state_are_not_compared() {
        let mut host = offer(&amd(), true);
        let document = for_vcpu(&host, 0, 2);
        for entry in host.iter_mut().filter(|e| e.function == 1) {
            entry.ecx &= !bits(&[27]);
            entry.edx &= !bits(&[9, 28]);
        }
        assert_eq!(missing_features(&document, &host), []);
    }
}
