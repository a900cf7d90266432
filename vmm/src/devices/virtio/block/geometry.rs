//! The block sizes of a disk: what its guest is told, and what O_DIRECT needs.

#![expect(unsafe_code, reason = "the ioctls of block devices that rustix does not have")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FileType, StatxFlags, fstat, ioctl_blkpbszget, ioctl_blksszget, statx};
use rustix::ioctl::{Getter, ioctl};

use super::SECTOR;

/// Numbers of ioctls without an argument size (Linux include/uapi/linux/fs.h).
const BLKIOMIN: u32 = 0x1278;
const BLKIOOPT: u32 = 0x1279;
const BLKALIGNOFF: u32 = 0x127a;
/// Largest block size that is passed on. Linux supports blocks of up to 64 KiB.
const BLOCK_MAX: u32 = 64 << 10;
/// The alignment for O_DIRECT if the host's kernel does not tell it (before Linux 6.1).
const USUAL_ALIGNMENT: u64 = 4096;

/// The block sizes that the guest sees (5.2.4: `blk_size` and `topology`). They stay as they are for the life of
/// the VM, because partition tables and file systems in the guest depend on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size of a logical block, in bytes: a power of two from 512 on.
    pub block_bytes: u32,
    /// Size of a physical block: the logical size times 2 to the power of this.
    pub physical_exponent: u8,
    /// Offset of the first aligned logical block, in logical blocks.
    pub alignment_offset: u8,
    /// The smallest transfer without a read before the write, in logical blocks.
    pub minimum_io_blocks: u16,
    /// The best size of a transfer, in logical blocks. 0: none is better than others.
    pub optimal_io_blocks: u32,
}

impl Default for Geometry {
    /// Blocks of 512 bytes, and nothing else to tell.
    fn default() -> Self {
        Self {
            block_bytes: SECTOR as u32,
            physical_exponent: 0,
            alignment_offset: 0,
            minimum_io_blocks: 0,
            optimal_io_blocks: 0,
        }
    }
}

impl Geometry {
    /// Returns what a new guest is told of `file`. A block device has the block sizes of the host's device. An
    /// image file has blocks of 512 bytes, wherever it is stored: an image that is copied to another disk keeps
    /// its partition table.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        if FileType::from_raw_mode(fstat(file)?.st_mode) != FileType::BlockDevice {
            return Ok(Self::default());
        }
        let (logical, physical) = (ioctl_blksszget(file)?, ioctl_blkpbszget(file)?);
        Ok(Self::from_bytes(logical, physical, getter::<BLKIOMIN>(file), getter::<BLKIOOPT>(file))
            .with_offset(getter::<BLKALIGNOFF>(file)))
    }

    fn from_bytes(logical: u32, physical: u32, minimum: u32, optimal: u32) -> Self {
        if !Self::is_block_size(logical) {
            return Self::default();
        }
        let ratio = (physical / logical).clamp(1, BLOCK_MAX / logical);
        Self {
            block_bytes: logical,
            physical_exponent: ratio.ilog2() as u8,
            alignment_offset: 0,
            minimum_io_blocks: u16::try_from(minimum / logical).unwrap_or(0),
            optimal_io_blocks: optimal / logical,
        }
    }

    /// BLKALIGNOFF gives the distance of the device's start from a physical block, in bytes.
    fn with_offset(self, bytes: u32) -> Self {
        Self { alignment_offset: u8::try_from(bytes / self.block_bytes).unwrap_or(0), ..self }
    }

    /// Whether `bytes` can be the size of a logical block.
    pub(super) fn is_block_size(bytes: u32) -> bool {
        bytes.is_power_of_two() && (SECTOR as u32..=BLOCK_MAX).contains(&bytes)
    }

    /// Whether there is more to tell than the block size.
    pub(super) fn has_topology(&self) -> bool {
        *self != Self { block_bytes: self.block_bytes, ..Self::default() }
    }
}

/// Returns the value of an ioctl, or 0 if the device does not know it.
fn getter<const OPCODE: u32>(file: &File) -> u32 {
    // SAFETY: `OPCODE` is one of the three ioctls above, which write one unsigned or signed int.
    let getter = unsafe { Getter::<OPCODE, u32>::new() };
    // SAFETY: as above; the value belongs to `getter`, and `file` is open.
    unsafe { ioctl(file.as_fd(), getter) }.unwrap_or(0)
}

/// What O_DIRECT needs of a transfer: its address in memory, and its offset and length, must be multiples of
/// these numbers, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Alignment {
    pub(super) memory: u64,
    pub(super) offset: u64,
}

impl Alignment {
    /// Returns what `file` needs.
    pub(super) fn of(file: &File) -> Self {
        let stat = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
        let told = stat.ok().filter(|stat| stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
        let align = |bytes: u32| match u64::from(bytes) {
            0 => USUAL_ALIGNMENT,
            bytes => bytes,
        };
        match told {
            Some(stat) => {
                let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
                Self { memory: align(memory), offset: align(offset) }
            }
            None => Self { memory: USUAL_ALIGNMENT, offset: USUAL_ALIGNMENT },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_file_has_blocks_of_512_bytes_and_no_topology() {
        let geometry = Geometry::of(&tempfile::tempfile().unwrap()).unwrap();
        assert_eq!(geometry, Geometry::default());
        assert!(!geometry.has_topology());
    }

    #[test]
    fn sizes_in_bytes_become_numbers_of_blocks() {
        let told = Geometry::from_bytes(512, 4096, 4096, 1 << 20).with_offset(3584);
        let wanted = Geometry {
            block_bytes: 512,
            physical_exponent: 3,
            alignment_offset: 7,
            minimum_io_blocks: 8,
            optimal_io_blocks: 2048,
        };
        assert_eq!(told, wanted);
        let told = Geometry::from_bytes(4096, 4096, 4096, 0).with_offset(u32::MAX);
        assert_eq!((told.block_bytes, told.physical_exponent, told.alignment_offset), (4096, 0, 0));
    }

    #[test]
    fn a_device_that_reports_nonsense_gets_the_usual_sizes() {
        for logical in [0, 1, 513, 3 << 10, 128 << 10, u32::MAX] {
            assert_eq!(Geometry::from_bytes(logical, 4096, 1, 1), Geometry::default());
        }
        for physical in [0, 1, 511] {
            assert_eq!(Geometry::from_bytes(512, physical, 0, 0), Geometry::default());
        }
        assert_eq!(Geometry::from_bytes(512, u32::MAX, 0, 0).physical_exponent, 7);
    }

    #[test]
    fn the_alignment_for_o_direct_is_a_power_of_two() {
        let Alignment { memory, offset } = Alignment::of(&tempfile::tempfile().unwrap());
        assert!(memory.is_power_of_two() && offset.is_power_of_two(), "{memory} {offset}");
    }
}
