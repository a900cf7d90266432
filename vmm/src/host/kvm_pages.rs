//! The page sizes with which KVM maps a guest's RAM, from KVM's files in debugfs.
//!
//! A guest is faster with larger pages; huge folios and aligned files make them possible. The host's page
//! tables do not show the page sizes of files with DAX: `/proc/PID/smaps` leaves their huge pages out of
//! `FilePmdMapped` (Linux `fs/proc/task_mmu.c`, `smaps_pmd_entry`).

use std::fs;
use std::path::Path;

use rustix::process::Pid;

use crate::api::MappedPages;

/// Returns the page counts of the VM of process `pid`, from the debugfs below `root`. `None` if the kernel
/// does not show them.
pub fn of_process(root: &Path, pid: Pid) -> Option<MappedPages> {
    // The directory is named PID-FD, after the process that created the VM (Linux `virt/kvm/kvm_main.c`).
    let prefix = format!("{}-", pid.as_raw_nonzero());
    let vms = fs::read_dir(root.join("sys/kernel/debug/kvm")).ok()?.flatten();
    let mut vms = vms.filter(|vm| vm.file_name().to_string_lossy().starts_with(&prefix));
    let vm = vms.next()?.path();
    let count = |name| fs::read_to_string(vm.join(name)).ok()?.trim().parse().ok();
    Some(MappedPages {
        small: count("pages_4k")?,
        huge: count("pages_2m")?,
        giant: count("pages_1g")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_counts_are_those_of_the_process_and_of_no_other() {
        let root = tempfile::tempdir().unwrap();
        let of = |pid| of_process(root.path(), Pid::from_raw(pid).unwrap());
        assert_eq!(of(12), None, "no debugfs");
        for (vm, counts) in [("12-7", ["5", "6", "7"]), ("123-7", ["1", "1", "1"])] {
            let vm = root.path().join("sys/kernel/debug/kvm").join(vm);
            fs::create_dir_all(&vm).unwrap();
            for (name, count) in ["pages_4k", "pages_2m", "pages_1g"].iter().zip(counts) {
                fs::write(vm.join(name), format!("{count}\n")).unwrap();
            }
        }
        assert_eq!(of(12), Some(MappedPages { small: 5, huge: 6, giant: 7 }));
        assert_eq!(of(1), None);
    }
}
