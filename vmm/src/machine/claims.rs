//! Refuses devices that have the same file, tap or address. Two VMs that write to one disk destroy its file system;
//! two logs with one name overwrite each other.
//!
//! The configuration is checked by names. Before a VM boots, its files are compared with those of the VMs that have
//! a process by what they are, because one file may have several names; the names may not have led anywhere before.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Machine, VmName};
use crate::devices::claims::{Claim, Thing};
use crate::look;

/// How long the files of a VM may take to show what they are.
const LOOK_WITHIN: Duration = Duration::from_secs(2);

/// Two devices have the same thing. The text names it, both VMs, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ClaimError(String);

impl ClaimError {
    /// The error for `first` of VM `vm` and `second` of VM `other_vm`, which are the same thing.
    fn new((vm, first): (&VmName, &Claim), (other_vm, second): (&VmName, &Claim)) -> Self {
        let name = |claim: &Claim| match &claim.thing {
            Thing::Path(path) => path.display().to_string(),
            Thing::Named(_, name) => name.clone(),
        };
        let (name, other_name) = (name(first), name(second));
        let (role, other_role) = (first.role, second.role);
        let spelled =
            if name == other_name { String::new() } else { format!(" (as {other_name})") };
        let both = match (vm == other_vm, role == other_role) {
            (true, true) => format!("VM `{vm}` has the {role} {name} twice{spelled}"),
            (true, false) => {
                format!("VM `{vm}` has {name} as its {role} and as its {other_role}{spelled}")
            }
            (false, true) => {
                format!("VM `{vm}` and VM `{other_vm}` have the same {role} {name}{spelled}")
            }
            (false, false) => format!(
                "VM `{vm}` has {name} as its {role}, and VM `{other_vm}` as its {other_role}{spelled}"
            ),
        };
        let shared = first.shared_with.filter(|with| second.shared_with == Some(with));
        let shared =
            shared.map_or(String::new(), |with| format!(", or say {with} for all of them"));
        Self(format!("{both}: give each its own{shared}"))
    }
}

/// How a thing is recognized.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// By its name.
    Name(Thing),
    /// A file: by file system and inode.
    File { device: u64, inode: u64 },
    /// A block device: by its number.
    Device(u64),
}

/// What devices have claimed.
#[derive(Debug, Default)]
pub struct Claims(BTreeMap<Key, (VmName, Claim)>);

impl Claims {
    /// Checks that no two devices of `machines` have a thing of one name.
    pub fn check_names(machines: &[Machine]) -> Result<(), ClaimError> {
        let mut claims = Self::default();
        machines.iter().try_for_each(|machine| claims.add_names(machine))
    }

    /// Adds what the devices of `machine` have, by names. Errors if another one has it already.
    pub fn add_names(&mut self, machine: &Machine) -> Result<(), ClaimError> {
        self.add(machine, |claim| [by_name(claim)].into())
    }

    /// Adds what the devices of `machine` have, by names and by what was seen of its files. Errors if another one has it
    /// already.
    pub fn add_files(&mut self, machine: &Machine, seen: &FilesSeen) -> Result<(), ClaimError> {
        self.add(machine, |claim| match &claim.thing {
            Thing::Path(path) => {
                let file = seen.0.get(path).cloned().flatten();
                [by_name(claim)].into_iter().chain(file).collect()
            }
            Thing::Named(..) => [by_name(claim)].into(),
        })
    }

    fn add(
        &mut self,
        machine: &Machine,
        keys: impl Fn(&Claim) -> BTreeSet<Key>,
    ) -> Result<(), ClaimError> {
        for claim in machine.devices.iter().flat_map(|device| device.options.claims()) {
            for key in keys(&claim) {
                let Some((vm, first)) = self.0.get(&key) else {
                    self.0.insert(key, (machine.name.clone(), claim.clone()));
                    continue;
                };
                if !(first.shared && claim.shared) {
                    return Err(ClaimError::new((vm, first), (&machine.name, &claim)));
                }
            }
        }
        Ok(())
    }
}

/// What the files of VMs are, as far as they show it.
#[derive(Debug)]
pub struct FilesSeen(BTreeMap<PathBuf, Option<Key>>);

impl FilesSeen {
    /// Looks at the files of all `machines` at the same time, so that servers that are gone cost the time of one. A file that
    /// does not answer is only compared by its name; disks are locked besides.
    pub fn of<'a>(machines: impl IntoIterator<Item = &'a Machine>) -> Self {
        let mut of_vms = BTreeMap::new();
        for machine in machines {
            for claim in machine.devices.iter().flat_map(|device| device.options.claims()) {
                if let Thing::Path(path) = claim.thing {
                    of_vms.entry(path).or_insert(&machine.name);
                }
            }
        }
        let paths: Vec<PathBuf> = of_vms.keys().cloned().collect();
        let seen = look::at(&paths, LOOK_WITHIN, by_file);
        for ((path, vm), _) in of_vms.iter().zip(&seen).filter(|(_, file)| file.is_none()) {
            tracing::warn!(
                "VM `{vm}`: {} does not answer, so only its name is compared with those of other VMs' files",
                path.display()
            );
        }
        Self(paths.into_iter().zip(seen.into_iter().map(Option::flatten)).collect())
    }
}

/// The name without what makes no difference: `/data//./a` is `/data/a`.
fn by_name(claim: &Claim) -> Key {
    Key::Name(match &claim.thing {
        Thing::Path(path) => Thing::Path(path.components().collect()),
        named => named.clone(),
    })
}

/// The file that a path leads to, if it exists; otherwise the path without symbolic links.
fn by_file(path: &Path) -> Option<Key> {
    if let Ok(found) = std::fs::metadata(path) {
        return Some(match found.file_type() {
            kind if kind.is_block_device() => Key::Device(found.rdev()),
            _ => Key::File { device: found.dev(), inode: found.ino() },
        });
    }
    let (directory, name) = (path.parent()?, path.file_name()?);
    let directory: PathBuf = directory.canonicalize().ok()?;
    Some(Key::Name(Thing::Path(directory.join(name))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    /// Two VMs, `a` and `b`, with these lines.
    fn machines([a, b]: [&str; 2]) -> Result<Vec<Machine>, String> {
        let vm = |name: &str, lines: &str| {
            format!("[[vm]]\nname = \"{name}\"\nmemory = \"size=64M\"\nkernel = \"/k\"\n{lines}\n")
        };
        let config = Config::parse(&(vm("a", a) + &vm("b", b)));
        config.map(|config| config.machines).map_err(|error| error.to_string())
    }

    #[test]
    fn what_only_one_vm_can_have_is_refused_with_both_vms_and_what_to_do() {
        for (lines, told) in [
            (
                ["disk = 'path=/d'", "disk = 'path=/d'"],
                "VM `a` and VM `b` have the same disk /d: give each",
            ),
            (["disk = 'path=/d'", "disk = 'path=/d'"], "or say readonly=on for all of them"),
            (["disk = 'path=/d'", "disk = 'path=//./d/,readonly=on'"], "same disk /d (as //./d/)"),
            (["disk = ['path=/d', 'path=/d']", ""], "VM `a` has the disk /d twice: give each"),
            (
                ["serial = 'file=/l'", "serial = 'file=/l'"],
                "the same serial log /l: give each its own",
            ),
            (["serial = 'file=/l,keep=2'", "serial = 'file=/l.2'"], "same serial log /l.2"),
            (
                ["serial = 'file=/l'", "disk = 'path=/l'"],
                "VM `a` has /l as its serial log, and VM `b` as its disk",
            ),
            (["serial = 'socket=/s'", "serial = 'socket=/s'"], "the same serial socket /s"),
            (["serial = 'port=p'", "serial = 'port=p'"], "the same virtio-serial port p"),
            (["net = 'tap=t'", "net = 'tap=t'"], "the same tap t"),
            (["net = ['tap=t', 'tap=t']", ""], "VM `a` has the tap t twice"),
            (
                [
                    "net = 'tap=t,bridge=b,mac=52:54:00:00:00:01'",
                    "net = 'tap=u,bridge=b,mac=52:54:00:00:00:01'",
                ],
                "the same MAC address on a bridge 52:54:00:00:00:01 on b",
            ),
            (
                [
                    "platform = 'uuid=6f1f2f5c-8a0e-4c39-9d0b-2f6b1c0de5a7'",
                    "platform = 'uuid=6F1F2F5C-8A0E-4C39-9D0B-2F6B1C0DE5A7'",
                ],
                "the same UUID 6f1f2f5c",
            ),
        ] {
            let refused = machines(lines).expect_err(told);
            assert!(refused.contains(told), "{refused}");
        }
    }

    #[test]
    fn what_vms_can_share_is_not_refused() {
        for lines in [
            ["disk = 'path=/d,readonly=on'", "disk = 'path=/d,readonly=on'"],
            ["disk = ['path=/d,readonly=on', 'path=/d,readonly=on']", ""],
            ["serial = 'tty'", "serial = 'tty'"],
            ["serial = 'pty'", "serial = 'pty'"],
            ["serial = 'file=/l,keep=2'", "serial = 'file=/l.3'"],
            ["rng = 'src=/dev/urandom'", "rng = 'src=/dev/urandom'"],
            ["cloud-init = '/seed'", "cloud-init = '/seed'"],
            // Networks of their own.
            ["net = 'tap=t,mac=52:54:00:00:00:01'", "net = 'tap=u,mac=52:54:00:00:00:01'"],
            ["net = 'tap=t,bridge=b'", "net = 'tap=u,bridge=b'"],
        ] {
            assert_eq!(machines(lines).map(|machines| machines.len()), Ok(2), "{lines:?}");
        }
    }

    #[test]
    fn one_file_with_two_names_is_found_before_a_boot() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("disk"), b"").unwrap();
        std::fs::hard_link(path("disk"), path("hard")).unwrap();
        std::os::unix::fs::symlink(path("disk"), path("soft")).unwrap();
        std::os::unix::fs::symlink(directory.path(), path("same")).unwrap();
        let key = |key: &str, name: &str| format!("{key}{}'", path(name).display());
        let check = |[a, b]: [String; 2]| {
            let mut claims = Claims::default();
            let machines = machines([&a, &b]).unwrap();
            let seen = FilesSeen::of(&machines);
            machines
                .iter()
                .try_for_each(|machine| claims.add_files(machine, &seen))
                .map_err(|e| e.to_string())
        };
        for other in ["hard", "soft"] {
            let refused = check([key("disk = 'path=", "disk"), key("disk = 'path=", other)]);
            let refused = refused.unwrap_err();
            assert!(refused.contains("VM `a` and VM `b`") && refused.contains(other), "{refused}");
        }
        // A log that does not exist yet.
        let log = [key("serial = 'file=", "log"), key("serial = 'file=", "same/log")];
        assert!(check(log).unwrap_err().contains("same serial log"));
        assert_eq!(check([key("disk = 'path=", "disk"), key("serial = 'file=", "log")]), Ok(()));
    }
}
