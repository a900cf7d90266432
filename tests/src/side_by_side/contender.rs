//! How each VMM is started with the guest, and how its VM is paused.

use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::{GUEST_MIB, Settings, host, network};
use crate::qemu;

/// Where the machine has `perennial`, and the guest's files.
pub(super) const PERENNIAL: &str = "/perennial";
pub(super) const KERNEL: &str = "/guest/bzImage";
pub(super) const INITRAMFS: &str = "/guest/initramfs";

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// The socket by which a VM is paused.
const SOCKET: &str = "/run/vmm.sock";
/// The guest's Ethernet address. Always the same, so that the host does not have to ask for it again.
const MAC: &str = "52:54:00:12:34:56";

/// One of the VMMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contender {
    /// `perennial run`.
    Perennial,
    /// QEMU with `-M microvm,pcie=on,rtc=on`.
    Microvm,
    /// QEMU with `-M q35`.
    Q35,
}

impl Contender {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Perennial, Self::Microvm, Self::Q35];

    /// The command that runs the guest. The guest's serial port is the command's output.
    pub(super) fn command(self, settings: &Settings) -> Command {
        // Linux compares the TSC with kvm-clock, and on an emulated host would call it unstable.
        let cmdline = format!(
            "console=ttyS0 quiet panic=-1 tsc=nowatchdog {} {} {}",
            super::init::GUEST,
            network::parameter(),
            settings.parameters()
        );
        let mut command = match self {
            Self::Perennial => perennial(&cmdline),
            Self::Microvm => qemu("microvm,pcie=on,rtc=on", &cmdline),
            Self::Q35 => qemu("q35", &cmdline),
        };
        let _ = std::fs::remove_file(SOCKET);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }

    /// Stops the VM's vCPUs and devices.
    pub(super) fn pause(self) -> Result<(), host::Problem> {
        self.tell("pause", "stop").map(drop)
    }

    /// Lets a VM go on that was paused.
    pub(super) fn resume(self) -> Result<(), host::Problem> {
        self.tell("resume", "cont").map(drop)
    }

    /// What the VMM says about the VM.
    pub(super) fn status(self) -> Result<String, host::Problem> {
        self.tell("status", "info status")
    }

    /// Gives `perennial` the first command, or QEMU the second one, and returns what it says.
    fn tell(self, perennial: &str, qemu: &str) -> Result<String, host::Problem> {
        if self != Self::Perennial {
            return Ok(qemu::ask_monitor(&UnixStream::connect(SOCKET)?, qemu)?);
        }
        let command = ["ctl", "--socket", SOCKET, perennial, "vm"];
        let output = Command::new(PERENNIAL).args(command).output()?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned().into()),
        }
    }
}

fn perennial(cmdline: &str) -> Command {
    let mut command = Command::new(PERENNIAL);
    command.args(["run", "--kernel", KERNEL, "--initramfs", INITRAMFS, "--cmdline", cmdline]);
    command.args(["--cpus", "boot=1", "--memory", &format!("size={GUEST_MIB}M")]);
    command.args(["--disk", &format!("path={}", host::DISK)]);
    command.args(["--net", &format!("tap={},mac={MAC}", network::TAP)]);
    command.args(["--serial", "tty", "--api-socket", SOCKET]);
    command
}

/// The same devices as those of `perennial run`: a serial port, a clock, a disk, a network device and a source
/// of entropy.
fn qemu(machine: &str, cmdline: &str) -> Command {
    let mut command = Command::new(QEMU);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-M", machine, "-accel", "kvm", "-cpu", "host", "-smp", "1"]);
    command.args(["-m", &format!("{GUEST_MIB}M")]);
    command.args(["-kernel", KERNEL, "-initrd", INITRAMFS, "-append", cmdline]);
    command.args(["-serial", "stdio", "-qmp", &format!("unix:{SOCKET},server=on,wait=off")]);
    command.args(["-drive", &format!("if=none,id=disk,format=raw,file={}", host::DISK)]);
    command.args(["-device", "virtio-blk-pci,drive=disk"]);
    let tap = format!("tap,id=net,ifname={},script=no,downscript=no", network::TAP);
    command.args(["-netdev", &tap]);
    // No ROM: it is for booting from the network.
    command.args(["-device", &format!("virtio-net-pci,netdev=net,romfile=,mac={MAC}")]);
    command.args(["-device", "virtio-rng-pci"]);
    command
}
