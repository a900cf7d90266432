//! Room for what the update preserves, where anything but the host's memory limits it: the fd store of a systemd
//! service, and the pool's file system. Otherwise it would end in the blackout with ENOSPC.

use luo::Copies;

use super::memory::live;
use super::{Check, Finding, Surroundings};
use crate::guests::Life;
use crate::guests::held::Held;
use crate::guests::indexed::{FileKind, IndexedFile};

/// Files of the update that belong to no VM: the manifest, the index, and this host's program.
const FILES_OF_THE_HOST: u64 = 3;
/// The same without the program, which is given up if there is no room for it.
const DOCUMENTS_OF_THE_HOST: u64 = 2;
/// Bytes of documents for each VM beside its vCPUs, and for each vCPU: about twice what the largest have, whose
/// vCPUs have an XSAVE area of 11 KiB. Also its part of the manifest, the index and the pool's tree.
const BYTES_OF_A_VM: u64 = 64 << 10;
const BYTES_OF_A_VCPU: u64 = 32 << 10;
/// Bytes for each VM that is preserved here, beside its state document: its part of the manifest, the index and the
/// pool's tree.
const BYTES_OF_AN_ENTRY: u64 = 16 << 10;
/// Each copy takes whole blocks.
const BLOCK: u64 = 4096;

/// Bytes that are taken to be enough for the documents of a VM with so many vCPUs.
pub fn bytes_of_documents(vcpus: u64) -> u64 {
    BYTES_OF_A_VM + BYTES_OF_A_VCPU * vcpus
}

/// Checks the room for the VMs that travel, and for those that are preserved here and go along.
pub(super) fn check(surroundings: &Surroundings<'_>) -> Vec<Finding> {
    let room = surroundings.room;
    let vms = live(surroundings).count() as u64;
    let held: Vec<_> = held(surroundings).collect();
    if vms == 0 && held.is_empty() {
        return Vec::new();
    }
    let mut findings = Vec::new();
    if surroundings.empties_store {
        findings.push(emptied_store());
    }
    if let Some(free) = room.files {
        let touched = live(surroundings).map(|(_, live)| touched(live)).sum::<u64>();
        let of_vms = touched + vms + held.len() as u64;
        findings.extend(too_few_files(of_vms + FILES_OF_THE_HOST, free));
    }
    if let Some(free) = room.copies {
        let travelling = surroundings.travelling().filter(|vm| vm.is_live());
        let of_vms = travelling.map(|vm| bytes_of_documents(vm.machine.cpus.into())).sum::<u64>();
        // RAM stays where it is.
        let documents = held.iter().filter(|file| file.kind != FileKind::Ram);
        let sizes = documents.clone().map(|file| file.bytes.next_multiple_of(BLOCK));
        let of_held = sizes.map(|bytes| bytes + BYTES_OF_AN_ENTRY).sum::<u64>();
        let bytes = of_vms + of_held + BYTES_OF_A_VM;
        let files = vms + documents.count() as u64 + DOCUMENTS_OF_THE_HOST;
        findings.extend(too_little_room(Copies { files, bytes }, free));
    }
    findings
}

fn emptied_store() -> Finding {
    let sentence = "systemd empties the fd store of this service when it stops the service for the kexec: all VMs would be \
                    lost";
    let remedy =
        "set FileDescriptorStorePreserve=yes in the unit, and run `systemctl daemon-reload`";
    Finding::new(Check::FdStore, "", sentence.to_owned(), remedy)
}

/// The files of the VMs that are preserved here, as far as the update preserves them again. A VM that is left out of the
/// update goes along as well, if it is preserved.
fn held<'a>(surroundings: &Surroundings<'a>) -> impl Iterator<Item = &'a IndexedFile> {
    let held = surroundings.vms.iter().filter_map(|vm| match &vm.life {
        Life::Preserved { held, .. } => Some(held),
        _ => None,
    });
    held.flat_map(Held::preserved_again)
}

/// The segments of a VM's RAM that are preserved. One that cannot be examined counts.
fn touched(live: &crate::guests::Live) -> u64 {
    let is_preserved = |segment: &&_| guest_mem::is_touched(segment).unwrap_or(true);
    live.segments.iter().filter(is_preserved).count() as u64
}

fn too_few_files(needed: u64, free: u64) -> Option<Finding> {
    (needed > free).then(|| {
        let sentence = format!(
            "the update puts {needed} files into the fd store of this service, which takes {free} more: VMs would \
             be lost"
        );
        let more = needed - free;
        let remedy = format!(
            "raise FileDescriptorStoreMax= of the unit by {more} and restart the service, or stop a VM"
        );
        Finding::new(Check::FdStore, "", sentence, remedy)
    })
}

fn too_little_room(needed: Copies, free: Copies) -> Option<Finding> {
    let what = if needed.bytes > free.bytes {
        format!(
            "needs about {} KiB in the pool, which has {} KiB free",
            needed.bytes >> 10,
            free.bytes >> 10
        )
    } else if needed.files > free.files {
        format!("makes {} files in the pool, which has {} inodes free", needed.files, free.files)
    } else {
        return None;
    };
    let sentence = format!("the update {what}: it could not be done once the VMs are paused");
    let remedy = "stop a VM, or cold boot with a larger pool (`memmap=`, `format-from`)";
    Some(Finding::new(Check::PoolRoom, "", sentence, remedy))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use luo::builtin::keeper::Keeper;
    use luo::{Orchestrator, Room, Token};

    use super::*;
    use crate::config::HostSection;
    use crate::guests::Guest;
    use crate::guests::confinement::Confinement;
    use crate::guests::entry::tests::sample;
    use crate::guests::memfd::document_memfd;
    use crate::live_update::manifest::vm_session;

    /// A preserved VM with a document of 5000 bytes and a piece of RAM, which are still in the session that they came in
    /// if it `stays`.
    fn preserved(stays: bool) -> Guest {
        let entry = sample();
        let name = vm_session(&entry.machine.name);
        let keeper = Keeper::start();
        let session = keeper.create_session(&name).unwrap();
        for token in [0, 1] {
            let file = document_memfd("file", b"contents").unwrap();
            session.preserve(file.as_fd(), Token(token)).unwrap();
        }
        let keeper = Keeper::arrive(keeper.switch().unwrap()).unwrap();
        drop(session);
        let file = |token, kind, bytes| IndexedFile { token, kind, bytes, digest: 0 };
        let files = vec![file(0, FileKind::State, 5000), file(1, FileKind::Ram, 1 << 20)];
        let mut held = Held::new(keeper.retrieve_session(&name).unwrap(), files);
        if !stays {
            held.collect(&keeper, false).unwrap();
            held.release().unwrap();
        }
        let mut vm = Guest::new(entry.machine.clone(), &Confinement::new(&HostSection::default()));
        vm.life = Life::Preserved { held, entry: Some(Box::new(entry)), why: Vec::new() };
        vm
    }

    #[test]
    fn what_is_preserved_here_and_goes_along_takes_room_as_well() {
        let none = Copies { files: 0, bytes: 0 };
        let room = Room { files: Some(0), copies: Some(none) };
        let around = Surroundings { room, ..Surroundings::without_vms() };
        let vms = [preserved(false), preserved(false)];
        let found = check(&Surroundings { vms: &vms, ..around });
        let emptied = check(&Surroundings { vms: &vms, empties_store: true, ..around });
        assert_eq!(emptied, [vec![emptied_store()], found.clone()].concat());
        assert!(!emptied[0].can_be_forced && emptied[0].to_string().contains("StorePreserve=yes"));
        // Two blocks and an entry for each VM, and the host's.
        let text = found.iter().map(ToString::to_string).collect::<String>();
        assert!(text.contains("puts 7 files into the fd store"), "{text}");
        assert!(text.contains("needs about 112 KiB in the pool"), "{text}");
        let enough = Room { files: Some(7), copies: Some(Copies { files: 4, bytes: 112 << 10 }) };
        assert_eq!(check(&Surroundings { vms: &vms, room: enough, ..around }), []);
        // Nothing of these is preserved again.
        assert_eq!(check(&Surroundings { vms: &[preserved(true)], ..around }), []);
    }

    #[test]
    fn an_fd_store_must_take_every_file_and_says_by_how_much_it_is_too_small() {
        assert_eq!(too_few_files(7, 7), None);
        let finding = too_few_files(70, 64).unwrap();
        assert_eq!((finding.name, finding.can_be_forced), (Check::FdStore, false));
        let text = finding.to_string();
        assert!(text.contains("puts 70 files") && text.contains("takes 64 more"), "{text}");
        assert!(text.contains("FileDescriptorStoreMax= of the unit by 6"), "{text}");
    }

    #[test]
    fn a_pool_must_have_room_and_inodes_for_the_documents() {
        let needed = Copies { files: 3, bytes: 160 << 10 };
        assert_eq!(too_little_room(needed, needed), None);
        let text = too_little_room(needed, Copies { bytes: needed.bytes - 1, ..needed }).unwrap();
        assert!(
            text.to_string().contains("about 160 KiB in the pool, which has 159 KiB"),
            "{text}"
        );
        let text = too_little_room(needed, Copies { files: 2, ..needed }).unwrap();
        assert!(
            text.to_string().contains("makes 3 files in the pool, which has 2 inodes"),
            "{text}"
        );
        assert!(text.can_be_forced);
    }

    #[test]
    fn without_vms_nothing_is_preserved() {
        let none = Copies { files: 0, bytes: 0 };
        let room = Room { files: Some(0), copies: Some(none) };
        assert_eq!(check(&Surroundings { room, ..Surroundings::without_vms() }), []);
    }
}
