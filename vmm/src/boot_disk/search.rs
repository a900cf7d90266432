//! Searches a disk: its entries in the order in which they are tried, until one is loaded.
//!
//! An entry whose files are missing, empty or cut off is passed over, and so is a configuration that cannot be read: an
//! upgrade that was interrupted by a power failure leaves such files, and the kernel before it beside them. What was
//! passed over is a warning of the boot.

use std::cell::OnceCell;
use std::fmt::{Display, Write as _};
use std::io;

use super::entry::{Boot, Booted, Entry, Files, LoadError};
use super::excerpt;
use super::file_system::{DiskFile, FileSystem, FileSystemError, Found};
use super::grub::{self, Choice, Chosen, Place, Save, Volumes};
use super::image::Image;
use super::partitions::{self, Partition, Scheme};
use super::rewrite::{self, RewriteError};
use super::unified::{Section, Unified, UnifiedError};
use super::view::View;
use super::{initramfs, loader_spec};

/// Most partitions whose file systems are opened.
const VOLUMES: usize = 32;
/// Most bytes of a kernel. An initramfs is limited by the guest's RAM.
const KERNEL_MAX: u64 = 256 << 20;
/// Most bytes of a configuration file.
pub(super) const TEXT_MAX: u64 = 1 << 20;
/// Most boot loader entries of a file system.
const ENTRIES: usize = 256;
/// Most notes about what was found in an error.
const NOTES: usize = 40;
/// Most entries whose files are opened.
const ATTEMPTS: usize = 16;

/// Where boot loader entries are: on the ESP or a boot partition, or in a root file system.
const LOADER: [&str; 2] = ["/loader", "/boot/loader"];
/// Where unified kernel images are, and the most bytes of one.
const UNIFIED: &str = "/EFI/Linux";
const UNIFIED_MAX: u64 = 1 << 30;
/// Where GRUB's configuration is: in a root file system, or on a boot partition.
const GRUB: [&str; 4] =
    ["/boot/grub/grub.cfg", "/grub/grub.cfg", "/boot/grub2/grub.cfg", "/grub2/grub.cfg"];

/// What of a GRUB configuration is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// All of it.
    Whole,
    /// The file beside it in which `grub-mkconfig` writes the next one, before it copies that over the one in use.
    New,
    /// What is in front of the place where it was cut off.
    Beginning,
}

impl Part {
    const ALL: [Self; 3] = [Self::Whole, Self::New, Self::Beginning];
}

/// A partition with its file system.
struct Volume {
    partition: Partition,
    file_system: Result<FileSystem, FileSystemError>,
}

/// A disk that is searched.
pub(super) struct Search {
    disk: View,
    scheme: Scheme,
    volumes: Vec<Volume>,
    /// What was found and cannot be booted.
    notes: Vec<String>,
    /// The files of the entries that were opened.
    tried: Vec<Files>,
    /// Whether an entry that was opened has an initramfs.
    has_initramfs: bool,
    /// Whether an environment block of GRUB could not be written.
    is_unsaved: bool,
    /// The first environment block of GRUB, once it was looked for.
    environment: OnceCell<Vec<u8>>,
}

type Load<'l, T, E> = &'l mut dyn FnMut(Boot) -> Result<T, LoadError<E>>;

impl Search {
    /// Reads the partitions of a disk with logical sectors of `sector` bytes, and opens their file systems.
    pub(super) fn new(mut disk: View, sector: u64) -> io::Result<Self> {
        let whole = FileSystem::open(disk.again());
        let table = partitions::read(&mut disk, sector, whole.is_ok())?;
        let file_system = |partition: &Partition| match disk.part(partition.start, partition.bytes)
        {
            Some(view) => FileSystem::open(view),
            None => Err(FileSystemError::Absurd("the partition is not on the disk")),
        };
        let volumes = table.partitions.iter().take(VOLUMES);
        let volumes = volumes.map(|p| Volume { partition: *p, file_system: file_system(p) });
        let (scheme, volumes) = (table.scheme, volumes.collect());
        let (notes, tried) = (Vec::new(), Vec::new());
        let (has_initramfs, is_unsaved) = (false, false);
        let environment = OnceCell::new();
        Ok(Self { disk, scheme, volumes, notes, tried, has_initramfs, is_unsaved, environment })
    }

    fn file_systems(&self) -> Vec<(usize, FileSystem)> {
        let volumes = self.volumes.iter().enumerate();
        volumes.filter_map(|(at, v)| Some((at, v.file_system.as_ref().ok()?.clone()))).collect()
    }

    /// Calls `load` with each entry in turn until one is loaded. `None` if there is none.
    pub(super) fn boot<T, E>(&mut self, load: Load<'_, T, E>) -> Option<Result<Booted<T>, E>> {
        let file_systems = self.file_systems();
        let uses_loader_entries = |(_, file_system): &(usize, FileSystem)| {
            let mut texts = GRUB.iter().filter_map(|path| text(file_system, path).ok());
            texts.any(|text| grub::uses_loader_entries(&text))
        };
        // GRUB chooses among the loader entries then.
        let is_grubs = file_systems.iter().any(uses_loader_entries);
        if is_grubs && let Some(booted) = self.boot_by_grub(&file_systems, load) {
            return Some(booted);
        }
        let booted = self.boot_by_loader_entries(&file_systems, load);
        if booted.is_some() || is_grubs {
            return booted;
        }
        self.boot_by_grub(&file_systems, load)
    }

    fn boot_by_loader_entries<T, E>(
        &mut self,
        file_systems: &[(usize, FileSystem)],
        load: Load<'_, T, E>,
    ) -> Option<Result<Booted<T>, E>> {
        for (volume, file_system) in file_systems {
            for directory in LOADER {
                self.has_initramfs = false;
                for entry in self.loader_entries(*volume, file_system, directory) {
                    if let Some(booted) = self.attempt(entry, load) {
                        return Some(booted);
                    }
                }
            }
        }
        None
    }

    fn boot_by_grub<T, E>(
        &mut self,
        file_systems: &[(usize, FileSystem)],
        load: Load<'_, T, E>,
    ) -> Option<Result<Booted<T>, E>> {
        for (volume, file_system) in file_systems {
            for path in GRUB {
                self.has_initramfs = false;
                for part in Part::ALL {
                    for entry in self.grub_entries(*volume, file_system, path, part) {
                        if let Some(booted) = self.attempt(entry, load) {
                            return Some(booted);
                        }
                    }
                }
            }
        }
        None
    }

    /// Opens the files of an entry, loads them, and saves what the entry saves. `None` if the entry cannot be booted.
    fn attempt<T, E>(
        &mut self,
        entry: Entry,
        load: Load<'_, T, E>,
    ) -> Option<Result<Booted<T>, E>> {
        if self.tried.len() >= ATTEMPTS || self.tried.contains(&entry.files) {
            return None;
        }
        let Entry { mut origin, files, cmdline, is_once, saves } = entry;
        let opened = self.open(&files, cmdline, origin.clone());
        // One that is for a single boot stands for itself.
        self.has_initramfs |= !is_once && files.have_initramfs();
        self.tried.push(files);
        let loaded = opened.and_then(|boot| match load(boot) {
            Ok(loaded) => Ok(Ok(loaded)),
            Err(LoadError::Other(error)) => Ok(Err(error)),
            Err(LoadError::Damaged(problem)) => Err(problem),
        });
        let loaded = match loaded {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(error)) => return Some(Err(error)),
            Err(problem) => {
                self.notes.push(format!("{origin}: {problem}"));
                return None;
            }
        };
        match (self.save(&saves), is_once) {
            (Ok(()), false) => {}
            (Ok(()), true) => origin.push_str(", chosen for this boot only,"),
            (Err(problem), false) => {
                self.notes.push(format!("GRUB's variables cannot be saved: {problem}"));
            }
            (Err(problem), true) => {
                // The same files may be those of the default entry.
                self.tried.pop();
                self.notes.push(format!(
                    "{origin} was chosen for the next boot only (grub-reboot) and is not used, because this cannot \
                     be noted, and it would be booted again and again: {problem}"
                ));
                return None;
            }
        }
        let warnings = self.notes.drain(..).take(NOTES).collect();
        Some(Ok(Booted { loaded, origin, warnings }))
    }

    /// The boot loader entries of `directory` in the order in which they are tried, with the unified kernel images
    /// beside it.
    fn loader_entries(
        &mut self,
        volume: usize,
        file_system: &FileSystem,
        directory: &str,
    ) -> Vec<Entry> {
        let (entries, mut parsed) = (format!("{directory}/entries"), Vec::new());
        for path in self.list(volume, file_system, &entries, ".conf") {
            let name = path.rsplit('/').next().unwrap_or_default();
            match text(file_system, &path) {
                Ok(text) if text.trim().is_empty() => self.note(volume, &path, &"it is empty"),
                Ok(text) => match self.loader_entry(name, &text) {
                    Ok(entry) => parsed.extend(entry),
                    Err(problem) => self.note(volume, &path, &problem),
                },
                Err(error) => self.note(volume, &path, &error),
            }
        }
        let images = match directory == LOADER[0] {
            true => self.list(volume, file_system, UNIFIED, ".efi"),
            false => Vec::new(),
        };
        for path in images {
            let name = path.rsplit('/').next().unwrap_or_default();
            match Unified::read(file_system, &path, UNIFIED_MAX) {
                Ok(image) => {
                    let entry = loader_spec::Entry::unified(name, path.clone(), &image.os_release);
                    parsed.push(entry);
                }
                Err(error) => self.note(volume, &path, &error),
            }
        }
        let settings = text(file_system, &format!("{directory}/loader.conf")).unwrap_or_default();
        let on = self.called(volume);
        let place = |path: String| Place { volume, path };
        let entry = |entry: loader_spec::Entry| {
            let of = if entry.is_unified { &entry.linux } else { &entries };
            let origin = format!("`{}` of {} on {on}", excerpt(&entry.title), excerpt(of));
            let (is_once, saves) = (false, Vec::new());
            let (kernel, cmdline) = (place(entry.linux), entry.options);
            let files = match entry.is_unified {
                true => Files::Unified(kernel),
                false => {
                    let initramfs = entry.initrds.into_iter().map(place).collect();
                    Files::Separate { kernel, initramfs }
                }
            };
            Entry { origin, files, cmdline, is_once, saves }
        };
        loader_spec::order(parsed, &settings).into_iter().map(entry).collect()
    }

    /// A boot loader entry, with GRUB's variables if it is written for GRUB. Errors with the reason if it cannot be used.
    fn loader_entry(&self, name: &str, text: &str) -> Result<Option<loader_spec::Entry>, String> {
        let entry = loader_spec::Entry::parse(name, text).map_err(|error| error.to_string())?;
        let Some(mut entry) = entry else { return Ok(None) };
        if entry.is_for_grub {
            grub::expand(&mut entry, self.environment.get_or_init(|| self.read_environment()))?;
        }
        Ok(Some(entry))
    }

    /// The first environment block of GRUB, which may be on the ESP. Empty if there is none.
    fn read_environment(&self) -> Vec<u8> {
        for (_, file_system) in self.file_systems() {
            let vendors = file_system.list("/EFI", ENTRIES).ok().flatten().unwrap_or_default();
            let of_vendors = vendors.into_iter().map(|name| format!("/EFI/{name}/grubenv"));
            let of_grub = GRUB.iter().map(|path| path.replace("grub.cfg", "grubenv"));
            let mut paths = of_grub.chain(of_vendors);
            if let Some(block) = paths.find_map(|path| file_system.contents(&path, TEXT_MAX).ok()) {
                return block;
            }
        }
        Vec::new()
    }

    /// The paths of the files in a directory whose names have this ending.
    fn list(
        &mut self,
        volume: usize,
        file_system: &FileSystem,
        directory: &str,
        ending: &str,
    ) -> Vec<String> {
        let names = file_system.list(directory, ENTRIES).unwrap_or_else(|error| {
            self.note(volume, directory, &error);
            None
        });
        let names = names.into_iter().flatten();
        let names = names.filter(|name| name.to_ascii_lowercase().ends_with(ending));
        names.map(|name| format!("{directory}/{name}")).collect()
    }

    /// The entries of GRUB's configuration at `path` in the order in which they are tried.
    fn grub_entries(
        &mut self,
        volume: usize,
        file_system: &FileSystem,
        path: &str,
        part: Part,
    ) -> Vec<Entry> {
        let path = if part == Part::New { &format!("{path}.new") } else { path };
        let text = match file_system.look(path) {
            Ok(Some(Found::File { .. })) => text(file_system, path),
            Ok(_) => return Vec::new(),
            Err(error) => Err(error),
        };
        let chosen = match (text, part) {
            (Err(_), Part::Beginning) => return Vec::new(),
            (Ok(text), Part::Beginning) if !grub::is_cut_off(&text) => return Vec::new(),
            (Err(error), _) => Err(error.to_string()),
            (Ok(text), Part::Beginning) => {
                let mut texts = grub::beginnings(&text);
                let found = texts.find_map(|text| grub::choose(self, volume, path, text).ok());
                Ok(found.unwrap_or_default())
            }
            (Ok(text), _) => {
                grub::choose(self, volume, path, &text).map_err(|error| error.to_string())
            }
        };
        let on = self.called(volume);
        let entry = |chosen: Chosen| {
            let Chosen { title, kernel, initramfs, cmdline, is_once, saves } = chosen;
            let origin = format!("`{}` of {path} on {on}", excerpt(&title));
            Entry { origin, files: Files::Separate { kernel, initramfs }, cmdline, is_once, saves }
        };
        match chosen {
            Ok(Choice { entries, skipped }) => {
                for (place, problem) in skipped {
                    self.note(place.volume, &place.path, &problem);
                }
                entries.into_iter().map(entry).collect()
            }
            Err(problem) => {
                self.note(volume, path, &problem);
                Vec::new()
            }
        }
    }

    /// Opens the files of an entry. Errors with the reason if one of them is missing or known to be damaged.
    fn open(&self, files: &Files, cmdline: String, origin: String) -> Result<Boot, String> {
        let (kernel, initramfs, cmdline) = match files {
            Files::Separate { kernel, initramfs } => {
                let kernel = Image::new(vec![self.file(kernel, KERNEL_MAX)?]);
                let initramfs = initramfs.iter().map(|place| {
                    let mut file = self.file(place, u64::MAX)?;
                    let path = excerpt(&place.path);
                    initramfs::check(&mut file)
                        .map_err(|error| format!("the initramfs {path} cannot be used: {error}"))?;
                    Ok(file)
                });
                let initramfs = initramfs.collect::<Result<Vec<_>, String>>()?;
                (kernel, (!initramfs.is_empty()).then(|| Image::new(initramfs)), cmdline)
            }
            Files::Unified(place) => self.open_unified(place).map_err(|e| e.to_string())?,
        };
        if initramfs.is_none() && self.has_initramfs {
            return Err(
                "it has no initramfs, and the entry in whose place it would be booted has one"
                    .to_owned(),
            );
        }
        Ok(Boot { kernel, initramfs, cmdline, origin })
    }

    fn file(&self, place: &Place, most: u64) -> Result<DiskFile, String> {
        let missing = || FileSystemError::Missing(excerpt(&place.path));
        let file_system = self.file_system(place.volume).ok_or_else(missing);
        file_system.and_then(|fs| fs.file(&place.path, most)).map_err(|error| error.to_string())
    }

    /// Opens a unified kernel image: its kernel, initramfs and command line.
    fn open_unified(&self, place: &Place) -> Result<(Image, Option<Image>, String), UnifiedError> {
        let path = &place.path;
        let missing = || FileSystemError::Missing(excerpt(path));
        let file_system = self.file_system(place.volume).ok_or_else(missing)?;
        let Unified { kernel, initramfs, cmdline, os_release: _ } =
            Unified::read(file_system, path, UNIFIED_MAX)?;
        let open = |section: &Section| {
            Ok((section.start, section.bytes, file_system.file(path, UNIFIED_MAX)?))
        };
        let pieces = initramfs.iter().map(open).collect::<Result<Vec<_>, FileSystemError>>()?;
        let initramfs = (!pieces.is_empty()).then(|| Image::of_pieces(pieces.into_iter()));
        let kernel = Image::of_pieces([open(&kernel)?].into_iter());
        Ok((kernel, initramfs, cmdline))
    }

    /// Writes the environment blocks. Errors with the reason if one of them cannot be written.
    fn save(&mut self, saves: &[Save]) -> Result<(), String> {
        if std::mem::take(&mut self.is_unsaved) {
            // The reason is known already.
            return Ok(());
        }
        for Save { place, old, new } in saves {
            let (path, on) = (excerpt(&place.path), self.called(place.volume));
            let partition = self.volumes.get(place.volume).map(|volume| volume.partition);
            let view = partition.and_then(|part| self.disk.part(part.start, part.bytes));
            let written = match (view, new) {
                (Some(view), Some(new)) => rewrite::rewrite(&view, &place.path, old, new),
                (None, _) | (_, None) => Err(RewriteError::NoRoom),
            };
            written.map_err(|error| {
                self.is_unsaved = true;
                format!("{path} on {on}: {}", crate::causes::chain(&error).join(": "))
            })?;
        }
        Ok(())
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

    fn note(&mut self, volume: usize, path: &str, problem: &dyn Display) {
        let note = format!("{} on {}: {problem}", excerpt(path), self.called(volume));
        self.notes.push(note);
    }

    /// What the disk has, in words.
    pub(super) fn description(&self) -> String {
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

    fn list(&self, volume: usize, directory: &str) -> Vec<String> {
        let file_system = self.file_system(volume);
        let names = file_system.and_then(|fs| fs.list(directory, ENTRIES).ok().flatten());
        names.unwrap_or_default()
    }

    fn look(&self, volume: usize, path: &str) -> Option<Option<u64>> {
        match self.file_system(volume)?.look(path).ok()?? {
            Found::File { bytes } => Some(Some(bytes)),
            Found::Directory => Some(None),
        }
    }
}
