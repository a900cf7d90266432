//! The drivers that the next host needs before it can resume VMs: KVM, those of its file systems and their
//! devices, and those of what the VMs' devices use; and that of a hardware watchdog, which would reset the machine. Each is
//! built into the next kernel or a module that the next host can load.

use std::collections::BTreeSet;
use std::path::Path;

use kexec::{Part, Presence};

use super::{Check, Finding, Surroundings};
use crate::config::Config;
use crate::devices::needs::HostNeed;

/// Directory with a directory of modules for each release, on a machine and in an initramfs.
pub(super) const DIRECTORY: &str = "lib/modules";
/// File in the directory of a release: the modules that the kernel has built in.
pub(super) const BUILT_IN: &str = "modules.builtin";

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
const KNOWN: [(&str, &str, &str); 24] = [
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
    ("tun", "CONFIG_TUN", "Linktype set failed because interface is up"),
    ("bridge", "CONFIG_BRIDGE", "received packet on %s with own address as source address"),
    ("virtio_console", "CONFIG_VIRTIO_CONSOLE", "Error allocating inbufs"),
    ("i6300esb", "CONFIG_I6300ESB_WDT", "i6300esb.nowayout"),
    ("iTCO_wdt", "CONFIG_ITCO_WDT", "iTCO_wdt.nowayout"),
    ("softdog", "CONFIG_SOFT_WATCHDOG", "softdog.nowayout"),
    ("sp5100_tco", "CONFIG_SP5100_TCO", "sp5100_tco.nowayout"),
    ("wdat_wdt", "CONFIG_WDAT_WDT", "wdat_wdt.nowayout"),
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

    /// What it means if the next host loads no module for the driver, and the list of what the kernel has built in
    /// does not have it either.
    fn not_in_list(&self, release: &str) -> Finding {
        let Self { what, part: Part { symbol, .. }, module } = self;
        let sentence = format!(
            "the next host would lack {what}: `modules.builtin` of Linux {release} does not list \
             `{module}`, and the next host loads no such module"
        );
        Finding::new(Check::Driver, module, sentence, Self::remedy(module, symbol))
    }

    fn remedy(module: &str, symbol: &str) -> String {
        format!(
            "add the module `{module}` to the initramfs and to `modules` in its configuration, or build \
             the kernel with {symbol}=y"
        )
    }

    /// What it means if no module provides the driver and the kernel has it like this.
    pub(super) fn finding(&self, presence: Presence) -> Option<Finding> {
        let Self { what, part: Part { symbol, .. }, module } = self;
        let remedy = Self::remedy(module, symbol);
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

/// The modules of the next kernel, as far as files beside it tell. All names have `_` for `-`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Modules {
    /// Those that the next host can load.
    pub loadable: BTreeSet<String>,
    /// Those that the kernel has built in: all of them, from `modules.builtin` of its release. `None` without that
    /// file.
    pub built_in: Option<BTreeSet<String>>,
}

impl Modules {
    fn provide(&self, module: &String) -> bool {
        let is_built_in = self.built_in.as_ref().is_some_and(|names| names.contains(module));
        is_built_in || self.loadable.contains(module)
    }
}

/// The drivers that the next host needs and that none of its `modules` provides. `next` is the next host's
/// configuration, as far as it is known.
pub(super) fn needed(
    surroundings: &Surroundings<'_>,
    next: Option<&Config>,
    modules: &Modules,
) -> Vec<Need> {
    let root = surroundings.root;
    let mut needs = vec![Need::new("kvm", "KVM".to_owned())];
    let cpu = std::fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    for (vendor, feature) in [("kvm_amd", "svm"), ("kvm_intel", "vmx")] {
        // A kernel with the drivers built in has those of both vendors.
        let is_for_this_cpu = cpu.is_empty() || cpu.split_whitespace().any(|word| word == feature);
        if is_for_this_cpu && root.join("sys/module").join(vendor).is_dir() {
            needs.push(Need::new(vendor, "KVM for this CPU".to_owned()));
        }
    }
    for (vm, need) in surroundings.device_needs() {
        if let HostNeed::Driver { module, of } = need {
            needs.push(Need::new(module, format!("the driver of {of}, for VM `{vm}`")));
        }
    }
    if surroundings.is_first_process {
        for (watchdog, driver) in running_watchdogs(root) {
            let what = format!("the driver of {watchdog}, which runs and would reset the machine");
            needs.push(Need::new(&driver, what));
        }
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
    needs.retain(|need| !modules.provide(&need.module) && seen.insert(need.module.clone()));
    needs
}

/// Returns findings about drivers that the next host lacks, and the needs about which only the kernel itself can tell:
/// all of them without a list of what it has built in, none with one.
pub(super) fn missing(
    needs: Vec<Need>,
    modules: &Modules,
    release: Option<&str>,
) -> (Vec<Finding>, Vec<Need>) {
    match release.filter(|_| modules.built_in.is_some()) {
        Some(release) => (needs.iter().map(|need| need.not_in_list(release)).collect(), Vec::new()),
        None => (Vec::new(), needs),
    }
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

/// The hardware watchdogs that run now, and the modules of their drivers.
fn running_watchdogs(root: &Path) -> Vec<(String, String)> {
    let entries = std::fs::read_dir(root.join("sys/class/watchdog")).into_iter().flatten();
    let watchdog = |entry: std::fs::DirEntry| {
        let state = std::fs::read_to_string(entry.path().join("state")).ok()?;
        let module = std::fs::read_link(entry.path().join("device/driver/module")).ok()?;
        let name = format!("/dev/{}", entry.file_name().to_str()?);
        let module = module.file_name()?.to_str()?.replace('-', "_");
        (state.trim() == "active").then_some((name, module))
    };
    let mut found: Vec<_> = entries.flatten().filter_map(watchdog).collect();
    found.sort();
    found
}

/// The name of a module's file without its suffixes, with `_` for `-`; `None` if it is no module.
pub(super) fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|s| file.strip_suffix(s))?;
    Some(stem.replace('-', "_"))
}

/// The modules of a release that are on this machine, for a next host that runs from its disk.
pub(super) fn installed(root: &Path, release: Option<&str>) -> Modules {
    let Some(release) = release else { return Modules::default() };
    let directory = root.join(DIRECTORY).join(release);
    let list = |file| std::fs::read_to_string(directory.join(file)).ok();
    let dep = list("modules.dep").unwrap_or_default();
    let files = dep.lines().filter_map(|line| line.split(':').next());
    Modules {
        loadable: files.filter_map(module_name).collect(),
        built_in: list(BUILT_IN).map(|list| built_in(&list)),
    }
}

/// The release of a kernel as `uname -r` shows it, which is the name of its directory of modules. `said` is what its
/// header says: release and build. `None` if that does not begin with the name of a directory.
pub(super) fn release(said: Option<&str>) -> Option<&str> {
    let release = said?.split_whitespace().next()?;
    (!release.contains('/') && !release.starts_with('.')).then_some(release)
}

/// The modules of a list `modules.builtin`: a path on each line.
pub(super) fn built_in(list: &str) -> BTreeSet<String> {
    list.lines().filter_map(|line| module_name(line.trim())).collect()
}

#[cfg(test)]
#[path = "drivers_tests.rs"]
mod tests;
