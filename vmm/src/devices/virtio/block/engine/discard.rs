//! Discards blocks of a block device, and finds out whether a disk can discard.

#![expect(unsafe_code, reason = "the ioctl that rustix does not have")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::ioctl::{Setter, ioctl};

use super::super::request::is_unsupported;

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

/// Whether the storage of a disk of `size` bytes can discard. Changes no data: the question names bytes that cannot be
/// discarded.
///
/// A block device refuses a range that does not begin with a sector, but says before that if it cannot discard at all (Linux
/// block/ioctl.c, `blk_ioctl_discard`). The bytes of a file are behind its end; some file systems take this for
/// a change of the file and set its time.
pub(in super::super) fn can_discard(file: &File, is_device: bool, size: u64) -> bool {
    if is_device {
        let refused = discard(file, 1, 512).err();
        return refused.is_some_and(|error| error.raw_os_error() == Some(libc::EINVAL));
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let done = fallocate(file, flags, size.next_multiple_of(4096), 4096);
    !done.is_err_and(|error| is_unsupported(&error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_asked_whether_it_can_discard_and_stays_as_it_is() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 5000], 0).unwrap();
        let blocks =
            |file: &File| std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        let before = blocks(&file);
        assert!(can_discard(&file, false, 5000));
        assert_eq!((file.metadata().unwrap().len(), blocks(&file)), (5000, before));
        let mut found = [0; 5000];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 0).unwrap();
        assert_eq!(found, [7; 5000]);
        // No file with holes.
        let null = File::options().write(true).open("/dev/null").unwrap();
        assert!(!can_discard(&null, false, 512));
    }
}
