//! The features of the guests' CPUs that the next kernel's command line switches off. What the next kernel's KVM offers
//! besides, only that kernel can tell: a rehearsal asks it.

use std::collections::BTreeMap;

use super::{Check, Finding, Surroundings, documents};
use crate::arch::x86_64::cpuid::Register::{self, Eax, Ebx, Ecx, Edx};
use crate::arch::x86_64::cpuid::features::{GROUPS, Kind};
use crate::arch::x86_64::cpuid::kinds;
use crate::live_update::next_kernel::Candidate;
use crate::machine::VmName;
use crate::state::document;
use crate::vm::VmStateV1;

/// The parameters that switch features off, with the value that does if one is needed, and the features. KVM offers none
/// that its kernel has switched off (Linux Documentation/admin-guide/kernel-parameters.txt).
const SWITCHES: [(&str, Option<&str>, &[&str]); 8] = [
    ("noxsave", None, &["xsave"]),
    ("noxsaveopt", None, &["xsaveopt"]),
    ("noxsaves", None, &["xsaves"]),
    ("nopku", None, &["pku"]),
    ("nopcid", None, &["pcid"]),
    ("noinvpcid", None, &["invpcid"]),
    ("nofsgsbase", None, &["fsgsbase"]),
    ("tsx", Some("off"), &["hle", "rtm"]),
];

/// The parameter that switches any feature off: names as in /proc/cpuinfo, and numbers, separated by commas. The kernel
/// reads the last one of its command line.
const CLEAR: &str = "clearcpuid";

/// Numbers of features are 32 times one of these words, and the bit in the register that the word has (Linux
/// arch/x86/include/asm/cpufeatures.h). Other words hold what the kernel itself calls a feature.
const WORDS: [(u32, (u32, u32, Register)); 11] = [
    (0, (1, 0, Edx)),
    (1, (0x8000_0001, 0, Edx)),
    (4, (1, 0, Ecx)),
    (6, (0x8000_0001, 0, Ecx)),
    (9, (7, 0, Ebx)),
    (10, (0xd, 1, Eax)),
    (12, (7, 1, Eax)),
    (13, (0x8000_0008, 0, Ebx)),
    (16, (7, 0, Ecx)),
    (18, (7, 0, Edx)),
    (20, (0x8000_0021, 0, Eax)),
];

/// A parameter that switches a feature off, by the feature's name.
type Off = BTreeMap<&'static str, String>;

/// Checks the command line against the guests that run. A VM that is preserved here stays so there.
pub(super) fn check(candidate: &Candidate, surroundings: &Surroundings<'_>) -> Vec<Finding> {
    if surroundings.vms.is_empty() {
        return Vec::new();
    }
    let off = switched_off(&candidate.next.cmdline);
    // The documents are asked for only if one may lead to a finding.
    let guests = match off.is_empty() {
        true => Vec::new(),
        false => documents::of_live(surroundings),
    };
    let of_guest = |(vm, state): (VmName, Result<Vec<u8>, String>)| {
        let read = |bytes: Vec<u8>| document::read_document(&bytes).map_err(|e| e.to_string());
        match state.and_then(read) {
            Ok(state) => lost(vm.as_str(), &state, &off),
            Err(why) => {
                let sentence = format!("which CPU features its guest has is not known: {why}");
                vec![Finding::new(Check::CpuUnknown, format!("VM `{vm}`"), sentence, "")]
            }
        }
    };
    let mut findings: Vec<Finding> = guests.into_iter().flat_map(of_guest).collect();
    let remedy = match surroundings.is_first_process {
        true => "`perennial ctl rehearse` asks it",
        false => {
            "a VM whose guest lacks a feature there stays preserved, and can come back to this kernel"
        }
    };
    let sentence = "what the next kernel's KVM offers guests is not known before it runs";
    findings.push(Finding::new(Check::CpuUnknown, "", sentence, remedy));
    findings
}

/// The findings about what a VM's guest has and the command line switches off.
fn lost(vm: &str, state: &VmStateV1, off: &Off) -> Vec<Finding> {
    // All vCPUs of a machine have the same features.
    let features = state.vcpus.first().map(|vcpu| kinds(&vcpu.cpuid)).unwrap_or_default();
    let lost = |is_lost: fn(Kind) -> bool| {
        let lost =
            features.iter().filter(|(name, kind)| is_lost(**kind) && off.contains_key(*name));
        let said = lost.map(|(name, _)| format!("{name} (`{}`)", off[name]));
        said.collect::<Vec<_>>().join(", ")
    };
    let needed = lost(|kind| matches!(kind, Kind::Instruction | Kind::State | Kind::Mitigation));
    let hints = lost(|kind| kind == Kind::Hint);
    let subject = format!("VM `{vm}`");
    let mut findings = Vec::new();
    if !needed.is_empty() {
        let sentence =
            format!("the next command line switches off CPU features that its guest has: {needed}");
        let remedy = format!("remove the parameters, or leave the VM out (`--without {vm}`)");
        findings.push(Finding::new(Check::Cpu, &subject, sentence, remedy));
    }
    if !hints.is_empty() {
        let sentence = format!("the next command line switches off hints of its CPUID: {hints}");
        let remedy = "see docs/cpu.md: the guest runs on without them, or the VM is not restored";
        findings.push(Finding::new(Check::CpuHints, &subject, sentence, remedy));
    }
    findings
}

/// The features that a command line switches off.
fn switched_off(line: &str) -> Off {
    let mut off = Off::new();
    for parameter in kexec::parameters(line) {
        let does = |(name, value, _): &&(&str, Option<&str>, &[&str])| {
            parameter.is(name) && (value.is_none() || parameter.value == *value)
        };
        let switch = SWITCHES.iter().find(does);
        for name in switch.into_iter().flat_map(|(.., names)| names.iter()) {
            off.insert(name, line_of(parameter.name, parameter.value));
        }
    }
    let clear = kexec::parameters(line).filter(|parameter| parameter.is(CLEAR)).last();
    for word in clear.and_then(|parameter| parameter.value).unwrap_or_default().split(',') {
        if let Some(name) = feature(word) {
            off.insert(name, format!("{CLEAR}={word}"));
        }
    }
    off
}

fn line_of(name: &str, value: Option<&str>) -> String {
    value.map_or_else(|| name.to_owned(), |value| format!("{name}={value}"))
}

/// The name of the feature that a word of [`CLEAR`] names. `None` if no guest has such a one.
fn feature(word: &str) -> Option<&'static str> {
    let mut bits = GROUPS.iter().flat_map(|group| group.bits.iter().map(move |bit| (group, bit)));
    let found = match word.parse::<u32>() {
        Ok(number) => {
            let (_, register) = WORDS.iter().find(|(word, _)| *word == number / u32::BITS)?;
            bits.find(|(group, (bit, _))| {
                (group.leaf, group.subleaf, group.register) == *register
                    && u32::from(*bit) == number % u32::BITS
            })
        }
        Err(_) => bits.find(|(_, (_, name))| *name == word),
    };
    found.map(|(_, (_, name))| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_command_line_switches_off_is_known_by_name_and_by_number() {
        let off = |line| switched_off(line).into_iter().collect::<Vec<_>>();
        assert_eq!(off("quiet nosmp clearcpuid=bogus,9999,96 tsx=on"), []);
        let said = |name, by: &str| (name, by.to_owned());
        // 293 is word 9, bit 5.
        assert_eq!(off("clearcpuid=erms clearcpuid=293"), [said("avx2", "clearcpuid=293")]);
        assert_eq!(
            off("nopku tsx=off clearcpuid=avx2,154 -- noxsave"),
            [
                said("avx2", "clearcpuid=avx2"),
                said("hle", "tsx=off"),
                said("pku", "nopku"),
                said("rtm", "tsx=off"),
                said("xsave", "clearcpuid=154"),
            ]
        );
    }

    #[test]
    fn a_guest_that_has_a_feature_is_named_and_one_that_has_it_not_is_not() {
        let mut state = VmStateV1::sample();
        let found = |state: &VmStateV1, line: &str| {
            let found = lost("web", state, &switched_off(line));
            found.into_iter().map(|finding| (finding.name, finding.to_string())).collect::<Vec<_>>()
        };
        let cpuid = &mut state.vcpus[0].cpuid;
        cpuid.retain(|entry| (entry.function, entry.index) != (7, 0));
        assert_eq!(found(&state, "clearcpuid=avx2,erms"), []);
        let leaf = kvm_bindings::kvm_cpuid_entry2 {
            function: 7,
            ebx: 1 << 5 | 1 << 9,
            ..Default::default()
        };
        state.vcpus[0].cpuid.push(leaf);
        let both = found(&state, "clearcpuid=avx2,erms");
        assert_eq!(
            both.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
            [Check::Cpu, Check::CpuHints]
        );
        for part in ["VM `web`", "avx2 (`clearcpuid=avx2`)", "--without web", "--force cpu"] {
            assert!(both[0].1.contains(part), "{part}: {}", both[0].1);
        }
        assert!(both[1].1.contains("erms"), "{}", both[1].1);
    }
}
