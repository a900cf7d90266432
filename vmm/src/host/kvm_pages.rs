//! The page sizes with which KVM maps a guest's RAM, from KVM's files in debugfs.
//!
//! A guest is faster with larger pages; huge folios and aligned files make them possible. The host's page
//! tables do not show the page sizes of files with DAX: `/proc/PID/smaps` leaves their huge pages out of
//! `FilePmdMapped` (Linux `fs/proc/task_mmu.c`, `smaps_pmd_entry`).

use std::collections::BTreeMap;
use std::fs::{self, DirEntry};
use std::path::{Path, PathBuf};

use rustix::process::Pid;

use crate::api::MappedPages;

/// KVM's directories in debugfs, by the process that created the VM.
pub struct KvmPages(BTreeMap<i32, PathBuf>);

impl KvmPages {
    /// Lists the VMs in the debugfs below `root`, once for all of them. Empty if the kernel does not show them.
    pub fn list(root: &Path) -> Self {
        // A directory is named PID-FD, after the process that created the VM (Linux `virt/kvm/kvm_main.c`).
        let of_vm = |entry: DirEntry| {
            let name = entry.file_name();
            let pid = name.to_str()?.split_once('-')?.0.parse().ok()?;
            Some((pid, entry.path()))
        };
        let entries = fs::read_dir(root.join("sys/kernel/debug/kvm"));
        Self(entries.into_iter().flatten().flatten().filter_map(of_vm).collect())
    }

    /// Returns the page counts of the VM of process `pid`. `None` if the kernel does not show them.
    pub fn of_process(&self, pid: Pid) -> Option<MappedPages> {
        let vm = self.0.get(&pid.as_raw_nonzero().get())?;
        let count = |name| fs::read_to_string(vm.join(name)).ok()?.trim().parse().ok();
        Some(MappedPages {
            small: count("pages_4k")?,
            huge: count("pages_2m")?,
            giant: count("pages_1g")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_counts_are_those_of_the_process_and_of_no_other() {
        let root = tempfile::tempdir().unwrap();
        let of_process = |pages: &KvmPages, pid| pages.of_process(Pid::from_raw(pid).unwrap());
        let before = KvmPages::list(root.path());
        assert_eq!(of_process(&before, 12), None, "no debugfs");
        for (vm, counts) in [("12-7", ["5", "6", "7"]), ("123-7", ["1", "1", "1"])] {
            let vm = root.path().join("sys/kernel/debug/kvm").join(vm);
            fs::create_dir_all(&vm).unwrap();
            for (name, count) in ["pages_4k", "pages_2m", "pages_1g"].iter().zip(counts) {
                fs::write(vm.join(name), format!("{count}\n")).unwrap();
            }
        }
        let pages = KvmPages::list(root.path());
        assert_eq!(of_process(&pages, 12), Some(MappedPages { small: 5, huge: 6, giant: 7 }));
        assert_eq!(of_process(&pages, 1), None);
        assert_eq!(of_process(&before, 12), None, "the directory is read only once");
    }
}
