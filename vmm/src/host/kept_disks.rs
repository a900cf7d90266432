//! The disks of VMs that are preserved or withheld. The memory of such a VM describes its disks as they are, so the host
//! keeps them open and locked, as the VM's process would: no other VM and no other program may use them meanwhile.
//!
//! A disk that cannot be opened is no error here: that may be why the VM is preserved. Whoever restores the VM opens its
//! disks again, so they are released before that.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, StatxFlags, statx};

use super::Host;
use crate::causes::chain;
use crate::devices::catalog::DeviceOptions;
use crate::devices::files::{OpenError, Opened};
use crate::guests::elsewhere::Elsewhere;
use crate::guests::{Guest, GuestError, Life};
use crate::machine::{Machine, VmName};

/// The disks that the host keeps.
#[derive(Default)]
pub(super) struct KeptDisks(Vec<Kept>);

/// The disks of a VM.
struct Kept {
    vm: VmName,
    /// Opens them. That may take long, or never end.
    opening: Elsewhere<Vec<KeptDisk>>,
    opened: Vec<KeptDisk>,
}

/// A disk that the host has opened.
struct KeptDisk {
    path: PathBuf,
    files: Vec<Opened>,
    /// What an image file was like then. `None` for a block device.
    was: Option<Content>,
}

/// What shows that an image file was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Content {
    bytes: u64,
    /// When it was written to: seconds since 1970, and nanoseconds.
    written: (i64, u32),
}

impl Content {
    /// What `file` is like, as far as this machine knows: a server that may be gone is not asked. `None` if it is not a
    /// regular file, or cannot be asked.
    fn of(file: impl AsFd) -> Option<Self> {
        let wanted = StatxFlags::TYPE | StatxFlags::SIZE | StatxFlags::MTIME;
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = statx(file, "", flags, wanted).ok()?;
        let is_file = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile;
        let written = (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec);
        is_file.then_some(Self { bytes: stat.stx_size, written })
    }

    /// Whether something was written between the two looks. An image of another size was made smaller or larger, as
    /// `truncate` does: a VM is restored with a disk that has grown.
    fn differs(self, now: Self) -> bool {
        self.written != now.written && self.bytes == now.bytes
    }
}

impl KeptDisk {
    /// The disk at `path`, if it could be opened.
    fn new(path: &Path, opened: Result<Vec<Opened>, OpenError>) -> Option<Self> {
        match opened {
            Ok(files) => {
                let was = files.first().and_then(|file| Content::of(&file.fd));
                Some(Self { path: path.to_owned(), files, was })
            }
            Err(error) => {
                let (shown, why) = (path.display(), chain(&error).join(": "));
                tracing::warn!("the disk {shown} of a preserved VM is not locked: {why}");
                None
            }
        }
    }

    /// Returns what the image was and is like, if something was written to it since it was opened.
    fn change(&self) -> Option<(Content, Content)> {
        let now = self.files.first().and_then(|file| Content::of(&file.fd));
        self.was.zip(now).filter(|(was, now)| was.differs(*now))
    }
}

impl KeptDisks {
    /// Begins to open and lock the disks of `machine`.
    fn keep(&mut self, machine: &Machine) {
        let disks = machine.devices.iter().filter(|device| device.options.stored_at().is_some());
        let disks: Vec<_> = disks.map(|device| device.options.clone()).collect();
        let open = move || {
            let open = |disk: &DeviceOptions| KeptDisk::new(disk.stored_at()?, disk.open());
            disks.iter().filter_map(open).collect()
        };
        let vm = machine.name.clone();
        let what = format!("opening the disks of the preserved VM `{vm}`");
        match Elsewhere::begin("keep-disks", what, open) {
            Ok(opening) => self.0.push(Kept { vm, opening, opened: Vec::new() }),
            Err(error) => tracing::warn!("the disks of VM `{vm}` are not locked: {error}"),
        }
    }

    /// Closes the disks of a VM.
    pub(super) fn release(&mut self, vm: &VmName) {
        self.retain(|kept| kept.vm != *vm);
    }

    /// Closes the disks of all VMs. Before this process ends or becomes another program, which would close them, too, with
    /// all guests paused.
    pub(super) fn release_all(&mut self) {
        self.retain(|_| false);
    }

    /// Closes the disks that are not `wanted`. On a server that is gone, that may take long, so it is done elsewhere.
    fn retain(&mut self, wanted: impl Fn(&Kept) -> bool) {
        let closed: Vec<Kept> = self.0.extract_if(.., |kept| !wanted(kept)).collect();
        if closed.is_empty() {
            return;
        }
        let what = "closing the disks of a VM that was preserved".to_owned();
        if let Err(error) = Elsewhere::begin("close-disks", what, move || drop(closed)) {
            tracing::debug!("the disks of a VM that was preserved are closed here: {error}");
        }
    }

    /// Errors if something was written to an image of the VM since the host keeps it.
    pub(super) fn check_unchanged(&mut self, vm: &VmName) -> Result<(), GuestError> {
        let Some(kept) = self.0.iter_mut().find(|kept| kept.vm == *vm) else { return Ok(()) };
        kept.opened.extend(kept.opening.take().and_then(Result::ok).into_iter().flatten());
        let change = |disk: &KeptDisk| disk.change().map(|change| (disk.path.clone(), change));
        match kept.opened.iter().find_map(change) {
            Some((path, (was, now))) => {
                let time = |(seconds, ns): (i64, u32)| format!("{seconds}.{ns:09}");
                let (was, now) = (time(was.written), time(now.written));
                Err(GuestError::DiskWritten { name: vm.clone(), path, was, now })
            }
            None => Ok(()),
        }
    }
}

/// The description of the machine whose disks are to be kept. `None` if the VM is neither preserved nor withheld.
fn to_keep(vm: &Guest) -> Option<&Machine> {
    match &vm.life {
        Life::Preserved { entry: Some(entry), .. } => Some(&entry.machine),
        Life::Preserved { entry: None, .. } | Life::Withheld(_) => Some(&vm.machine),
        _ => None,
    }
}

impl Host {
    /// Keeps the disks of the VMs that are preserved or withheld, and closes those of all others. The disks of a VM that is
    /// late are opened for its restore.
    pub(super) fn keep_disks(&mut self) {
        let is_late = |name: &VmName| self.late.iter().any(|late| late.name() == name);
        let wanted = self.vms.iter().filter_map(to_keep);
        let wanted: Vec<&Machine> = wanted.filter(|machine| !is_late(&machine.name)).collect();
        self.kept_disks.retain(|kept| wanted.iter().any(|machine| machine.name == kept.vm));
        for machine in wanted {
            if !self.kept_disks.0.iter().any(|kept| kept.vm == machine.name) {
                self.kept_disks.keep(machine);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
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

    fn kept(machine: &Machine) -> KeptDisks {
        let mut kept = KeptDisks::default();
        kept.keep(machine);
        let Kept { opening, opened, .. } = &mut kept.0[0];
        while opened.is_empty() {
            opened.extend(opening.take().into_iter().flat_map(Result::unwrap));
            std::thread::yield_now();
        }
        kept
    }

    #[test]
    fn a_disk_that_is_kept_is_in_use_until_it_is_released() {
        let (_directory, _, machine) = image();
        let open = || {
            let mut disks = machine.devices.iter().filter(|d| d.options.stored_at().is_some());
            disks.next().unwrap().options.open()
        };
        let mut kept = kept(&machine);
        let error = chain(&open().unwrap_err()).join(": ");
        assert!(error.contains("web.img") && error.contains("it is in use"), "{error}");
        kept.release(&machine.name);
        open().unwrap();
    }

    #[test]
    fn an_image_that_was_written_to_is_noticed_and_one_that_has_grown_is_not_meant() {
        let (_directory, path, machine) = image();
        let mut kept = kept(&machine);
        kept.check_unchanged(&machine.name).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(8192).unwrap();
        kept.check_unchanged(&machine.name).unwrap();
        file.set_len(4096).unwrap();
        file.write_all_at(b"another program", 0).unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(7);
        file.set_modified(long_ago).unwrap();
        let error = kept.check_unchanged(&machine.name).unwrap_err().to_string();
        for part in ["`web`", "web.img", "7.000000000", "--force"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}
