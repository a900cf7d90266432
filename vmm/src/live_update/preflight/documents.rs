//! The documents as this host would write them now, for a next program to read: the manifest, and the state documents
//! of the VMs. Those of VMs that run are those with which they came into their processes, as no VM is paused.

use std::fs::File;
use std::io;

use super::{Check, Finding, Surroundings};
use crate::guests::Life;
use crate::guests::Live;
use crate::guests::entry::{SegmentEntry, VmEntry};
use crate::guests::first_states::{first_states, travels};
use crate::guests::held::Held;
use crate::guests::ledger::Ledger;
use crate::guests::memfd::{document_memfd, read_document};
use crate::live_update::carry;
use crate::live_update::manifest::{Manifest, STATE_TOKEN};
use crate::machine::{Machine, VmName};
use crate::state::document;

/// What the manifest is called in findings.
pub(super) const MANIFEST: &str = "the manifest";
/// What the manifest with the next host's own configuration is called in findings.
pub(super) const NEXT_CONFIG: &str = "the configuration in the initramfs";

/// A document that a next host would get.
#[derive(Debug)]
pub(super) struct Document {
    /// Its name in findings.
    pub(super) name: String,
    /// Its contents.
    pub(super) file: File,
    /// What it means if the next host cannot read it.
    pub(super) check: Check,
}

/// Returns the documents, the manifest first, and notes about those that there are not. None if no VM would travel.
/// `next_config` is the text of the next host's own configuration: it has the form of a manifest, too.
pub(super) fn documents(
    surroundings: &Surroundings<'_>,
    next_config: Option<&str>,
) -> (Vec<Document>, Vec<Finding>) {
    let live: Vec<_> = surroundings.travelling().filter_map(travels).collect();
    let mut entries: Vec<VmEntry> =
        live.iter().map(|(machine, live)| entry(machine, live)).collect();
    entries.extend(carry::entries(surroundings.vms));
    let mut documents = Vec::new();
    let mut findings = Vec::new();
    let mut add = |name: String, check, contents: Result<Vec<u8>, String>| {
        let file = contents.and_then(|contents| {
            document_memfd("document", &contents).map_err(|error| error.to_string())
        });
        match file {
            Ok(file) => documents.push(Document { name, file, check }),
            Err(why) => {
                let sentence = format!("{name} was not shown to the next host: {why}");
                findings.push(Finding::new(Check::InitramfsDocumentUnknown, name, sentence, ""));
            }
        }
    };
    if !entries.is_empty() {
        let drafts = [
            (MANIFEST, Some(draft(entries, surroundings.config))),
            (NEXT_CONFIG, next_config.map(|text| draft(Vec::new(), text))),
        ];
        for (name, draft) in drafts.into_iter().filter_map(|(name, draft)| Some((name, draft?))) {
            let contents = document::write_document(&draft).map_err(|e| e.to_string());
            add(name.into(), Check::InitramfsDocuments, contents);
        }
    }
    for (vm, state) in of_live(surroundings) {
        add(format!("the state document of VM `{vm}`"), Check::InitramfsDocuments, state);
    }
    for vm in surroundings.travelling() {
        if let Life::Preserved { held, .. } = &vm.life {
            let state = held_state(held).map_err(|error| error.to_string());
            let name = format!("the state document of VM `{}`", vm.machine.name);
            add(name, Check::InitramfsPreserved, state);
        }
    }
    (documents, findings)
}

/// The names of the VMs that would go along with their processes, and their state documents, or why there is none.
pub(super) fn of_live(surroundings: &Surroundings<'_>) -> Vec<(VmName, Result<Vec<u8>, String>)> {
    let live: Vec<_> = surroundings.travelling().filter_map(travels).collect();
    let states = first_states(&live);
    live.iter().map(|(machine, _)| machine.name.clone()).zip(states).collect()
}

/// Reads the state document of a preserved VM.
fn held_state(held: &Held) -> io::Result<Vec<u8>> {
    let listed = held.files().iter().find(|file| file.token == STATE_TOKEN.0);
    let bytes = listed.ok_or_else(|| io::Error::other("it is not in the index"))?.bytes;
    let file = held.file(STATE_TOKEN).map_err(io::Error::other)?;
    read_document(&file.into(), bytes)
}

/// Returns a draft of the manifest; `None` if there are no VMs that would travel.
pub(in crate::live_update) fn manifest(surroundings: &Surroundings<'_>) -> Option<File> {
    let live = surroundings.travelling().filter_map(travels);
    let vms: Vec<VmEntry> = live.map(|(machine, live)| entry(machine, live)).collect();
    if vms.is_empty() {
        return None;
    }
    // An update that cannot write its manifest fails with its own error.
    document_memfd("manifest", &document::write_document(&draft(vms, "")).ok()?).ok()
}

/// Returns a manifest without VMs that has this configuration. `None` if there is no memory for it.
pub(in crate::live_update) fn with_config(text: &str) -> Option<File> {
    let bytes = document::write_document(&draft(Vec::new(), text)).ok()?;
    document_memfd("manifest", &bytes).ok()
}

fn draft(vms: Vec<VmEntry>, config: &str) -> Manifest {
    Manifest {
        kernel: crate::live_update::kernel_name(),
        number: 1,
        config: config.to_owned(),
        ticks: 0,
        realtime_ns: 0,
        ledger: Ledger::default(),
        vms,
        boots: Vec::new(),
    }
}

fn entry(machine: &Machine, live: &Live) -> VmEntry {
    let segment = |bytes| SegmentEntry { bytes, preserved: true, frames: None };
    VmEntry {
        machine: machine.clone(),
        running: live.running,
        state_bytes: 0,
        state_digest: 0,
        last_exit_ticks: 0,
        ledger: Ledger::default(),
        segments: live.segments.iter().map(|ram| segment(ram.len())).collect(),
    }
}
