//! The CPUID of guests, and whether another host has all features of it.
//!
//! A new guest gets the features that KVM supports and whose state this VMM carries over a live update
//! ([`features`]), or the part of them that a baseline has ([`CpuModel`]). Its topology is one socket of
//! single-threaded cores. A restored guest keeps exactly the CPUID that it booted with; [`compare()`] lists the
//! features of it that a new host lacks. Register layouts: Intel SDM 2A `CPUID`, AMD APM 3 appendix E.

pub mod features;

mod compare;
mod offer;
mod processor;

use std::collections::{BTreeMap, BTreeSet};

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

pub use compare::{Comparison, Missing, Uncarried, compare};
pub use offer::{CpuModel, baseline};
pub use processor::{of_this_processor, physical_address_bits};

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

/// Returns the CPUID that KVM supports on this host, without the topology of a vCPU.
pub fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, kvm_ioctls::Error> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    Ok(complete(supported.as_slice(), kvm.check_extension(Cap::TscDeadlineTimer)))
}

/// Adds what KVM provides without saying so.
fn complete(supported: &[kvm_cpuid_entry2], tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let mut entries = supported.to_vec();
    for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
        // A hypervisor is present. Without this bit Linux does not look for a paravirtual clock.
        entry.ecx |= bits(&[31]);
        // KVM always emulates the x2APIC if the LAPIC is in the kernel.
        entry.ecx |= bits(&[21]);
        // Some kernels do not list the bit as supported; the capability says whether it works
        // (Documentation/virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID).
        entry.ecx = entry.ecx & !bits(&[24]) | if tsc_deadline { bits(&[24]) } else { 0 };
    }
    entries
}

/// Adds the bits of `more` to `entries`.
pub fn add(entries: &mut Vec<kvm_cpuid_entry2>, more: &[kvm_cpuid_entry2]) {
    for shown in more {
        let same =
            |e: &&mut kvm_cpuid_entry2| (e.function, e.index) == (shown.function, shown.index);
        match entries.iter_mut().find(same) {
            Some(entry) => {
                for register in [Eax, Ebx, Ecx, Edx] {
                    *get_mut(entry, register) |= get(shown, register);
                }
            }
            None => entries.push(*shown),
        }
    }
}

/// Returns the CPUID that this build offers guests, without the topology of a vCPU. `supported` is from
/// [`supported`]; `xsave_size` is the size of the XSAVE area that is saved, in bytes.
pub fn template(supported: &[kvm_cpuid_entry2], xsave_size: usize) -> Vec<kvm_cpuid_entry2> {
    offer::offer(supported, xsave_size)
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
    matches!(vendor(entries).as_deref(), Some("AuthenticAMD" | "HygonGenuine"))
}

/// Returns the name of the processor's maker.
fn vendor(entries: &[kvm_cpuid_entry2]) -> Option<String> {
    let leaf = find(entries, 0, 0)?;
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    Some(bytes.escape_ascii().to_string())
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

/// Adds to what a guest is offered the virtualisation of `supported`, if that has any: VMX, or SVM with its leaf.
pub fn add_virtualisation(offered: &mut Vec<kvm_cpuid_entry2>, supported: &[kvm_cpuid_entry2]) {
    const SVM: u32 = 0x8000_000a;
    let virtualisation = [(1, bits(&[5])), (0x8000_0001, bits(&[2]))];
    for (leaf, mask) in virtualisation {
        let has = find(supported, leaf, 0).map_or(0, |entry| entry.ecx & mask);
        offered.iter_mut().filter(|e| e.function == leaf).for_each(|entry| entry.ecx |= has);
    }
    if let Some(leaf) = find(supported, SVM, 0)
        && find(offered, 0x8000_0001, 0).is_some_and(|entry| entry.ecx & bits(&[2]) != 0)
    {
        offered.retain(|entry| entry.function != SVM);
        offered.push(*leaf);
        offered.sort_by_key(|entry| (entry.function, entry.index));
    }
}

/// Names of the features in `entries` that the table of features has.
pub fn names(entries: &[kvm_cpuid_entry2]) -> BTreeSet<&'static str> {
    kinds(entries).into_keys().collect()
}

/// The features in `entries` that the table of features has, by their names.
pub fn kinds(entries: &[kvm_cpuid_entry2]) -> BTreeMap<&'static str, features::Kind> {
    let set = |group: &features::Group| {
        find(entries, group.leaf, group.subleaf).map_or(0, |entry| get(entry, group.register))
    };
    let groups = features::GROUPS.iter();
    let there = groups.flat_map(|group| {
        let bits = group.bits.iter().filter(move |(bit, _)| set(group) & 1 << *bit != 0);
        bits.map(|(_, name)| (*name, group.kind))
    });
    there.collect()
}

/// Returns the entries in the form that KVM takes.
pub fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, kvm_ioctls::Error> {
    CpuId::from_entries(entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

#[cfg(test)]
mod tests;
