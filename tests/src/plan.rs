//! Describes a host with its VMs, and makes the images and configuration files for it.
//!
//! A host has two sides, `a` and `b`. Each is a kernel and an initramfs whose configuration names the
//! other side as the target of updates, so that updates can go back and forth. Both sides are on the
//! host's data disk, with everything that the VMs need.

mod vm;

use std::error::Error;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};

use perennial_doubles::pvh;

use crate::binaries::{self, Binaries};
use crate::debian::{self, Release};
use crate::image::{Ext4, Initramfs, raw_disk};
use crate::kernels::{self, Kernel, Role};
use crate::network;
use crate::paths;
use crate::pool::{self, Pool};
use crate::qemu::{self, Machine};
use crate::systemd::{self, ORDERS_PORT};
use crate::unified;
use crate::workload::disk::{READ_ONLY_BLOCKS, read_only_record};

pub use vm::{Backing, GuestKernel, GuestRoot, MUTE_MAC, VmPlan};

/// Name of the control port.
pub const CONTROL_PORT: &str = "perennial.control";

/// The bridge that the host makes for VMs on the network.
const BRIDGE: &str = "br0";

/// The sector that a broken disk does not write.
pub const BROKEN_SECTOR: u64 = 8 << 11;

/// Paths at which a host with an earlier program finds that program and this one.
pub const EARLIER: &str = "/data/programs/earlier";
/// See [`EARLIER`].
pub const THIS: &str = "/data/programs/this";

/// RAM that the host itself needs, including KHO's scratch area, in MiB.
const HOST_MIB: u64 = 1280;

/// RAM of a tiny VM in MiB, and of its process.
const TINY_MIB: u64 = 64;
const TINY_PROCESS_MIB: u64 = 16;

/// The LUO that carries a host's VMs over a live update. It determines the host's kernels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Luo {
    /// The kernel's LUO, in kernels that are built with it.
    #[default]
    Kernel,
    /// A pool, under a distribution's kernels.
    Pool,
}

impl Luo {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Kernel, Self::Pool];

    /// The kernels of the host before an update and after it.
    pub fn hosts(self) -> [Role; 2] {
        match self {
            Self::Kernel => [Role::HostA, Role::HostB],
            Self::Pool => [Role::StockA, Role::StockB],
        }
    }

    /// The host's name for the backend.
    pub fn backend(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Pool => "pool",
        }
    }
}

/// A host.
#[derive(Debug, Clone, Default)]
pub struct HostPlan {
    /// The LUO that carries its VMs.
    pub luo: Luo,
    /// Whether its guests run a distribution's kernel, which boots only as a bzImage with an initramfs.
    pub stock_guests: bool,
    /// Its VMs.
    pub vms: Vec<VmPlan>,
    /// Number of VMs of 64 MiB that it has besides, which halt and have no devices: see [`pvh::HALTS`].
    pub tiny: u32,
    /// Whether the host is a service of systemd instead of PID 1.
    pub under_systemd: bool,
    /// RAM of the machine in MiB. `None` computes it from the VMs.
    pub memory_mib: Option<u64>,
    /// A file for the machine's RAM, for tests that write to it beforehand or keep it afterwards.
    pub ram_file: Option<PathBuf>,
    /// Lines added to `[host]` in both sides' configuration.
    pub extra_host: String,
    /// Replaces the configuration of side `a`, which boots first.
    pub config_a: Option<String>,
    /// Changes the configuration of side `a`.
    pub edit_a: Option<fn(String) -> String>,
    /// Changes the configuration of side `b`.
    pub edit_b: Option<fn(String) -> String>,
    /// The last eight letters of a binding that the program of side `b` does not know, and of the one that it knows in
    /// its place. Eight, because a compiler compares long names in pieces of eight bytes.
    pub other_binding_b: Option<[&'static str; 2]>,
    /// The program of side `a`, if it is not this one. Both are on the data disk as well: [`EARLIER`] and [`THIS`].
    pub earlier_a: Option<PathBuf>,
    /// Whether the host does the damage that its kernel's command line names.
    pub with_faults: bool,
    /// Whether the machine's CPU lacks virtualisation.
    pub without_kvm: bool,
    /// Seconds without food after which a hardware watchdog of the machine resets it, on side `a` and on side `b`. Only on
    /// hosts with a pool.
    pub watchdog: Option<[u32; 2]>,
    /// Whether the first kernel boots without LUO and KHO.
    pub without_luo: bool,
}

/// What is on a disk of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskKind {
    /// The records of the workload.
    Records,
    /// An image of Debian.
    Debian(Release),
    /// What the work of a Debian guest writes.
    Work,
    /// Nothing. It fails a write of [`BROKEN_SECTOR`].
    Broken,
    /// What the guest writes, discards and zeroes.
    Scratch,
}

/// A disk of a VM that is a disk of the host as well.
#[derive(Debug, Clone)]
pub struct VmDisk {
    /// Name of the VM.
    pub vm: String,
    /// The image file.
    pub path: PathBuf,
    /// What is on it.
    pub kind: DiskKind,
}

/// A plan's machine, with all files made.
#[derive(Debug)]
pub struct Prepared {
    /// The machine to start.
    pub machine: Machine,
    /// The VMs' disks that are disks of the host.
    pub vm_disks: Vec<VmDisk>,
    /// Ports of this computer that lead to VMs.
    pub vm_ports: Vec<VmPort>,
}

/// A port of this computer that leads to a VM.
#[derive(Debug, Clone)]
pub struct VmPort {
    /// Name of the VM.
    pub vm: String,
    /// The VM's port.
    pub guest_port: u16,
    /// The port of this computer.
    pub port: u16,
}

impl HostPlan {
    /// A host with these VMs.
    pub fn new(vms: Vec<VmPlan>) -> Self {
        Self { vms, ..Self::default() }
    }

    /// The same host with this LUO and its kernels.
    pub fn on(self, luo: Luo) -> Self {
        Self { luo, ..self }
    }

    /// The same host under systemd.
    pub fn under_systemd(self) -> Self {
        Self { under_systemd: true, ..self }
    }

    /// The VMs on the network, with their addresses.
    fn addresses(&self) -> impl Iterator<Item = (&VmPlan, Ipv4Addr)> {
        let numbered = self.vms.iter().enumerate().filter(|(_, vm)| vm.network);
        numbered.map(|(number, vm)| (vm, network::address(number)))
    }

    /// `[host.network]` of both sides, if a VM is on the network.
    fn network_section(&self) -> String {
        match self.addresses().next() {
            None => String::new(),
            Some(_) => format!(
                "[host.network]\nbridge = \"{BRIDGE}\"\nuplink = \"eth0\"\n\
                 address = \"{}/24\"\ngateway = \"{}\"\n",
                network::HOST,
                network::GATEWAY
            ),
        }
    }

    fn vms_mib(&self) -> u64 {
        let tiny = u64::from(self.tiny) * TINY_MIB;
        self.vms.iter().map(|vm| vm.memory_mib).sum::<u64>() + tiny
    }

    /// RAM of the machine in MiB.
    pub fn memory_mib(&self) -> u64 {
        let processes = u64::from(self.tiny) * TINY_PROCESS_MIB;
        self.memory_mib.unwrap_or(match self.pool() {
            Some(pool) => pool.machine_mib() + processes,
            None => HOST_MIB + self.vms_mib() + processes,
        })
    }

    /// The pool, if the VMs' RAM is in one.
    pub fn pool(&self) -> Option<Pool> {
        (self.luo == Luo::Pool).then(|| Pool::new(self.vms_mib()))
    }

    /// The same machine without VMs. Other settings have their defaults.
    pub fn without_vms(&self) -> Self {
        Self {
            memory_mib: Some(self.memory_mib()),
            luo: self.luo,
            under_systemd: self.under_systemd,
            ..Self::default()
        }
    }

    /// The kernels of the host before an update and after it.
    fn hosts(&self) -> [Role; 2] {
        match self.watchdog {
            // The only stock kernel with its driver.
            Some(_) => [Role::StockB; 2],
            None => self.luo.hosts(),
        }
    }

    /// Paths of the files with the symbols of the host's kernels (the two have the same code), and of the
    /// guests' kernel. `None` for a distribution's kernel.
    pub fn symbols(&self) -> [Option<PathBuf>; 2] {
        let [host, _] = self.hosts();
        let guest = if self.stock_guests { Role::StockB } else { Role::Guest };
        let vmlinux = |role| kernels::find(role).ok().map(Kernel::vmlinux);
        [host, guest].map(|role| vmlinux(role).filter(|path| path.exists()))
    }

    /// The command line of both sides' kernels.
    pub fn cmdline(&self) -> String {
        let quiet = if paths::verbose() { "" } else { " quiet" };
        let memory = match self.pool() {
            Some(pool) => pool.parameter(),
            // The scratch area is just large enough for the next kernel and initramfs, because a
            // preservation has to migrate every guest page out of it.
            None => "kho_scratch=16M,256M,0 transparent_hugepage_shmem=advise".to_owned(),
        };
        // Its driver stops the watchdog at each reboot, unless it is told otherwise.
        let watched = self.watchdog.map_or("", |_| " watchdog.stop_on_reboot=0");
        // On a busy machine the emulated timer is late for the kernel's test of it, which then panics.
        format!("console=ttyS0 panic=-1 no_timer_check {memory}{quiet}{watched}")
    }

    /// The configuration of one side. `host_lines` are the lines in `[host]` for the side's kernel.
    pub fn config(&self, side: char, host_lines: &str) -> String {
        let other = if side == 'a' { 'b' } else { 'a' };
        let pool = self.pool().map_or(String::new(), |_| format!(", {}", pool::mount()));
        let watchdog = self.watchdog.map_or(String::new(), |[a, b]| {
            let seconds = if side == 'a' { a } else { b };
            format!("watchdog = \"/dev/watchdog\"\nwatchdog-timeout-s = {seconds}\n")
        });
        let mut out = format!(
            "[host]\nhostname = \"host-{side}\"\nsocket = \"/run/perennial.sock\"\n\
             control-port = \"{CONTROL_PORT}\"\nconfine = \"required\"\n\
             mounts = [{{ source = \"/dev/vda\", target = \"/data\", type = \"ext4\" }}{pool}]\n\
             {host_lines}{watchdog}{}\n{}[update]\nkernel = \"/data/{other}/bzImage\"\n\
             initramfs = \"/data/{other}/initramfs\"\ncmdline = \"{}\"\n",
            self.extra_host,
            self.network_section(),
            self.cmdline()
        );
        let mut devices = 'b'..='z';
        for (number, vm) in self.vms.iter().enumerate() {
            let mut device = || format!("/dev/vd{}", devices.next().unwrap_or('z'));
            let root = match vm.root {
                GuestRoot::Debian(_) => device(),
                _ => format!("/data/{}.root", vm.name),
            };
            let disk = match vm.backing {
                Backing::Device => device(),
                Backing::File => format!("/data/{}.img", vm.name),
            };
            let more = [vm.broken_disks, vm.scratch_disks].map(|has| has.then(&mut device));
            let more = more.each_ref().map(Option::as_deref);
            // Writing to a String cannot fail.
            let _ = vm.write(&mut out, &root, &disk, more, network::address(number));
        }
        for number in 0..self.tiny {
            out += &format!(
                "\n[[vm]]\nname = \"tiny-{number}\"\nmemory = \"size={TINY_MIB}M\"\nkernel = \"/data/guest/tiny\"\n\
                 serial = \"off\"\n"
            );
        }
        out
    }

    /// Makes all images in `directory`.
    pub fn prepare(&self, directory: &Path) -> Result<Prepared, Box<dyn Error>> {
        let binaries = binaries::build()?;
        let [role_a, role_b] = self.hosts();
        let (host_a, host_b) = (kernels::find(role_a)?, kernels::find(role_b)?);
        let tree = Ext4::new(directory)?;
        let lines = |kernel| match self.luo {
            Luo::Kernel => String::new(),
            Luo::Pool => pool::host_lines(kernel),
        };
        let config_a = self.config_a.clone().unwrap_or_else(|| self.config('a', &lines(host_a)));
        let config_a = self.edit_a.unwrap_or(|config| config)(config_a);
        let config_b = self.edit_b.unwrap_or(|config| config)(self.config('b', &lines(host_b)));
        for (side, kernel, config) in [("a", host_a, &config_a), ("b", host_b, &config_b)] {
            tree.copy(&format!("{side}/bzImage"), &kernel.bzimage())?;
            let mut initramfs = match self.under_systemd {
                true => systemd::initramfs(binaries, config)?,
                false => {
                    let other = self.other_binding_b.filter(|_| side == "b");
                    let earlier = self.earlier_a.as_deref().filter(|_| side == "a");
                    let program = match earlier {
                        Some(earlier) => earlier.to_owned(),
                        None if self.with_faults => binaries::with_faults()?.to_owned(),
                        None => binaries.perennial(),
                    };
                    host_initramfs(&program, config, other)?
                }
            };
            if self.luo == Luo::Pool {
                initramfs.modules(kernel, &kernel.modules)?;
            }
            initramfs.write(&tree.path(&format!("{side}/initramfs"))?)?;
        }
        if let Some(pool) = self.pool() {
            pool.make_image(&tree.path(pool::IMAGE)?)?;
        }
        if !self.vms.is_empty() {
            let role = if self.stock_guests { Role::StockB } else { Role::Guest };
            guest_files(role, binaries, &tree)?;
        }
        fs::write(tree.path("guest/tiny")?, pvh::image(pvh::HALTS))?;
        if let Some(earlier) = &self.earlier_a {
            tree.copy(EARLIER.trim_start_matches("/data/"), earlier)?;
            tree.copy(THIS.trim_start_matches("/data/"), &binaries.perennial())?;
        }
        let vm_disks = self.vm_disks(binaries, directory, &tree)?;
        let data = directory.join("data.img");
        let disks = vm_disks.iter().map(|disk| disk.path.clone());
        let disks: Vec<PathBuf> = [data.clone()].into_iter().chain(disks).collect();
        let initramfs = directory.join("initramfs");
        fs::copy(tree.path("a/initramfs")?, &initramfs)?;
        bad_files(&tree, &host_a.bzimage())?;
        tree.write(&data, 64 << 20)?;
        let orders = self.under_systemd.then_some(ORDERS_PORT);
        let ports = [CONTROL_PORT].into_iter().chain(orders).map(str::to_owned);
        let mut vm_ports = Vec::new();
        let mut forwards = Vec::new();
        for (vm, address) in self.addresses() {
            for &guest_port in vm.ports() {
                let port = network::free_port()?;
                forwards.push((port, SocketAddrV4::new(address, guest_port)));
                vm_ports.push(VmPort { vm: vm.name.clone(), guest_port, port });
            }
        }
        let luo = match self.luo {
            Luo::Kernel if !self.without_luo => " liveupdate=on kho=on",
            _ => "",
        };
        let machine = Machine {
            kernel: host_a.bzimage(),
            initramfs,
            cmdline: format!("{}{luo}", self.cmdline()),
            memory_mib: self.memory_mib(),
            ram_file: self.ram_file.clone(),
            disks,
            ports: ports.chain(self.vms.iter().map(VmPlan::port)).collect(),
            forwards,
            watches_wire: self.vms.iter().any(|vm| vm.mute_net),
            without_kvm: self.without_kvm,
            watchdog: self.watchdog.is_some(),
            may_reset: self.watchdog.is_some(),
        };
        Ok(Prepared { machine, vm_disks, vm_ports })
    }

    /// Makes the disks of the VMs. Returns those that are disks of the host as well, in their order.
    fn vm_disks(
        &self,
        binaries: &Binaries,
        directory: &Path,
        tree: &Ext4,
    ) -> Result<Vec<VmDisk>, Box<dyn Error>> {
        let mut disks = Vec::new();
        for (number, vm) in self.vms.iter().enumerate() {
            match vm.root {
                GuestRoot::Initramfs => {}
                GuestRoot::Disk => {
                    guest_root(binaries, directory, &tree.path(&format!("{}.root", vm.name))?)?;
                }
                GuestRoot::Unified => {
                    let [kernel, initramfs] = ["guest/bzImage", "guest/initramfs"];
                    let (kernel, initramfs) = (tree.path(kernel)?, tree.path(initramfs)?);
                    let contents = (&*kernel, &*initramfs, vm.unified_cmdline());
                    unified::disk(&tree.path(&format!("{}.root", vm.name))?, contents, directory)?;
                }
                GuestRoot::Debian(release) => {
                    let path = directory.join(format!("{}.root", vm.name));
                    release.copy(&path)?;
                    let kind = DiskKind::Debian(release);
                    disks.push(VmDisk { vm: vm.name.clone(), path, kind });
                    let user_data = tree.path(&format!("{}.seed/user-data", vm.name))?;
                    fs::write(user_data, debian::user_data())?;
                    let file = tree.path(&format!("{}.seed/network-config", vm.name))?;
                    let address = network::address(number);
                    let network = (vm::SEED_MAC, address, network::GATEWAY);
                    fs::write(file, debian::network_config(vm.network.then_some(network)))?;
                }
            }
            for number in 0..vm.idle_disks {
                raw_disk(&tree.path(&vm.idle_disk(number))?, 1 << 20)?;
            }
            let bytes = vm.disk_mib << 20;
            match vm.backing {
                Backing::File => raw_disk(&tree.path(&format!("{}.img", vm.name))?, bytes)?,
                Backing::Device => {
                    let path = directory.join(format!("{}.img", vm.name));
                    raw_disk(&path, bytes)?;
                    if let Some(contents) = &vm.disk_contents {
                        let mut disk = fs::File::options().write(true).open(&path)?;
                        std::io::copy(&mut fs::File::open(contents)?, &mut disk)?;
                    }
                    if vm.scratch_disks {
                        fs::write(qemu::properties_of(&path), "write-zeroes=off")?;
                    }
                    let kind = match vm.root {
                        GuestRoot::Debian(_) => DiskKind::Work,
                        _ => DiskKind::Records,
                    };
                    disks.push(VmDisk { vm: vm.name.clone(), path, kind });
                }
            }
            if vm.broken_disks {
                raw_disk(&tree.path(&vm.second_broken_disk())?, 1 << 20)?;
                let path = directory.join(format!("{}.broken.img", vm.name));
                raw_disk(&path, 16 << 20)?;
                fs::write(qemu::faults_of(&path), qemu::write_fault(BROKEN_SECTOR))?;
                fs::write(qemu::properties_of(&path), "discard=off")?;
                disks.push(VmDisk { vm: vm.name.clone(), path, kind: DiskKind::Broken });
            }
            disks.extend(vm.scratch_disks.then(|| scratch_disks(vm, directory, tree)).transpose()?);
        }
        Ok(disks)
    }
}

/// Makes the scratch disks of a VM. Returns the one that is a disk of the host.
fn scratch_disks(vm: &VmPlan, directory: &Path, tree: &Ext4) -> std::io::Result<VmDisk> {
    let [written, read] = vm.scratch_files();
    raw_disk(&tree.path(&written)?, 1 << 20)?;
    let blocks = (0..READ_ONLY_BLOCKS).flat_map(|number| read_only_record(number).to_block().0);
    fs::write(tree.path(&read)?, blocks.collect::<Vec<u8>>())?;
    let path = directory.join(format!("{}.scratch.img", vm.name));
    raw_disk(&path, 1 << 20)?;
    fs::write(qemu::properties_of(&path), "logical_block_size=4096,physical_block_size=4096")?;
    Ok(VmDisk { vm: vm.name.clone(), path, kind: DiskKind::Scratch })
}

fn host_initramfs(
    program: &Path,
    config: &str,
    other_binding: Option<[&str; 2]>,
) -> std::io::Result<Initramfs> {
    let mut archive = Initramfs::new()?;
    let mut program = binaries::contents(program)?;
    if let Some([known, other]) = other_binding {
        replace(&mut program, known, other);
    }
    archive.file("init", 0o755, &program)?;
    archive.file("etc/perennial.toml", 0o644, config.as_bytes())?;
    Ok(archive)
}

/// Replaces a text by another one of the same length, wherever it is in a program.
fn replace(program: &mut [u8], text: &str, other: &str) {
    assert_eq!(text.len(), other.len());
    let find = |program: &[u8]| program.windows(text.len()).position(|w| w == text.as_bytes());
    assert!(find(program).is_some(), "no `{text}` in the program");
    while let Some(at) = find(program) {
        program[at..at + text.len()].copy_from_slice(other.as_bytes());
    }
}

/// The kernels and the initramfs of the guests.
fn guest_files(role: Role, binaries: &Binaries, tree: &Ext4) -> Result<(), Box<dyn Error>> {
    let kernel = kernels::find(role)?;
    tree.copy("guest/bzImage", &kernel.bzimage())?;
    // A distribution's kernel package has no ELF image.
    if kernel.vmlinux().exists() {
        tree.copy("guest/vmlinux", &kernel.vmlinux())?;
    }
    Ok(guest_initramfs(role, binaries)?.write(&tree.path("guest/initramfs")?)?)
}

/// The initramfs of the guests.
pub(crate) fn guest_initramfs(
    role: Role,
    binaries: &Binaries,
) -> Result<Initramfs, Box<dyn Error>> {
    let kernel = kernels::find(role)?;
    let mut archive = Initramfs::new()?;
    archive.file("init", 0o755, &binaries::contents(&binaries.guest_init())?)?;
    // virtio_net needs the two that are called after failover.
    let needed = |name: &&String| name.starts_with("virtio") || name.ends_with("failover");
    archive.modules(kernel, kernel.modules.iter().filter(needed))?;
    Ok(archive)
}

/// A root file system for a guest without initramfs.
fn guest_root(binaries: &Binaries, directory: &Path, image: &Path) -> std::io::Result<()> {
    let tree = Ext4::new(directory)?;
    for name in ["dev", "proc", "sys", "run", "tmp"] {
        tree.directory(name)?;
    }
    tree.copy("sbin/init", &binaries.guest_init())?;
    tree.write(image, 0)
}

/// Kernels and archives that must be refused.
fn bad_files(tree: &Ext4, bzimage: &Path) -> std::io::Result<()> {
    let kernel = binaries::contents(bzimage)?;
    fs::write(tree.path("bad/empty")?, b"")?;
    fs::write(tree.path("bad/truncated-bzImage")?, &kernel[..kernel.len() / 2])?;
    fs::write(tree.path("bad/header-only")?, &kernel[..512])?;
    fs::write(tree.path("bad/no-kernel")?, vec![0x55; 1 << 20])?;
    Initramfs::new()?.write(&tree.path("bad/no-init")?)?;
    // Another program, and a module that is not there.
    let mut stranger = Initramfs::new()?;
    stranger.file("init", 0o755, b"#!/bin/sh\n")?;
    stranger.file("etc/perennial.toml", 0o644, b"[host]\nmodules = [\"nowhere\"]\n")?;
    stranger.write(&tree.path("bad/stranger")?)?;
    raw_disk(&tree.path("bad/no-initramfs")?, 1 << 20)?;
    // Larger than the scratch area that the next kernel must be loaded into; a sparse file.
    let huge = tree.path("bad/huge-initramfs")?;
    fs::write(&huge, b"070701")?;
    File::options().write(true).open(huge)?.set_len(300 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> HostPlan {
        let (kernel, root) = (GuestKernel::Pvh, GuestRoot::Disk);
        let pvh = VmPlan { kernel, root, ..VmPlan::new("db", 128, 1) };
        let file = VmPlan { backing: Backing::File, ..VmPlan::new("log", 64, 1) };
        HostPlan::new(vec![VmPlan::new("web", 256, 2), file, pvh])
    }

    #[test]
    fn each_side_updates_to_the_other_and_both_describe_the_same_vms() {
        let parse = |side| plan().config(side, "").parse::<toml::Table>().unwrap();
        let (a, b) = (parse('a'), parse('b'));
        assert_eq!(a["update"]["kernel"].as_str(), Some("/data/b/bzImage"));
        assert_eq!(b["update"]["kernel"].as_str(), Some("/data/a/bzImage"));
        assert_eq!(a["vm"], b["vm"]);
    }

    #[test]
    fn disks_are_named_in_the_order_in_which_the_machine_has_them() {
        let config = plan().config('a', "").parse::<toml::Table>().unwrap();
        let disks: Vec<String> =
            (0..3).map(|vm| config["vm"][vm]["disk"].to_string().replace('"', "")).collect();
        assert_eq!(
            disks,
            ["[path=/dev/vdb]", "[path=/data/log.img]", "[path=/data/db.root, path=/dev/vdc]"]
        );
    }
}
