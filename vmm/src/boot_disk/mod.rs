//! Finds a kernel, an initramfs and a command line on the guest's own disk, as a boot loader does.
//!
//! ```text
//!   disk --partitions--> views --file_system--> /loader/entries, grub.cfg --> kernel, initramfs, command line
//! ```
//!
//! The search runs in the VM's process and reads the disk through the file descriptor that the host opened for
//! it. It writes nothing but GRUB's environment block, and only as the guest's own script for GRUB says. Every byte
//! of the disk is the guest's. So the search has bounds for all that it keeps, and
//! runs on a thread of its own: it ends with an error after [`WITHIN`], whatever the disk claims, and a panic in
//! a crate that reads file systems is an error of the search.

mod file_system;
mod grub;
mod image;
mod journal;
mod loader_spec;
mod partitions;
mod rewrite;
mod unified;
mod view;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use self::file_system::{FileSystem, FileSystemError, Found};
use self::grub::{Chosen, Place, Save, Volumes};
pub use self::image::Image;
use self::partitions::{Partition, Scheme};
use self::rewrite::RewriteError;
use self::unified::{Section, Unified, UnifiedError};
use self::view::View;
use crate::causes::panic_message;

/// The longest time in which a disk is searched and its kernel is loaded.
pub const WITHIN: Duration = Duration::from_secs(20);

/// Stack of the thread: `fatfs` follows a path by a call for each directory.
const STACK: usize = 8 << 20;
/// Most partitions whose file systems are opened.
const VOLUMES: usize = 32;
/// Most bytes of a kernel. An initramfs is limited by the guest's RAM.
const KERNEL_MAX: u64 = 256 << 20;
/// Most bytes of a configuration file.
const TEXT_MAX: u64 = 1 << 20;
/// Most boot loader entries of a file system.
const ENTRIES: usize = 256;
/// Most bytes of a text from the disk in an error.
const EXCERPT: usize = 80;
/// Most notes about what was found in an error.
const NOTES: usize = 40;

/// Where boot loader entries are: on the ESP or a boot partition, or in a root file system.
const LOADER: [&str; 2] = ["/loader", "/boot/loader"];
/// Where unified kernel images are, and the most bytes of one.
const UNIFIED: &str = "/EFI/Linux";
const UNIFIED_MAX: u64 = 1 << 30;
/// Where GRUB's configuration is: in a root file system, or on a boot partition.
const GRUB: [&str; 4] =
    ["/boot/grub/grub.cfg", "/grub/grub.cfg", "/boot/grub2/grub.cfg", "/grub2/grub.cfg"];

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

/// What a disk boots.
pub struct Boot {
    /// The kernel.
    pub kernel: Image,
    /// The initramfs, if there is one.
    pub initramfs: Option<Image>,
    /// The command line.
    pub cmdline: String,
    /// Which entry of which configuration this is, for people.
    pub origin: String,
    /// What an operator should know about it.
    pub warnings: Vec<String>,
}

/// Searches `disk` and calls `load` with what was found, both on a thread of their own.
pub fn boot<T: Send + 'static>(
    disk: File,
    load: impl FnOnce(Boot) -> T + Send + 'static,
) -> Result<T, BootDiskError> {
    let deadline = Instant::now() + WITHIN;
    let (sender, receiver) = mpsc::channel();
    let search = move || {
        let found = catch_unwind(AssertUnwindSafe(|| find(disk, deadline).map(load)));
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

/// Returns what `disk` boots.
fn find(disk: File, deadline: Instant) -> Result<Boot, BootDiskError> {
    let search = || {
        let mut search = Search::new(View::whole(disk, deadline)?)?;
        let found = search.loader_entries().or_else(|| search.grub());
        Ok(found.ok_or_else(|| search.description()))
    };
    match search() {
        Ok(Ok(boot)) => Ok(boot),
        _ if Instant::now() > deadline => Err(BootDiskError::Late),
        Ok(Err(found)) => Err(BootDiskError::Nothing { found }),
        Err(error) => Err(BootDiskError::Read(error)),
    }
}

/// A partition with its file system.
struct Volume {
    partition: Partition,
    file_system: Result<FileSystem, FileSystemError>,
}

/// A disk that is searched.
struct Search {
    disk: View,
    scheme: Scheme,
    volumes: Vec<Volume>,
    /// What was found and cannot be booted.
    notes: Vec<String>,
}

impl Search {
    fn new(mut disk: View) -> io::Result<Self> {
        let whole = FileSystem::open(disk.again());
        let table = partitions::read(&mut disk, whole.is_ok())?;
        let file_system = |partition: &Partition| match disk.part(partition.start, partition.bytes)
        {
            Some(view) => FileSystem::open(view),
            None => Err(FileSystemError::Absurd("the partition is not on the disk")),
        };
        let volumes = table.partitions.iter().take(VOLUMES);
        let volumes = volumes.map(|p| Volume { partition: *p, file_system: file_system(p) });
        let (scheme, volumes, notes) = (table.scheme, volumes.collect(), Vec::new());
        Ok(Self { disk, scheme, volumes, notes })
    }

    fn file_systems(&self) -> Vec<(usize, FileSystem)> {
        let volumes = self.volumes.iter().enumerate();
        volumes.filter_map(|(at, v)| Some((at, v.file_system.as_ref().ok()?.clone()))).collect()
    }

    /// What the first file system with boot loader entries boots.
    fn loader_entries(&mut self) -> Option<Boot> {
        for (volume, file_system) in self.file_systems() {
            for directory in LOADER {
                match self.loader_entry(volume, &file_system, directory) {
                    Ok(None) => {}
                    Ok(Some(boot)) => return Some(boot),
                    Err(error @ UnifiedError::FileSystem(_)) => {
                        self.note(volume, &format!("{directory}/entries"), &error);
                    }
                    Err(error) => self.note(volume, UNIFIED, &error),
                }
            }
        }
        None
    }

    /// What the boot loader entries of `directory` boot, and the unified kernel images beside it. `None` if there
    /// are none.
    fn loader_entry(
        &self,
        volume: usize,
        file_system: &FileSystem,
        directory: &str,
    ) -> Result<Option<Boot>, UnifiedError> {
        let (entries, unified) = (format!("{directory}/entries"), directory == LOADER[0]);
        let mut parsed = Vec::new();
        let names = file_system.list(&entries, ENTRIES)?.unwrap_or_default();
        for name in names.iter().filter(|name| name.ends_with(".conf")) {
            let text = text(file_system, &format!("{entries}/{name}"))?;
            parsed.extend(loader_spec::Entry::parse(name, &text));
        }
        let images = if unified { file_system.list(UNIFIED, ENTRIES)? } else { None };
        let is_image = |name: &&String| name.to_ascii_lowercase().ends_with(".efi");
        let mut refused = None;
        for name in images.iter().flatten().filter(is_image) {
            let path = format!("{UNIFIED}/{name}");
            match Unified::read(file_system, &path, UNIFIED_MAX) {
                Ok(image) => {
                    parsed.push(loader_spec::Entry::unified(name, path, &image.os_release));
                }
                Err(error) => refused = Some(error),
            }
        }
        let settings = text(file_system, &format!("{directory}/loader.conf")).unwrap_or_default();
        let Some(entry) = loader_spec::choose(parsed, &settings) else {
            return refused.map_or(Ok(None), Err);
        };
        if entry.is_unified {
            return self.open_unified(volume, file_system, &entry).map(Some);
        }
        let place = |path: String| Place { volume, path };
        let chosen = Chosen {
            title: entry.title,
            kernel: place(entry.linux),
            initramfs: entry.initrds.into_iter().map(place).collect(),
            cmdline: entry.options,
            is_once: false,
            saves: Vec::new(),
        };
        Ok(Some(self.open(chosen, volume, &entries)?))
    }

    /// Opens a unified kernel image.
    fn open_unified(
        &self,
        volume: usize,
        file_system: &FileSystem,
        entry: &loader_spec::Entry,
    ) -> Result<Boot, UnifiedError> {
        let path = &entry.linux;
        let Unified { kernel, initramfs, cmdline, os_release: _ } =
            Unified::read(file_system, path, UNIFIED_MAX)?;
        let open = |section: &Section| {
            Ok((section.start, section.bytes, file_system.file(path, UNIFIED_MAX)?))
        };
        let pieces = initramfs.iter().map(open).collect::<Result<Vec<_>, FileSystemError>>()?;
        let initramfs = (!pieces.is_empty()).then(|| Image::of_pieces(pieces.into_iter()));
        let kernel = Image::of_pieces([open(&kernel)?].into_iter());
        let on = self.called(volume);
        let origin = format!("`{}` of {} on {on}", excerpt(&entry.title), excerpt(path));
        Ok(Boot { kernel, initramfs, cmdline, origin, warnings: Vec::new() })
    }

    /// What the first GRUB configuration that can be used boots.
    fn grub(&mut self) -> Option<Boot> {
        for (volume, file_system) in self.file_systems() {
            for path in GRUB {
                let text = match file_system.look(path) {
                    Ok(Some(Found::File { .. })) => text(&file_system, path),
                    Ok(_) => continue,
                    Err(error) => Err(error),
                };
                match text.map(|text| self.grub_entry(volume, path, &text)) {
                    Ok(Ok(boot)) => return Some(boot),
                    Ok(Err(note)) => self.notes.push(note),
                    Err(error) => self.note(volume, path, &error),
                }
            }
        }
        None
    }

    /// What GRUB's configuration at `path` of `volume` boots. Saves what its script saves.
    fn grub_entry(&self, volume: usize, path: &str, text: &str) -> Result<Boot, String> {
        let note = |error: &dyn std::error::Error| self.about(volume, path, error);
        let choose = |once| -> Result<_, String> {
            let chosen = grub::choose(self, volume, path, text, once).map_err(|e| note(&e))?;
            let (is_once, saves) = (chosen.is_once, chosen.saves.clone());
            let boot = self.open(chosen, volume, path).map_err(|e| note(&e))?;
            Ok((boot, is_once, saves))
        };
        let (mut boot, is_once, saves) = choose(true)?;
        match (self.save(&saves), is_once) {
            (Ok(()), false) => {}
            (Ok(()), true) => boot.origin.push_str(", chosen for this boot only,"),
            (Err(problem), false) => {
                boot.warnings.push(format!("GRUB's variables cannot be saved: {problem}"));
            }
            (Err(problem), true) => {
                boot = choose(false)?.0;
                boot.warnings.push(format!(
                    "the entry that was chosen for the next boot only (grub-reboot) is not used, because this \
                     cannot be noted, and it would be booted again and again: {problem}"
                ));
            }
        }
        Ok(boot)
    }

    /// Writes the environment blocks. Errors with the reason if one of them cannot be written.
    fn save(&self, saves: &[Save]) -> Result<(), String> {
        for Save { place, old, new } in saves {
            let (path, on) = (excerpt(&place.path), self.called(place.volume));
            let partition = self.volumes.get(place.volume).map(|volume| volume.partition);
            let view = partition.and_then(|part| self.disk.part(part.start, part.bytes));
            let written = match (view, new) {
                (Some(view), Some(new)) => rewrite::rewrite(&view, &place.path, old, new),
                (None, _) | (_, None) => Err(RewriteError::NoRoom),
            };
            written.map_err(|error| {
                format!("{path} on {on}: {}", crate::causes::chain(&error).join(": "))
            })?;
        }
        Ok(())
    }

    /// Opens the files of what was chosen by the configuration at `path` of `volume`.
    fn open(&self, chosen: Chosen, volume: usize, path: &str) -> Result<Boot, FileSystemError> {
        let Chosen { title, kernel, initramfs, cmdline, is_once: _, saves: _ } = chosen;
        let open = |place: &Place, most| match self.file_system(place.volume) {
            Some(file_system) => file_system.file(&place.path, most),
            None => Err(FileSystemError::Missing(excerpt(&place.path))),
        };
        let kernel = Image::new(vec![open(&kernel, KERNEL_MAX)?]);
        let files = initramfs.iter().map(|place| open(place, u64::MAX));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let initramfs = (!files.is_empty()).then(|| Image::new(files));
        let origin = format!("`{}` of {path} on {}", excerpt(&title), self.called(volume));
        Ok(Boot { kernel, initramfs, cmdline, origin, warnings: Vec::new() })
    }

    fn file_system(&self, volume: usize) -> Option<&FileSystem> {
        self.volumes.get(volume)?.file_system.as_ref().ok()
    }

    fn called(&self, volume: usize) -> String {
        match self.volumes.get(volume).map_or(0, |volume| volume.partition.number) {
            0 => "the whole disk".to_owned(),
            number => format!("partition {number}"),
        }
    }

    fn note(&mut self, volume: usize, path: &str, error: &dyn std::error::Error) {
        let note = self.about(volume, path, error);
        self.notes.push(note);
    }

    fn about(&self, volume: usize, path: &str, error: &dyn std::error::Error) -> String {
        format!("{path} on {}: {error}", self.called(volume))
    }

    /// What the disk has, in words.
    fn description(&self) -> String {
        let scheme = match self.scheme {
            Scheme::Gpt => "a GPT",
            Scheme::Mbr => "an MBR",
            Scheme::None => "no partition table",
        };
        let mut words = format!("{} bytes, {scheme}", self.disk.len());
        if self.volumes.is_empty() {
            words.push_str(" without partitions");
        }
        for (at, volume) in self.volumes.iter().enumerate() {
            let (called, bytes) = (self.called(at), volume.partition.bytes);
            let found = match &volume.file_system {
                Ok(file_system) => file_system.name().to_owned(),
                Err(error) => error.to_string(),
            };
            // Writing to a string cannot fail.
            let _ = write!(words, "; {called} ({bytes} bytes): {found}");
        }
        for note in self.notes.iter().take(NOTES) {
            let _ = write!(words, "; {note}");
        }
        words
    }
}

/// The text of a configuration file. What is not UTF-8 is replaced: it can only be in comments and titles.
fn text(file_system: &FileSystem, path: &str) -> Result<String, FileSystemError> {
    Ok(String::from_utf8_lossy(&file_system.contents(path, TEXT_MAX)?).into_owned())
}

impl Volumes for Search {
    fn by_name(&self, name: &str) -> Option<usize> {
        // `hd0`, `hd0,gpt1`, `hd0,msdos5`, `hd0,1`: this is the only disk.
        let number = match name.strip_prefix("hd0")?.strip_prefix(',') {
            None => 0,
            Some(part) => {
                let digits = part.trim_start_matches("gpt").trim_start_matches("msdos");
                digits.parse().ok()?
            }
        };
        self.volumes.iter().position(|volume| volume.partition.number == number)
    }

    fn name(&self, volume: usize) -> String {
        let number = self.volumes.get(volume).map_or(0, |volume| volume.partition.number);
        match self.scheme {
            Scheme::Gpt => format!("hd0,gpt{number}"),
            Scheme::Mbr => format!("hd0,msdos{number}"),
            Scheme::None => "hd0".to_owned(),
        }
    }

    fn by_uuid(&self, uuid: &str) -> Option<usize> {
        let is = |fs: &FileSystem| fs.uuid.eq_ignore_ascii_case(uuid);
        (0..self.volumes.len()).find(|at| self.file_system(*at).is_some_and(is))
    }

    fn by_label(&self, label: &str) -> Option<usize> {
        let is = |fs: &FileSystem| fs.label == label;
        (0..self.volumes.len()).find(|at| self.file_system(*at).is_some_and(is))
    }

    fn by_file(&self, path: &str) -> Option<usize> {
        let has = |fs: &FileSystem| matches!(fs.look(path), Ok(Some(_)));
        (0..self.volumes.len()).find(|at| self.file_system(*at).is_some_and(has))
    }

    fn read(&self, volume: usize, path: &str) -> Option<Vec<u8>> {
        self.file_system(volume)?.contents(path, TEXT_MAX).ok()
    }

    fn look(&self, volume: usize, path: &str) -> Option<Option<u64>> {
        match self.file_system(volume)?.look(path).ok()?? {
            Found::File { bytes } => Some(Some(bytes)),
            Found::Directory => Some(None),
        }
    }
}
