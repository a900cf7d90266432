//! Room for what the update preserves, where anything but the host's memory limits it: the fd store of a systemd
//! service, and the pool's file system. Otherwise it would end in the blackout with ENOSPC.

use luo::Copies;

use super::memory::live;
use super::{Check, Finding, Surroundings};

/// Files of the update that belong to no VM: the manifest, the index, and this host's program.
const FILES_OF_THE_HOST: u64 = 3;
/// The same without the program, which is given up if there is no room for it.
const DOCUMENTS_OF_THE_HOST: u64 = 2;
/// Bytes of documents for each VM beside its vCPUs, and for each vCPU: about twice what the largest have, whose
/// vCPUs have an XSAVE area of 11 KiB. Also its part of the manifest, the index and the pool's tree.
const BYTES_OF_A_VM: u64 = 64 << 10;
const BYTES_OF_A_VCPU: u64 = 32 << 10;

/// Bytes that are taken to be enough for the documents of a VM with so many vCPUs.
pub fn bytes_of_documents(vcpus: u64) -> u64 {
    BYTES_OF_A_VM + BYTES_OF_A_VCPU * vcpus
}

/// Checks the room for the VMs that travel.
pub(super) fn check(surroundings: &Surroundings<'_>) -> Vec<Finding> {
    let room = surroundings.room;
    let vms = live(surroundings).count() as u64;
    if vms == 0 {
        return Vec::new();
    }
    let mut findings = Vec::new();
    if let Some(free) = room.files {
        let touched = live(surroundings).map(|(_, live)| touched(live)).sum::<u64>();
        findings.extend(too_few_files(touched + vms + FILES_OF_THE_HOST, free));
    }
    if let Some(free) = room.copies {
        let travelling = surroundings.travelling().filter(|vm| vm.is_live());
        let of_vms = travelling.map(|vm| bytes_of_documents(vm.machine.cpus.into())).sum::<u64>();
        let bytes = of_vms + BYTES_OF_A_VM;
        findings
            .extend(too_little_room(Copies { files: vms + DOCUMENTS_OF_THE_HOST, bytes }, free));
    }
    findings
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
    use super::*;

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
        let room = luo::Room { files: Some(0), copies: Some(none) };
        assert_eq!(check(&Surroundings { room, ..Surroundings::without_vms() }), []);
    }
}
