//! What a file or a block device of the host is, beyond the path by which it was opened: after a live
//! update the same path may lead to another one.

use std::fmt;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FileType, fstat, fstatvfs, major, minor};
use serde::{Deserialize, Serialize};

use crate::state::{Node, Reader, StateError};

/// Where sysfs lists block devices by their numbers.
const BLOCK_DEVICES: &str = "/sys/dev/block";

/// What is behind an open file descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Identity {
    /// A regular file.
    File {
        /// The id of its file system (`f_fsid` of fstatvfs(3)). ext4 and btrfs make it from their
        /// UUID, others from a device number, which another kernel may give differently.
        file_system: u64,
        /// The number of its inode.
        inode: u64,
    },
    /// A block device.
    BlockDevice {
        /// Major device number.
        major: u32,
        /// Minor device number.
        minor: u32,
        /// The serial number that the device tells, empty if it tells none.
        serial: String,
    },
}

impl Identity {
    /// Looks at an open file. Errors if it is neither a regular file nor a block device.
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

    /// Whether both are one and the same, as far as another kernel can tell: the ids of file systems
    /// and the numbers of devices may differ there, inodes and serial numbers do not.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File { inode, .. }, Self::File { inode: other, .. }) => inode == other,
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
        identity.ok_or_else(|| reader.invalid("identity", format!("{words:?} identifies nothing")))
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

/// The serial number of a block device. virtio has it beside the device, NVMe and SCSI one level up.
fn serial(major: u32, minor: u32) -> String {
    let device = format!("{BLOCK_DEVICES}/{major}:{minor}");
    ["serial", "device/serial", "device/wwid", "wwid"]
        .iter()
        .find_map(|name| std::fs::read_to_string(format!("{device}/{name}")).ok())
        .map_or_else(String::new, |text| text.trim().replace('\0', ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(minor: u32, serial: &str) -> Identity {
        Identity::BlockDevice { major: 8, minor, serial: serial.to_owned() }
    }

    #[test]
    fn a_file_is_itself_whatever_it_is_called_and_another_is_another() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&a, "a").unwrap();
        let first = Identity::of(std::fs::File::open(&a).unwrap()).unwrap();
        std::fs::rename(&a, &b).unwrap();
        std::fs::write(&a, "another").unwrap();
        assert!(first.is_same(&Identity::of(std::fs::File::open(&b).unwrap()).unwrap()));
        assert!(!first.is_same(&Identity::of(std::fs::File::open(&a).unwrap()).unwrap()));
        let error = Identity::of(std::fs::File::open("/dev/null").unwrap()).unwrap_err();
        assert!(error.to_string().contains("neither a regular file"), "{error}");
    }

    #[test]
    fn a_block_device_is_known_by_its_serial_number_and_without_one_by_its_number() {
        assert!(device(0, "disk-7").is_same(&device(16, "disk-7")), "the kernel counted otherwise");
        assert!(!device(0, "disk-7").is_same(&device(0, "disk-8")));
        assert!(!device(0, "disk-7").is_same(&device(0, "")));
        assert!(device(0, "").is_same(&device(0, "")));
        assert!(!device(0, "").is_same(&device(16, "")));
        assert!(!device(0, "").is_same(&Identity::File { file_system: 0, inode: 0 }));
    }
}
