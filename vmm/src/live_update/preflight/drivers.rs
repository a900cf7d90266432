//! The drivers that the next host needs before it can resume VMs: KVM, and those of its file systems and their
//! devices. Each is built into the next kernel or a module that the next host can load.

use std::collections::BTreeSet;
use std::path::Path;

use kexec::{Part, Presence};

use super::{Check, Finding, Surroundings};
use crate::config::Config;

/// A driver that the next host needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Need {
    /// What it is and what it is for.
    what: String,
    /// The kernel's part.
    pub part: Part,
    /// The module, with `_` for `-`.
    module: String,
}

/// Module, symbol of the configuration, and a string that only a kernel with the driver built in has: a name of a
/// parameter, which begins with the module's name in such a kernel only, or a message.
const KNOWN: [(&str, &str, &str); 16] = [
    ("kvm", "CONFIG_KVM", "kvm-vcpu:%d"),
    ("kvm_amd", "CONFIG_KVM_AMD", "kvm_amd.npt"),
    ("kvm_intel", "CONFIG_KVM_INTEL", "kvm_intel.ept"),
    ("ext4", "CONFIG_EXT4_FS", "EXT4-fs error (device %s)"),
    ("xfs", "CONFIG_XFS_FS", "XFS (%s): "),
    ("btrfs", "CONFIG_BTRFS_FS", "BTRFS error"),
    ("f2fs", "CONFIG_F2FS_FS", "F2FS-fs (%s): "),
    ("vfat", "CONFIG_VFAT_FS", ""),
    ("erofs", "CONFIG_EROFS_FS", ""),
    ("squashfs", "CONFIG_SQUASHFS", ""),
    ("virtio_blk", "CONFIG_VIRTIO_BLK", "virtio_blk.queue_depth"),
    ("nvme", "CONFIG_BLK_DEV_NVME", "nvme.io_queue_depth"),
    ("nd_pmem", "CONFIG_BLK_DEV_PMEM", ""),
    ("sd", "CONFIG_BLK_DEV_SD", ""),
    ("dm_mod", "CONFIG_BLK_DEV_DM", "dm_mod.dm_numa_node"),
    ("md_mod", "CONFIG_BLK_DEV_MD", "md_mod.start_ro"),
];

/// Names in sysfs of drivers that are called otherwise as modules.
const OTHER_NAMES: [(&str, &str); 2] = [("sd", "sd_mod"), ("nd_pmem", "nd_pmem")];

impl Need {
    /// The need for a driver of this name; `None` if nothing is known about how it shows.
    fn new(module: &str, what: String) -> Option<Self> {
        let (name, symbol, string) = *KNOWN.iter().find(|(name, ..)| *name == module)?;
        let module = OTHER_NAMES.iter().find(|(driver, _)| *driver == name);
        let module = module.map_or(name, |(_, module)| module).to_owned();
        Some(Self { what, part: Part { symbol, string }, module })
    }

    /// What it means if no module provides the driver and the kernel has it like this.
    pub(super) fn finding(&self, presence: Presence) -> Option<Finding> {
        let Self { what, part: Part { symbol, .. }, module } = self;
        let remedy = format!(
            "add the module `{module}` to the initramfs and to `modules` in its configuration, or build \
             the kernel with {symbol}=y"
        );
        match presence {
            Presence::BuiltIn => None,
            Presence::Module => {
                let sentence = format!(
                    "the next host would lack {what}: the next kernel has it as the module \
                     `{module}`, which that host cannot load"
                );
                Some(Finding::new(Check::Driver, module, sentence, remedy))
            }
            Presence::Absent => {
                let sentence =
                    format!("the next host would lack {what}: the next kernel is built without it");
                let remedy = format!("build the kernel with {symbol}");
                Some(Finding::new(Check::Driver, module, sentence, remedy))
            }
            Presence::Unknown => {
                let sentence = format!(
                    "it is not known whether the next host has {what}: no module `{module}` was \
                     found for it, and the next kernel does not tell what is built in"
                );
                Some(Finding::new(Check::DriverUnknown, module, sentence, remedy))
            }
        }
    }
}

/// The drivers that the next host needs and that none of the `loadable` modules provides. `next` is the next host's
/// configuration, as far as it is known.
pub(super) fn needed(
    surroundings: &Surroundings<'_>,
    next: Option<&Config>,
    loadable: &BTreeSet<String>,
) -> Vec<Need> {
    let root = surroundings.root;
    let mut needs = vec![Need::new("kvm", "KVM".to_owned())];
    for vendor in ["kvm_amd", "kvm_intel"] {
        // The running kernel has one for this CPU.
        if root.join("sys/module").join(vendor).is_dir() {
            needs.push(Need::new(vendor, "KVM for this CPU".to_owned()));
        }
    }
    if surroundings.is_first_process {
        for mount in next.iter().flat_map(|config| &config.host.mounts) {
            let target = mount.target.display();
            needs.push(Need::new(&mount.fs, format!("the file system {} of {target}", mount.fs)));
            if let Some(driver) = driver_of(root, Path::new(&mount.source)) {
                needs.push(Need::new(&driver, format!("the driver of {}", mount.source)));
            }
        }
        for machine in next.iter().flat_map(|config| &config.machines) {
            for path in machine.devices.iter().filter_map(|device| device.options.stored_at()) {
                if let Some(driver) = driver_of(root, path) {
                    needs.push(Need::new(&driver, format!("the driver of {}", path.display())));
                }
            }
        }
    }
    let mut needs: Vec<Need> = needs.into_iter().flatten().collect();
    let mut seen = BTreeSet::new();
    needs.retain(|need| !loadable.contains(&need.module) && seen.insert(need.module.clone()));
    needs
}

/// The name of the driver that the running kernel uses for a block device; `None` if that does not show.
fn driver_of(root: &Path, device: &Path) -> Option<String> {
    let name = device.strip_prefix("/dev").ok()?.to_str()?;
    let class = root.join("sys/class/block").join(name.replace('/', "!"));
    // A partition's device is its disk.
    let own = class.join("device/driver");
    let of_disk =
        class.canonicalize().ok().and_then(|path| Some(path.parent()?.join("device/driver")));
    let link = std::fs::read_link(own).ok().or_else(|| std::fs::read_link(of_disk?).ok())?;
    Some(link.file_name()?.to_str()?.replace('-', "_"))
}

/// The name of a module's file without its suffixes, with `_` for `-`; `None` if it is no module.
pub(super) fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|s| file.strip_suffix(s))?;
    Some(stem.replace('-', "_"))
}

/// The modules of a release that are on this machine, for a next host that runs from its disk.
pub(super) fn installed(root: &Path, release: &str) -> BTreeSet<String> {
    let release = release.split_whitespace().next().unwrap_or_default();
    if release.is_empty() || release.contains('/') {
        return BTreeSet::new();
    }
    let directory = root.join("lib/modules").join(release);
    let list = |file| std::fs::read_to_string(directory.join(file)).unwrap_or_default();
    let (dep, built_in) = (list("modules.dep"), list("modules.builtin"));
    let files = dep.lines().filter_map(|line| line.split(':').next()).chain(built_in.lines());
    files.filter_map(module_name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(text).unwrap()
    }

    fn machine() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("sys/devices/virtio0/block/vda");
        std::fs::create_dir_all(device.join("vda1")).unwrap();
        std::fs::create_dir_all(root.path().join("sys/class/block")).unwrap();
        std::fs::create_dir_all(root.path().join("sys/module/kvm_amd")).unwrap();
        let link = |to: &str, at: std::path::PathBuf| std::os::unix::fs::symlink(to, at).unwrap();
        std::fs::create_dir_all(device.join("device")).unwrap();
        link("../../../bus/drivers/virtio-blk", device.join("device/driver"));
        for name in ["vda", "vda/vda1"] {
            let at = root.path().join("sys/class/block").join(name.rsplit('/').next().unwrap());
            link(&format!("../../devices/virtio0/block/{name}"), at);
        }
        root
    }

    fn names(needs: &[Need]) -> Vec<&str> {
        needs.iter().map(|need| need.module.as_str()).collect()
    }

    #[test]
    fn kvm_and_what_is_mounted_are_needed() {
        let root = machine();
        let next = config(
            "[host]\nmounts = [\n\
             { source = \"/dev/vda1\", target = \"/data\", type = \"ext4\" },\n\
             { source = \"none\", target = \"/tmp\", type = \"tmpfs\" }]\n",
        );
        let none = BTreeSet::new();
        let (root, nothing) = (root.path(), Surroundings::without_vms());
        let first = Surroundings { is_first_process: true, root, ..nothing };
        let needs = needed(&first, Some(&next), &none);
        assert_eq!(names(&needs), ["kvm", "kvm_amd", "ext4", "virtio_blk"]);
        assert!(needs[2].what.contains("/data") && needs[3].what.contains("/dev/vda1"));
        let loadable = ["kvm", "virtio_blk"].map(str::to_owned).into();
        assert_eq!(names(&needed(&first, Some(&next), &loadable)), ["kvm_amd", "ext4"]);
        // A host on a distribution has its file systems already.
        let other = Surroundings { is_first_process: false, ..first };
        assert_eq!(names(&needed(&other, Some(&next), &none)), ["kvm", "kvm_amd"]);
    }

    #[test]
    fn a_driver_that_is_missing_is_refused_and_an_unknown_one_is_a_note() {
        let need = Need::new("ext4", "the file system ext4 of /data".to_owned()).unwrap();
        let severity = |presence| need.finding(presence).map(|finding| finding.name);
        assert_eq!(severity(Presence::BuiltIn), None);
        assert_eq!(severity(Presence::Module), Some(Check::Driver));
        assert_eq!(severity(Presence::Absent), Some(Check::Driver));
        assert_eq!(severity(Presence::Unknown), Some(Check::DriverUnknown));
        let text = need.finding(Presence::Module).unwrap().to_string();
        assert!(text.contains("/data") && text.contains("CONFIG_EXT4_FS=y"), "{text}");
        assert_eq!(Need::new("no-such-driver", String::new()), None);
    }

    #[test]
    fn modules_are_known_by_their_files() {
        assert_eq!(module_name("lib/modules/kvm-amd.ko.xz").as_deref(), Some("kvm_amd"));
        assert_eq!(module_name("kvm.ko").as_deref(), Some("kvm"));
        assert_eq!(module_name("lib/modules/modules.order"), None);
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("lib/modules/7.3.4-a");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("modules.dep"), "a/kvm-amd.ko: a/kvm.ko\na/kvm.ko:\n")
            .unwrap();
        std::fs::write(directory.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        let found = installed(root.path(), "7.3.4-a (builder) #1");
        assert_eq!(found, ["ext4", "kvm", "kvm_amd"].map(str::to_owned).into());
        assert!(installed(root.path(), "../7.3.4-a").is_empty());
        assert!(installed(root.path(), "7.2").is_empty());
    }
}
