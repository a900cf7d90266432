//! What the update needs of the host's memory and file descriptors, and what it has to write to disks before.

use std::fs;

use rustix::process::{Resource, getrlimit};

use super::{Check, Finding, Surroundings};
use crate::guests::{Life, Live, ram};
use crate::live_update::next_kernel::Candidate;

/// Files of the update that belong to no VM: the host's session, the manifest, the index, the kernel, the initramfs,
/// and what is opened for a moment.
const FDS_OF_THE_HOST: u64 = 16;
/// Files of the update for each VM: its session and its state document.
const FDS_OF_A_VM: u64 = 2;

/// Checks memory, file descriptors and data that is to be written.
pub(super) fn check(candidate: &Candidate, surroundings: &Surroundings<'_>) -> Vec<Finding> {
    let root = surroundings.root;
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let meminfo = read("proc/meminfo");
    let mut findings = Vec::new();
    if let Ok(available) = guest_mem::available_bytes(&meminfo) {
        let files = loading(candidate);
        let holes = match surroundings.fills_holes {
            true => live(surroundings).map(|(_, live)| holes(live)).sum(),
            false => 0,
        };
        findings.extend(too_little(files, holes, available));
    }
    let open = fs::read_dir(root.join("proc/self/fd")).map_or(0, Iterator::count) as u64;
    let vms = live(surroundings).count() as u64;
    findings.extend(too_few_fds(open, vms, getrlimit(Resource::Nofile).maximum));
    for (name, live) in live(surroundings) {
        findings.extend(resized(name, live));
    }
    findings.extend(unwritten(&meminfo, &read("proc/diskstats")));
    findings
}

pub(super) fn live<'a>(
    surroundings: &Surroundings<'a>,
) -> impl Iterator<Item = (&'a str, &'a Live)> {
    surroundings.travelling().filter_map(|vm| match &vm.life {
        Life::Live(live) => Some((vm.machine.name.as_str(), live)),
        _ => None,
    })
}

/// Bytes of memory that loading takes: the running kernel reads both files into its memory, and copies them to where
/// the next kernel starts, unless that is a scratch area, which is kept for it.
fn loading(candidate: &Candidate) -> u64 {
    let kernel = candidate.kernel.as_ref().map_or((0, 0), |kernel| (kernel.size, kernel.init_size));
    let initramfs = match &candidate.initramfs {
        Ok(Some(initramfs)) => initramfs.size,
        _ => 0,
    };
    let is_in_scratch = candidate.running.as_ref().is_ok_and(|running| running.scratch.is_some());
    let copies = if is_in_scratch { 0 } else { kernel.1.saturating_add(initramfs) };
    kernel.0.saturating_add(initramfs).saturating_add(copies)
}

/// Bytes of a VM's RAM that LUO fills when it preserves the RAM. A segment that cannot be examined counts in full.
fn holes(live: &Live) -> u64 {
    live.segments.iter().map(|segment| ram::filled_bytes(segment).unwrap_or(segment.len())).sum()
}

fn too_little(files: u64, holes: u64, available: u64) -> Option<Finding> {
    (files.saturating_add(holes) > available).then(|| {
        let sentence = format!(
            "the update takes {} MiB of memory to load the next kernel and {} MiB to preserve guest RAM, \
             whose holes are filled; the host has {} MiB available",
            files >> 20,
            holes >> 20,
            available >> 20
        );
        Finding::new(Check::Memory, "", sentence, "stop a VM, or free memory otherwise")
    })
}

fn too_few_fds(open: u64, vms: u64, limit: Option<u64>) -> Option<Finding> {
    let needed = open + FDS_OF_THE_HOST + FDS_OF_A_VM * vms;
    let limit = limit.filter(|limit| needed > *limit)?;
    let sentence = format!(
        "the update needs {needed} open files at a time, {open} of which are open now, and this process \
         may have {limit}"
    );
    let remedy = "raise the limit (LimitNOFILE= of the service), or stop a VM";
    Some(Finding::new(Check::OpenFiles, "", sentence, remedy))
}

/// Checks that the segments of a VM's RAM have the size that they were made with: the VM's process has them, too.
fn resized(vm: &str, live: &Live) -> Option<Finding> {
    live.segments.iter().enumerate().find_map(|(index, segment)| {
        let bytes = segment.file().metadata().ok()?.len();
        (bytes != segment.len()).then(|| resized_finding(vm, index, bytes, segment.len()))
    })
}

fn resized_finding(vm: &str, index: usize, bytes: u64, expected: u64) -> Finding {
    let sentence = format!(
        "segment {index} of its RAM has {bytes} bytes, and was made with {expected}: the VM's process \
         was taken over or has a bug"
    );
    Finding::new(Check::RamResized, format!("VM `{vm}`"), sentence, "stop the VM")
}

/// Tells how much data is to be written to disks, and how long that takes if they are as fast as they were.
fn unwritten(meminfo: &str, diskstats: &str) -> Option<Finding> {
    /// Less than this is not worth a word.
    const LEAST: u64 = 64 << 20;
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
    };
    let bytes = (kib("Dirty")? + kib("Writeback")?) << 10;
    if bytes < LEAST {
        return None;
    }
    let time = match bytes_per_second(diskstats) {
        Some(rate) => format!(
            ", about {} s at {} MiB/s, the speed of this host's disks so far",
            bytes.div_ceil(rate),
            rate >> 20
        ),
        None => String::new(),
    };
    let sentence = format!(
        "{} MiB of written data are not on disks yet, and are written before the jump{time}",
        bytes >> 20
    );
    Some(Finding::new(
        Check::UnwrittenData,
        "",
        sentence,
        "`sync` before the update makes it shorter",
    ))
}

/// The mean speed at which the disks wrote while they were writing. `None` if they wrote too little to tell
/// (Linux, Documentation/admin-guide/iostats.rst).
fn bytes_per_second(diskstats: &str) -> Option<u64> {
    let (mut sectors, mut milliseconds) = (0_u64, 0_u64);
    for line in diskstats.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        // Fields 7 and 8 after number and name: sectors written, milliseconds spent writing.
        let number = |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok());
        let (Some(written), Some(spent)) = (number(9), number(10)) else { continue };
        sectors = sectors.saturating_add(written);
        milliseconds = milliseconds.saturating_add(spent);
    }
    let bytes = sectors.checked_mul(512).filter(|bytes| *bytes >= 16 << 20)?;
    Some((bytes.checked_mul(1000)? / milliseconds.max(1)).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn memory_for_holes_and_for_the_next_kernel_must_be_there_together() {
        assert_eq!(too_little(20 * MIB, 100 * MIB, 120 * MIB), None);
        let finding = too_little(20 * MIB, 101 * MIB, 120 * MIB).unwrap();
        let text = finding.to_string();
        assert!(["20 MiB", "101 MiB", "120 MiB"].iter().all(|size| text.contains(size)), "{text}");
        assert!(too_little(u64::MAX, u64::MAX, 1).is_some());
    }

    #[test]
    fn open_files_must_suffice_for_every_vm() {
        assert_eq!(too_few_fds(100, 10, None), None);
        assert_eq!(too_few_fds(100, 10, Some(136)), None);
        let text = too_few_fds(100, 10, Some(135)).unwrap().to_string();
        assert!(text.contains("136 open files") && text.contains("may have 135"), "{text}");
    }

    #[test]
    fn a_segment_of_another_size_names_vm_and_sizes() {
        let text = resized_finding("web", 3, 5, 4).to_string();
        assert!(text.contains("`web`: segment 3") && text.contains("5 bytes"), "{text}");
    }

    #[test]
    fn data_to_be_written_is_told_with_its_time_if_disks_have_shown_their_speed() {
        let meminfo = "MemFree: 1 kB\nDirty:            102400 kB\nWriteback:  2048 kB\n";
        let stats = " 254 0 vda 1 0 8 1 10 0 204800 1000 0 0 0\n 254 16 vdb 1 0 8 1\n";
        let text = unwritten(meminfo, stats).unwrap().to_string();
        assert!(text.contains("102 MiB") && text.contains("about 2 s at 100 MiB/s"), "{text}");
        let text = unwritten(meminfo, "").unwrap().to_string();
        assert!(!text.contains("MiB/s"), "{text}");
        assert_eq!(unwritten("Dirty: 8 kB\nWriteback: 0 kB\n", stats), None);
        assert_eq!(unwritten("", stats), None);
    }
}
