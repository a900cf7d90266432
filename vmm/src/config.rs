//! The host's configuration file: TOML; unknown keys are errors.
//!
//! The options of a VM are written as for Cloud Hypervisor (`memory = "size=2G"`, `disk =
//! ["path=..."]`). Each VM's section becomes a checked [`Machine`] in which all defaults are filled
//! in; the rest of the program sees only that.

mod confinement;
mod mistake;
mod network;
mod priority;
mod restart;
mod salvage;

pub use confinement::{Confine, FirstUser, USERS};
pub use network::{Address, HostAddress, NetworkSection};
pub use priority::Priority;
pub use restart::Restart;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::arch::x86_64::cpuid::{self, CpuModel};
use crate::arch::x86_64::layout;
use crate::devices::catalog::{DeviceOptions, KINDS};
use crate::link::MissingHints;
use crate::machine::claims::{ClaimError, Claims};
use crate::machine::{self, Boot, DiskBoot, KernelBoot, Machine, MachineError, VmName};
use crate::options::{Options, parse_size};

/// A configuration that is not valid.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is in the file is not valid.
    #[error("the configuration {} is not valid", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<ConfigError>,
    },
    /// The text is not TOML, or has unknown keys or values of wrong types.
    #[error("{0}")]
    Parse(String),
    /// Two VMs have one name.
    #[error("two VMs are called `{0}`: give one of them another name")]
    DuplicateName(VmName),
    /// Two devices have what only one can have.
    #[error(transparent)]
    Claimed(#[from] ClaimError),
    /// A network that the host cannot have.
    #[error("[host.network]: {0}")]
    Network(String),
    /// The value of a VM's key is not valid in the option dialect.
    #[error("{vm}: {key} = \"{value}\": {problem}")]
    Option {
        /// The VM as the file names it.
        vm: String,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A VM's section has an unknown key.
    #[error("{vm}: `{key}` is not known; there is {known}")]
    UnknownKey {
        /// The VM as the file names it.
        vm: String,
        /// The key.
        key: String,
        /// The keys of a VM.
        known: String,
    },
    /// A VM's section has nothing to boot.
    #[error(
        "{vm}: there is nothing to boot: add `kernel = \"FILE\"`, or `boot = \"disk\"` for what is on its \
         first disk"
    )]
    NoBoot {
        /// The VM as the file names it.
        vm: String,
    },
    /// A VM boots from its disk and has a kernel, too.
    #[error(
        "{vm}: boot = \"disk\" takes kernel and initramfs from the disk, but there is {key} = \"{path}\": \
         remove one of the two"
    )]
    BootTwice {
        /// The VM as the file names it.
        vm: String,
        /// The key that must not be there.
        key: &'static str,
        /// Its value.
        path: String,
    },
    /// A machine that cannot exist.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// The whole file, checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// The host's own settings.
    pub host: HostSection,
    /// Defaults for `perennial ctl update`.
    pub update: UpdateSection,
    /// The VMs, in the order of the file.
    pub machines: Vec<Machine>,
    /// When the host boots a VM again that has ended; VMs with the default are not in it.
    pub restart: BTreeMap<VmName, Restart>,
    /// How urgent each VM is; VMs with the default are not in it.
    pub priority: BTreeMap<VmName, Priority>,
}

/// `[host]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct HostSection {
    /// Host name that the host sets if it is PID 1.
    pub hostname: Option<String>,
    /// Path of the API socket.
    pub socket: Option<PathBuf>,
    /// Path of the lock that says that a host runs on this machine.
    pub lock: Option<PathBuf>,
    /// Name of a virtio-serial port on which the host serves the API, too.
    pub control_port: Option<String>,
    /// Kernel modules that PID 1 loads, in this order, before it mounts file systems.
    pub modules: Vec<String>,
    /// File systems that PID 1 mounts before it starts or resumes any VM.
    pub mounts: Vec<Mount>,
    /// The pool's directory, which holds the VMs' RAM and sessions if the kernel has no LUO: on a
    /// file system with DAX, in memory that survives a kexec.
    pub pool: Option<PathBuf>,
    /// The network interfaces that PID 1 sets up before it starts or resumes any VM.
    pub network: Option<NetworkSection>,
    /// How many seconds a guest has to shut down when it is asked to; 0 is to pull the plug at once.
    pub stop_within_s: Option<u32>,
    /// The first of the user IDs that the processes of VMs run as, if the host runs as root.
    pub users: FirstUser,
    /// What to do with a VM whose process cannot be confined in full.
    pub confine: Confine,
    /// What to do with a VM whose guest was told something of its processor's speed or safety that is not true
    /// of this host's.
    pub missing_hints: MissingHints,
    /// Device of the hardware watchdog that the host feeds.
    pub watchdog: Option<PathBuf>,
    /// Seconds without food after which the watchdog resets the machine.
    pub watchdog_timeout_s: Option<NonZeroU32>,
}

/// The watchdog's period in seconds if the configuration does not say: a kexec and the start of the next host must fit
/// into it.
const WATCHDOG_TIMEOUT_S: u32 = 120;

/// How many seconds a guest has to shut down if the configuration does not say: what Debian's systemd needs
/// for a service that hangs is 90 s, most guests take 10 s.
const STOP_WITHIN_S: u32 = 60;

impl HostSection {
    /// How many seconds a guest has to shut down when it is asked to.
    pub fn stop_within_s(&self) -> u32 {
        self.stop_within_s.unwrap_or(STOP_WITHIN_S)
    }

    /// Seconds without food after which the watchdog resets the machine.
    pub fn watchdog_timeout_s(&self) -> u32 {
        self.watchdog_timeout_s.map_or(WATCHDOG_TIMEOUT_S, NonZeroU32::get)
    }

    /// Returns the keys of a configuration that is not valid as a whole; a key that cannot be read is empty. A host needs
    /// them to reach the pool with the VMs that the previous kernel left, to feed its watchdog, and to serve its API.
    pub fn salvage(text: &str) -> Self {
        fn key<T: serde::de::DeserializeOwned + Default>(host: &toml::Value, key: &str) -> T {
            host.get(key).and_then(|value| value.clone().try_into().ok()).unwrap_or_default()
        }
        let file: Option<toml::Table> = toml::from_str(text).ok();
        match file.as_ref().and_then(|file| file.get("host")) {
            Some(host) => Self {
                hostname: key(host, "hostname"),
                socket: key(host, "socket"),
                control_port: key(host, "control-port"),
                lock: key(host, "lock"),
                modules: key(host, "modules"),
                mounts: key(host, "mounts"),
                pool: key(host, "pool"),
                network: key(host, "network"),
                users: key(host, "users"),
                confine: key(host, "confine"),
                missing_hints: key(host, "missing-hints"),
                watchdog: key(host, "watchdog"),
                watchdog_timeout_s: key(host, "watchdog-timeout-s"),
                stop_within_s: key(host, "stop-within-s"),
            },
            None => Self::default(),
        }
    }
}

/// One file system to mount.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Mount {
    /// A block device, or another source that the file system accepts.
    pub source: String,
    /// The directory to mount on; created if missing.
    pub target: PathBuf,
    /// The file system's type, as for mount(2).
    #[serde(rename = "type")]
    pub fs: String,
    /// The file system's own options.
    #[serde(default)]
    pub options: String,
    /// An image to copy onto the device before the mount, if the device is empty.
    #[serde(default)]
    pub format_from: Option<PathBuf>,
}

/// `[update]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct UpdateSection {
    /// The next kernel.
    pub kernel: Option<PathBuf>,
    /// Its initramfs.
    pub initramfs: Option<PathBuf>,
    /// Its command line; the host adds the parameters that the kernel's LUO needs. For a pool, it
    /// must have the same `memmap=` as the running kernel's.
    pub cmdline: String,
    /// How many seconds the blackout may take; when they have passed, everything is undone.
    pub budget: Option<NonZeroU32>,
    /// Whether each update is rehearsed first, unless its request says otherwise.
    pub rehearse: bool,
    /// How many seconds a rehearsal may take, unless its request says.
    pub rehearse_within_s: Option<NonZeroU32>,
}

/// How many seconds a blackout may take if the configuration does not say.
const BUDGET_S: u32 = 60;
/// The same for a rehearsal.
const REHEARSE_WITHIN_S: u32 = 120;

impl UpdateSection {
    /// How long the blackout may take.
    pub fn budget(&self) -> Duration {
        Duration::from_secs(self.budget.map_or(BUDGET_S, NonZeroU32::get).into())
    }

    /// How many seconds a rehearsal may take.
    pub fn rehearse_within_s(&self) -> u32 {
        self.rehearse_within_s.map_or(REHEARSE_WITHIN_S, NonZeroU32::get)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    host: HostSection,
    #[serde(default)]
    update: UpdateSection,
    #[serde(default)]
    vm: Vec<VmSection>,
}

#[derive(Deserialize)]
struct VmSection {
    name: String,
    memory: String,
    #[serde(default = "one")]
    cpus: u32,
    #[serde(default)]
    cpu: CpuModel,
    #[serde(default)]
    restart: Restart,
    priority: Option<toml::Value>,
    boot: Option<BootFrom>,
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    #[serde(default)]
    cmdline: String,
    /// All other keys: the keys of devices, and unknown keys, which [`parse_devices`] refuses.
    #[serde(flatten)]
    devices: BTreeMap<String, OneOrMore>,
}

/// The values of a VM's key `boot`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootFrom {
    /// What is on the VM's first disk.
    Disk,
}

/// The keys of a VM's section that are not for devices.
const VM_KEYS: [&str; 10] = [
    "name",
    "memory",
    "cpus",
    "cpu",
    "restart",
    "priority",
    "boot",
    "kernel",
    "initramfs",
    "cmdline",
];

/// The value of a device's key.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
    Other(toml::Value),
}

fn one() -> u32 {
    1
}

/// Size that no configuration has, in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// Reads the text of a configuration. A host reads it while its guests stand still, so nothing at `path` may keep it
/// waiting or fill its memory.
pub fn read_text(path: &Path) -> Result<String, ConfigError> {
    let read = || {
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        let mut text = String::new();
        std::fs::File::open(path)?.take(MOST_BYTES + 1).read_to_string(&mut text)?;
        match text.len() as u64 {
            0..=MOST_BYTES => Ok(text),
            _ => Err(io::Error::other(format!("it has more than {MOST_BYTES} bytes"))),
        }
    };
    read().map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

impl Config {
    /// Reads and checks the file at `path`.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        Self::read_with_text(path).1
    }

    /// The same, with the text of the file. It is empty if the file cannot be read.
    pub fn read_with_text(path: &Path) -> (String, Result<Self, ConfigError>) {
        let text = match read_text(path) {
            Ok(text) => text,
            Err(error) => return (String::new(), Err(error)),
        };
        let config = Self::parse(&text).map_err(|source| {
            let (path, source) = (path.to_owned(), Box::new(source));
            ConfigError::File { path, source }
        });
        (text, config)
    }

    /// Checks the text of a configuration.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        if let Some(problem) = mistake::list_for_a_section(text) {
            return Err(ConfigError::Parse(problem));
        }
        let file: File =
            toml::from_str(text).map_err(|e| ConfigError::Parse(mistake::describe(text, &e)))?;
        if let Some(network) = &file.host.network {
            network.check().map_err(ConfigError::Network)?;
        }
        let policies: Vec<Restart> = file.vm.iter().map(|vm| vm.restart).collect();
        let priorities = file.vm.iter().map(VmSection::priority).collect::<Result<Vec<_>, _>>()?;
        let machines = file.vm.into_iter().map(VmSection::check).collect::<Result<Vec<_>, _>>()?;
        let mut names = BTreeSet::new();
        for machine in &machines {
            if !names.insert(&machine.name) {
                return Err(ConfigError::DuplicateName(machine.name.clone()));
            }
        }
        Claims::check_names(&machines)?;
        let mut config = Self { host: file.host, update: file.update, ..Self::default() };
        for (machine, (restart, priority)) in
            machines.into_iter().zip(policies.into_iter().zip(priorities))
        {
            config.push(machine, restart, priority);
        }
        Ok(config)
    }

    fn push(&mut self, machine: Machine, restart: Restart, priority: Priority) {
        if restart != Restart::default() {
            self.restart.insert(machine.name.clone(), restart);
        }
        if priority != Priority::default() {
            self.priority.insert(machine.name.clone(), priority);
        }
        self.machines.push(machine);
    }

    /// Returns how urgent the VM of this name is.
    pub fn priority(&self, vm: &VmName) -> Priority {
        self.priority.get(vm).copied().unwrap_or_default()
    }

    /// Returns when the host boots the VM of this name again after it has ended.
    pub fn restart(&self, vm: &VmName) -> Restart {
        self.restart.get(vm).copied().unwrap_or_default()
    }
}

impl VmSection {
    fn check(self) -> Result<Machine, ConfigError> {
        let name = VmName::new(&self.name)?;
        let option = |key: &str, value: &str, problem: String| ConfigError::Option {
            vm: format!("VM `{}`", self.name),
            key: key.to_owned(),
            value: value.escape_default().to_string(),
            problem,
        };
        let bits = cpuid::physical_address_bits();
        let ram_bytes = parse_memory(&self.memory)
            .and_then(|bytes| check_addresses(bytes, bits).map(|()| bytes))
            .map_err(|problem| option("memory", &self.memory, problem))?;
        let devices = parse_devices(&self.name, self.cpus, &self.devices, option)?;
        let boot = self.boot()?;
        let cpus = self.cpus;
        let devices = machine::place(devices);
        let machine = Machine { name, ram_bytes, cpus, cpu: self.cpu, boot, devices };
        machine.check()?;
        Ok(machine)
    }
}

impl VmSection {
    fn priority(&self) -> Result<Priority, ConfigError> {
        let Some(value) = &self.priority else { return Ok(Priority::default()) };
        Priority::read(value).map_err(|problem| ConfigError::Option {
            vm: format!("VM `{}`", self.name),
            key: "priority".to_owned(),
            value: value.as_str().map_or_else(|| value.to_string(), str::to_owned),
            problem,
        })
    }

    /// What the VM boots.
    fn boot(&self) -> Result<Boot, ConfigError> {
        let Self { boot, kernel, initramfs, cmdline, .. } = self;
        let shown = |path: &Option<PathBuf>| path.as_ref().map(|p| p.display().to_string());
        let (cmdline, vm) = (cmdline.clone(), || format!("VM `{}`", self.name));
        match (boot, kernel) {
            (None, Some(kernel)) => {
                let (kernel, initramfs) = (kernel.clone(), initramfs.clone());
                Ok(KernelBoot { kernel, initramfs, cmdline }.into())
            }
            (None, None) => Err(ConfigError::NoBoot { vm: vm() }),
            (Some(BootFrom::Disk), _) => match (shown(kernel), shown(initramfs)) {
                (None, None) => Ok(DiskBoot { cmdline }.into()),
                (Some(path), _) => Err(ConfigError::BootTwice { vm: vm(), key: "kernel", path }),
                (_, Some(path)) => Err(ConfigError::BootTwice { vm: vm(), key: "initramfs", path }),
            },
        }
    }
}

/// Returns the devices of a VM's section. `option` makes an error about one value.
fn parse_devices(
    vm: &str,
    vcpus: u32,
    keys: &BTreeMap<String, OneOrMore>,
    option: impl Fn(&str, &str, String) -> ConfigError,
) -> Result<Vec<DeviceOptions>, ConfigError> {
    if let Some(key) = keys.keys().find(|key| KINDS.iter().all(|kind| kind.key != *key)) {
        let known: Vec<&str> =
            VM_KEYS.into_iter().chain(KINDS.iter().map(|kind| kind.key)).collect();
        return Err(ConfigError::UnknownKey {
            vm: format!("VM `{vm}`"),
            key: key.clone(),
            known: known.join(", "),
        });
    }
    let mut devices = Vec::new();
    for kind in KINDS {
        let texts = match keys.get(kind.key) {
            None => {
                devices.extend((kind.unasked)());
                continue;
            }
            Some(OneOrMore::One(text)) => std::slice::from_ref(text),
            Some(OneOrMore::More(texts)) => texts,
            Some(OneOrMore::Other(value)) => {
                let problem = "it must be a text, or a list of texts".to_owned();
                return Err(option(kind.key, &value.to_string(), problem));
            }
        };
        for text in texts {
            let parsed = match text.contains('\0') {
                true => Err("it contains a NUL byte".to_owned()),
                false => (kind.parse)(text, vcpus),
            };
            devices.push(parsed.map_err(|problem| option(kind.key, text, problem))?);
        }
    }
    Ok(devices)
}

fn parse_memory(text: &str) -> Result<u64, String> {
    match Options::parse(text, &["size"])?.get("size") {
        Some(size) => parse_size(size),
        None => Err("it must be of the form size=2G".to_owned()),
    }
}

/// Errors if a processor whose physical addresses have `bits` bits cannot address all of a guest's RAM.
fn check_addresses(ram_bytes: u64, bits: u32) -> Result<(), String> {
    match layout::most_ram(bits) {
        most if ram_bytes > most => Err(format!(
            "this machine's processor has physical addresses of {bits} bits, which are too short for so much RAM: \
             at most size={}G",
            most >> 30
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::serial;

    const GOOD: &str = r#"
        [host]
        hostname = "host-a"
        socket = "/run/perennial.sock"
        stop-within-s = 90
        control-port = "perennial.control"
        mounts = [{ source = "/dev/vda", target = "/data", type = "ext4" }]
        [update]
        budget = 5
        rehearse = true
        rehearse-within-s = 300
        kernel = "/data/next/bzImage"
        cmdline = "console=ttyS0"
        [[vm]]
        name = "web"
        memory = "size=512M"
        cpus = 2
        kernel = "/data/vmlinux"
        initramfs = "/data/initramfs"
        cmdline = "console=ttyS0"
        disk = ["path=/data/web.img", "path=/data/ro.img,readonly=on"]
        serial = "port=web"
    "#;

    fn vm(lines: &str) -> String {
        format!("[[vm]]\nname = \"a\"\nmemory = \"size=64M\"\nkernel = \"/k\"\n{lines}")
    }

    fn error(text: &str) -> String {
        let error = Config::parse(text).expect_err(text).to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn a_full_configuration_becomes_checked_machines() {
        let config = Config::parse(GOOD).unwrap();
        let web = &config.machines[0];
        assert_eq!(web.name.as_str(), "web");
        assert_eq!(web.ram_bytes, 512 << 20);
        assert_eq!(web.cpus, 2);
        let nodes: Vec<String> = web.devices.iter().map(|device| device.node()).collect();
        // Behind them are those that every machine has.
        assert_eq!(nodes[..3], ["serial@3f8", "virtio-blk@1", "virtio-blk@2"]);
        assert_eq!(web.devices[0].options, serial());
        // A disk has a queue for each of the two vCPUs.
        let queues = |count| {
            let text = format!("path=/data/ro.img,readonly=on,num_queues={count}");
            (KINDS.iter().find(|kind| kind.key == "disk").unwrap().parse)(&text, 1).unwrap()
        };
        assert_eq!(web.devices[2].options, queues(2));
        assert_ne!(web.devices[2].options, queues(1));
        assert_eq!(config.host.mounts[0].target, Path::new("/data"));
        assert_eq!(config.host.stop_within_s(), 90);
        assert_eq!(HostSection::default().stop_within_s(), 60);
        assert_eq!(config.update.budget(), Duration::from_secs(5));
        assert_eq!(UpdateSection::default().budget(), Duration::from_secs(60));
        assert_eq!((config.update.rehearse, config.update.rehearse_within_s()), (true, 300));
        let unsaid = UpdateSection::default();
        assert_eq!((unsaid.rehearse, unsaid.rehearse_within_s()), (false, 120));
    }

    #[test]
    fn an_unknown_key_is_named_wherever_it_stands() {
        assert!(error("colour = 1").contains("colour"));
        assert!(error("[host]\ncolour = 1").contains("colour"));
        assert!(error("[update]\nrehearse_within_s = 1").contains("`rehearse-within-s`"));
        assert!(error(&vm("colour = 1")).contains("colour"));
        assert!(error(&vm("disk = [\"path=/d,colour=red\"]")).contains("`colour` is not known"));
        let known = error(&vm("colour = 1"));
        assert!(known.contains("VM `a`: `colour`") && known.contains("cmdline, serial, disk"));
    }

    #[test]
    fn what_leads_to_the_pool_is_read_even_if_the_rest_is_wrong() {
        let pool = "modules = [\"nd_pmem\"]\npool = \"/pool\"\nmounts = [{ source = \
                    \"/dev/pmem0\", target = \"/pool\", type = \"ext4\", format-from = \"/p\" }]\n";
        let good = Config::parse(&format!("[host]\n{pool}")).unwrap().host;
        assert_eq!(good.mounts[0].format_from.as_deref(), Some(Path::new("/p")));
        let wrong = format!("[host]\nhostnaem = \"a\"\n{pool}[[vm]]\nname = 7\n");
        Config::parse(&wrong).expect_err("wrong");
        assert_eq!(HostSection::salvage(&wrong), good);
        let module = HostSection::salvage(&wrong.replace("[\"nd_pmem\"]", "7"));
        assert_eq!(module, HostSection { modules: Vec::new(), ..good });
        assert_eq!(HostSection::salvage("not TOML"), HostSection::default());
    }

    #[test]
    fn a_vm_boots_a_kernel_or_its_first_disk() {
        let vm = |lines: &str| {
            Config::parse(&format!("[[vm]]\nname = \"a\"\nmemory = \"size=64M\"\n{lines}"))
        };
        let boot = |lines: &str| vm(lines).unwrap().machines.remove(0).boot;
        let disk = "boot = \"disk\"\ndisk = \"path=/d\"\n";
        assert_eq!(boot(disk), DiskBoot::default().into());
        let more = DiskBoot { cmdline: "quiet".to_owned() };
        assert_eq!(boot(&format!("{disk}cmdline = \"quiet\"")), more.into());
        let refused = |lines: &str| vm(lines).unwrap_err().to_string();
        assert!(refused("").contains("add `kernel = \"FILE\"`, or `boot = \"disk\"`"));
        assert!(refused("initramfs = \"/i\"").contains("nothing to boot"));
        assert!(refused(&format!("{disk}kernel = \"/k\"")).contains("there is kernel = \"/k\""));
        assert!(refused(&format!("{disk}initramfs = \"/i\"")).contains("initramfs = \"/i\""));
        assert!(refused("boot = \"network\"").contains("expected `disk`"));
        assert!(refused("boot = \"disk\"").contains("needs a disk: add `disk = "));
    }

    #[test]
    fn a_vm_has_the_hosts_processor_or_a_baseline() {
        let cpu = |lines: &str| Config::parse(&vm(lines)).map(|mut c| c.machines.remove(0).cpu);
        assert_eq!(cpu("").unwrap(), CpuModel::Host);
        assert_eq!(cpu("cpu = \"host\"").unwrap(), CpuModel::Host);
        assert_eq!(cpu("cpu = \"x86-64-v3\"").unwrap(), CpuModel::V3);
        let wrong = error(&vm("cpu = \"x86-64-v5\""));
        assert!(wrong.contains("x86-64-v5") && wrong.contains("x86-64-v4"), "{wrong}");
    }

    #[test]
    fn an_error_in_a_file_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.toml");
        for (text, said) in
            [("host = 1", "[host]"), ("[[vm]]\nname = \"a b\"\nmemory = \"\"", "`a b`")]
        {
            std::fs::write(&path, text).unwrap();
            let error = crate::causes::chain(&Config::read(&path).unwrap_err()).join(": ");
            let start = format!("the configuration {} is not valid: ", path.display());
            assert!(error.starts_with(&start) && error.contains(said), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        let missing = Config::read(&path).unwrap_err().to_string();
        assert_eq!(missing, format!("cannot read the configuration {}", path.display()));
    }

    #[test]
    fn ram_that_the_processor_cannot_address_is_refused_with_both_sides() {
        for (bits, most) in [(36, 63), (39, 511), (40, 1023)] {
            assert_eq!(check_addresses(most << 30, bits), Ok(()));
            let said = check_addresses((most << 30) + 1, bits).unwrap_err();
            assert!(said.contains(&format!("addresses of {bits} bits")), "{said}");
            assert!(said.ends_with(&format!("at most size={most}G")), "{said}");
        }
        // All RAM that a machine can have, and the map that the guest gets.
        assert_eq!(check_addresses(machine::MAX_RAM, 41), Ok(()));
        let last = *layout::memory_map(layout::most_ram(39)).last().unwrap();
        assert_eq!(last.start + last.size, 1 << 39);
        let whole = vm("").replace("64M", "1024G");
        let bits = cpuid::physical_address_bits();
        assert!(bits >= 36, "{bits}");
        assert_eq!(Config::parse(&whole).is_ok(), bits > 40, "{bits}");
    }

    #[test]
    fn two_vms_of_one_name_are_refused() {
        assert!(error(&format!("{}{}", vm(""), vm(""))).contains("two VMs are called `a`"));
    }

    #[test]
    fn a_bad_word_names_the_vm_the_key_and_what_would_be_right() {
        let text = error(&vm("serial = \"sock=/x\""));
        assert!(text.contains("VM `a`") && text.contains("serial") && text.contains("file=PATH"));
        assert!(error(&vm("disk = [\"readonly=on\"]")).contains("path=FILE"));
        assert!(error(&vm("disk = [\"path=/a,path=/b\"]")).contains("twice"));
        assert!(error(&vm("disk = 7")).contains("list of texts"));
        assert!(error(&vm("serial = [\"off\", \"tty\"]")).contains("2 of `serial`"));
        assert!(error(&vm("serial = \"file=\\u0000\"")).contains("NUL byte"));
        let memory = "[[vm]]\nname=\"a\"\nkernel=\"/k\"\nmemory=\"2G\"";
        assert!(error(memory).contains("size=2G") || error(memory).contains("key=value"));
    }
}
