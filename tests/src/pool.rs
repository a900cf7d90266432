//! A host without the kernel's LUO: a stock kernel, its modules, and a pool in memory that the kernel
//! does not use as RAM.
//!
//! ```text
//!   0 ... 1 GiB   the host's own        1 GiB ... the pool: /dev/pmem0, ext4 with DAX      firmware
//! ```
//!
//! A pool that would reach into the hole below 4 GiB starts at 4 GiB instead.

use std::io;
use std::path::Path;
use std::process::Command;

use crate::kernels::Kernel;

/// RAM that a stock host needs for itself.
const HOST_MIB: u64 = 1024;
/// Start of the hole in the physical addresses of QEMU's machine, and of the RAM above the hole.
const HOLE_MIB: u64 = 3072;
const BEHIND_HOLE_MIB: u64 = 4096;
/// Space for the firmware's tables at the end of RAM.
const FIRMWARE_MIB: u64 = 32;
/// What a pool needs beyond the VMs' RAM: state documents, and the metadata of ext4.
const OVERHEAD_MIB: u64 = 96;
/// Unit of a pool's size: the unit in which Linux adds memory.
const UNIT_MIB: u64 = 128;

/// Where a pool is mounted.
pub const PATH: &str = "/pool";
/// Name of the pool's image on the host's data disk.
pub const IMAGE: &str = "pool.ext4";

/// A pool and the machine around it, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    size: u64,
    start: u64,
}

impl Pool {
    /// A pool for VMs with this much RAM together.
    pub fn new(vms_mib: u64) -> Self {
        let size = (vms_mib + OVERHEAD_MIB).next_multiple_of(UNIT_MIB);
        let start =
            if HOST_MIB + size + FIRMWARE_MIB <= HOLE_MIB { HOST_MIB } else { BEHIND_HOLE_MIB };
        Self { size, start }
    }

    /// Where the pool lies in a file that is the machine's RAM, in bytes.
    pub fn in_ram_file(self) -> std::ops::Range<u64> {
        let start = self.start.min(HOLE_MIB) << 20;
        start..start + (self.size << 20)
    }

    /// RAM of the machine, in MiB.
    pub fn machine_mib(self) -> u64 {
        self.start.min(HOLE_MIB) + self.size + FIRMWARE_MIB
    }

    /// The parameter on the command line of every kernel of the machine.
    pub fn parameter(self) -> String {
        format!("memmap={}M!{}M", self.size, self.start)
    }

    /// Makes the image of the empty pool.
    pub fn make_image(self, image: &Path) -> io::Result<()> {
        make_image(image, self.size, 1024)
    }
}

/// Makes the image of an empty pool: an ext4 file system of `mib` MiB with `files` inodes, whose
/// extents are aligned for huge pages.
pub fn make_image(image: &Path, mib: u64, files: u32) -> io::Result<()> {
    let output = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-N", &files.to_string()])
        .args(["-J", "size=8", "-E", "stride=512,stripe_width=512,root_owner=0:0"])
        .arg(image)
        .arg(format!("{mib}M"))
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("mke2fs: {}: {}", output.status, said.trim())))
}

/// The lines in `[host]` that give a host its pool and the modules for it.
pub fn host_lines(kernel: &Kernel) -> String {
    let modules: Vec<_> = kernel.modules.iter().map(|name| format!("\"{name}\"")).collect();
    format!("modules = [{}]\npool = \"{PATH}\"\n", modules.join(", "))
}

/// The pool's entry in `mounts`. It must follow the data disk's, which holds the image.
pub fn mount() -> String {
    format!(
        "{{ source = \"/dev/pmem0\", target = \"{PATH}\", type = \"ext4\", options = \
         \"dax=always\", format-from = \"/data/{IMAGE}\" }}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_never_lies_across_the_hole() {
        let small = Pool::new(256);
        assert_eq!(small.parameter(), "memmap=384M!1024M");
        assert_eq!(small.machine_mib(), 1440);
        let large = Pool::new(2048);
        assert_eq!(large.parameter(), "memmap=2176M!4096M");
        assert_eq!(large.machine_mib(), 3072 + 2176 + 32);
    }

    #[test]
    fn the_image_is_as_large_as_the_pool_and_takes_little_space() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join(IMAGE);
        Pool::new(256).make_image(&image).unwrap();
        let metadata = std::fs::metadata(&image).unwrap();
        assert_eq!(metadata.len(), 384 << 20);
        assert!(metadata.blocks() * 512 < 64 << 20, "{}", metadata.blocks());
    }
}
