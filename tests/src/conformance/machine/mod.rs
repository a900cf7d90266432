//! A system in a QEMU machine: its kernel's LUO, or a pool on a kernel without LUO.
//!
//! ```text
//!   test: rows, World, Guest --- virtio port, a JSON value a line --- init (PID 1): a System
//!                                                                       | kernel: agents
//!                                                                       | pool: this process
//! ```
//!
//! A case runs outside the machine, so that it continues over every switch; the machine makes each of
//! its calls. The switch is a kexec, from one of two kernels to the other.

mod guest;
pub(crate) mod init;
pub(crate) mod kernel;
mod protocol;
mod ram;

use std::error::Error;
use std::fs::{self, File};
use std::path::Path;

pub(crate) use guest::{Guest, Shared, Turn};
pub(crate) use ram::Ram;

use super::profile::{self, Profile};
use crate::binaries;
use crate::image::{Ext4, Initramfs};
use crate::kernels::{self, Kernel, Role};
use crate::paths;
use crate::plan::Luo;
use crate::pool::{self, IMAGE as POOL_IMAGE, PATH as POOL};
use crate::qemu::Machine;
use crate::suite;

/// RAM of the machine, and the pool's part of it, in MiB. The firmware has tables at the end of RAM.
const RAM_MIB: u64 = 1024;
const POOL_START_MIB: u64 = 768;
const POOL_MIB: u64 = 128;
/// Cases preserve hundreds of files at a time.
const POOL_FILES: u32 = 4096;

/// The owner of the LUO that the cases use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    Kernel,
    Pool,
}

impl Owner {
    const ALL: [Self; 2] = [Self::Kernel, Self::Pool];

    /// The owner's name on the kernel command line.
    fn word(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Pool => "pool",
        }
    }

    /// The kernels of the two sides.
    fn kernels(self) -> [Role; 2] {
        self.luo().hosts()
    }

    fn luo(self) -> Luo {
        match self {
            Self::Kernel => Luo::Kernel,
            Self::Pool => Luo::Pool,
        }
    }

    fn profile(self) -> &'static Profile {
        match self {
            Self::Kernel => &profile::KERNEL,
            Self::Pool => &profile::POOL,
        }
    }

    /// The kernels' command line. The scratch area is little larger than the next kernel and
    /// initramfs, because preserved memory has to be migrated out of it.
    fn command_line(self) -> String {
        let quiet = if paths::verbose() { "" } else { " quiet" };
        let own = match self {
            Self::Kernel => {
                "liveupdate=on kho=on kho_scratch=16M,96M,0 transparent_hugepage_shmem=advise"
                    .to_owned()
            }
            Self::Pool => format!("kho=off memmap={POOL_MIB}M!{POOL_START_MIB}M"),
        };
        format!("console=ttyS0 panic=-1{quiet} {own} {}={}", protocol::ROLE, self.word())
    }
}

/// What this computer lacks for such a machine. `None` if nothing is missing.
pub(crate) fn missing(owner: Owner) -> Option<String> {
    // The machine has no VM, so no guest kernel is needed.
    let [kernel, _] = owner.kernels();
    suite::missing(owner.luo(), kernel)
}

/// Makes the machine's images in `directory`.
fn prepare(owner: Owner, directory: &Path) -> Result<Machine, Box<dyn Error>> {
    let tree = Ext4::new(directory)?;
    for (side, role) in kernel::SIDES.into_iter().zip(owner.kernels()) {
        let kernel = kernels::find(role)?;
        tree.copy(&format!("{side}/{}", kernel::KERNEL), &kernel.bzimage())?;
        let initramfs = tree.path(&format!("{side}/{}", kernel::INITRAMFS))?;
        initramfs_of(kernel)?.write(&initramfs)?;
    }
    let initramfs = directory.join("initramfs");
    fs::copy(tree.path(&format!("{}/{}", kernel::SIDES[0], kernel::INITRAMFS))?, &initramfs)?;
    // A sparse file.
    let large = tree.path(kernel::LARGE_INITRAMFS)?;
    fs::write(&large, b"070701")?;
    File::options().write(true).open(large)?.set_len(200 << 20)?;
    if owner == Owner::Pool {
        pool::make_image(&tree.path(POOL_IMAGE)?, POOL_MIB, POOL_FILES)?;
    }
    let disk = directory.join("data.img");
    tree.write(&disk, 0)?;
    Ok(Machine {
        kernel: kernels::find(owner.kernels()[0])?.bzimage(),
        initramfs,
        cmdline: owner.command_line(),
        memory_mib: RAM_MIB,
        disks: vec![disk],
        ports: vec![protocol::PORT.to_owned()],
        may_reset: true,
        ..Machine::default()
    })
}

/// An initramfs with PID 1, and the kernel's modules if it has any.
fn initramfs_of(kernel: &Kernel) -> Result<Initramfs, Box<dyn Error>> {
    let mut archive = Initramfs::new()?;
    let agent = binaries::build()?.conformance_agent();
    archive.file("init", 0o755, &binaries::contents(&agent)?)?;
    archive.modules(kernel, &kernel.modules)?;
    Ok(archive)
}
