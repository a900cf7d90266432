//! What a guest is offered: the part of what KVM supports that is in the table of features, or a baseline.

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::Register::{Eax, Ebx, Ecx, Edx};
use super::features::{Bit, COMPONENTS, GROUPS, Group, Kind, LEAVES, UNKNOWN};
use super::{Register, bits, find, get, get_mut};

/// The processor that a VM's guest finds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuModel {
    /// All features of the host's processor whose state is carried over a live update.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// Level 2 of the x86-64 psABI: SSE4.2, POPCNT, CMPXCHG16B, LAHF.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// Level 3: also AVX2, BMI1, BMI2, F16C, FMA, LZCNT, MOVBE.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// Level 4: also AVX512F, BW, CD, DQ and VL.
    #[serde(rename = "x86-64-v4")]
    V4,
}

impl CpuModel {
    /// All models.
    pub const ALL: [Self; 4] = [Self::Host, Self::V2, Self::V3, Self::V4];

    /// Returns the model's name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// Returns the model of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|model| model.name() == name)
    }

    /// Whether the features of `level` are part of the model.
    fn includes(self, level: Self) -> bool {
        self as u8 >= level as u8
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The features of each level beyond those that every 64-bit processor has (x86-64 psABI 1.0, section 3.1.1).
#[rustfmt::skip]
const LEVELS: &[(CpuModel, u32, Register, u32)] = &[
    // pni, ssse3, cx16, sse4_1, sse4_2, popcnt; lahf_lm
    (CpuModel::V2, 1, Ecx, bits(&[0, 9, 13, 19, 20, 23])),
    (CpuModel::V2, 0x8000_0001, Ecx, bits(&[0])),
    // fma, movbe, xsave, avx, f16c; bmi1, avx2, bmi2; abm
    (CpuModel::V3, 1, Ecx, bits(&[12, 22, 26, 28, 29])),
    (CpuModel::V3, 7, Ebx, bits(&[3, 5, 8])),
    (CpuModel::V3, 0x8000_0001, Ecx, bits(&[5])),
    // avx512f, avx512dq, avx512cd, avx512bw, avx512vl
    (CpuModel::V4, 7, Ebx, bits(&[16, 17, 28, 30, 31])),
];

/// Leaves that no guest of a baseline gets: performance counters, AMX, AVX10.
const NOT_IN_BASELINE: &[u32] = &[0xa, 0x1d, 0x1e, 0x24, 0x8000_0022];

/// Highest subleaf of leaf 7 in the table of features.
const LAST_SUBLEAF_OF_7: u32 = 2;

/// Returns what is offered of what KVM supports. `xsave_size` is the size of the XSAVE area that is saved, in
/// bytes.
pub(super) fn offer(supported: &[kvm_cpuid_entry2], xsave_size: usize) -> Vec<kvm_cpuid_entry2> {
    let mut entries = supported.to_vec();
    entries.retain(|e| LEAVES.contains(&e.function));
    entries.retain(|e| e.function != 7 || e.index <= LAST_SUBLEAF_OF_7);
    for entry in entries.iter_mut().filter(|e| (e.function, e.index) == (7, 0)) {
        entry.eax = entry.eax.min(LAST_SUBLEAF_OF_7);
    }
    let carried = carried_components(&entries, xsave_size);
    let is_carried = |feature| {
        let mut components = COMPONENTS.iter().filter(|(_, needs, _)| *needs == feature);
        components.all(|(component, ..)| carried & 1 << component != 0)
    };
    keep(&mut entries, |group, _, name| {
        group.kind != Kind::Withheld && component_of(name).is_none_or(is_carried)
    });
    set_components(&mut entries, carried);
    entries
}

/// Returns the part of `offered` that belongs to the baseline `model`, or the names of the features that are
/// missing for it. All of `offered` for [`CpuModel::Host`].
pub fn baseline(
    offered: &[kvm_cpuid_entry2],
    model: CpuModel,
) -> Result<Vec<kvm_cpuid_entry2>, Vec<&'static str>> {
    if model == CpuModel::Host {
        return Ok(offered.to_vec());
    }
    let wanted = |group: &Group, bit: u8| {
        LEVELS.iter().any(|&(level, leaf, register, mask)| {
            model.includes(level)
                && (group.leaf, group.subleaf, group.register) == (leaf, 0, register)
                && mask & 1 << bit != 0
        })
    };
    let mut missing = Vec::new();
    for group in GROUPS {
        let has = find(offered, group.leaf, group.subleaf).map_or(0, |e| get(e, group.register));
        let absent =
            group.bits.iter().filter(|(bit, _)| has & 1 << bit == 0 && wanted(group, *bit));
        missing.extend(absent.map(|(_, name)| *name));
    }
    if !missing.is_empty() {
        return Err(missing);
    }
    let mut entries = offered.to_vec();
    entries.retain(|e| !NOT_IN_BASELINE.contains(&e.function));
    keep(&mut entries, |group, bit, _| match group.kind {
        Kind::Base | Kind::Mitigation | Kind::Hint | Kind::Live => true,
        Kind::Instruction | Kind::State => wanted(group, bit),
        Kind::Withheld => false,
    });
    let components = find(offered, 0xd, 0).map_or(0, |leaf| leaf.eax);
    set_components(&mut entries, components);
    Ok(entries)
}

/// Clears every feature for which `keeps` (group, bit, name) is false, and every bit without a name.
fn keep(entries: &mut [kvm_cpuid_entry2], keeps: impl Fn(&Group, u8, &str) -> bool) {
    for entry in entries {
        for register in [Eax, Ebx, Ecx, Edx] {
            let at = (entry.function, entry.index, register);
            let groups = GROUPS.iter().filter(|g| (g.leaf, g.subleaf, g.register) == at);
            let mut known = UNKNOWN.contains(&at);
            let mut mask = 0;
            for group in groups {
                known = true;
                let kept = group.bits.iter().filter(|(bit, name)| keeps(group, *bit, name));
                mask |= kept.fold(0, |mask, (bit, _)| mask | 1 << bit);
            }
            if known {
                *get_mut(entry, register) &= mask;
            }
        }
    }
}

/// Returns the feature whose component of the XSAVE area the feature `name` needs.
fn component_of(name: &str) -> Option<Bit> {
    let vex = ["fma", "f16c", "vaes", "vpclmulqdq", "xop", "fma4", "sha512", "sm3", "sm4"];
    match name {
        "mpx" => Some((7, 0, Ebx, 14)),
        "pku" => Some((7, 0, Ecx, 3)),
        _ if name.starts_with("amx") => Some((7, 0, Edx, 24)),
        _ if name.starts_with("avx512") || name == "avx10" => Some((7, 0, Ebx, 16)),
        _ if name.starts_with("avx") || vex.contains(&name) => Some((1, 0, Ecx, 28)),
        _ => None,
    }
}

/// Returns the known components of the XSAVE area (bits of XCR0) that KVM supports and that lie wholly within
/// the area that is saved.
fn carried_components(entries: &[kvm_cpuid_entry2], xsave_size: usize) -> u32 {
    let supported = find(entries, 0xd, 0).map_or(0, |leaf| leaf.eax);
    let fits = |bit: u8| {
        find(entries, 0xd, bit.into()).is_some_and(|component| {
            let end = u64::from(component.ebx) + u64::from(component.eax);
            end <= xsave_size as u64
        })
    };
    let carried = COMPONENTS.iter().map(|(bit, ..)| *bit).filter(|bit| fits(*bit));
    supported & carried.fold(0b11, |mask, bit| mask | 1 << bit)
}

/// Makes leaf 0xd say that the XSAVE area has those of `components` whose features are offered.
fn set_components(entries: &mut Vec<kvm_cpuid_entry2>, components: u32) {
    let has = |(leaf, subleaf, register, bit): Bit| {
        find(entries, leaf, subleaf).is_some_and(|e| get(e, register) & 1 << bit != 0)
    };
    if !has((1, 0, Ecx, 26)) {
        entries.retain(|e| e.function != 0xd);
        for entry in entries.iter_mut().filter(|e| (e.function, e.index) == (1, 0)) {
            // OSXSAVE
            entry.ecx &= !bits(&[27]);
        }
        return;
    }
    let offered = COMPONENTS.iter().filter(|(_, feature, _)| has(*feature));
    let components = components & offered.fold(0b11, |mask, (bit, ..)| mask | 1 << bit);
    entries.retain(|e| {
        e.function != 0xd || e.index < 2 || e.index < 32 && components & 1 << e.index != 0
    });
    // Header and legacy area have 576 bytes; each component says where it begins and how long it is.
    let ends = entries.iter().filter(|e| e.function == 0xd && e.index >= 2);
    let size = ends.map(|e| e.ebx.saturating_add(e.eax)).fold(576, u32::max);
    for entry in entries.iter_mut().filter(|e| e.function == 0xd) {
        match entry.index {
            0 => (entry.eax, entry.ecx, entry.edx) = (components, size, 0),
            // No component of IA32_XSS: they belong to features that are not offered.
            1 => (entry.ecx, entry.edx) = (0, 0),
            _ => {}
        }
    }
}
