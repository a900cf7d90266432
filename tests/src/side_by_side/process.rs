//! The processes of a VMM: which they are, what memory they hold, and what CPU time they use.

use std::fs;
use std::time::Duration;

use super::host::Problem;
use super::{GUEST_MIB, system};

/// A process and all of its descendants, the process first.
pub(super) fn with_descendants(pid: u32) -> Result<Vec<u32>, Problem> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Ok(child) = name.parse::<u32>() else { continue };
        let Ok(stat) = fs::read_to_string(format!("/proc/{name}/stat")) else { continue };
        // proc(5): the name, in parentheses, the state, and the parent.
        let parent = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().nth(1));
        if let Some(parent) = parent.and_then(|parent| parent.parse::<u32>().ok()) {
            parents.push((child, parent));
        }
    }
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(parents.iter().filter(|entry| entry.1 == parent).map(|entry| entry.0));
        next += 1;
    }
    Ok(found)
}

/// The CPU time that these processes have used.
pub(super) fn cpu_time(pids: &[u32]) -> Result<Duration, Problem> {
    Ok(pids.iter().map(|pid| system::cpu_time(*pid)).sum::<Result<Duration, _>>()?)
}

/// What a process has in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Resident {
    /// Bytes that it has mapped and that are in memory, without a guest's RAM.
    pub(super) bytes: u64,
    /// Size of the guest's RAM that it has mapped.
    pub(super) guest: u64,
}

pub(super) fn resident(pid: u32) -> Result<Resident, Problem> {
    parse_smaps(&fs::read_to_string(format!("/proc/{pid}/smaps"))?)
        .ok_or(format!("/proc/{pid}/smaps has another format than proc(5) says").into())
}

/// Whether a mapping of this size and these permissions is a piece of the guest's RAM. What else a VMM
/// maps is smaller, or is reserved address space that cannot be written.
fn is_guest_ram(bytes: u64, permissions: &str) -> bool {
    permissions.starts_with("rw") && bytes >= (GUEST_MIB << 20) / 8
}

/// proc(5), `smaps`: for each mapping a line with its range and permissions, and lines with a word, a
/// colon and a value.
fn parse_smaps(smaps: &str) -> Option<Resident> {
    let mut resident = Resident::default();
    let mut in_guest_ram = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next()?;
        if first == "Rss:" {
            let bytes = words.next()?.parse::<u64>().ok()? << 10;
            resident.bytes += if in_guest_ram { 0 } else { bytes };
        } else if !first.ends_with(':') {
            let (start, end) = first.split_once('-')?;
            let address = |text| u64::from_str_radix(text, 16).ok();
            let bytes = address(end)?.checked_sub(address(start)?)?;
            in_guest_ram = is_guest_ram(bytes, words.next()?);
            resident.guest += if in_guest_ram { bytes } else { 0 };
        }
    }
    Some(resident)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0c8a00000-55d0c8c00000 r-xp 00000000 00:01 12 /perennial
Size:               2048 kB
Rss:                1024 kB
Pss:                 512 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0010000000 rw-s 00000000 00:01 13 /memfd:ram (deleted)
Rss:              262144 kB
7f0010000000-7f0014000000 ---p 00000000 00:00 0
Rss:                   0 kB
7ffd0a000000-7ffd0a021000 rw-p 00000000 00:00 0 [stack]
Rss:                  24 kB
";

    #[test]
    fn the_guests_ram_is_left_out_and_its_size_is_told() {
        let resident = parse_smaps(SMAPS).unwrap();
        assert_eq!(resident, Resident { bytes: 1048 << 10, guest: 256 << 20 });
    }

    #[test]
    fn what_is_no_list_of_mappings_is_an_error() {
        assert_eq!(parse_smaps("Rss: many kB\n"), None);
        assert_eq!(parse_smaps("nothing\n"), None);
    }

    #[test]
    fn this_process_has_memory_and_no_guest() {
        let resident = resident(std::process::id()).unwrap();
        assert!(resident.bytes > 100 << 10, "{resident:?}");
        assert!(with_descendants(std::process::id()).unwrap().starts_with(&[std::process::id()]));
    }
}
