//! What earlier programs really left, read as a host reads it at its arrival: an index, a manifest with its ledgers, the
//! states of VMs with guests at work, and the report in its file. `golden/left/README.md` says where they are from.
//!
//! The golden documents beside them have one value for each binding, which somebody made up. These have what real
//! guests and real kernels put there, in documents that must fit each other.

use std::fs;
use std::path::{Path, PathBuf};

use crate::api::report::Report;
use crate::live_update::index::{FileKind, Index};
use crate::live_update::manifest::{
    INDEX_TOKEN, MANIFEST_TOKEN, Manifest, STATE_TOKEN, host_session, vm_session,
};
use crate::state::Schema;
use crate::state::document::{read_document, write_document};
use crate::vm::VmStateV1;

/// What to do if a document fails here.
const REMEDY: &str = "Hosts in the field have such documents in their memory. Keep reading every binding of this one, and \
                      give what is new a binding of its own: docs/state-versioning.md, \"A new version\". Never write \
                      the files in golden/left again";

/// The directories of `golden/left`, each with what one program left.
fn left() -> Vec<PathBuf> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/left");
    let entries = fs::read_dir(all).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    found.sort();
    found
}

/// Reads a document, and checks that its value is written to the same bytes: then it still means the same.
fn read<S: Schema>(directory: &Path, session: &str, token: u64) -> (S, Vec<u8>) {
    let path = directory.join(format!("{session}-{token}.dtb"));
    let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let value = read_document(&bytes).unwrap_or_else(|error| {
        panic!("{} is not read any more: {error}. {REMEDY}", path.display())
    });
    let again = write_document(&value).unwrap();
    assert!(again == bytes, "{} is written differently now. {REMEDY}", path.display());
    (value, bytes)
}

#[test]
fn what_earlier_programs_left_is_read_and_means_the_same() {
    let all = left();
    assert!(all.len() >= 2, "{all:?}");
    for directory in all {
        let host = host_session();
        let (index, _) = read::<Index>(&directory, host.as_str(), INDEX_TOKEN.0);
        let (manifest, bytes) = read::<Manifest>(&directory, host.as_str(), MANIFEST_TOKEN.0);
        index.check(&manifest, &bytes).unwrap();
        assert!(!manifest.ledger.phases.is_empty(), "{}", directory.display());
        assert!(!manifest.vms.is_empty(), "{}", directory.display());
        for vm in &manifest.vms {
            let session = vm_session(&vm.machine.name);
            let (state, bytes) = read::<VmStateV1>(&directory, session.as_str(), STATE_TOKEN.0);
            assert_eq!(state.machine, vm.machine);
            let told = (vm.state_bytes, vm.state_digest);
            assert_eq!(told, (bytes.len() as u64, crc32fast::hash(&bytes)), "{session}");
            let files = &index.session(session.as_str()).unwrap().files;
            assert!(files.iter().any(|file| file.kind == FileKind::Ram), "{session}: {files:?}");
        }
    }
}

#[test]
fn the_report_that_an_earlier_host_kept_is_read_and_means_the_same() {
    let reports = left().into_iter().map(|directory| directory.join("report.json"));
    let reports: Vec<_> = reports.filter(|path| path.exists()).collect();
    assert!(!reports.is_empty());
    for path in reports {
        let report = Report::read(&path)
            .unwrap_or_else(|error| panic!("{} is not read any more: {error}", path.display()));
        let had: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let has = serde_json::to_value(&report).unwrap();
        // A new field may be added: an old host ignores it. None may be lost.
        for (old, new) in had["vms"].as_array().unwrap().iter().zip(has["vms"].as_array().unwrap())
        {
            keeps(old, new, &path);
        }
        keeps(&had["host"], &has["host"], &path);
    }
}

/// Errors unless `new` has every field of `old`, with its value.
fn keeps(old: &serde_json::Value, new: &serde_json::Value, path: &Path) {
    for (name, value) in old.as_object().unwrap() {
        let why =
            "a report outlives its host: give a new field `#[serde(default)]`, and keep the others";
        assert_eq!(new.get(name), Some(value), "{}: `{name}`: {why}", path.display());
    }
}
