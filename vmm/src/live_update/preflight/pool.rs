//! Whether the next host finds the pool that has the VMs: by its own configuration, as the running host did by its own.

use std::path::Path;

use kexec::Survival;

use super::{Check, Finding, Surroundings, mounts};
use crate::config::Config;
use crate::live_update::next_kernel::Candidate;

/// Checks that `next`, the next host's configuration, names the pool in which the VMs are.
pub(super) fn check(
    candidate: &Candidate,
    surroundings: &Surroundings<'_>,
    next: Option<&Config>,
) -> Option<Finding> {
    let is_in_pool = candidate.survival == Survival::Reserved && !surroundings.vms.is_empty();
    let next = next.filter(|_| is_in_pool && surroundings.is_first_process)?;
    // A host whose own configuration cannot be read says nothing of the pool that it uses.
    let here = Config::parse(surroundings.config).ok()?.host.pool?;
    hidden(&here, &mounts::mounted(surroundings.root), next)
}

fn hidden(here: &Path, mounted: &str, next: &Config) -> Option<Finding> {
    let shown = here.display();
    let (sentence, remedy) = match &next.host.pool {
        None => (
            format!(
                "the VMs are in the pool {shown}, and `[host]` of the next configuration names no `pool`"
            ),
            "add it to the configuration in the initramfs",
        ),
        Some(there) => {
            let problem = mounts::differ((here, mounted), (there, next))?;
            (format!("the pool {shown} {problem}"), mounts::REMEDY)
        }
    };
    Some(Finding::new(Check::PoolHidden, shown, sentence, remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_host_must_find_the_pool_at_its_own_path() {
        let mounted = "rootfs / rootfs rw 0 0\n/dev/pmem0 /pool ext4 rw,dax=always 0 0\n";
        let found = |here: &str, next: &str| {
            let next = Config::parse(next).unwrap();
            hidden(Path::new(here), mounted, &next).map(|finding| finding.to_string())
        };
        let mount = |source: &str, target: &str| {
            format!(
                "[[host.mounts]]\nsource = \"{source}\"\ntarget = \"{target}\"\ntype = \"ext4\"\n"
            )
        };
        let pool = |path: &str| format!("[host]\npool = \"{path}\"\n");
        assert_eq!(found("/pool/a", &(pool("/pool/a") + &mount("/dev/pmem0", "/pool"))), None);
        // The same directory of the same device under another name.
        assert_eq!(found("/pool/a", &(pool("/other/a") + &mount("/dev/pmem0", "/other"))), None);
        for (next, part) in [
            (mount("/dev/pmem0", "/pool"), "names no `pool`"),
            (pool("/pool/a"), "mounts nothing there"),
            (pool("/pool/a") + &mount("/dev/pmem1", "/pool"), "/dev/pmem1 on /pool"),
            (pool("/pool/b") + &mount("/dev/pmem0", "/pool"), "/dev/pmem0 on /pool"),
        ] {
            let said = found("/pool/a", &next).unwrap_or_default();
            assert!(said.contains(part) && said.contains("/pool/a"), "{next}: {said}");
        }
    }
}
