//! The identity of a file or a block device of the host, independent of the path by which it was
//! opened: after a live update the same path may lead to a different file or device.

use std::fmt;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FileType, fstat, fstatfs, fstatvfs, major, minor};
use serde::{Deserialize, Serialize};

use crate::state::{Node, Reader, StateError};

/// The sysfs directory that lists block devices by `major:minor`.
const BLOCK_DEVICES: &str = "/sys/dev/block";

/// The identity of the file or block device behind an open file descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Identity {
    /// A regular file.
    File {
        /// ID of the file system (`f_fsid` of fstatvfs(3)). ext4 and btrfs derive it from their
        /// UUID, other file systems from a device number, which may differ under another kernel.
        file_system: u64,
        /// Inode number.
        inode: u64,
    },
    /// A block device.
    BlockDevice {
        /// Major device number.
        major: u32,
        /// Minor device number.
        minor: u32,
        /// The serial number that the device reports, empty if it reports none.
        serial: String,
    },
}

impl Identity {
    /// Returns the identity of an open file. Errors if it is neither a regular file nor a block
    /// device.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        let stat = fstat(&file)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                Ok(Self::File { file_system: fstatvfs(&file)?.f_fsid, inode: stat.st_ino })
            }
            FileType::BlockDevice => {
                let (major, minor) = (major(stat.st_rdev), minor(stat.st_rdev));
                Ok(Self::BlockDevice { major, minor, serial: serial(major, minor) })
            }
            _ => Err(io::Error::other("it is neither a regular file nor a block device")),
        }
    }

    /// Returns whether both identities name the same file or device, also if they were taken under
    /// different kernels. Inode and serial numbers are the same under each of them. A device number counts only if
    /// neither side has a serial number, and the ID of a file system only with `lasting_file_system`: whether this
    /// file's comes from the file system's UUID ([`is_on_lasting_file_system`]). Images that were made alike on two
    /// disks may have one inode number.
    pub fn is_same(&self, other: &Self, lasting_file_system: bool) -> bool {
        match (self, other) {
            (
                Self::File { file_system, inode },
                Self::File { file_system: other_file_system, inode: other },
            ) => inode == other && (!lasting_file_system || file_system == other_file_system),
            (Self::BlockDevice { serial, .. }, Self::BlockDevice { serial: other_serial, .. })
                if !serial.is_empty() || !other_serial.is_empty() =>
            {
                serial == other_serial
            }
            (this, other) => this == other,
        }
    }

    /// Writes the property `identity`.
    pub fn encode(&self, node: &mut Node) {
        match self {
            Self::File { file_system, inode } => {
                let (file_system, inode) = (format!("{file_system:x}"), inode.to_string());
                node.put_strings("identity", &["file", &file_system, &inode]);
            }
            Self::BlockDevice { major, minor, serial } => {
                let number = format!("{major}:{minor}");
                node.put_strings("identity", &["block-device", &number, serial]);
            }
        }
    }

    /// Reads the property `identity`.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let words = reader.strings("identity")?;
        let identity = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["file", file_system, inode] => (|| {
                let file_system = u64::from_str_radix(file_system, 16).ok()?;
                Some(Self::File { file_system, inode: inode.parse().ok()? })
            })(),
            ["block-device", number, serial] => (|| {
                let (major, minor) = number.split_once(':')?;
                let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
                Some(Self::BlockDevice { major, minor, serial: serial.to_owned() })
            })(),
            _ => None,
        };
        identity.ok_or_else(|| {
            reader.invalid(
                "identity",
                format!("{words:?} identifies neither a file nor a block device"),
            )
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file_system, inode } => {
                write!(f, "the file with inode {inode} on file system {file_system:x}")
            }
            Self::BlockDevice { major, minor, serial } if serial.is_empty() => {
                write!(f, "the block device {major}:{minor}")
            }
            Self::BlockDevice { major, minor, serial } => {
                write!(f, "the block device {major}:{minor} with serial number `{serial}`")
            }
        }
    }
}

/// Returns whether the ID of the file's file system comes from its UUID, so that it is the same under every kernel:
/// ext2, ext3, ext4 and Btrfs. If it is so here and the IDs differ, the file was on another file system before.
pub fn is_on_lasting_file_system(file: impl AsFd) -> bool {
    let lasting = [libc::EXT4_SUPER_MAGIC, libc::BTRFS_SUPER_MAGIC];
    fstatfs(file).is_ok_and(|system| lasting.contains(&system.f_type))
}

/// Returns the serial number of a block device, or an empty string. sysfs has it in the device's own
/// directory for virtio, and in `device/` below it for NVMe and SCSI.
fn serial(major: u32, minor: u32) -> String {
    let device = format!("{BLOCK_DEVICES}/{major}:{minor}");
    ["serial", "device/serial", "device/wwid", "wwid"]
        .iter()
        .find_map(|name| std::fs::read_to_string(format!("{device}/{name}")).ok())
        .map_or_else(String::new, |text| text.trim().replace('\0', ""))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn device(minor: u32, serial: &str) -> Identity {
        Identity::BlockDevice { major: 8, minor, serial: serial.to_owned() }
    }

    #[test]
    fn a_renamed_file_is_the_same_and_a_new_file_at_its_path_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&a, "a").unwrap();
        let first = Identity::of(std::fs::File::open(&a).unwrap()).unwrap();
        std::fs::rename(&a, &b).unwrap();
        std::fs::write(&a, "another").unwrap();
        assert!(first.is_same(&Identity::of(std::fs::File::open(&b).unwrap()).unwrap(), true));
        assert!(!first.is_same(&Identity::of(std::fs::File::open(&a).unwrap()).unwrap(), true));
        let error = Identity::of(std::fs::File::open("/dev/null").unwrap()).unwrap_err();
        assert!(error.to_string().contains("neither a regular file"), "{error}");
    }

    #[test]
    fn block_devices_are_compared_by_serial_number_or_else_by_device_number() {
        assert!(
            device(0, "disk-7").is_same(&device(16, "disk-7"), false),
            "only the device number differs"
        );
        assert!(!device(0, "disk-7").is_same(&device(0, "disk-8"), false));
        assert!(!device(0, "disk-7").is_same(&device(0, ""), false));
        assert!(device(0, "").is_same(&device(0, ""), false));
        assert!(!device(0, "").is_same(&device(16, ""), false));
        assert!(!device(0, "").is_same(&Identity::File { file_system: 0, inode: 0 }, false));
    }

    #[test]
    fn a_file_system_counts_if_its_id_comes_from_its_uuid() {
        let file = |file_system, inode| Identity::File { file_system, inode };
        for (other, lasting, same) in [
            (file(1, 2), true, true),
            // Another disk, made in the same way.
            (file(7, 2), true, false),
            // The same one, with another number of its device.
            (file(7, 2), false, true),
            (file(1, 3), false, false),
        ] {
            assert_eq!(file(1, 2).is_same(&other, lasting), same, "{other}, {lasting}");
        }
        let memfd = memfd_create("a", MemfdFlags::CLOEXEC).unwrap();
        assert!(!is_on_lasting_file_system(&memfd));
        assert!(!is_on_lasting_file_system(std::fs::File::open("/proc/self/status").unwrap()));
    }
}
