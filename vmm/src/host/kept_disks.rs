//! The disks of VMs that are preserved or withheld. The memory of such a VM describes its disks as they are, so the host
//! keeps them open and locked, as the VM's process would: no other VM and no other program may use them meanwhile.
//!
//! A disk that cannot be opened is no error here: that may be why the VM is preserved. Whoever restores the VM opens its
//! disks again, so they are released before that.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, StatxFlags, fdatasync, statx};

use super::Host;
use crate::causes::chain;
use crate::devices::catalog::DeviceOptions;
use crate::devices::files::Opened;
use crate::guests::elsewhere::Elsewhere;
use crate::guests::{Guest, GuestError};
use crate::live_update::breakpoint;
use crate::live_update::preflight::KeptDisk;
use crate::machine::{Machine, VmName};

/// How long a disk that could not be opened is left alone.
const AGAIN_AFTER: Duration = Duration::from_secs(60);
/// How long whoever gives a VM up waits for its disks to be closed. Those of a dead server may take longer.
const CLOSED_WITHIN: Duration = Duration::from_millis(200);

/// The disks that the host keeps.
#[derive(Default)]
pub(super) struct KeptDisks {
    kept: Vec<Kept>,
    /// What the disks were like when the host opened them first. It stays when they are closed for an attempt to leave that
    /// is undone.
    was: BTreeMap<(VmName, PathBuf), Content>,
}

/// The disks of a VM.
struct Kept {
    vm: VmName,
    /// The disks of its machine.
    paths: Vec<PathBuf>,
    opened: Vec<OpenedDisk>,
    /// Those that are to be opened.
    missing: Vec<DeviceOptions>,
    /// Opens those that were missing. That may take long, or never end.
    opening: Option<Elsewhere<Vec<Tried>>>,
    /// When those that are missing are tried again.
    again_at: Instant,
}

/// A disk that the host has opened.
struct OpenedDisk {
    path: PathBuf,
    files: Vec<Opened>,
    /// What it was like when it was opened just now.
    found: Option<Content>,
}

/// A disk, or what is to be opened again, and why.
type Tried = Result<OpenedDisk, (DeviceOptions, String)>;

/// What shows that a disk was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// An image file.
    Image {
        bytes: u64,
        /// When it was written to: seconds since 1970, and nanoseconds.
        written: (i64, u32),
    },
    /// A block device: the sectors that were written and discarded since the machine started.
    BlockDevice { sectors: u64 },
}

impl Content {
    /// What the disk is like, as far as this machine knows: a server that may be gone is not asked. `None` if it cannot be
    /// known.
    fn of(disk: &[Opened]) -> Option<Self> {
        let wanted = StatxFlags::TYPE | StatxFlags::SIZE | StatxFlags::MTIME;
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = statx(&disk.first()?.fd, "", flags, wanted).ok()?;
        match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::RegularFile => {
                let written = (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec);
                Some(Self::Image { bytes: stat.stx_size, written })
            }
            FileType::BlockDevice => {
                Self::of_device(Path::new("/"), stat.stx_rdev_major, stat.stx_rdev_minor)
            }
            _ => None,
        }
    }

    /// Counts as sysfs below `root` does (Linux Documentation/block/stat.rst).
    fn of_device(root: &Path, major: u32, minor: u32) -> Option<Self> {
        const WRITTEN: usize = 6;
        const DISCARDED: usize = 13;
        let path = root.join(format!("sys/dev/block/{major}:{minor}/stat"));
        let stat = fs::read_to_string(path).ok()?;
        let count = |field| stat.split_whitespace().nth(field)?.parse::<u64>().ok();
        let sectors = count(WRITTEN)?.wrapping_add(count(DISCARDED).unwrap_or(0));
        Some(Self::BlockDevice { sectors })
    }

    /// A clause about what was written between the two looks. `None` if nothing was. An image of another size was made
    /// smaller or larger, as `truncate` does: a VM is restored with a disk that has grown.
    fn change(self, now: Self) -> Option<String> {
        let time = |(seconds, ns): (i64, u32)| format!("{seconds}.{ns:09}");
        match (self, now) {
            (Self::Image { bytes, written }, Self::Image { bytes: size, written: last })
                if bytes == size && written != last =>
            {
                let (was, is) = (time(written), time(last));
                Some(format!(
                    "the time of its last write was {was} and is {is} (seconds since 1970)"
                ))
            }
            (Self::BlockDevice { sectors: was }, Self::BlockDevice { sectors: is })
                if was != is =>
            {
                Some(format!("{was} sectors had been written or discarded, and now {is} have"))
            }
            _ => None,
        }
    }
}

/// Opens a disk. What was written to a block device is on it then, so that it does not count later.
fn open(options: DeviceOptions) -> Option<Tried> {
    let path = options.stored_at()?.to_owned();
    Some(match options.open() {
        Ok(files) => {
            // It may have been opened to be read only.
            let _ = files.first().map(|file| fdatasync(&file.fd));
            let found = Content::of(&files);
            Ok(OpenedDisk { path, files, found })
        }
        Err(error) => Err((options, chain(&error).join(": "))),
    })
}

impl Kept {
    fn new(machine: &Machine) -> Self {
        let disks = machine.devices.iter().filter(|device| device.options.stored_at().is_some());
        let missing = disks.map(|device| device.options.clone()).collect();
        let (vm, paths) = (machine.name.clone(), stored_at(machine));
        let again_at = Instant::now();
        Self { vm, paths, opened: Vec::new(), missing, opening: None, again_at }
    }

    /// Begins to open what is missing, if it is time.
    fn begin(&mut self) {
        if Instant::now() < self.again_at || (self.missing.is_empty() && self.opening.is_none()) {
            return;
        }
        self.again_at = Instant::now() + AGAIN_AFTER;
        if self.opening.is_some() {
            return;
        }
        let vm = &self.vm;
        let what = format!("opening the disks of the preserved VM `{vm}`");
        let missing = self.missing.clone();
        let open = move || missing.into_iter().filter_map(open).collect();
        match Elsewhere::begin("keep-disks", what, open) {
            Ok(opening) => {
                self.opening = Some(opening);
                self.missing.clear();
            }
            Err(error) => tracing::warn!("the disks of VM `{vm}` are not locked: {error}"),
        }
    }

    /// Takes over what was opened. `was` has what disks were like before.
    fn take(&mut self, was: &mut BTreeMap<(VmName, PathBuf), Content>) {
        let Some(tried) = self.opening.as_ref().and_then(Elsewhere::take) else { return };
        self.opening = None;
        for tried in tried.unwrap_or_default() {
            match tried {
                Ok(disk) => {
                    if let Some(found) = disk.found {
                        was.entry((self.vm.clone(), disk.path.clone())).or_insert(found);
                    }
                    self.opened.push(disk);
                }
                Err((options, why)) => {
                    let shown = options.stored_at().unwrap_or(Path::new("")).display();
                    let (vm, seconds) = (&self.vm, AGAIN_AFTER.as_secs());
                    tracing::warn!(
                        "the disk {shown} of the preserved VM `{vm}` is not locked, and tried again in {seconds} s: {why}"
                    );
                    self.missing.push(options);
                }
            }
        }
    }
}

/// The paths of a machine's disks.
fn stored_at(machine: &Machine) -> Vec<PathBuf> {
    let paths = machine.devices.iter().filter_map(|device| device.options.stored_at());
    paths.map(Path::to_owned).collect()
}

impl KeptDisks {
    /// Keeps the disks of these machines, and closes all others.
    fn keep(&mut self, wanted: &[&Machine]) {
        self.was.retain(|(vm, _), _| wanted.iter().any(|machine| machine.name == *vm));
        let is_wanted = |kept: &Kept, machine: &Machine| {
            machine.name == kept.vm && stored_at(machine) == kept.paths
        };
        self.retain(|kept| wanted.iter().any(|machine| is_wanted(kept, machine)));
        for machine in wanted {
            if !self.kept.iter().any(|kept| kept.vm == machine.name) {
                self.kept.push(Kept::new(machine));
            }
        }
        for kept in &mut self.kept {
            kept.take(&mut self.was);
            kept.begin();
        }
    }

    /// When the host opens a disk again that it could not open, or takes note that it could not.
    pub(super) fn due(&self) -> Option<Instant> {
        let is_waiting = |kept: &&Kept| !kept.missing.is_empty() || kept.opening.is_some();
        let waiting = self.kept.iter().filter(is_waiting);
        waiting.map(|kept| kept.again_at).min()
    }

    /// What the preflight compares with what is at the paths of the disks.
    pub(super) fn shown(&self) -> Vec<KeptDisk> {
        let disks =
            self.kept.iter().flat_map(|kept| kept.opened.iter().map(move |disk| (kept, disk)));
        let shown = disks.filter_map(|(Kept { vm, .. }, disk)| {
            let bytes = match self.was.get(&(vm.clone(), disk.path.clone())) {
                Some(Content::Image { bytes, .. }) => Some(*bytes),
                _ => None,
            };
            let open = disk.files.first()?.fd.as_fd();
            KeptDisk::new(vm.clone(), disk.path.clone(), open, bytes)
        });
        shown.collect()
    }

    /// Closes the disks of a VM that is restored.
    pub(super) fn release(&mut self, vm: &VmName) {
        drop(self.retain(|kept| kept.vm != *vm));
    }

    /// Closes the disks of a VM that is given up: another program may use them when this has returned.
    pub(super) fn give_up(&mut self, vm: &VmName) {
        if let Some(closing) = self.retain(|kept| kept.vm != *vm)
            && closing.wait_for(CLOSED_WITHIN).is_none()
        {
            tracing::warn!(
                "the disks of VM `{vm}` are not closed yet: their storage does not answer"
            );
        }
    }

    /// Closes the disks of all VMs. Before this process ends or becomes another program, which would close them, too, with
    /// all guests paused.
    pub(super) fn release_all(&mut self) {
        drop(self.retain(|_| false));
    }

    /// Closes the disks that are not `wanted`. On a server that is gone, that may take long, so it is done elsewhere.
    fn retain(&mut self, wanted: impl Fn(&Kept) -> bool) -> Option<Elsewhere<()>> {
        let closed: Vec<Kept> = self.kept.extract_if(.., |kept| !wanted(kept)).collect();
        if closed.is_empty() {
            return None;
        }
        let what = "closing the disks of a VM that was preserved".to_owned();
        let close = move || {
            for kept in closed {
                // What is opened only now is closed, too.
                if let Some(opening) = kept.opening {
                    drop(opening.wait());
                }
            }
        };
        let closing = Elsewhere::begin("close-disks", what, close);
        closing
            .inspect_err(|error| {
                tracing::debug!("the disks of a VM that was preserved are closed here: {error}");
            })
            .ok()
    }

    /// Errors if something was written to a disk of the VM since the host keeps it.
    pub(super) fn check_unchanged(&mut self, vm: &VmName) -> Result<(), GuestError> {
        let Some(kept) = self.kept.iter_mut().find(|kept| kept.vm == *vm) else { return Ok(()) };
        kept.take(&mut self.was);
        for OpenedDisk { path, files, .. } in &kept.opened {
            let was = self.was.get(&(vm.clone(), path.clone()));
            let change = was.zip(Content::of(files)).and_then(|(was, now)| was.change(now));
            if let Some(how) = change {
                let (name, path) = (vm.clone(), path.clone());
                return Err(GuestError::DiskWritten { name, path, how });
            }
        }
        Ok(())
    }
}

impl Host {
    /// Keeps the disks of the VMs that are preserved or withheld, and closes those of all others. The disks of a VM that is
    /// late are opened for its restore.
    pub(super) fn keep_disks(&mut self) {
        breakpoint::reach("keep-disks", None);
        let is_late = |name: &VmName| self.late.iter().any(|late| late.name() == name);
        let wanted = self.vms.iter().filter_map(Guest::kept_machine);
        let wanted: Vec<&Machine> = wanted.filter(|machine| !is_late(&machine.name)).collect();
        self.kept_disks.keep(&wanted);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::config::Config;

    /// An image in a new directory, and a machine with it.
    fn image() -> (tempfile::TempDir, PathBuf, Machine) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.img");
        fs::write(&path, [0; 4096]).unwrap();
        let machine = machine(&path);
        (directory, path, machine)
    }

    fn machine(disk: &Path) -> Machine {
        let disk = disk.display();
        let text = format!(
            "[[vm]]\nname = \"web\"\nmemory = \"size=64M\"\nkernel = \"/nowhere/kernel\"\ndisk = [\"path={disk}\"]\n"
        );
        Config::parse(&text).unwrap().machines.remove(0)
    }

    /// Keeps the machine's disk until it was opened, or could not be.
    fn keep(kept: &mut KeptDisks, machine: &Machine) {
        kept.keep(&[machine]);
        while kept.kept[0].opening.is_some() {
            kept.keep(&[machine]);
            std::thread::yield_now();
        }
    }

    fn open(machine: &Machine) -> Result<(), String> {
        let disk = machine.devices.iter().find(|device| device.options.stored_at().is_some());
        let opened = disk.unwrap().options.open();
        opened.map(drop).map_err(|error| chain(&error).join(": "))
    }

    /// Writes to the file without another size, long ago.
    fn write(path: &Path) {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(b"another program", 0).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(7)).unwrap();
    }

    #[test]
    fn a_disk_that_is_kept_is_in_use_until_its_vm_is_given_up() {
        let (_directory, _, machine) = image();
        let mut kept = KeptDisks::default();
        keep(&mut kept, &machine);
        let error = open(&machine).unwrap_err();
        assert!(error.contains("web.img") && error.contains("it is in use"), "{error}");
        kept.give_up(&machine.name);
        open(&machine).unwrap();
        // Also while it is being opened.
        kept.keep(&[&machine]);
        kept.give_up(&machine.name);
        open(&machine).unwrap();
    }

    #[test]
    fn a_disk_that_could_not_be_opened_is_tried_again_later() {
        let (_directory, path, machine) = image();
        fs::remove_file(&path).unwrap();
        let mut kept = KeptDisks::default();
        kept.keep(&[&machine]);
        assert!(kept.due().is_some(), "or nobody learns that it could not be opened");
        keep(&mut kept, &machine);
        let due = kept.due().unwrap();
        assert!(due > Instant::now());
        fs::write(&path, [0; 4096]).unwrap();
        keep(&mut kept, &machine);
        assert_eq!((kept.due(), kept.kept[0].opened.len()), (Some(due), 0), "not before its time");
        kept.kept[0].again_at = Instant::now();
        keep(&mut kept, &machine);
        assert_eq!(kept.due(), None);
        assert!(open(&machine).unwrap_err().contains("it is in use"));
    }

    #[test]
    fn another_description_of_the_vm_brings_other_disks() {
        let (directory, path, machine) = image();
        let mut kept = KeptDisks::default();
        keep(&mut kept, &machine);
        let other = directory.path().join("other.img");
        fs::copy(path, &other).unwrap();
        let renamed = super::tests::machine(&other);
        keep(&mut kept, &renamed);
        assert!(open(&renamed).unwrap_err().contains("it is in use"));
    }

    #[test]
    fn an_image_that_was_written_to_is_noticed_and_one_that_has_grown_is_not_meant() {
        let (_directory, path, machine) = image();
        let mut kept = KeptDisks::default();
        keep(&mut kept, &machine);
        kept.check_unchanged(&machine.name).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(8192).unwrap();
        kept.check_unchanged(&machine.name).unwrap();
        file.set_len(4096).unwrap();
        write(&path);
        let error = kept.check_unchanged(&machine.name).unwrap_err().to_string();
        for part in ["`web`", "web.img", "7.000000000", "--force"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn what_was_written_before_an_attempt_to_leave_is_still_noticed_when_it_is_undone() {
        let (_directory, path, machine) = image();
        let mut kept = KeptDisks::default();
        keep(&mut kept, &machine);
        kept.release_all();
        write(&path);
        keep(&mut kept, &machine);
        kept.check_unchanged(&machine.name).unwrap_err();
        // It was given up, or restored: what is preserved later is another state.
        kept.keep(&[]);
        keep(&mut kept, &machine);
        kept.check_unchanged(&machine.name).unwrap();
    }

    #[test]
    fn writes_and_discards_of_a_block_device_are_counted() {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("sys/dev/block/253:0");
        fs::create_dir_all(&device).unwrap();
        let content = |stat: &str| {
            fs::write(device.join("stat"), stat).unwrap();
            Content::of_device(root.path(), 253, 0)
        };
        // As Linux 6.12 shows them, and one from before discards were counted.
        let before = content("  10 0 80 1 5 2 4096 3 0 4 5 0 0 0 0 1 1\n").unwrap();
        let read = content("  99 0 990 1 5 2 4096 3 0 4 5 0 0 0 0 1 1\n").unwrap();
        assert_eq!(before.change(read), None);
        let written = content("  10 0 80 1 6 2 4104 3 0 4 5 0 0 0 0 1 1\n").unwrap();
        let said = before.change(written).unwrap();
        assert!(said.contains("4096") && said.contains("4104"), "{said}");
        let discarded = content("  10 0 80 1 5 2 4096 3 0 4 5 1 0 8 0 1 1\n").unwrap();
        assert!(before.change(discarded).is_some());
        let old = content("  10 0 80 1 5 2 4096 3 0 4 5\n").unwrap();
        assert_eq!(before.change(old), None);
        assert_eq!((content("garbage"), Content::of_device(root.path(), 1, 1)), (None, None));
    }
}
