//! Describes one VM.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use super::BRIDGE;
use crate::debian::{self, Release};
use crate::network;
use crate::paths;

/// Time between two heartbeats of a guest, in milliseconds. A check waits for a dozen of them. Each byte of a heartbeat is
/// an exit, which takes 0.4 ms in an emulated machine: ten heartbeats a second of two guests take all of its time.
const HEARTBEAT_MS: u64 = 400;

/// The address of a mute network device.
pub const MUTE_MAC: [u8; 6] = [2, b'm', b'u', b't', b'e', 1];

/// The address of a Debian guest's network device, by which its seed names the device.
pub(super) const SEED_MAC: &str = "02:64:65:62:69:61";

/// Which image of the kernel a guest boots from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestKernel {
    /// A bzImage, by Linux's own boot protocol.
    BzImage,
    /// An ELF vmlinux, through its PVH entry.
    Pvh,
}

/// Where a guest's root file system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestRoot {
    /// In an initramfs.
    Initramfs,
    /// On a virtio disk; there is no initramfs.
    Disk,
    /// In the initramfs of a unified kernel image on a disk, from which the guest also boots. See [`crate::unified`].
    Unified,
    /// On a disk image of Debian, from which the guest also boots. See [`crate::debian`].
    Debian(Release),
}

/// Where the contents of a guest's disk are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// A disk of the host, which the harness can read afterwards.
    Device,
    /// A file on the host's data disk.
    File,
}

/// One VM.
#[derive(Debug, Clone)]
pub struct VmPlan {
    /// Its name.
    pub name: String,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub cpus: u32,
    /// Its kernel.
    pub kernel: GuestKernel,
    /// Its root file system.
    pub root: GuestRoot,
    /// Memory that the workload fills and verifies, in MiB, or `all` for all free memory.
    pub checksummed: String,
    /// Share of each vCPU that the counter uses, in percent.
    pub busy: u32,
    /// Where the contents of its disk are.
    pub backing: Backing,
    /// Size of its disk in MiB.
    pub disk_mib: u64,
    /// A file of this computer with which its disk begins, if that is a [`Backing::Device`].
    pub disk_contents: Option<PathBuf>,
    /// It is on the host's network, and sends back what it gets on [`network::ECHO_PORT`].
    pub network: bool,
    /// Pairs of queues of its network device.
    pub queues: u32,
    /// Largest packet of its network device, if it is not the usual one.
    pub mtu: Option<u32>,
    /// More options of its disk.
    pub disk_options: &'static str,
    /// Threads of the guest that read the disk besides the one that writes it.
    pub disk_readers: u32,
    /// The processor that its guest finds.
    pub cpu: &'static str,
    /// A line of its section, such as its priority.
    pub line: &'static str,
    /// More parameters of its kernel.
    pub parameters: &'static str,
    /// Disks that it has besides and that nothing uses: files of 1 MiB on the host's data disk.
    pub idle_disks: u32,
    /// Network devices that it has besides and that nothing uses.
    pub idle_nets: u32,
    /// It has one more network device, with the address [`MUTE_MAC`] and on the host's bridge, which its kernel does not
    /// bring up: the guest sends nothing by it.
    pub mute_net: bool,
    /// It has two more disks: one of the host's, which fails a write of [`BROKEN_SECTOR`](super::BROKEN_SECTOR),
    /// and a file on the host's data disk.
    pub broken_disks: bool,
    /// It has three more disks, on which it works without end (`scratch.rs` of its PID 1): one of the host's with sectors
    /// of 4 KiB, a file on the host's data disk, and one there that it can only read.
    pub scratch_disks: bool,
    /// Its serial port is a socket of the host, which `perennial console` brings to the virtio port. Only under systemd:
    /// `systemctl start console@NAME` starts that program.
    pub console: bool,
}

impl VmPlan {
    /// A VM with the defaults of most tests.
    pub fn new(name: &str, memory_mib: u64, cpus: u32) -> Self {
        Self {
            name: name.to_owned(),
            memory_mib,
            cpus,
            kernel: GuestKernel::BzImage,
            root: GuestRoot::Initramfs,
            checksummed: (memory_mib / 8).to_string(),
            // Host and guests may share one emulated CPU, and a distribution's kernels tick 250
            // times a second: guests that use more make no progress for minutes.
            busy: 10,
            backing: Backing::Device,
            disk_mib: 16,
            disk_contents: None,
            network: false,
            queues: 1,
            mtu: None,
            disk_options: "",
            disk_readers: 0,
            cpu: "host",
            line: "",
            parameters: "",
            idle_disks: 0,
            idle_nets: 0,
            mute_net: false,
            broken_disks: false,
            scratch_disks: false,
            console: false,
        }
    }

    /// The file of its second broken disk.
    pub(super) fn second_broken_disk(&self) -> String {
        format!("{}.broken2.img", self.name)
    }

    /// The files of its scratch disks: the one that it writes, and the one that it only reads.
    pub(super) fn scratch_files(&self) -> [String; 2] {
        ["scratch", "readonly"].map(|kind| format!("{}.{kind}.img", self.name))
    }

    pub(super) fn idle_disk(&self, number: u32) -> String {
        format!("{}.idle{number}.img", self.name)
    }

    /// What the kernel and PID 1 of a guest on the network are told.
    fn network_cmdline(address: Ipv4Addr) -> String {
        let gateway = network::GATEWAY;
        format!(
            " ip={address}::{gateway}:255.255.255.0::eth0:off perennial.echo={}",
            network::ECHO_PORT
        )
    }

    /// The command line in its unified kernel image. That of the configuration is added to it.
    pub(super) fn unified_cmdline(&self) -> &'static str {
        "perennial.disk=/dev/vdb"
    }

    fn cmdline(&self) -> String {
        let root = match self.root {
            GuestRoot::Unified => "",
            GuestRoot::Initramfs => "perennial.disk=/dev/vda",
            GuestRoot::Disk => "root=/dev/vda rw init=/sbin/init perennial.disk=/dev/vdb",
            GuestRoot::Debian(_) => return debian::CMDLINE.to_owned(),
        };
        let broken = if self.broken_disks { " perennial.broken=vdb,vdc" } else { "" };
        let scratch = match (self.scratch_disks, self.root) {
            (false, _) => "",
            (true, GuestRoot::Initramfs) => " perennial.scratch=vdb,vdc,vdd",
            (true, _) => " perennial.scratch=vdc,vdd,vde",
        };
        let quiet = if paths::verbose() { "earlyprintk=ttyS0" } else { "quiet" };
        // The workqueue watchdog is the only one that does not learn that a guest was paused. It
        // would warn after 30 s, and an update of an emulated host can take so long.
        let patient = "workqueue.watchdog_thresh=240";
        // Linux compares the TSC with kvm-clock twice a second. On an emulated host kvm-clock jumps by
        // milliseconds whenever the emulator loses its CPU, and Linux 7.3 then reports a skewed TSC.
        // During boot, Linux can also hang forever in a comparison of two vCPUs' TSCs, with
        // interrupts off on both (kernel/time/clocksource.c, `watchdog_wait_seq`). The guest's PID 1
        // compares the vCPUs' TSCs instead.
        let unwatched = "tsc=nowatchdog";
        format!(
            "console=ttyS0 {quiet} panic=-1 {patient} {unwatched} {root} perennial.memory={} perennial.busy={} \
             perennial.interval={HEARTBEAT_MS} perennial.readers={}{broken}{scratch} {}",
            self.checksummed, self.busy, self.disk_readers, self.parameters
        )
    }

    /// The ports that can be reached from outside the host.
    pub(super) fn ports(&self) -> &'static [u16] {
        match self.root {
            GuestRoot::Debian(_) => &[network::ECHO_PORT, debian::IPERF3_PORT],
            _ => &[network::ECHO_PORT],
        }
    }

    /// The virtio port that carries its serial line.
    pub fn port(&self) -> String {
        format!("vm.{}", self.name)
    }

    /// Appends the VM's section of a configuration, with the paths of its disks. `broken` is the first of the broken
    /// ones, `scratch` that of the scratch ones.
    pub(super) fn write(
        &self,
        out: &mut String,
        root: &str,
        disk: &str,
        [broken, scratch]: [Option<&str>; 2],
        address: Ipv4Addr,
    ) -> std::fmt::Result {
        let kernel = match self.kernel {
            GuestKernel::BzImage => "bzImage",
            GuestKernel::Pvh => "vmlinux",
        };
        let disk = match self.disk_options {
            "" => format!("\"path={disk}\""),
            more => format!("\"path={disk},{more}\""),
        };
        let kernel = format!("kernel = \"/data/guest/{kernel}\"\n");
        let (boot, disks) = match self.root {
            GuestRoot::Initramfs => {
                (format!("{kernel}initramfs = \"/data/guest/initramfs\"\n"), disk)
            }
            GuestRoot::Disk => (kernel, format!("\"path={root}\", {disk}")),
            GuestRoot::Unified => {
                ("boot = \"disk\"\n".to_owned(), format!("\"path={root}\", {disk}"))
            }
            GuestRoot::Debian(_) => {
                let seed = format!("cloud-init = \"/data/{}.seed\"\n", self.name);
                (format!("boot = \"disk\"\n{seed}"), format!("\"path={root}\", {disk}"))
            }
        };
        let idle_disks = (0..self.idle_disks)
            .map(|number| format!(", \"path=/data/{}\"", self.idle_disk(number)));
        let broken_disks = broken.map_or(String::new(), |first| {
            let second = self.second_broken_disk();
            format!(", \"path={first},direct=on\", \"path=/data/{second}\"")
        });
        let scratch_disks = scratch.map_or(String::new(), |first| {
            let [written, read] = self.scratch_files();
            format!(
                ", \"path={first}\", \"path=/data/{written}\", \"path=/data/{read},readonly=on\""
            )
        });
        let disks = disks + &idle_disks.collect::<String>() + &broken_disks + &scratch_disks;
        let (mut nets, on_network) = match self.network {
            false => (vec![], String::new()),
            true => {
                let mtu = self.mtu.map_or(String::new(), |mtu| format!(",mtu={mtu}"));
                let tap =
                    format!("tap=vm-{},bridge={BRIDGE},queues={}{mtu}", self.name, self.queues);
                match self.root {
                    // It has the address from its seed.
                    GuestRoot::Debian(_) => {
                        (vec![format!("\"{tap},mac={SEED_MAC}\"")], String::new())
                    }
                    _ => (vec![format!("\"{tap}\"")], Self::network_cmdline(address)),
                }
            }
        };
        nets.extend((0..self.idle_nets).map(|number| format!("\"tap={}-{number}\"", self.name)));
        let mute = || {
            let mac = MUTE_MAC.map(|byte| format!("{byte:02x}")).join(":");
            format!("\"tap=vm-{}-mute,bridge={BRIDGE},mac={mac}\"", self.name)
        };
        nets.extend(self.mute_net.then(mute));
        let net = nets.join(", ");
        let serial = match self.console {
            true => format!("socket=/run/consoles/{}", self.name),
            false => format!("port={}", self.port()),
        };
        write!(
            out,
            "\n[[vm]]\nname = \"{}\"\nmemory = \"size={}M\"\ncpus = {}\ncpu = \"{}\"\n{}\n\
         {boot}cmdline = \"{}{on_network}\"\nnet = [{net}]\n\
         disk = [{disks}]\nserial = \"{serial}\"\nrng = \"src=/dev/urandom\"\n",
            self.name,
            self.memory_mib,
            self.cpus,
            self.cpu,
            self.line,
            self.cmdline(),
        )
    }
}
