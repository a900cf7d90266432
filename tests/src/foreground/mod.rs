//! Programs on a terminal: a machine whose PID 1 ([`init`]) is the person at the terminal, who uses
//! `perennial run` or `perennial console`.
//!
//! `perennial`, a guest's kernel and its initramfs are in the machine's own initramfs. PID 1 prints its verdict on the console and powers off.

mod consoles;
pub mod init;
mod intruder;
mod logs;
mod network;
mod pool_mount;
mod session;
mod user;

use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;

use crate::binaries;
use crate::host::Failure;
use crate::image::{Ext4, Initramfs};
use crate::kernels::{self, Role};
use crate::plan::{self, Luo};
use crate::pool::{self, Pool};
use crate::qemu::{self, Machine, Qemu};
use crate::unified;

/// Where the machine has `perennial`, and the directory of the guest's files.
const PERENNIAL: &str = "/perennial";
const GUEST: &str = "/guest";

/// The start of the line with the verdict; the rest is `PASSED` or what went wrong.
const VERDICT: &str = "foreground: ";
const PASSED: &str = "all is well";

/// Longest time from power-on to power-off.
const WITHIN: Duration = Duration::from_secs(600);

/// On the command line of the machine that tries consoles: of the first kernel, and of the second.
const CONSOLES: &str = "perennial.consoles=first";
const AGAIN: &str = "perennial.consoles=again";
/// The same of the machine that tries network devices.
const NETWORK: &str = "perennial.network=first";
const NETWORK_AGAIN: &str = "perennial.network=again";
/// The rest of these command lines, without the parameter that the LUO needs.
const NEXT_CMDLINE: &str = "console=ttyS0 panic=-1 quiet";
/// RAM of the VMs of a host in MiB.
const VMS_MIB: u64 = 192;
/// The parameter of the kernel's LUO.
const SCRATCH: &str = "kho_scratch=16M,128M,0";
/// Name of the guest's initramfs among the temporary files.
const GUEST_INITRAMFS: &str = "guest-initramfs";
/// Directory with the second kernel and its initramfs.
const DATA: &str = "/data";

/// Tries `perennial run` on the first of the two kernels of `luo`.
pub fn run(luo: Luo) -> Result<(), Failure> {
    let directory = qemu::scratch_directory()?;
    let [role, _] = luo.hosts();
    let initramfs = directory.path().join("initramfs");
    image(role, directory.path())?.write(&initramfs)?;
    let mut disks = Vec::new();
    match unified::missing() {
        None => {
            let disk = directory.path().join("guest.img");
            let kernel = kernels::find(Role::Guest)?.bzimage();
            let guest = (&*kernel, &*directory.path().join(GUEST_INITRAMFS), "quiet");
            unified::disk(&disk, guest, directory.path())?;
            disks.push(disk);
        }
        Some(why) => eprintln!("SKIPPED: `perennial run` with a disk that boots itself: {why}"),
    }
    let machine = Machine {
        kernel: kernels::find(role)?.bzimage(),
        initramfs,
        cmdline: "console=ttyS0 panic=-1 quiet".into(),
        memory_mib: 1024,
        disks,
        ..Machine::default()
    };
    expect_content(machine, directory)
}

/// Tries the consoles of a host's VMs, over a live update from the first of the two kernels of `luo` to the
/// second.
pub fn consoles(luo: Luo) -> Result<(), Failure> {
    over_an_update(luo, CONSOLES)
}

/// Tries network devices, also over such a live update.
pub fn network(luo: Luo) -> Result<(), Failure> {
    over_an_update(luo, NETWORK)
}

/// A machine whose PID 1 does what `what` on the first kernel's command line says.
fn over_an_update(luo: Luo, what: &str) -> Result<(), Failure> {
    let directory = qemu::scratch_directory()?;
    let [first, second] = luo.hosts();
    let initramfs = directory.path().join("initramfs");
    image(first, directory.path())?.write(&initramfs)?;
    let tree = Ext4::new(directory.path())?;
    tree.copy("bzImage", &kernels::find(second)?.bzimage())?;
    image(second, directory.path())?.write(&tree.path("initramfs")?)?;
    let disk = directory.path().join("data.img");
    let (parameters, memory_mib) = match luo {
        Luo::Kernel => (format!("{SCRATCH} liveupdate=on kho=on"), 1536),
        Luo::Pool => {
            let pool = Pool::new(VMS_MIB);
            pool.make_image(&tree.path(pool::IMAGE)?)?;
            (pool.parameter(), pool.machine_mib())
        }
    };
    tree.write(&disk, 0)?;
    let machine = Machine {
        kernel: kernels::find(first)?.bzimage(),
        initramfs,
        cmdline: format!("{NEXT_CMDLINE} {parameters} {what}"),
        memory_mib,
        disks: vec![disk],
        ..Machine::default()
    };
    expect_content(machine, directory)
}

/// The initramfs of the machine. `directory` is for temporary files.
fn image(role: Role, directory: &Path) -> Result<Initramfs, Failure> {
    let (kernel, binaries) = (kernels::find(role)?, binaries::build()?);
    let guest = directory.join(GUEST_INITRAMFS);
    plan::guest_initramfs(Role::Guest, binaries)?.write(&guest)?;
    let mut archive = Initramfs::new()?;
    archive.modules(kernel, &kernel.modules)?;
    archive.directory(&GUEST[1..])?;
    for (name, path) in [
        ("init", binaries.foreground_init()),
        (&PERENNIAL[1..], binaries.perennial()),
        ("guest/bzImage", kernels::find(Role::Guest)?.bzimage()),
        ("guest/initramfs", guest),
    ] {
        archive.file(name, 0o755, &binaries::contents(&path)?)?;
    }
    Ok(archive)
}

/// Errors unless PID 1 of the machine is content.
fn expect_content(machine: Machine, directory: TempDir) -> Result<(), Failure> {
    let mut qemu = Qemu::start(&machine, qemu::accelerator(), directory)?;
    let ended = qemu.wait_for_end(WITHIN);
    let console = qemu.console();
    let verdict = console.lines().find_map(|line| line.trim_end().strip_prefix(VERDICT));
    match verdict {
        Some(PASSED) if ended => Ok(()),
        Some(verdict) => Err(verdict.into()),
        None => Err(format!("no verdict; the console:\n{}", qemu.last_lines(40)).into()),
    }
}
