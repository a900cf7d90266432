//! Other hosts of this machine, and `perennial run`: a kexec ends their VMs, which are no part of this host's update. They are
//! known by the processes of their VMs, because a host may have any lock, or none. Those in other PID namespaces are not seen.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::{Check, Finding, Surroundings};

/// What the command line of a VM's process begins with.
const VM_PROCESS: &[u8] = b"perennial\0vmm\0";

pub(super) fn check(surroundings: &Surroundings<'_>) -> Vec<Finding> {
    let Some(own) = surroundings.host else { return Vec::new() };
    let others = hosts(&surroundings.root.join("proc")).into_iter();
    // A process that the end of its host has left behind is about to end.
    let others = others.filter(|(host, _)| ![own, 1].contains(host));
    let finding = |(host, vms)| {
        let sentence = format!(
            "process {host} is another host, or `perennial run`, and has VMs as well ({vms}): the next kernel ends them"
        );
        Finding::new(Check::OtherHost, format!("process {host}"), sentence, "stop them first")
    };
    others.map(finding).collect()
}

/// Returns the processes that have processes of VMs, and how many.
fn hosts(proc: &Path) -> BTreeMap<u32, usize> {
    let mut hosts = BTreeMap::new();
    for process in fs::read_dir(proc).into_iter().flatten().flatten() {
        if process.file_name().to_str().is_none_or(|name| name.parse::<u32>().is_err()) {
            continue;
        }
        // It may have ended meanwhile.
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        if line.starts_with(VM_PROCESS)
            && let Ok(status) = fs::read_to_string(process.path().join("status"))
            && let Some(parent) = status.lines().find_map(|line| line.strip_prefix("PPid:"))
            && let Ok(parent) = parent.trim().parse()
        {
            *hosts.entry(parent).or_default() += 1;
        }
    }
    hosts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processes_of_other_hosts_vms_are_found_and_no_others() {
        let root = tempfile::tempdir().unwrap();
        let vm = "perennial\0vmm\0--log\0info\0";
        for (pid, parent, line) in [
            (10, 7, vm),
            (11, 7, vm),
            (12, 8, vm),
            (13, 9, vm),
            (14, 1, vm),
            (7, 1, "perennial\0host\0"),
            (15, 6, "perennial\0vmmm\0"),
            (16, 6, "cat\0perennial\0vmm\0"),
        ] {
            let process = root.path().join(format!("proc/{pid}"));
            fs::create_dir_all(&process).unwrap();
            fs::write(process.join("cmdline"), line).unwrap();
            fs::write(process.join("status"), format!("Name:\tx\nPPid:\t{parent}\n")).unwrap();
        }
        fs::create_dir(root.path().join("proc/self")).unwrap();
        let surroundings = Surroundings { root: root.path(), ..Surroundings::without_vms() };
        assert!(check(&surroundings).is_empty(), "no host asks");
        let found = check(&Surroundings { host: Some(8), ..surroundings });
        let found: Vec<_> = found.iter().map(|f| (f.subject.as_str(), f.can_be_forced)).collect();
        assert_eq!(found, [("process 7", true), ("process 9", true)]);
        let found = check(&Surroundings { host: Some(9), ..surroundings });
        assert!(found[0].sentence.contains("(2)"), "{found:?}");
    }
}
