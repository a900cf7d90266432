//! `perennial run` and Debian's QEMU, side by side in one machine: the guest's work, and what the host measures.
//!
//! The machine's initramfs has all that is needed: both programs, and a guest's kernel and initramfs. The
//! machine's PID 1 ([`init`]) runs the same guest in each VMM in turn, on the same disk file and the same
//! tap, and prints each VM's results on the console. PID 1 of the guests is the same program.

mod contender;
mod disk;
mod guest;
mod host;
pub mod init;
mod network;
mod process;
mod silence;
mod system;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use contender::Contender;

use crate::binaries;
use crate::host::Failure;
use crate::image::Initramfs;
use crate::kernels::{self, Role};
use crate::qemu::{self, Machine, Qemu};

/// RAM of the machine, in MiB: its initramfs, a disk, a guest, and a VMM.
const HOST_MIB: u64 = 2048;
/// RAM of a guest, in MiB.
pub const GUEST_MIB: u64 = 256;
/// Size of the disk, in MiB.
pub const DISK_MIB: u64 = 256;

/// The start of the lines with one VM's results.
const RESULT: &str = "side-by-side result: ";
/// The start of the line with what went wrong.
const PROBLEM: &str = "side-by-side problem: ";

/// How much is measured. In the kernels' command lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// How often each VMM runs the guest.
    pub rounds: usize,
    /// The time of one load.
    pub load: Duration,
    /// The time for which the CPU time of an idle, and of a paused, VM is counted.
    pub idle: Duration,
}

impl Settings {
    /// For results that mean something.
    pub const FULL: Self =
        Self { rounds: 5, load: Duration::from_secs(3), idle: Duration::from_secs(4) };
    /// To see that everything works.
    pub const QUICK: Self =
        Self { rounds: 1, load: Duration::from_millis(200), idle: Duration::from_millis(500) };

    fn parameters(&self) -> String {
        let Self { rounds, load, idle } = self;
        format!(
            "side.rounds={rounds} side.load={} side.idle={}",
            load.as_millis(),
            idle.as_millis()
        )
    }

    fn parse(cmdline: &str) -> Result<Self, String> {
        let number = |key: &str| -> Result<u64, String> {
            let mut words = cmdline.split_whitespace();
            let value = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
            value
                .and_then(|value| value.parse().ok())
                .ok_or(format!("{key}: missing on the command line, or not a number"))
        };
        Ok(Self {
            rounds: number("side.rounds")? as usize,
            load: Duration::from_millis(number("side.load")?),
            idle: Duration::from_millis(number("side.idle")?),
        })
    }
}

/// What is measured of a VM. A [`Measured`] has a value of each under its name.
pub mod names {
    /// Seconds from the start of the VMM to the first output of the guest's PID 1.
    pub const BOOT: &str = "boot";
    /// Requests a second, of 4 KiB at random places; one at a time, and 32 at a time.
    pub const RANDOM_READ: &str = "random-read-1";
    /// As above.
    pub const RANDOM_READ_32: &str = "random-read-32";
    /// As above.
    pub const RANDOM_WRITE: &str = "random-write-1";
    /// As above.
    pub const RANDOM_WRITE_32: &str = "random-write-32";
    /// Bytes a second, in requests of 1 MiB, one at a time.
    pub const READ: &str = "read";
    /// As above.
    pub const WRITE: &str = "write";
    /// Bytes a second over TCP from the guest to the host.
    pub const STREAM_OUT: &str = "stream-out";
    /// Bytes a second over TCP from the host to the guest.
    pub const STREAM_IN: &str = "stream-in";
    /// A byte to the host and a byte back over TCP: how often a second.
    pub const REQUESTS: &str = "requests";
    /// Bytes of memory that the VM's process has besides the guest's RAM.
    pub const MEMORY: &str = "memory";
    /// Bytes of memory that all processes of the VM have together besides the guest's RAM.
    pub const MEMORY_ALL: &str = "memory-all";
    /// The share of a CPU that all processes of a VM use whose guest is idle.
    pub const IDLE: &str = "idle-cpu";
    /// The same for a VM that is paused.
    pub const PAUSED: &str = "paused-cpu";

    /// All of them.
    pub const ALL: [&str; 14] = [
        BOOT,
        RANDOM_READ,
        RANDOM_READ_32,
        RANDOM_WRITE,
        RANDOM_WRITE_32,
        READ,
        WRITE,
        STREAM_OUT,
        STREAM_IN,
        REQUESTS,
        MEMORY,
        MEMORY_ALL,
        IDLE,
        PAUSED,
    ];
}

/// What was measured of one VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measured {
    /// The round, from 0.
    pub round: usize,
    /// The VMM that ran it.
    pub contender: Contender,
    /// One value for each of [`names::ALL`].
    pub values: BTreeMap<String, f64>,
}

/// Runs all rounds in one machine. Returns the results in the order of the VMs.
pub fn run(settings: Settings, qemu_tree: &Path) -> Result<Vec<Measured>, Failure> {
    let directory = qemu::scratch_directory()?;
    let initramfs = directory.path().join("initramfs");
    image(directory.path(), qemu_tree)?.write(&initramfs)?;
    let machine = Machine {
        kernel: kernels::find(Role::HostA)?.bzimage(),
        initramfs,
        cmdline: format!(
            "console=ttyS0 panic=-1 quiet transparent_hugepage_shmem=advise {}",
            settings.parameters()
        ),
        memory_mib: HOST_MIB,
        ..Machine::default()
    };
    let mut qemu = Qemu::start(&machine, qemu::accelerator(), directory)?;
    let ended = qemu.wait_for_end(host::longest(settings));
    let console = qemu.console();
    let lines = || console.lines().map(str::trim_end);
    let problem = lines().find_map(|line| line.strip_prefix(PROBLEM));
    let measured = lines()
        .filter_map(|line| line.strip_prefix(RESULT))
        .map(serde_json::from_str)
        .collect::<Result<Vec<Measured>, _>>()?;
    match problem {
        Some(problem) => Err(format!("{problem}; the console:\n{}", qemu.last_lines(40)).into()),
        None if ended && measured.len() == settings.rounds * Contender::ALL.len() => Ok(measured),
        None => {
            let count = measured.len();
            let last = qemu.last_lines(40);
            Err(format!("only {count} VMs were measured; the console:\n{last}").into())
        }
    }
}

/// The initramfs of the machine. `directory` is for temporary files.
fn image(directory: &Path, qemu_tree: &Path) -> Result<Initramfs, Failure> {
    let binaries = binaries::build()?;
    let init = binaries::contents(&binaries.side_by_side_init())?;
    let guest = directory.join("guest-initramfs");
    let mut archive = Initramfs::new()?;
    archive.file("init", 0o755, &init)?;
    archive.write(&guest)?;
    let mut archive = Initramfs::new()?;
    // QEMU's program, libraries and firmware at the paths at which they expect each other.
    archive.tree(qemu_tree, &|_| false)?;
    archive.directory("guest")?;
    archive.file("init", 0o755, &init)?;
    for (name, path) in [
        (&contender::PERENNIAL[1..], binaries.perennial()),
        (&contender::KERNEL[1..], kernels::find(Role::Guest)?.bzimage()),
        (&contender::INITRAMFS[1..], guest),
    ] {
        archive.file(name, 0o755, &binaries::contents(&path)?)?;
    }
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_pass_through_a_command_line() {
        for settings in [Settings::FULL, Settings::QUICK] {
            let cmdline = format!("console=ttyS0 {} quiet", settings.parameters());
            assert_eq!(Settings::parse(&cmdline), Ok(settings));
        }
        assert!(Settings::parse("side.rounds=1 side.load=2").unwrap_err().contains("side.idle"));
    }
}
