//! The file systems on a disk: ext2 to ext4 by `ext4-view`, FAT by `fatfs`.
//!
//! Both crates trust some of what they read with memory: how many block groups there are, how long a symbolic
//! link is. What they would trust is checked here first. The search as a whole has a deadline, and a
//! panic in a crate is an error of the search (see [`super`]).

use std::io::{self, Read, Seek, SeekFrom};
use std::rc::Rc;

use ext4_view::{Ext4, Ext4Error};

use super::partitions::u32_at;
use super::view::{View, sought};
use super::{excerpt, journal};

/// Where the superblock of ext4 begins, and how much of it is read here.
const SUPERBLOCK: u64 = 1024;
/// `s_magic`, at 0x38 of the superblock.
const EXT4_MAGIC: u32 = 0xef53;
/// `s_feature_incompat`, at 0x60, and the features in it that `ext4-view` does not read (Linux fs/ext4/ext4.h).
const FEATURES: [(u32, &str); 8] = [
    (0x1, "compression"),
    (0x10, "meta_bg"),
    (0x100, "mmp"),
    (0x400, "ea_inode"),
    (0x1000, "dirdata"),
    (0x4000, "large_dir"),
    (0x8000, "inline_data"),
    (0x2_0000, "casefold"),
];
/// Most block groups: at 128 MiB each these are 16 TiB. `ext4-view` has 16 bytes for each.
const GROUPS_MAX: u64 = 1 << 17;
/// Most symbolic links on the way to a file, as for Linux, and most bytes of a path.
const LINKS: usize = 40;
const PATH_MAX: usize = 4096;
/// Most bytes of a path on FAT, which `fatfs` follows by a call for each directory.
const FAT_PATH_MAX: usize = 1024;
/// Bytes of a file on FAT that are read at once.
const CHUNK: usize = 1 << 20;

type Fat = fatfs::FileSystem<View>;

/// Something cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileSystemError {
    /// What is there is no file system that can be read; with the name of what it looks like.
    #[error("it is {0}, which cannot be read here (only ext4 and FAT can)")]
    Foreign(&'static str),
    /// There is nothing that looks like a file system.
    #[error("it has no file system that is known here")]
    Unknown,
    /// The file system claims to be larger than its partition, or has absurd numbers.
    #[error("its ext4 file system is damaged: {0}")]
    Absurd(&'static str),
    /// The file system has a feature that cannot be read here, by its name for `mke2fs -O`.
    #[error("its ext4 file system has the feature `{0}`, which cannot be read here")]
    Feature(&'static str),
    /// The file system was not unmounted, and cannot be read as it would be after its journal was replayed.
    #[error(
        "its ext4 file system was not unmounted, and its journal cannot be replayed here: {0}; boot it once with \
         `kernel`, or run e2fsck on it"
    )]
    Unclean(String),
    /// The crate refuses the file system or the file.
    #[error("its {kind} file system: {problem}")]
    Refused { kind: &'static str, problem: String },
    /// The file is larger than what may be read.
    #[error("the file {path} has {bytes} bytes, {most} can be read")]
    TooLarge { path: String, bytes: u64, most: u64 },
    /// The path leads nowhere.
    #[error("there is no file {0}")]
    Missing(String),
    /// The path leads in a circle, or is too long.
    #[error("the path {0} has more than {LINKS} symbolic links or more than {PATH_MAX} bytes")]
    Links(String),
}

use FileSystemError as Error;

/// A file system.
#[derive(Clone)]
pub(super) struct FileSystem {
    kind: Kind,
    /// Its UUID, as GRUB and blkid write it.
    pub(super) uuid: String,
    pub(super) label: String,
}

#[derive(Clone)]
enum Kind {
    Ext4(Ext4),
    Fat(Rc<Fat>),
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    File { bytes: u64 },
    Directory,
}

impl FileSystem {
    /// Reads the file system that begins at the first byte of `view`.
    pub(super) fn open(mut view: View) -> Result<Self, Error> {
        let mut head = vec![0; (SUPERBLOCK + 1024) as usize];
        match view.read_exact_at(0, &mut head) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(Error::Unknown);
            }
            other => other.map_err(|error| refused("unknown", &error))?,
        }
        let superblock = &head[SUPERBLOCK as usize..];
        if u32_at(superblock, 0x38) & 0xffff == EXT4_MAGIC {
            let features = u32_at(superblock, 0x60);
            if let Some((_, name)) = FEATURES.iter().find(|(bit, _)| features & bit != 0) {
                return Err(Error::Feature(name));
            }
            check_superblock(superblock, view.len())?;
            let view = journal::replay(view).map_err(|error| Error::Unclean(causes(&error)))?;
            let ext4 = Ext4::load(Box::new(view)).map_err(|error| refused("ext4", &error))?;
            let (uuid, label) = (ext4.uuid().to_string(), ext4.label().display().to_string());
            return Ok(Self { kind: Kind::Ext4(ext4), uuid, label });
        }
        if is_fat(&head) {
            let options = fatfs::FsOptions::new();
            let fat = Fat::new(view, options).map_err(|error| refused("FAT", &error))?;
            let id = fat.volume_id();
            let uuid = format!("{:04X}-{:04X}", id >> 16, id & 0xffff);
            let label = fat.volume_label();
            return Ok(Self { kind: Kind::Fat(Rc::new(fat)), uuid, label });
        }
        Err(foreign(&mut view).map_or(Error::Unknown, Error::Foreign))
    }

    pub(super) fn name(&self) -> &'static str {
        match self.kind {
            Kind::Ext4(_) => "ext4",
            Kind::Fat(_) => "FAT",
        }
    }

    /// What is at `path`, if anything.
    pub(super) fn look(&self, path: &str) -> Result<Option<Found>, Error> {
        match &self.kind {
            Kind::Ext4(ext4) => {
                let Some(path) = resolve(ext4, path)? else { return Ok(None) };
                let metadata = ext4.metadata(path.as_str()).map_err(|e| refused("ext4", &e))?;
                let file = metadata.file_type().is_regular_file();
                Ok(match metadata.is_dir() {
                    true => Some(Found::Directory),
                    false => file.then_some(Found::File { bytes: metadata.len() }),
                })
            }
            Kind::Fat(fat) => fat_look(fat, path),
        }
    }

    /// The names in a directory, at most `most` of them; `None` if there is no such directory.
    pub(super) fn list(&self, path: &str, most: usize) -> Result<Option<Vec<String>>, Error> {
        if self.look(path)? != Some(Found::Directory) {
            return Ok(None);
        }
        match &self.kind {
            Kind::Ext4(ext4) => {
                let Some(path) = resolve(ext4, path)? else { return Ok(None) };
                let entries = ext4.read_dir(path.as_str()).map_err(|e| refused("ext4", &e))?;
                let names = entries.take(most).map(|entry| {
                    let entry = entry.map_err(|e| refused("ext4", &e))?;
                    Ok(entry.file_name().as_str().unwrap_or_default().to_owned())
                });
                Ok(Some(names.collect::<Result<_, Error>>()?))
            }
            Kind::Fat(fat) => {
                let directory = fat.root_dir().open_dir(fat_path(path));
                let directory = directory.map_err(|error| refused("FAT", &error))?;
                let names = directory
                    .iter()
                    .take(most)
                    .map(|entry| Ok(entry.map_err(|error| refused("FAT", &error))?.file_name()));
                Ok(Some(names.collect::<Result<_, Error>>()?))
            }
        }
    }

    /// The contents of the file at `path`. Errors if it has more than `most` bytes.
    pub(super) fn contents(&self, path: &str, most: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        let read = self.file(path, most)?.take(most).read_to_end(&mut bytes);
        read.map_err(|error| Error::Refused {
            kind: self.name(),
            problem: excerpt(&format!("{path}: {error}")),
        })?;
        Ok(bytes)
    }

    /// Opens the file at `path`. Errors if it has more than `most` bytes.
    pub(super) fn file(&self, path: &str, most: u64) -> Result<DiskFile, Error> {
        let missing = || Error::Missing(excerpt(path));
        let bytes = match self.look(path)? {
            Some(Found::File { bytes }) => bytes,
            _ => return Err(missing()),
        };
        if bytes > most {
            return Err(Error::TooLarge { path: excerpt(path), bytes, most });
        }
        let source = match &self.kind {
            Kind::Ext4(ext4) => {
                let path = resolve(ext4, path)?.ok_or_else(missing)?;
                let file = ext4.open(path.as_str()).map_err(|e| refused("ext4", &e))?;
                Source::Ext4(Box::new(file))
            }
            Kind::Fat(fat) => {
                let path = fat_path(path).to_owned();
                Source::Fat { fat: fat.clone(), path, start: 0, chunk: Vec::new() }
            }
        };
        Ok(DiskFile { source, bytes, position: 0 })
    }
}

/// Checks what `ext4-view` would believe. Offsets are those of the kernel's `struct ext4_super_block`.
fn check_superblock(superblock: &[u8], bytes: u64) -> Result<(), Error> {
    let blocks = u64::from(u32_at(superblock, 0x4))
        | match u32_at(superblock, 0x60) & 0x80 {
            0 => 0,
            // INCOMPAT_64BIT: the number of blocks has 64 bits.
            _ => u64::from(u32_at(superblock, 0x150)) << 32,
        };
    let (log_size, per_group) = (u32_at(superblock, 0x18), u64::from(u32_at(superblock, 0x20)));
    if log_size > 6 {
        return Err(Error::Absurd("its blocks are larger than 64 KiB"));
    }
    match blocks.checked_mul(1024 << log_size) {
        Some(needed) if needed <= bytes => {}
        _ => return Err(Error::Absurd("it is larger than its partition")),
    }
    // INCOMPAT_64BIT is believed or not by the same rule in `ext4-view` as here; the high half counts there
    // in any case.
    if u32_at(superblock, 0x60) & 0x80 == 0 && u32_at(superblock, 0x150) != 0 {
        return Err(Error::Absurd("it has more than 2^32 blocks without the 64bit feature"));
    }
    if per_group == 0 || blocks / per_group > GROUPS_MAX {
        return Err(Error::Absurd("it has more block groups than its size needs"));
    }
    Ok(())
}

/// Whether a boot sector is one of FAT: a jump, sectors of a known size, and the name.
fn is_fat(head: &[u8]) -> bool {
    let sector = u32_at(head, 11) & 0xffff;
    let names = [&head[54..57], &head[82..85]];
    matches!(head[0], 0xeb | 0xe9)
        && [512, 1024, 2048, 4096].contains(&sector)
        && names.contains(&&b"FAT"[..])
}

/// What cannot be read, with the place and the bytes by which it is recognized. A superblock of a RAID may be in one of
/// several places, and so may the label of LVM.
const FOREIGN: [(&str, u64, &[u8]); 21] = [
    ("XFS", 0, b"XFSB"),
    ("Btrfs", 0x1_0040, b"_BHRfS_M"),
    ("an LVM volume", 0, b"LABELONE"),
    ("an LVM volume", 512, b"LABELONE"),
    ("an LVM volume", 1024, b"LABELONE"),
    ("an LVM volume", 1536, b"LABELONE"),
    ("encrypted (LUKS)", 0, b"LUKS\xba\xbe"),
    ("encrypted (BitLocker)", 3, b"-FVE-FS-"),
    ("F2FS", 1024, b"\x10\x20\xf5\xf2"),
    ("a part of a RAID", 0, b"\xfc\x4e\x2b\xa9"),
    ("a part of a RAID", 4096, b"\xfc\x4e\x2b\xa9"),
    ("NTFS", 3, b"NTFS    "),
    ("exFAT", 3, b"EXFAT   "),
    ("swap space", 4086, b"SWAPSPACE2"),
    ("swap space", 65_526, b"SWAPSPACE2"),
    ("bcachefs", 4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("EROFS", 1024, b"\xe2\xe1\xf5\xe0"),
    ("SquashFS", 0, b"hsqs"),
    ("an ISO 9660 image", 0x8001, b"CD001"),
    ("ReiserFS", 0x1_0034, b"ReIsEr"),
    ("JFS", 0x8000, b"JFS1"),
];

/// The name of a file system or container that cannot be read.
fn foreign(view: &mut View) -> Option<&'static str> {
    let has = |(_, at, magic): &&(&str, u64, &[u8])| {
        let mut bytes = vec![0; magic.len()];
        view.read_exact_at(*at, &mut bytes).is_ok() && bytes == *magic
    };
    FOREIGN.iter().find(has).map(|(name, ..)| *name)
}

/// The text of an error and of its causes.
fn causes(error: &dyn std::error::Error) -> String {
    crate::causes::chain(error).join(": ")
}

fn refused(kind: &'static str, error: &dyn std::error::Error) -> Error {
    Error::Refused { kind, problem: excerpt(&error.to_string()) }
}

/// Returns `path` without symbolic links, `.` and `..`; `None` if it leads nowhere. `ext4-view` could do
/// that, but would read a symbolic link of whatever length into memory.
fn resolve(ext4: &Ext4, path: &str) -> Result<Option<String>, Error> {
    let too_many = || Error::Links(excerpt(path));
    let mut ahead: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
    let (mut done, mut links) = (String::new(), 0);
    while let Some(name) = ahead.pop() {
        match name.as_str() {
            "" | "." => continue,
            ".." => {
                done.truncate(done.rfind('/').unwrap_or(0));
                continue;
            }
            _ => {}
        }
        let here = format!("{done}/{name}");
        if here.len() > PATH_MAX || ahead.len() > PATH_MAX {
            return Err(too_many());
        }
        let metadata = match ext4.symlink_metadata(here.as_str()) {
            Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => return Ok(None),
            other => other.map_err(|error| refused("ext4", &error))?,
        };
        if !metadata.is_symlink() {
            done = here;
            continue;
        }
        links += 1;
        if links > LINKS || metadata.len() > PATH_MAX as u64 {
            return Err(too_many());
        }
        let target = ext4.read_link(here.as_str()).map_err(|error| refused("ext4", &error))?;
        let Ok(target) = target.to_str() else { return Ok(None) };
        if target.starts_with('/') {
            done.clear();
        }
        ahead.extend(target.split('/').rev().map(str::to_owned));
    }
    Ok(Some(if done.is_empty() { "/".to_owned() } else { done }))
}

fn fat_path(path: &str) -> &str {
    path.trim_matches('/')
}

fn fat_look(fat: &Fat, path: &str) -> Result<Option<Found>, Error> {
    let path = fat_path(path);
    if path.is_empty() {
        return Ok(Some(Found::Directory));
    }
    if path.len() > FAT_PATH_MAX {
        return Ok(None);
    }
    let root = fat.root_dir();
    match root.open_dir(path) {
        Ok(_) => return Ok(Some(Found::Directory)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // It is a file, or cannot be read, which the next attempt tells.
        Err(_) => {}
    }
    match root.open_file(path) {
        Ok(mut file) => {
            let bytes = file.seek(SeekFrom::End(0)).map_err(|error| refused("FAT", &error))?;
            Ok(Some(Found::File { bytes }))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(refused("FAT", &error)),
    }
}

/// An open file.
pub(super) struct DiskFile {
    source: Source,
    /// Its length.
    pub(super) bytes: u64,
    position: u64,
}

enum Source {
    Ext4(Box<ext4_view::File>),
    /// `fatfs` lends its files from the file system, so each chunk of the file is read by opening it again.
    Fat {
        fat: Rc<Fat>,
        path: String,
        start: u64,
        chunk: Vec<u8>,
    },
}

impl Read for DiskFile {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let left = self.bytes.saturating_sub(self.position);
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(target.len());
        let target = &mut target[..most];
        if target.is_empty() {
            return Ok(0);
        }
        let count = match &mut self.source {
            Source::Ext4(file) => {
                go_to(file, self.position)?;
                file.read_bytes(target)?
            }
            Source::Fat { fat, path, start, chunk } => {
                let held = *start..*start + chunk.len() as u64;
                if !held.contains(&self.position) {
                    let mut file = fat.root_dir().open_file(path)?;
                    file.seek(SeekFrom::Start(self.position))?;
                    (*start, *chunk) = (self.position, Vec::new());
                    file.take(CHUNK as u64).read_to_end(chunk)?;
                }
                let offset = (self.position - *start) as usize;
                let found = chunk.get(offset..).unwrap_or_default();
                let count = found.len().min(target.len());
                target[..count].copy_from_slice(&found[..count]);
                count
            }
        };
        self.position += count as u64;
        Ok(count)
    }
}

/// Goes to a position in a file. `ext4-view` goes there through all of the file's blocks from the first one on, so
/// what is not far ahead is read instead.
fn go_to(file: &mut ext4_view::File, position: u64) -> Result<(), Ext4Error> {
    let ahead = position.checked_sub(file.position());
    if ahead.is_none_or(|ahead| ahead > position / 16) {
        return file.seek_to(position);
    }
    let mut skipped = [0; 4096];
    while let Some(left @ 1..) = position.checked_sub(file.position()) {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(skipped.len());
        if file.read_bytes(&mut skipped[..most])? == 0 {
            break;
        }
    }
    Ok(())
}

impl Seek for DiskFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.position = sought(to, self.position, self.bytes)?;
        Ok(self.position)
    }
}
