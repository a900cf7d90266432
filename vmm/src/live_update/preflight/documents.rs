//! The manifest as this host would write it now, for a next program to read. The state documents of the VMs exist only
//! when the VMs are paused; the manifest has the descriptions of all their devices.

use std::fs::File;

use super::Surroundings;
use crate::guests::entry::{SegmentEntry, VmEntry};
use crate::guests::ledger::Ledger;
use crate::guests::memfd::document_memfd;
use crate::guests::{Guest, Life};
use crate::live_update::manifest::Manifest;
use crate::state::document;

/// Returns the manifest; `None` if there are no VMs that would travel.
pub(in crate::live_update) fn manifest(surroundings: &Surroundings<'_>) -> Option<File> {
    let vms: Vec<VmEntry> = surroundings.travelling().filter_map(entry).collect();
    if vms.is_empty() {
        return None;
    }
    let manifest = Manifest {
        kernel: crate::live_update::kernel_name(),
        number: 1,
        config: String::new(),
        ticks: 0,
        realtime_ns: 0,
        ledger: Ledger::default(),
        vms,
        boots: Vec::new(),
    };
    // An update that cannot write its manifest fails with its own error.
    document_memfd("manifest", &document::write_document(&manifest).ok()?).ok()
}

fn entry(vm: &Guest) -> Option<VmEntry> {
    let Life::Live(live) = &vm.life else { return None };
    let segment = |bytes| SegmentEntry { bytes, preserved: true, frames: None };
    Some(VmEntry {
        machine: vm.machine.clone(),
        running: live.running,
        state_bytes: 0,
        state_digest: 0,
        last_exit_ticks: 0,
        ledger: Ledger::default(),
        segments: live.segments.iter().map(|ram| segment(ram.len())).collect(),
    })
}
