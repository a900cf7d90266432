//! The disks of the VMs: what the next host will find at their paths.
//!
//! The file that a VM has open is compared with what its path leads to. The process of the VM shows its open files in
//! `/proc`; where it does not, nothing is compared. The disks of a preserved VM are those that this host keeps open.
//!
//! The next host could not resume a VM that runs now without its disks, so the update is refused. A VM that is preserved
//! stays so until its disks are back, and must not keep the others from an update: that is a warning.

use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxFlags, statx};

use super::{Check, Finding, Severity, Surroundings, mounts};
use crate::config::Config;
use crate::devices::identity::Identity;
use crate::devices::storage::StorageReport;
use crate::guests::storage::disk_reports;
use crate::guests::{Guest, Life};
use crate::look;
use crate::machine::VmName;

/// How long the paths of disks may take to show what is there.
const LOOK_WITHIN: Duration = Duration::from_secs(2);

/// A disk of a VM that has a process, or is preserved.
#[derive(Debug)]
struct Disk {
    vm: String,
    path: PathBuf,
    /// Size in bytes as the guest knows it, if its process says. Of a preserved VM: when the host began to keep the disk.
    told: Option<u64>,
    /// What its storage does not answer, if its process says.
    stalled: Option<Stalled>,
    /// Everything that the VM's process has open, or the disk that the host keeps; empty if that does not show.
    open: Vec<Place>,
    is_preserved: bool,
}

impl Disk {
    /// A finding about the disk.
    fn finding(&self, check: Check, sentence: String, remedy: &str) -> Finding {
        let check = match check.severity() {
            Severity::Refusal if self.is_preserved => Check::DiskPreserved,
            _ => check,
        };
        Finding::new(check, format!("VM `{}`", self.vm), sentence, remedy)
    }
}

/// A disk of a preserved VM, which the host keeps open.
#[derive(Debug)]
pub struct KeptDisk {
    vm: VmName,
    path: PathBuf,
    place: Place,
    /// Size of an image file in bytes when the host began to keep it.
    bytes: Option<u64>,
}

impl KeptDisk {
    /// The disk of `vm` that was opened at `path`. `bytes`: the size of an image file when the host began to keep it. `None`
    /// if the kernel does not tell what is open.
    pub fn new(
        vm: VmName,
        path: PathBuf,
        open: BorrowedFd<'_>,
        bytes: Option<u64>,
    ) -> Option<Self> {
        Some(Self { vm, path, place: Place::of_fd(open)?, bytes })
    }
}

/// Operations that a storage has not answered for a long time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stalled {
    count: u32,
    /// For how long it has not answered the oldest one.
    seconds: u64,
}

impl Stalled {
    fn of(report: &StorageReport) -> Option<Self> {
        let (count, seconds) = (report.stalled, report.waiting_s);
        (count > 0).then_some(Self { count, seconds })
    }
}

/// What statx(2) has to tell of a place.
const PLACE: StatxFlags = StatxFlags::TYPE.union(StatxFlags::INO);

/// What tells one file or block device from another on one kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    File { device: u64, inode: u64 },
    BlockDevice(u64),
}

impl Place {
    fn of(metadata: &Metadata) -> Self {
        match metadata.file_type().is_block_device() {
            true => Self::BlockDevice(metadata.rdev()),
            false => Self::File { device: metadata.dev(), inode: metadata.ino() },
        }
    }

    /// That of an open file, by its path in `/proc`. What the kernel knows of it is enough, so its storage is not asked,
    /// which may hang.
    fn of_open(path: &Path) -> Option<Self> {
        Some(Self::found(statx(CWD, path, AtFlags::STATX_DONT_SYNC, PLACE).ok()?))
    }

    /// The same, by its fd.
    fn of_fd(fd: impl AsFd) -> Option<Self> {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::EMPTY_PATH;
        Some(Self::found(statx(fd, "", flags, PLACE).ok()?))
    }

    fn found(found: Statx) -> Self {
        let number = rustix::fs::makedev;
        match FileType::from_raw_mode(found.stx_mode.into()) {
            FileType::BlockDevice => {
                Self::BlockDevice(number(found.stx_rdev_major, found.stx_rdev_minor))
            }
            _ => Self::File {
                device: number(found.stx_dev_major, found.stx_dev_minor),
                inode: found.stx_ino,
            },
        }
    }
}

/// Checks the disks of all VMs that have a process or are preserved. `next` is the next host's configuration, if it mounts
/// anything.
pub(super) fn check(surroundings: &Surroundings<'_>, next: Option<&Config>) -> Vec<Finding> {
    let mut disks = disks_of(surroundings.travelling());
    disks.extend(preserved_disks(surroundings.vms, surroundings.kept));
    let paths: Vec<PathBuf> = disks.iter().map(|disk| disk.path.clone()).collect();
    let found = look::at(&paths, LOOK_WITHIN, |path| fs::metadata(path));
    let mut findings = Vec::new();
    for (disk, found) in disks.iter().zip(found) {
        let number = found.as_ref().and_then(|found| block_device(found.as_ref().ok()?));
        findings.extend(stalled(disk).or_else(|| match found {
            Some(found) => there(disk, found, surroundings.root),
            None => Some(unseen(disk)),
        }));
        findings.extend(number.and_then(|number| unidentified(disk, number, surroundings.root)));
    }
    if let Some(next) = next.filter(|_| surroundings.is_first_process) {
        let mounted = mounts::mounted(surroundings.root);
        findings.extend(disks.iter().filter_map(|disk| hidden(disk, &mounted, next)));
    }
    findings
}

fn disks_of<'a>(vms: impl Iterator<Item = &'a Guest> + Clone) -> Vec<Disk> {
    let mut disks = Vec::new();
    for (vm, reports) in vms.clone().zip(disk_reports(vms)) {
        let Life::Live(live) = &vm.life else { continue };
        let fds = PathBuf::from(format!("/proc/{}/fd", live.process.pid().as_raw_pid()));
        let open: Vec<Place> = fs::read_dir(fds)
            .into_iter()
            .flatten()
            .filter_map(|entry| Place::of_open(&entry.ok()?.path()))
            .collect();
        let reports = reports.unwrap_or_default();
        for path in vm.machine.devices.iter().filter_map(|device| device.options.stored_at()) {
            let report = reports.iter().find(|disk| disk.path == path).map(|disk| &disk.report);
            let (told, stalled) = (report.map(|report| report.bytes), report.and_then(Stalled::of));
            let (vm, path) = (vm.machine.name.to_string(), path.to_owned());
            disks.push(Disk { vm, path, told, stalled, open: open.clone(), is_preserved: false });
        }
    }
    disks
}

/// The disks of the VMs that the host holds. They go along with every update. `kept` are those that it has open.
fn preserved_disks(vms: &[Guest], kept: &[KeptDisk]) -> Vec<Disk> {
    let mut disks = Vec::new();
    for machine in vms.iter().filter_map(Guest::kept_machine) {
        for path in machine.devices.iter().filter_map(|device| device.options.stored_at()) {
            let kept = kept.iter().find(|kept| kept.vm == machine.name && kept.path == path);
            disks.push(Disk {
                vm: machine.name.to_string(),
                path: path.to_owned(),
                told: kept.and_then(|kept| kept.bytes),
                stalled: None,
                open: kept.map(|kept| kept.place).into_iter().collect(),
                is_preserved: true,
            });
        }
    }
    disks
}

/// Checks that a disk answers. While it does not, its VM cannot be paused, and pages of the guest's RAM that its requests
/// use cannot be preserved.
fn stalled(disk: &Disk) -> Option<Finding> {
    let Stalled { count, seconds } = disk.stalled?;
    let sentence = format!(
        "the storage of the disk {} has not answered for {seconds} s (operations: {count})",
        disk.path.display()
    );
    Some(hangs(disk, sentence))
}

/// The finding that the storage of a disk hangs, as the sentence says.
fn hangs(disk: &Disk, sentence: String) -> Finding {
    let vm = &disk.vm;
    let remedy = match disk.is_preserved {
        true => "repair it before the VM is restored".to_owned(),
        false => format!("repair it, stop the VM, or leave the VM out (`--without {vm}`)"),
    };
    disk.finding(Check::DiskStalled, sentence, &remedy)
}

/// The finding about a disk of whose path nothing is known, because its storage does not answer.
fn unseen(disk: &Disk) -> Finding {
    let seconds = LOOK_WITHIN.as_secs();
    let sentence = format!(
        "the storage of the disk {} has not shown what is there for {seconds} s",
        disk.path.display()
    );
    hangs(disk, sentence)
}

/// Checks that a disk's path leads to what the VM has open, and that it is as large as the guest knows it. `found` is what
/// is at the path.
fn there(disk: &Disk, found: io::Result<Metadata>, root: &Path) -> Option<Finding> {
    let Disk { vm: _, path, told, stalled: _, open, is_preserved } = disk;
    let shown = path.display();
    let finding = |check, sentence, remedy| Some(disk.finding(check, sentence, remedy));
    let metadata = match found {
        Ok(metadata) => metadata,
        Err(error) => {
            let sentence = format!("the disk {shown} is not there for the next host: {error}");
            return finding(Check::DiskMissing, sentence, "bring it back to its path");
        }
    };
    let place = Place::of(&metadata);
    if !open.is_empty() && !open.contains(&place) {
        let (which, remedy) = match is_preserved {
            true => (
                "this host keeps for the VM, and which nobody keeps after the update",
                "put the one that the VM uses back before the update: it is lost if it has no other name",
            ),
            false => (
                "the VM has open",
                "put the one that the VM uses back, or stop the VM and boot it with the new one",
            ),
        };
        let sentence =
            format!("the disk {shown} is another file or device now than the one that {which}");
        return finding(Check::DiskOther, sentence, remedy);
    }
    let knows = |told| match is_preserved {
        true => format!("and had {told} when this host began to keep it"),
        false => format!("the guest knows it with {told}"),
    };
    let bytes = match place {
        Place::File { .. } => Some(metadata.len()),
        Place::BlockDevice(_) => size_of_block_device(root, metadata.rdev()),
    };
    match (bytes, told) {
        (Some(bytes), Some(told)) if bytes < *told => {
            let sentence = format!("the disk {shown} has {bytes} bytes, {}", knows(told));
            finding(Check::DiskSize, sentence, "make it as large as it was")
        }
        (Some(bytes), Some(told)) if bytes >> 9 > told >> 9 => {
            let when = if *is_preserved { "when it is restored" } else { "after the update" };
            let sentence = format!(
                "the disk {shown} has {bytes} bytes, {}: the guest will be told of the new size {when}",
                knows(told)
            );
            finding(Check::DiskGrown, sentence, "")
        }
        _ => None,
    }
}

/// Returns the number of a block device. `None` if it is something else.
fn block_device(metadata: &Metadata) -> Option<u64> {
    metadata.file_type().is_block_device().then(|| metadata.rdev())
}

/// Checks that more than its number tells the block device from others.
fn unidentified(disk: &Disk, number: u64, root: &Path) -> Option<Finding> {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let identity = Identity::of_device(root, major, minor).ok()?;
    identity.is_number_only().then(|| {
        let sentence = format!(
            "the disk {} has no serial number, and nothing but the device number {major}:{minor} tells it from others: the \
             next kernel may give that number to another disk, on which the VM would go on",
            disk.path.display()
        );
        let remedy = "give it a serial number (of a virtio disk: `serial=` of its hypervisor), or put a volume of LVM on it";
        disk.finding(Check::DiskUnidentified, sentence, remedy)
    })
}

/// Returns the size of a block device in bytes, as sysfs has it, in sectors of 512 bytes.
fn size_of_block_device(root: &Path, number: u64) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let path = root.join(format!("sys/dev/block/{major}:{minor}/size"));
    fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()?.checked_mul(512)
}

/// Checks that the next host mounts what holds the disk's file where this host has it. `mounted` is `/proc/mounts`.
fn hidden(disk: &Disk, mounted: &str, next: &Config) -> Option<Finding> {
    let path = &disk.path;
    if path.starts_with("/dev") {
        return None;
    }
    let problem = mounts::differ((path, mounted), (path, next))?;
    let sentence = format!("the disk {} {problem}", path.display());
    Some(disk.finding(Check::DiskHidden, sentence, mounts::REMEDY))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HostSection;
    use crate::guests::confinement::Confinement;
    use crate::guests::held::Held;
    use crate::live_update::manifest::vm_session;

    fn disk(path: &Path, told: Option<u64>) -> Disk {
        let open = fs::metadata(path).map(|metadata| vec![Place::of(&metadata)]);
        let (vm, open) = ("web".to_owned(), open.unwrap_or_default());
        Disk { vm, path: path.to_owned(), told, stalled: None, open, is_preserved: false }
    }

    fn look(disk: &Disk) -> Option<Finding> {
        there(disk, fs::metadata(&disk.path), Path::new("/"))
    }

    fn name(finding: Option<Finding>) -> Option<Check> {
        finding.map(|finding| finding.name)
    }

    #[test]
    fn a_disk_is_there_and_the_same_one_and_as_large_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.img");
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        assert_eq!(look(&disk(&path, Some(1 << 20))), None);
        assert_eq!(look(&disk(&path, None)), None, "what is unknown is no finding");
        assert_eq!(name(look(&disk(&path, Some(2 << 20)))), Some(Check::DiskSize));
        assert_eq!(name(look(&disk(&path, Some(1 << 19)))), Some(Check::DiskGrown));
        let opened = disk(&path, Some(1 << 20));
        let nothing_shown = Disk { open: Vec::new(), ..disk(&path, None) };
        // The old file must exist on, or the new one may get its number.
        fs::rename(&path, directory.path().join("old.img")).unwrap();
        let finding = look(&opened).unwrap();
        assert!(finding.sentence.contains("a.img") && finding.subject.contains("web"));
        assert_eq!(finding.name, Check::DiskMissing);
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        assert_eq!(name(look(&opened)), Some(Check::DiskOther));
        assert_eq!(look(&nothing_shown), None);
    }

    /// A VM that is preserved and has this disk.
    fn preserved(disk: &Path) -> Guest {
        let text = format!(
            "[[vm]]\nname = \"web\"\nmemory = \"size=64M\"\nkernel = \"/nowhere/kernel\"\ndisk = [\"path={}\"]\n",
            disk.display()
        );
        let machine = Config::parse(&text).unwrap().machines.remove(0);
        let held = Held::unretrieved(vm_session(&machine.name), Vec::new());
        let mut vm = Guest::new(machine, &Confinement::new(&HostSection::default()));
        vm.life = Life::Preserved { held, entry: None, why: Vec::new() };
        vm
    }

    #[test]
    fn a_disk_of_a_preserved_vm_is_looked_at_and_refuses_no_update() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.img");
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        let file = fs::File::open(&path).unwrap();
        let vms = [preserved(&path)];
        let name = || vms[0].machine.name.clone();
        let kept = [KeptDisk::new(name(), path.clone(), file.as_fd(), Some(1 << 20)).unwrap()];
        let around = Surroundings { vms: &vms, ..Surroundings::without_vms() };
        let found = |kept| {
            let found = check(&Surroundings { kept, ..around }, None);
            found.into_iter().map(|found| (found.name, found.sentence)).next()
        };
        assert_eq!((found(&kept), found(&[])), (None, None));
        let set_len =
            |bytes| fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(bytes);
        set_len(2 << 20).unwrap();
        assert_eq!(found(&kept).unwrap().0, Check::DiskGrown);
        set_len(1 << 19).unwrap();
        let (check, said) = found(&kept).unwrap();
        assert!(said.contains("524288 bytes") && said.contains("1048576"), "{said}");
        assert_eq!(
            (check, found(&[])),
            (Check::DiskPreserved, None),
            "what is unknown is no finding"
        );
        fs::rename(&path, directory.path().join("old.img")).unwrap();
        let (check, said) = found(&[]).unwrap();
        assert!(check == Check::DiskPreserved && said.contains("is not there"), "{said}");
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        let (check, said) = found(&kept).unwrap();
        assert!(check == Check::DiskPreserved && said.contains("another file"), "{said}");
        assert_eq!(found(&[]), None);
        let disk = Disk { is_preserved: true, ..disk(&path, None) };
        let mounted = "rootfs / rootfs rw 0 0\n/dev/vda /tmp ext4 rw 0 0\n";
        let findings = [unseen(&disk), hidden(&disk, mounted, &Config::default()).unwrap()];
        for finding in findings {
            assert_eq!((finding.name, finding.severity), (Check::DiskPreserved, Severity::Warning));
            assert!(!finding.can_be_forced && !finding.remedy.contains("--without"), "{finding}");
        }
    }

    #[test]
    fn an_open_file_is_recognized_without_asking_its_storage() {
        use std::os::fd::AsRawFd;
        for path in ["/dev/null", "/proc/self/exe", "/bin/sleep"] {
            let file = fs::File::open(path).unwrap();
            let shown = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            assert_eq!(Place::of_open(&shown), Some(Place::of(&file.metadata().unwrap())));
            assert_eq!(Place::of_fd(&file), Place::of_open(&shown));
        }
        assert_eq!(Place::of_open(Path::new("/proc/self/fd/nothing")), None);
    }

    #[test]
    fn a_disk_that_does_not_answer_is_named_with_its_vm_and_for_how_long() {
        let answers = disk(Path::new("/dev/vdc"), None);
        assert_eq!(stalled(&answers), None);
        let hangs = Disk { stalled: Some(Stalled { count: 2, seconds: 31 }), ..answers };
        let text = stalled(&hangs).unwrap().to_string();
        let told = ["VM `web`", "/dev/vdc", "31 s", "operations: 2", "--without web"];
        assert!(told.iter().all(|word| text.contains(word)), "{text}");
    }

    #[test]
    fn a_block_devices_size_is_read_from_sysfs() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("sys/dev/block/253:16");
        fs::create_dir_all(&directory).unwrap();
        let number = rustix::fs::makedev(253, 16);
        assert_eq!(size_of_block_device(root.path(), number), None);
        fs::write(directory.join("size"), "2048\n").unwrap();
        assert_eq!(size_of_block_device(root.path(), number), Some(1 << 20));
    }

    #[test]
    fn a_block_device_that_only_its_number_tells_from_others_is_a_warning() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("sys/dev/block/253:16");
        fs::create_dir_all(&directory).unwrap();
        let disk = disk(Path::new("/dev/vdb"), None);
        let look = || unidentified(&disk, rustix::fs::makedev(253, 16), root.path());
        let text = look().unwrap().to_string();
        let told = ["warning", "VM `web`", "/dev/vdb", "253:16", "`serial=`"];
        assert!(told.iter().all(|word| text.contains(word)), "{text}");
        fs::write(directory.join("serial"), "\n").unwrap();
        assert!(look().is_some(), "an empty number is none");
        fs::write(directory.join("serial"), "disk-7\n").unwrap();
        assert_eq!(look(), None);
        fs::remove_file(directory.join("serial")).unwrap();
        fs::create_dir(directory.join("dm")).unwrap();
        fs::write(directory.join("dm/uuid"), "LVM-abc\n").unwrap();
        assert_eq!(look(), None);
    }

    #[test]
    fn a_disk_that_the_next_host_mounts_over_or_not_at_all_is_found() {
        let mounted =
            "rootfs / rootfs rw 0 0\n/dev/vda /data ext4 rw 0 0\n/dev/vdb /data/b xfs rw 0 0\n";
        let config = |mounts: &[(&str, &str)]| {
            let mounts: Vec<String> = mounts
                .iter()
                .map(|(s, t)| format!("{{ source = \"{s}\", target = \"{t}\", type = \"ext4\" }}"))
                .collect();
            Config::parse(&format!("[host]\nmounts = [{}]\n", mounts.join(","))).unwrap()
        };
        let found = |path: &str, mounts: &[(&str, &str)]| {
            let finding = hidden(&disk(Path::new(path), None), mounted, &config(mounts));
            finding.map(|finding| finding.sentence)
        };
        let same = [("/dev/vda", "/data"), ("/dev/vdb", "/data/b")];
        assert_eq!(found("/data/a.img", &same), None);
        assert_eq!(found("/data/b/a.img", &same), None);
        assert_eq!(found("/dev/vdc", &[]), None);
        let moved = found("/data/a.img", &[("/dev/vda", "/elsewhere")]).unwrap();
        assert!(moved.contains("mounts nothing there") && moved.contains("/dev/vda"), "{moved}");
        let other = found("/data/a.img", &[("/dev/vdc", "/data")]).unwrap();
        assert!(other.contains("/dev/vdc on /data"), "{other}");
        let covered = [("/dev/vda", "/data"), ("/dev/vdd", "/data/b")];
        assert!(found("/data/b/a.img", &covered).unwrap().contains("/dev/vdd"));
        assert!(found("/images/a.img", &same).unwrap().contains("initramfs"));
    }
}
