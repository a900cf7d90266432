//! One machine a disk: locks on images, so that no other VM, of this host or another program, writes to a disk that is
//! in use, or uses one that is written to.
//!
//! The locks are those of open file descriptions (fcntl(2), `F_OFD_SETLK`). They go along with the file to the VM's
//! process, and the kernel drops them when the last process that has the file has ended: a disk cannot be
//! opened for the next process of a VM while the last one may still write. They are understood by the other
//! programs that lock images:
//!
//! * Cloud Hypervisor locks the whole file: for writing, or for reading if the disk is read-only.
//! * QEMU (docs/system/qemu-block-drivers, "Disk image file locking") locks single bytes for reading: byte 100 + N
//!   says that it uses permission N, byte 200 + N that it lets nobody else have it. Before that it looks
//!   whether the other byte is locked. Permission 0 is to read, 1 to write, 3 to resize.
//!
//! A block device is also opened exclusively (`O_EXCL`), which fails if it is mounted or part of a volume.

#![expect(unsafe_code, reason = "rustix has no locks of open file descriptions")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

/// A program of the host that ends may have its files open for a moment longer, because io_uring closes them in
/// the background.
const WITHIN: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

/// The bytes that a reader locks: it reads, and lets nobody write or resize.
const READER: [i64; 3] = [100, 201, 203];
/// The bytes that a writer of QEMU has locked.
const WRITER: [i64; 2] = [101, 103];

/// Why a file cannot be locked.
#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    /// Somebody else has a lock.
    Busy,
    /// The file system has no locks.
    NoLocks(io::ErrorKind),
}

/// Calls `open` and locks the file that it opens. Tries again for a moment while the file is busy.
pub(super) fn open_locked(
    read_only: bool,
    open: impl Fn() -> io::Result<File>,
) -> io::Result<File> {
    let deadline = Instant::now() + WITHIN;
    loop {
        let opened = open().and_then(|file| match lock(&file, read_only) {
            Ok(()) => Ok(file),
            Err(Refusal::NoLocks(why)) => {
                tracing::warn!("a disk cannot be locked, other programs may use it as well: {why}");
                Ok(file)
            }
            Err(Refusal::Busy) => Err(io::ErrorKind::ResourceBusy.into()),
        });
        match opened {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                if Instant::now() >= deadline {
                    return Err(io::Error::new(error.kind(), in_use(read_only)));
                }
                thread::sleep(PAUSE);
            }
            other => return other,
        }
    }
}

fn in_use(read_only: bool) -> &'static str {
    match read_only {
        true => "it is in use: another VM or program may write to it",
        false => {
            "it is in use: another VM or program has it open, or it is mounted, or this VM has it twice"
        }
    }
}

fn lock(file: &File, read_only: bool) -> Result<(), Refusal> {
    if !read_only {
        return set(file, libc::F_WRLCK, 0, 0);
    }
    for byte in READER {
        set(file, libc::F_RDLCK, byte, 1)?;
    }
    match WRITER.into_iter().any(|byte| is_locked(file, byte)) {
        true => Err(Refusal::Busy),
        false => Ok(()),
    }
}

fn range(kind: i32, start: i64, bytes: i64) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: bytes,
        l_pid: 0,
    }
}

/// Locks `bytes` bytes from `start` on; 0 are all.
fn set(file: &File, kind: i32, start: i64, bytes: i64) -> Result<(), Refusal> {
    let wanted = range(kind, start, bytes);
    // SAFETY: the fd is open, and the kernel only reads the structure, which outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const wanted) } {
        0 => Ok(()),
        _ => Err(match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Refusal::Busy
            }
            error => Refusal::NoLocks(error.kind()),
        }),
    }
}

/// Whether another open file has a lock on `byte`. Not known is taken for no: the own locks are in place.
fn is_locked(file: &File, byte: i64) -> bool {
    let mut found = range(libc::F_WRLCK, byte, 1);
    // SAFETY: the fd is open, and the kernel writes to the structure only during the call.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut found) };
    asked == 0 && found.l_type != libc::F_UNLCK as i16
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    struct Image(tempfile::NamedTempFile);

    impl Image {
        fn new() -> Self {
            Self(tempfile::NamedTempFile::new().unwrap())
        }

        fn open(&self, read_only: bool) -> File {
            OpenOptions::new().read(true).write(!read_only).open(self.0.path()).unwrap()
        }

        /// Opens and locks it.
        fn take(&self, read_only: bool) -> Result<File, Refusal> {
            let file = self.open(read_only);
            lock(&file, read_only).map(|()| file)
        }
    }

    #[test]
    fn a_disk_has_one_writer_or_any_number_of_readers() {
        let image = Image::new();
        let writer = image.take(false).unwrap();
        assert_eq!(image.take(false).unwrap_err(), Refusal::Busy);
        assert_eq!(image.take(true).unwrap_err(), Refusal::Busy);
        let passed_on = writer.try_clone().unwrap();
        drop(writer);
        assert_eq!(image.take(false).unwrap_err(), Refusal::Busy, "a VM's process still has it");
        drop(passed_on);
        let readers = [image.take(true).unwrap(), image.take(true).unwrap()];
        assert_eq!(image.take(false).unwrap_err(), Refusal::Busy);
        drop(readers);
        image.take(false).unwrap();
    }

    #[test]
    fn qemu_and_cloud_hypervisor_are_noticed_and_notice() {
        let image = Image::new();
        // A writer of QEMU uses permissions 0, 1 and 3 and lets nobody else write or resize.
        let qemu = image.open(false);
        for byte in [100, 101, 103, 201, 203] {
            set(&qemu, libc::F_RDLCK, byte, 1).unwrap();
        }
        assert_eq!(image.take(false).unwrap_err(), Refusal::Busy);
        assert_eq!(image.take(true).unwrap_err(), Refusal::Busy);
        drop(qemu);

        // A reader of QEMU and a reader of ours get along.
        let qemu = image.open(true);
        for byte in [100, 201, 203] {
            set(&qemu, libc::F_RDLCK, byte, 1).unwrap();
        }
        let reader = image.take(true).unwrap();
        assert_eq!(image.take(false).unwrap_err(), Refusal::Busy);
        drop(qemu);
        let qemu = image.open(false);
        assert!(is_locked(&qemu, 201), "a writer of QEMU would see that nobody may write");
        drop((qemu, reader));

        let writer = image.take(false).unwrap();
        let qemu = image.open(true);
        assert_eq!(set(&qemu, libc::F_RDLCK, 100, 1), Err(Refusal::Busy));
        drop((qemu, writer));

        let other = image.open(false);
        set(&other, libc::F_WRLCK, 0, 0).unwrap();
        assert_eq!(image.take(true).unwrap_err(), Refusal::Busy);
    }

    #[test]
    fn a_lock_that_goes_within_a_moment_is_waited_for_and_one_that_stays_is_an_error() {
        let image = Image::new();
        let old = image.take(false).unwrap();
        let ends = thread::spawn(move || {
            thread::sleep(PAUSE * 4);
            drop(old);
        });
        let held = open_locked(false, || Ok(image.open(false))).unwrap();
        ends.join().unwrap();
        let error = open_locked(true, || Ok(image.open(true))).unwrap_err();
        assert!(error.to_string().contains("it is in use"), "{error}");
        drop(held);
    }
}
