//! Whether this host has the features of a guest that booted on another one.

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;

use super::Register::{self, Eax, Ecx, Edx};
use super::features::{COMPONENTS, GROUPS, Kind};
use super::{find, get, vendor};

/// CPU features of a saved guest that this host lacks, in one register of CPUID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// Their names.
    pub names: Vec<String>,
    leaf: u32,
    subleaf: u32,
    register: Register,
    document: u32,
    host: u32,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { names, leaf, subleaf, register, document, host } = self;
        write!(
            f,
            "{} (CPUID leaf {leaf:#x} subleaf {subleaf} {register:?}: the document has {document:#010x}, \
             this host offers {host:#010x})",
            names.join(", ")
        )
    }
}

/// A feature of a saved guest whose state is not saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uncarried {
    /// Its name.
    pub name: &'static str,
    /// Why its state is not saved.
    pub why: &'static str,
}

impl fmt::Display for Uncarried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.why)
    }
}

/// The comparison of a guest's CPUID with this host's.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Vendors of the guest's processor and of this host's, if they differ.
    pub vendors: Option<(String, String)>,
    /// Instructions and state without which the guest cannot run.
    pub lacking: Vec<Missing>,
    /// Hints, without which the guest runs.
    pub hints: Vec<Missing>,
    /// Features whose state no document has.
    pub uncarried: Vec<Uncarried>,
}

/// Compares the CPUID in `document` with what this host's KVM supports.
pub fn compare(document: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Comparison {
    let mut found = Comparison::default();
    if let (Some(of_document), Some(of_host)) = (vendor(document), vendor(supported))
        && of_document != of_host
    {
        found.vendors = Some((of_document, of_host));
    }
    let mut registers: Vec<_> = GROUPS.iter().map(|g| (g.leaf, g.subleaf, g.register)).collect();
    registers.dedup();
    registers.sort_by_key(|(leaf, subleaf, register)| (*leaf, *subleaf, *register as u8));
    registers.dedup();
    registers.extend([(0xd, 0, Eax), (0xd, 0, Edx), (0xd, 1, Ecx), (0xd, 1, Edx)]);
    for at in registers {
        compare_register(&mut found, at, document, supported);
    }
    found
}

fn compare_register(
    found: &mut Comparison,
    (leaf, subleaf, register): (u32, u32, Register),
    document: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
) {
    let Some(entry) = find(document, leaf, subleaf) else { return };
    let document = get(entry, register);
    let host = find(supported, leaf, subleaf).map_or(0, |entry| get(entry, register));
    let (mut lacking, mut hints) = (Vec::new(), Vec::new());
    for bit in (0..32).filter(|bit| document & 1 << bit != 0) {
        let known = GROUPS.iter().find_map(|group| {
            let here = (group.leaf, group.subleaf, group.register) == (leaf, subleaf, register);
            let named = group.bits.iter().find(|(at, _)| here && *at == bit);
            named.map(|(_, name)| (group, *name))
        });
        match known {
            Some((group, name)) if group.kind == Kind::Withheld => {
                found.uncarried.push(Uncarried { name, why: group.why });
            }
            Some((group, _)) if group.kind == Kind::Live => {}
            _ if host & 1 << bit != 0 => {}
            Some((group, name)) if group.kind == Kind::Hint => hints.push(name.to_owned()),
            Some((_, name)) => lacking.push(name.to_owned()),
            None => lacking.push(unnamed(leaf, bit)),
        }
    }
    let mut push = |names: Vec<String>, list: fn(&mut Comparison) -> &mut Vec<Missing>| {
        if !names.is_empty() {
            list(found).push(Missing { names, leaf, subleaf, register, document, host });
        }
    };
    push(lacking, |found| &mut found.lacking);
    push(hints, |found| &mut found.hints);
}

/// Returns words for a bit that no group names.
fn unnamed(leaf: u32, bit: u8) -> String {
    let component = COMPONENTS.iter().find(|(at, ..)| leaf == 0xd && *at == bit);
    match component {
        Some((_, _, name)) => format!("the XSAVE component of {name}"),
        None if leaf == 0xd => format!("XSAVE component {bit}"),
        None => format!("bit {bit}"),
    }
}
