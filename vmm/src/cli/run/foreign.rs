//! What the command lines of Cloud Hypervisor and QEMU have and this one does not. A person who types one of these
//! is told so, and what to do instead.

use std::ffi::{OsStr, OsString};

use crate::devices::catalog::KINDS;
use crate::options::{self, UNKNOWN};

/// Options, with a remedy or an empty text.
pub(super) const OPTIONS: &[(&str, &str)] = &[
    ("balloon", ""),
    ("debug-console", "use `--serial`"),
    ("device", ""),
    ("event-monitor", "use `status` of the API"),
    ("firmware", NO_FIRMWARE),
    ("fs", "give the guest a disk with `--disk`"),
    ("gdb", ""),
    ("generic-vhost-user", ""),
    ("host-data", ""),
    ("igvm", NO_FIRMWARE),
    ("ivshmem", ""),
    ("landlock", ""),
    ("landlock-rules", "the VM's process opens no file by its path"),
    ("memory-zone", "use `--memory size=...`"),
    ("no-shutdown", ""),
    ("numa", ""),
    ("pci-segment", ""),
    ("pmem", "give the guest a disk with `--disk`"),
    ("pvmemcontrol", ""),
    ("pvpanic", ""),
    ("rate-limit-group", ""),
    ("restore", "a `perennial host` carries VMs over a live update"),
    ("seccomp", "the filters of the VM's process are always on"),
    ("tpm", ""),
    ("user-device", ""),
    ("vdpa", ""),
    ("vsock", "connect by `--net` or by the serial port"),
    ("watchdog", ""),
];

/// In place of `--firmware hypervisor-fw`, by which Cloud Hypervisor boots the image of a cloud.
pub(super) const NO_FIRMWARE: &str = "no firmware such as hypervisor-fw or CLOUDHV.fd is needed: leave it out, and the \
                                      guest boots what is on its first `--disk`, or the kernel of `--kernel`";

/// Values of these options that ask for what is always so.
const ALWAYS_SO: &[(&str, &str)] = &[("landlock", ""), ("seccomp", "true")];

/// Whether the `option` asks with this value, or without one, for what is always so.
pub(super) fn is_always_so(option: &str, value: &str) -> bool {
    ALWAYS_SO.contains(&(option, value))
}

/// Options of QEMU, without their dashes, with what to write here.
const QEMU: &[(&str, &str)] = &[
    ("append", "`--cmdline TEXT`"),
    (
        "bios",
        "nothing: without `--kernel` the guest boots what is on its first disk, and needs no firmware",
    ),
    ("cdrom", "`--disk path=FILE,readonly=on`"),
    ("display", "`--serial tty`: there is no screen"),
    ("drive", "`--disk path=FILE`"),
    ("enable-kvm", "nothing: KVM is always used"),
    ("hda", "`--disk path=FILE`"),
    ("initrd", "`--initramfs FILE`"),
    ("kernel", "`--kernel FILE`"),
    ("m", "`--memory size=512M`"),
    ("machine", "nothing: there is one machine"),
    ("netdev", "`--net tap=NAME`"),
    ("nic", "`--net tap=NAME`"),
    ("nographic", "nothing: the serial port has the terminal"),
    ("smp", "`--cpus boot=2`"),
];

/// Returns the first of these arguments of `run` that is an option of QEMU and none here, and what to write in its
/// place. The value of `--cmdline` may look like an option.
pub(in crate::cli) fn qemu(arguments: &[OsString]) -> Option<(String, &'static str)> {
    let after = |at: usize| at.checked_sub(1).and_then(|at| arguments.get(at));
    let mut words = arguments
        .iter()
        .enumerate()
        .filter(|(at, _)| after(*at).map(OsString::as_os_str) != Some(OsStr::new("--cmdline")));
    words.find_map(|(_, word)| {
        let word = word.to_str()?;
        let (name, is_long) = match word.strip_prefix("--") {
            Some(name) => (name, true),
            None => (word.strip_prefix('-')?, false),
        };
        let (_, instead) = QEMU.iter().find(|(of, _)| *of == name)?;
        // Some are called the same here, with two dashes.
        let is_ours = is_long && instead.starts_with(&format!("`{word} "));
        (!is_ours).then(|| (word.to_owned(), *instead))
    })
}

/// Keys inside of options that are for no device: the option, the key, and a remedy or an empty text. A kind of
/// device knows its own.
const KEYS: &[(&str, &str, &str)] = &[
    ("cpus", "affinity", "use `taskset`"),
    ("cpus", "core_scheduling", ""),
    ("cpus", "features", ""),
    ("cpus", "kvm_hyperv", ""),
    ("cpus", "max_phys_bits", ""),
    ("cpus", "nested", ""),
    ("cpus", "topology", ""),
    ("memory", "hotplug_method", ""),
    ("memory", "hotplug_size", ""),
    ("memory", "hotplugged_size", ""),
    ("memory", "hugepage_size", ""),
    ("memory", "hugepages", "transparent huge pages are used where the host allows them"),
    ("memory", "mergeable", ""),
    ("memory", "prefault", ""),
    ("memory", "reserve", ""),
    ("memory", "shared", "guest memory is always shared"),
    ("memory", "thp", "transparent huge pages are used where the host allows them"),
];
/// Keys of every device.
const OF_ALL: &[&str] = &[
    "bw_one_time_burst",
    "bw_refill_time",
    "bw_size",
    "id",
    "iommu",
    "pci_device_id",
    "ops_one_time_burst",
    "ops_refill_time",
    "ops_size",
    "pci_segment",
    "rate_limit_group",
];

/// Keys of `--cpus` and `--memory` with the value that changes nothing: the option, the key, the value. A kind of device
/// knows its own.
pub(super) const HARMLESS: &[(&str, &str, &str)] = &[
    ("cpus", "kvm_hyperv", "off"),
    ("memory", "hugepages", "off"),
    ("memory", "mergeable", "off"),
    ("memory", "prefault", "off"),
    ("memory", "reserve", "off"),
    ("memory", "shared", "on"),
    ("memory", "thp", "on"),
];

/// Returns the value of `option` without the pairs that mean something to Cloud Hypervisor only and change nothing
/// here: a name for its API, or what is always so.
pub(super) fn without_harmless(option: &str, value: &str) -> String {
    let kind = KINDS.iter().find(|kind| kind.key == option);
    let of_kind = kind.and_then(|kind| kind.command_line).map_or(&[][..], |line| line.harmless);
    options::without(value, |key, value| {
        let value = match value {
            "true" => "on",
            "false" => "off",
            value => value,
        };
        match key {
            "id" => kind.is_some(),
            "iommu" => kind.is_some() && value == "off",
            "pci_segment" => kind.is_some() && value == "0",
            key => {
                HARMLESS.contains(&(option, key, value))
                    || of_kind.iter().any(|(of, values)| *of == key && values.contains(&value))
            }
        }
    })
}

/// If `problem` is that `option` has an unknown key that Cloud Hypervisor knows, returns the key and the remedy.
pub(super) fn key<'a>(option: &str, problem: &'a str) -> Option<(&'a str, &'static str)> {
    let (key, rest) = problem.strip_prefix('`')?.split_once('`')?;
    if !rest.starts_with(UNKNOWN) {
        return None;
    }
    let own = KEYS.iter().find(|(of, name, _)| *of == option && *name == key);
    let own = own.map(|(_, _, remedy)| *remedy);
    let kind = KINDS.iter().find(|kind| kind.key == option);
    let foreign = kind.and_then(|kind| kind.command_line).map_or(&[][..], |line| line.foreign);
    let of_kind = foreign.iter().find(|(of, _)| *of == key);
    let remedy = own.or(of_kind.map(|(_, remedy)| *remedy));
    remedy.or(OF_ALL.contains(&key).then_some("")).map(|remedy| (key, remedy))
}
