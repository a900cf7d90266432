//! Finds a kernel, an initramfs and a command line on the guest's own disk, as a boot loader does.
//!
//! ```text
//!   disk --partitions--> views --file_system--> /loader/entries, grub.cfg --> kernel, initramfs, command line
//! ```
//!
//! Where the files of an entry are missing or damaged, as after an upgrade that was interrupted, the next entry is
//! tried. So what is found is a row of entries, in the order in which they are tried.
//!
//! The search runs in the VM's process and reads the disk through the file descriptor that the host opened for
//! it. It writes nothing but GRUB's environment block, and only as the guest's own script for GRUB says. Every byte
//! of the disk is the guest's. So the search has bounds for all that it keeps, and
//! runs on a thread of its own: it ends with an error after [`WITHIN`], whatever the disk claims, and a panic in
//! a crate that reads file systems is an error of the search.

mod entry;
mod file_system;
mod grub;
mod image;
mod initramfs;
mod journal;
mod loader_spec;
mod partitions;
mod rewrite;
mod search;
mod unified;
mod view;

#[cfg(test)]
mod fedora_tests;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod grown_tests;
#[cfg(test)]
mod interrupted_tests;
#[cfg(test)]
mod partition_tests;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, fstat, ioctl_blksszget};

pub use self::entry::{Boot, Booted, LoadError};
pub use self::image::Image;
use self::search::Search;
use self::view::View;
use crate::causes::panic_message;

/// The longest time in which a disk is searched and its kernel is loaded.
pub const WITHIN: Duration = Duration::from_secs(20);

/// Stack of the thread: `fatfs` follows a path by a call for each directory.
const STACK: usize = 8 << 20;
/// Most bytes of a text from the disk in an error.
const EXCERPT: usize = 80;

/// Nothing can be booted from a disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootDiskError {
    /// The disk cannot be read.
    #[error("the disk cannot be read")]
    Read(#[source] io::Error),
    /// The disk has nothing that can be booted.
    #[error(
        "looked for boot loader entries (/loader/entries/*.conf, also under /boot), unified kernel images \
         (/EFI/Linux/*.efi) and GRUB's configuration (/boot/grub/grub.cfg, /grub/grub.cfg, also in grub2) on \
         ext4 and FAT; the disk has {found}. Give the VM a `kernel` with its `initramfs` and `cmdline` in place \
         of `boot = \"disk\"`, or a disk with /boot on ext4 or FAT"
    )]
    Nothing {
        /// What the disk has.
        found: String,
    },
    /// It takes too long.
    #[error("reading it took more than {} s: the disk is damaged, or too slow", WITHIN.as_secs())]
    Late,
    /// A reader of file systems panicked.
    #[error("its file systems confuse their reader, which says: {0}")]
    Confused(String),
    /// The thread cannot be started.
    #[error("cannot start the thread that reads the disk")]
    Thread(#[source] io::Error),
}

/// Searches `disk` and calls `load` with each entry in turn until one is loaded, on a thread of their own.
pub fn boot<T: Send + 'static, E: Send + 'static>(
    disk: File,
    mut load: impl FnMut(Boot) -> Result<T, LoadError<E>> + Send + 'static,
) -> Result<Result<Booted<T>, E>, BootDiskError> {
    let deadline = Instant::now() + WITHIN;
    let (sender, receiver) = mpsc::channel();
    let search = move || {
        let found = catch_unwind(AssertUnwindSafe(|| {
            let sector = sector_bytes(&disk).map_err(BootDiskError::Read)?;
            find(disk, sector, deadline, &mut load)
        }));
        let found = found.unwrap_or_else(|panic| Err(confused(&*panic)));
        // The receiver is gone if this is too late.
        drop(sender.send(found));
    };
    let name = "boot-disk".to_owned();
    let started = thread::Builder::new().name(name).stack_size(STACK).spawn(search);
    started.map_err(BootDiskError::Thread)?;
    match receiver.recv_timeout(WITHIN) {
        Ok(found) => found,
        // The thread may still run; the VM's process ends when its host hears of this error.
        Err(RecvTimeoutError::Timeout) => Err(BootDiskError::Late),
        Err(RecvTimeoutError::Disconnected) => Err(BootDiskError::Confused("nothing".to_owned())),
    }
}

fn confused(panic: &(dyn Any + Send)) -> BootDiskError {
    BootDiskError::Confused(excerpt(&panic_message(panic)))
}

/// Text from the disk for an error: printable, short, on one line.
fn excerpt(text: &str) -> String {
    let mut short: String = text.chars().take(EXCERPT).flat_map(char::escape_default).collect();
    if text.chars().nth(EXCERPT).is_some() {
        short.push_str("...");
    }
    short
}

/// Size of the logical sectors of `disk`, which its partition table counts in: those of a block device, as its guest
/// sees it, and 512 bytes of an image file, wherever that is stored.
fn sector_bytes(disk: &File) -> io::Result<u64> {
    match FileType::from_raw_mode(fstat(disk)?.st_mode) {
        FileType::BlockDevice => Ok(ioctl_blksszget(disk)?.into()),
        _ => Ok(512),
    }
}

/// Returns what `load` made of the first entry that can be loaded of `disk`, which has sectors of `sector` bytes.
fn find<T, E>(
    disk: File,
    sector: u64,
    deadline: Instant,
    load: &mut dyn FnMut(Boot) -> Result<T, LoadError<E>>,
) -> Result<Result<Booted<T>, E>, BootDiskError> {
    let search = || {
        let mut search = Search::new(View::whole(disk, deadline)?, sector)?;
        Ok(search.boot(load).ok_or_else(|| search.description()))
    };
    match search() {
        Ok(Ok(booted)) => Ok(booted),
        _ if Instant::now() > deadline => Err(BootDiskError::Late),
        Ok(Err(found)) => Err(BootDiskError::Nothing { found }),
        Err(error) => Err(BootDiskError::Read(error)),
    }
}
