//! What stat and access say of the device, for programs that look before they open.
//!
//! The node is as devtmpfs makes it: a character device of root, mode 0600. It is not in a listing
//! of `/dev`, and who asks an open fd is told of the socket that it is.

use std::mem::{offset_of, size_of};

use rustix::io::Errno;

/// Major number of miscellaneous devices, and a minor one that Linux gives out dynamically.
const MAJOR: u32 = 10;
const MINOR: u32 = 255;
const MODE: u32 = libc::S_IFCHR | 0o600;

/// A `struct stat` of the device.
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

/// A `struct statx` of the device.
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

/// Both architectures are little-endian: the low bytes of a longer field are its first ones.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Whether the device can be accessed as `mode` says.
pub(super) fn access(mode: u32) -> Result<(), Errno> {
    const KNOWN: u32 = (libc::R_OK | libc::W_OK | libc::X_OK) as u32;
    match mode {
        mode if mode & !KNOWN != 0 => Err(Errno::INVAL),
        mode if mode & libc::X_OK as u32 != 0 => Err(Errno::ACCESS),
        _ => Ok(()),
    }
}
