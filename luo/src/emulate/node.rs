//! Answers of stat(2), statx(2) and access(2) for the device node, for programs that check the path
//! before they open it.
//!
//! The node looks as devtmpfs makes it: a character device of root, mode 0600. A listing of `/dev`
//! does not show it, and fstat(2) on an open fd shows a socket.

use std::mem::{offset_of, size_of};

use rustix::io::Errno;

/// Major number of miscellaneous devices. The minor number is dynamic on Linux.
const MAJOR: u32 = 10;
const MINOR: u32 = 255;
const MODE: u32 = libc::S_IFCHR | 0o600;

/// Returns the bytes of a `struct stat` of the device.
pub(super) fn stat() -> Vec<u8> {
    let mut bytes = vec![0; size_of::<libc::stat>()];
    put(&mut bytes, offset_of!(libc::stat, st_dev), &5_u64.to_ne_bytes());
    put(&mut bytes, offset_of!(libc::stat, st_ino), &1_u64.to_ne_bytes());
    put(&mut bytes, offset_of!(libc::stat, st_nlink), &1_u32.to_ne_bytes());
    put(&mut bytes, offset_of!(libc::stat, st_mode), &MODE.to_ne_bytes());
    let device = rustix::fs::makedev(MAJOR, MINOR);
    put(&mut bytes, offset_of!(libc::stat, st_rdev), &device.to_ne_bytes());
    put(&mut bytes, offset_of!(libc::stat, st_blksize), &4096_u32.to_ne_bytes());
    bytes
}

/// Returns the bytes of a `struct statx` of the device.
pub(super) fn statx() -> Vec<u8> {
    let mut bytes = vec![0; size_of::<libc::statx>()];
    let basic = libc::STATX_BASIC_STATS.to_ne_bytes();
    put(&mut bytes, offset_of!(libc::statx, stx_mask), &basic);
    put(&mut bytes, offset_of!(libc::statx, stx_blksize), &4096_u32.to_ne_bytes());
    put(&mut bytes, offset_of!(libc::statx, stx_nlink), &1_u32.to_ne_bytes());
    put(&mut bytes, offset_of!(libc::statx, stx_mode), &(MODE as u16).to_ne_bytes());
    put(&mut bytes, offset_of!(libc::statx, stx_ino), &1_u64.to_ne_bytes());
    put(&mut bytes, offset_of!(libc::statx, stx_rdev_major), &MAJOR.to_ne_bytes());
    put(&mut bytes, offset_of!(libc::statx, stx_rdev_minor), &MINOR.to_ne_bytes());
    put(&mut bytes, offset_of!(libc::statx, stx_dev_minor), &5_u32.to_ne_bytes());
    bytes
}

/// Writes a field. `value` may be shorter than the field: both architectures are little-endian, so
/// the low bytes come first.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Answers access(2): EINVAL for unknown bits in `mode`, EACCES for execution.
pub(super) fn access(mode: u32) -> Result<(), Errno> {
    const KNOWN: u32 = (libc::R_OK | libc::W_OK | libc::X_OK) as u32;
    match mode {
        mode if mode & !KNOWN != 0 => Err(Errno::INVAL),
        mode if mode & libc::X_OK as u32 != 0 => Err(Errno::ACCESS),
        _ => Ok(()),
    }
}
