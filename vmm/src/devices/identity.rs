//! The identity of a file or a block device of the host, independent of the path by which it was
//! opened: after a live update the same path may lead to a different file or device.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, StatxFlags, fstat, fstatfs, fstatvfs, major, minor, statx};
use serde::{Deserialize, Serialize};

use crate::state::{Node, Reader, StateError};

/// The sysfs directory that lists block devices by `major:minor`.
const BLOCK_DEVICES: &str = "sys/dev/block";

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
        /// When the file was made, in seconds since 1970 with nine decimals: the next file may get the inode number of
        /// one that was removed. `None` if the file system does not say so, or if the program that took the identity
        /// did not ask.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        born: Option<String>,
    },
    /// A block device.
    BlockDevice {
        /// Major device number.
        major: u32,
        /// Minor device number.
        minor: u32,
        /// The serial number that the device reports, empty if it reports none.
        serial: String,
        /// What tells the device apart if its serial number does not: the disk and number of a partition, the UUID of
        /// a device mapper's or MD device, the ID of an NVMe namespace. `None` if there is nothing, or if the
        /// program that took the identity did not know of it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        unit: Option<String>,
        /// More serial numbers and units that the device reports. Another kernel, or another program, may have taken
        /// one of them. Not saved.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        others: Vec<String>,
    },
}

impl Identity {
    /// Returns the identity of an open file. Errors if it is neither a regular file nor a block
    /// device, or if what identifies the device cannot be read now: with less of it, the device would pass for another.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        let stat = fstat(&file)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let (file_system, born) = (fstatvfs(&file)?.f_fsid, born(&file));
                Ok(Self::File { file_system, inode: stat.st_ino, born })
            }
            FileType::BlockDevice => {
                Self::of_device(Path::new("/"), major(stat.st_rdev), minor(stat.st_rdev))
            }
            _ => Err(io::Error::other("it is neither a regular file nor a block device")),
        }
    }

    /// Returns the identity of a block device, by what sysfs below `root` has of it.
    pub fn of_device(root: &Path, major: u32, minor: u32) -> io::Result<Self> {
        let device = root.join(BLOCK_DEVICES).join(format!("{major}:{minor}"));
        // The entry is a link to the device's directory, which is below its disk's for a partition.
        let device = match device.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => device,
            found => found?,
        };
        let (mut serials, mut units) = (serials(&device)?.into_iter(), units(&device)?.into_iter());
        let (serial, unit) = (serials.next().unwrap_or_default(), units.next());
        let others = serials.chain(units).collect();
        Ok(Self::BlockDevice { major, minor, serial, unit, others })
    }

    /// Whether only its number tells the block device from others. The next kernel may give that to another one.
    pub fn is_number_only(&self) -> bool {
        matches!(self, Self::BlockDevice { serial, unit: None, .. } if serial.is_empty())
    }

    /// Returns whether this is the file or device that was `saved`, also if the two identities were taken under
    /// different kernels. Inode numbers, serial numbers and units are the same under each of them. A device number
    /// counts only if there is neither a unit nor, on one of the sides, a serial number, and the ID of a file system only
    /// with `lasting_file_system`: whether this file's comes from the file system's UUID
    /// ([`is_on_lasting_file_system`]). Images that were made alike on two disks may have one inode number. The times at
    /// which files were made count if both are known.
    pub fn is_same(&self, saved: &Self, lasting_file_system: bool) -> bool {
        match (self, saved) {
            (
                Self::File { file_system, inode, born },
                Self::File { file_system: saved_file_system, inode: saved, born: saved_born },
            ) => {
                inode == saved
                    && (!lasting_file_system || file_system == saved_file_system)
                    && (born.is_none() || saved_born.is_none() || born == saved_born)
            }
            (
                Self::BlockDevice { major, minor, serial, unit, others },
                Self::BlockDevice {
                    major: saved_major,
                    minor: saved_minor,
                    serial: saved_serial,
                    unit: saved_unit,
                    others: _,
                },
            ) => match saved_unit {
                Some(saved) => unit.iter().chain(others).any(|unit| unit == saved),
                None if saved_serial.is_empty() => {
                    serial.is_empty() && (major, minor) == (saved_major, saved_minor)
                }
                None => serial == saved_serial || others.contains(saved_serial),
            },
            _ => false,
        }
    }

    /// Writes the property `identity`.
    pub fn encode(&self, node: &mut Node) {
        match self {
            Self::File { file_system, inode, born } => {
                let (file_system, inode) = (format!("{file_system:x}"), inode.to_string());
                let words = ["file", &file_system, &inode].into_iter().chain(born.as_deref());
                node.put_strings("identity", &words.collect::<Vec<_>>());
            }
            Self::BlockDevice { major, minor, serial, unit, others: _ } => {
                let number = format!("{major}:{minor}");
                let words = ["block-device", &number, serial].into_iter().chain(unit.as_deref());
                node.put_strings("identity", &words.collect::<Vec<_>>());
            }
        }
    }

    /// Reads the property `identity`. A device has a unit if `with_unit`, and a file the time at which it was made if
    /// `with_born`.
    pub fn decode(
        reader: &mut Reader<'_>,
        with_unit: bool,
        with_born: bool,
    ) -> Result<Self, StateError> {
        let words = reader.strings("identity")?;
        let identity = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["file", file_system, inode, ref born @ ..] if born.len() == usize::from(with_born) => {
                (|| {
                    let file_system = u64::from_str_radix(file_system, 16).ok()?;
                    let born = born.first().map(|born| (*born).to_owned());
                    Some(Self::File { file_system, inode: inode.parse().ok()?, born })
                })()
            }
            ["block-device", number, serial, ref unit @ ..]
                if unit.len() == usize::from(with_unit) =>
            {
                number.split_once(':').and_then(|(major, minor)| {
                    Some(Self::BlockDevice {
                        major: major.parse().ok()?,
                        minor: minor.parse().ok()?,
                        serial: serial.to_owned(),
                        unit: unit.first().map(|unit| (*unit).to_owned()),
                        others: Vec::new(),
                    })
                })
            }
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
            Self::File { file_system, inode, born } => {
                write!(f, "the file with inode {inode} on file system {file_system:x}")?;
                match born {
                    Some(born) => write!(f, ", made at {born} s"),
                    None => Ok(()),
                }
            }
            Self::BlockDevice { major, minor, serial, unit, others: _ } => {
                write!(f, "the block device {major}:{minor}")?;
                match unit {
                    Some(unit) => write!(f, " ({unit})"),
                    None if serial.is_empty() => Ok(()),
                    None => write!(f, " with serial number `{serial}`"),
                }
            }
        }
    }
}

/// Returns when the file was made, if its file system says so. Not of a file in tmpfs, which never gives an inode number
/// twice: a file of an initramfs is made by each kernel.
fn born(file: impl AsFd) -> Option<String> {
    if fstatfs(&file).ok()?.f_type == libc::TMPFS_MAGIC {
        return None;
    }
    let stat = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok()?;
    let is_known = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME);
    is_known.then(|| format!("{}.{:09}", stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec))
}

/// Returns whether the ID of the file's file system comes from its UUID, so that it is the same under every kernel:
/// ext2, ext3, ext4 and Btrfs. If it is so here and the IDs differ, the file was on another file system before.
pub fn is_on_lasting_file_system(file: impl AsFd) -> bool {
    let lasting = [libc::EXT4_SUPER_MAGIC, libc::BTRFS_SUPER_MAGIC];
    fstatfs(file).is_ok_and(|system| lasting.contains(&system.f_type))
}

/// Returns the serial numbers of the block device whose directory in sysfs is `device`, best first. They are in the
/// directory itself for virtio, and in `device/` below it for SCSI, which has a serial number since Linux 7.1, and for NVMe.
/// The LUNs of a SCSI target may have one serial number, so its WWID comes first.
fn serials(device: &Path) -> io::Result<Vec<String>> {
    let names = ["serial", "device/wwid", "device/serial", "wwid"];
    names.iter().filter_map(|name| attribute(&device.join(name)).transpose()).collect()
}

/// Returns what tells the block device whose directory in sysfs is `device` apart if its serial number does not, best
/// first.
fn units(device: &Path) -> io::Result<Vec<String>> {
    let named = |name: &str| attribute(&device.join(name));
    if let Some(number) = named("partition")? {
        let Some(disk) = device.parent() else { return Ok(Vec::new()) };
        let of = Some(units(disk)?).filter(|units| !units.is_empty());
        let of = of.map_or_else(|| serials(disk), Ok)?;
        return Ok(of.into_iter().map(|of| format!("partition {number} of {of}")).collect());
    }
    // A device without a UUID, which `dmsetup create` makes, has its name from whoever made it, under each kernel.
    for id in ["dm/uuid", "dm/name"] {
        if let Some(id) = named(id)? {
            return Ok(vec![format!("device mapper `{id}`")]);
        }
    }
    // An array without a superblock of MD's own has no UUID, or another each time.
    let is_own = |version: &String| version != "none" && !version.starts_with("external");
    if named("md/metadata_version")?.as_ref().is_some_and(is_own) {
        return Ok(named("md/uuid")?.map(|id| format!("MD array `{id}`")).into_iter().collect());
    }
    // All namespaces of an NVMe controller have the serial number of the controller. Their own IDs are no better: devices
    // exist that have the same ones, and Linux then leaves them out for the device that it finds last.
    let Some(number) = named("nsid")? else { return Ok(Vec::new()) };
    let serial = serials(device)?.into_iter().next();
    Ok(serial.map(|serial| format!("NVMe namespace {number} of {serial}")).into_iter().collect())
}

/// Returns the text of an attribute, if there is such a file and it is not empty. Errors, with its path, if it cannot be
/// read now.
fn attribute(path: &Path) -> io::Result<Option<String>> {
    let read = std::fs::read(path);
    let text = known(read).map_err(|error| {
        io::Error::new(error.kind(), format!("{} cannot be read: {error}", path.display()))
    })?;
    let text = text.map(|text| String::from_utf8_lossy(&text).trim().replace('\0', ""));
    Ok(text.filter(|text| !text.is_empty()))
}

/// Returns `None` for the error of an attribute that the device does not have. Drivers have several errors for that
/// (`EINVAL` and `ENXIO` of a SCSI disk without a WWID), and some attributes are the superuser's. Errors if the host or the
/// device fails to answer, which says nothing of the attribute.
fn known<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    const FAILED: [i32; 7] = [
        libc::EIO,
        libc::ENOMEM,
        libc::EMFILE,
        libc::ENFILE,
        libc::EINTR,
        libc::EAGAIN,
        libc::ETIMEDOUT,
    ];
    match read {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.raw_os_error().is_some_and(|errno| FAILED.contains(&errno)) => {
            Err(error)
        }
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn device(minor: u32, serial: &str) -> Identity {
        Identity::BlockDevice {
            major: 8,
            minor,
            serial: serial.to_owned(),
            unit: None,
            others: Vec::new(),
        }
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

    /// ext4 gives the number of a removed file to the next one.
    #[test]
    fn a_new_file_with_the_inode_number_of_a_removed_one_is_another() {
        // Beside the test's program, because tmpfs, which may be on /tmp, gives no number twice.
        let program = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let path = directory.path().join("web.img");
        let make = || {
            std::fs::write(&path, "a").unwrap();
            Identity::of(std::fs::File::open(&path).unwrap()).unwrap()
        };
        let number = |identity: &Identity| match identity {
            Identity::File { inode, .. } => *inode,
            other => panic!("{other}"),
        };
        let first = make();
        assert!(first.is_same(&make(), true), "written again, it is the same file");
        let (mut reused, begun) = (0, std::time::Instant::now());
        // Until Linux 6.13, files that are made within a few milliseconds have the same time.
        while begun.elapsed() < std::time::Duration::from_secs(5) {
            std::fs::remove_file(&path).unwrap();
            let another = make();
            if number(&another) == number(&first) {
                reused += 1;
                if !another.is_same(&first, true) {
                    return;
                }
            }
        }
        assert_eq!(reused, 0, "a new file is taken for the first one");
        println!("skipped: this file system gives no inode number twice");
    }

    #[test]
    fn the_time_at_which_a_file_was_made_counts_if_both_are_known() {
        let file = |born: Option<&str>| {
            let born = born.map(str::to_owned);
            Identity::File { file_system: 1, inode: 2, born }
        };
        for (here, saved, same) in [
            (Some("5.000000001"), Some("5.000000001"), true),
            (Some("5.000000002"), Some("5.000000001"), false),
            // Saved by an earlier program, or under a kernel that does not say it.
            (Some("5.000000001"), None, true),
            (None, Some("5.000000001"), true),
        ] {
            assert_eq!(file(here).is_same(&file(saved), true), same, "{here:?} was {saved:?}");
        }
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
        let file = Identity::File { file_system: 0, inode: 0, born: None };
        assert!(!device(0, "").is_same(&file, false));
    }

    #[test]
    fn a_unit_counts_if_the_saved_identity_has_one() {
        let device = |minor, serial: &str, unit: Option<&str>| Identity::BlockDevice {
            major: 8,
            minor,
            serial: serial.to_owned(),
            unit: unit.map(str::to_owned),
            others: vec!["wwid".to_owned(), "partition 1 of wwid".to_owned()],
        };
        for (here, saved, same) in [
            // A partition of a disk that is counted in another order now.
            (
                device(17, "", Some("partition 1 of a")),
                device(1, "", Some("partition 1 of a")),
                true,
            ),
            // The first partition of another disk, which has the number now.
            (
                device(1, "", Some("partition 1 of b")),
                device(1, "", Some("partition 1 of a")),
                false,
            ),
            // Another namespace of the same NVMe controller.
            (
                device(2, "c", Some("NVMe namespace `2`")),
                device(1, "c", Some("NVMe namespace `1`")),
                false,
            ),
            (device(1, "", None), device(1, "", Some("partition 1 of a")), false),
            // Saved by a program that knew no units.
            (device(1, "", Some("partition 1 of a")), device(1, "", None), true),
            (device(2, "c", Some("NVMe namespace `2`")), device(1, "c", None), true),
            (device(17, "", Some("partition 1 of a")), device(1, "", None), false),
            // Under a kernel, or by a program, that named the device otherwise.
            (
                device(17, "", Some("partition 1 of a")),
                device(1, "", Some("partition 1 of wwid")),
                true,
            ),
            (device(16, "vpd", None), device(0, "wwid", None), true),
            (device(0, "vpd", None), device(0, "", None), false),
        ] {
            assert_eq!(here.is_same(&saved, false), same, "{here} was {saved}");
        }
    }

    /// The directories are laid out as sysfs has them (Linux, `Documentation/ABI/stable/sysfs-block`).
    #[test]
    fn partitions_mapped_devices_arrays_and_namespaces_have_units() {
        let sysfs = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = sysfs.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("sda/device/wwid", "naa.5000c500\n");
        put("sda/device/serial", "ZC1\n");
        put("sda/sda2/partition", "2\n");
        put("vda/serial", "\n");
        put("vda/vda1/partition", "1\n");
        put("dm-0/dm/uuid", "LVM-abc\n");
        put("dm-0/dm/name", "vg-lv\n");
        put("dm-1/dm/uuid", "\n");
        put("dm-1/dm/name", "plain\n");
        put("md0/md/uuid", "3aaa0122\n");
        put("md0/md/metadata_version", "1.2\n");
        put("md1/md/uuid", "00000000\n");
        put("md1/md/metadata_version", "external:imsm\n");
        put("md2/md/uuid", "4bbb0122\n");
        put("md2/md/metadata_version", "none\n");
        put("nvme0n1/nsid", "1\n");
        put("nvme0n1/wwid", "eui.0025385b\n");
        put("nvme0n1/device/serial", "S4EV\n");
        put("nvme0n1/nvme0n1p3/partition", "3\n");
        for (name, expected) in [
            ("sda", &[][..]),
            ("sda/sda2", &["partition 2 of naa.5000c500", "partition 2 of ZC1"]),
            // The disk has no number, so that nothing tells its partitions from those of another.
            ("vda/vda1", &[]),
            ("dm-0", &["device mapper `LVM-abc`"]),
            ("dm-1", &["device mapper `plain`"]),
            ("md0", &["MD array `3aaa0122`"]),
            ("md1", &[]),
            ("md2", &[]),
            ("nvme0n1", &["NVMe namespace 1 of S4EV"]),
            ("nvme0n1/nvme0n1p3", &["partition 3 of NVMe namespace 1 of S4EV"]),
            ("no-device", &[]),
        ] {
            assert_eq!(units(&sysfs.path().join(name)).unwrap(), expected, "{name}");
        }
        for (name, expected) in [
            ("nvme0n1", &["S4EV", "eui.0025385b"][..]),
            ("sda", &["naa.5000c500", "ZC1"]),
            ("sda/sda2", &[]),
            ("vda", &[]),
        ] {
            assert_eq!(serials(&sysfs.path().join(name)).unwrap(), expected, "{name}");
        }
    }

    /// A file that opens and does not read: the memory of a process at address 0.
    const FAILS: &str = "/proc/self/mem";

    #[test]
    fn an_attribute_that_cannot_be_read_now_is_not_taken_for_one_that_is_missing() {
        let sysfs = tempfile::tempdir().unwrap();
        let fails = |name: &str| {
            let path = sysfs.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(FAILS, path).unwrap();
        };
        // The number of the partition, the number of its disk, the UUID of a mapped device.
        fails("sda/sda1/partition");
        fails("vdb/serial");
        std::fs::create_dir_all(sysfs.path().join("vdb/vdb1")).unwrap();
        std::fs::write(sysfs.path().join("vdb/vdb1/partition"), "1").unwrap();
        fails("dm-0/dm/uuid");
        fails("dm-1/dm/name");
        for (name, attribute) in [
            ("sda/sda1", "sda1/partition"),
            ("vdb/vdb1", "vdb/serial"),
            ("dm-0", "dm/uuid"),
            ("dm-1", "dm/name"),
        ] {
            let error = units(&sysfs.path().join(name)).unwrap_err().to_string();
            assert!(error.contains(attribute) && error.contains("cannot be read"), "{error}");
        }
        let error = serials(&sysfs.path().join("vdb")).unwrap_err().to_string();
        assert!(error.contains("vdb/serial"), "{error}");
    }

    #[test]
    fn only_an_error_that_says_nothing_of_the_attribute_is_one() {
        let known = |errno| known(io::Result::<()>::Err(io::Error::from_raw_os_error(errno)));
        for absent in [libc::ENOENT, libc::ENOTDIR, libc::EINVAL, libc::ENXIO, libc::EACCES] {
            assert!(known(absent).is_ok_and(|found| found.is_none()), "{absent}");
        }
        for failed in [libc::EIO, libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ETIMEDOUT] {
            assert!(known(failed).is_err(), "{failed}");
        }
    }

    #[test]
    fn a_file_system_counts_if_its_id_comes_from_its_uuid() {
        let file = |file_system, inode| Identity::File { file_system, inode, born: None };
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
