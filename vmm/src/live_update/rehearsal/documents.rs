//! The documents that the next host reads in a rehearsal, as an archive behind its initramfs.
//!
//! The manifest and the index are those that this host would write now. The state document of a VM is that with which
//! the VM came into its process: it has every node and every binding that the document of an update will have, and
//! the guest's CPUID, but other values.

use luo::Backend;

use super::RehearsalError;
use super::archive::Archive;
use crate::guests::Live;
use crate::guests::entry::{SegmentEntry, VmEntry};
use crate::guests::first_states::{first_states, travels};
use crate::guests::ledger::Ledger;
use crate::live_update::carry::{self, Carried};
use crate::live_update::index::Index;
use crate::live_update::manifest::Manifest;
use crate::live_update::preflight::{Check, Finding, Surroundings};
use crate::machine::Machine;
use crate::state::document;

/// Directory of the documents in the root of the next host's file system.
pub const DIRECTORY: &str = "perennial-rehearsal";
/// The manifest.
pub const MANIFEST: &str = "manifest";
/// The index.
pub const INDEX: &str = "index";
/// The name of the backend that carries the VMs.
pub const LUO: &str = "luo";
/// The features of the processor that the kernel before shows, as in /proc/cpuinfo.
pub const CPU_FLAGS: &str = "cpu-flags";
/// Directory of the state documents.
pub const STATES: &str = "states";
/// What the name of a state document begins with: the name of a VM alone could be `..`.
pub const VM: &str = "vm-";

/// What of the host goes into the documents.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The VMs.
    pub surroundings: Surroundings<'a>,
    /// The host's configuration.
    pub config: &'a str,
    /// Number of the live update.
    pub number: u32,
    /// What goes along beside the VMs.
    pub carried: &'a Carried,
    /// What carries the VMs.
    pub backend: Backend,
}

/// Returns the archive with all documents, and findings about the VMs without a state document.
pub(super) fn archive(source: &Source<'_>) -> Result<(Vec<u8>, Vec<Finding>), RehearsalError> {
    let vms = source.surroundings.vms;
    let live: Vec<_> = source.surroundings.travelling().filter_map(travels).collect();
    let mut findings = Vec::new();
    let mut states: Vec<(&Machine, Vec<u8>)> = Vec::new();
    let mut entries = Vec::new();
    for ((machine, live), state) in live.iter().zip(first_states(&live)) {
        match state {
            Ok(state) => {
                entries.push(entry(machine, live, &state));
                states.push((machine, state));
            }
            Err(why) => {
                let sentence = format!("no state document could be rehearsed: {why}");
                let subject = format!("VM `{}`", machine.name);
                findings.push(Finding::new(Check::RehearsalDocumentUnknown, subject, sentence, ""));
                entries.push(entry(machine, live, &[]));
            }
        }
    }
    entries.extend(carry::entries(vms));
    let manifest = Manifest {
        kernel: crate::live_update::kernel_name(),
        number: source.number,
        config: source.config.to_owned(),
        ticks: 0,
        realtime_ns: 0,
        ledger: Ledger::default(),
        vms: entries,
        boots: vms.iter().filter(|vm| vm.boots_next()).map(|vm| vm.machine.clone()).collect(),
    };
    let bytes = document::write_document(&manifest)?;
    let index = Index::of(&manifest, &bytes).with(&carry::indexed(vms, source.carried));
    let mut archive = Archive::default();
    archive.directory(DIRECTORY)?;
    let path = |name: &str| format!("{DIRECTORY}/{name}");
    archive.file(&path(MANIFEST), &bytes)?;
    archive.file(&path(INDEX), &document::write_document(&index)?)?;
    archive.file(&path(LUO), source.backend.to_string().as_bytes())?;
    archive.file(&path(CPU_FLAGS), cpu_flags().as_bytes())?;
    archive.directory(&path(STATES))?;
    for (machine, state) in states {
        archive.file(&path(&format!("{STATES}/{VM}{}", machine.name)), &state)?;
    }
    Ok((archive.finish()?, findings))
}

/// Returns the features that the running kernel shows of the processor; nothing if it shows none.
pub fn cpu_flags() -> String {
    flags(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()).to_owned()
}

/// Returns the line of features of a /proc/cpuinfo, without its name.
pub fn flags(cpuinfo: &str) -> &str {
    let line = cpuinfo.lines().find_map(|line| line.strip_prefix("flags"));
    line.and_then(|line| line.split_once(':')).map_or("", |(_, flags)| flags)
}

fn entry(machine: &Machine, live: &Live, state: &[u8]) -> VmEntry {
    let segment = |bytes| SegmentEntry { bytes, preserved: true, frames: None };
    VmEntry {
        machine: machine.clone(),
        running: live.running,
        state_bytes: state.len() as u64,
        state_digest: crc32fast::hash(state),
        last_exit_ticks: 0,
        ledger: Ledger::default(),
        segments: live.segments.iter().map(|ram| segment(ram.len())).collect(),
    }
}
