//! Discards blocks of a block device.

#![expect(unsafe_code, reason = "the ioctl that rustix does not have")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Setter, ioctl};

/// Linux include/uapi/linux/fs.h. The argument is the first byte and the number of bytes.
const BLKDISCARD: u32 = 0x1277;

/// Tells the device that nobody needs the contents of these bytes any more. fallocate(2) would write zeroes to a device
/// instead, which one that is thinly provisioned keeps, and refuse where a device can discard and not zero.
pub(super) fn discard(device: &File, offset: u64, bytes: u64) -> io::Result<()> {
    // SAFETY: `BLKDISCARD` reads two u64 and writes nothing.
    let setter = unsafe { Setter::<BLKDISCARD, [u64; 2]>::new([offset, bytes]) };
    // SAFETY: as above; the value belongs to `setter`, and `device` is open.
    Ok(unsafe { ioctl(device.as_fd(), setter) }?)
}
