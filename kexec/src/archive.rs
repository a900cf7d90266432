//! What is in an initramfs, read as Linux unpacks it (init/initramfs.c): cpio archives in the `newc` format, one
//! after the other, each plain or compressed.
//!
//! The reader is stricter than Linux, which ignores an archive from its first error on. Memory is bounded: only names
//! and the contents of files that the caller asks for are kept, with a limit on each.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::os::unix::fs::FileExt;

use crate::Initramfs;
use crate::compression::{Compression, Limited};

/// Most bytes of an unpacked initramfs.
const MOST_UNPACKED: u64 = 4 << 30;
/// Most bytes of the contents of one file that is kept.
const MOST_KEPT: u64 = 128 << 20;
/// Most bytes of all names.
const MOST_NAMES: usize = 64 << 20;
/// Most symbolic links in a path, as in Linux.
const MOST_LINKS: usize = 40;
/// Longest name with its NUL (`PATH_MAX`).
const LONGEST_NAME: u64 = 4096;

/// Why the contents of an initramfs are not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// The file cannot be read, or its compressed bytes are damaged.
    #[error("it cannot be unpacked")]
    Unpack(#[from] io::Error),
    /// It is no sequence of archives.
    #[error("{problem}, at byte {position} of the unpacked archive")]
    Damaged {
        /// What is wrong.
        problem: String,
        /// Where, in bytes from the start of the archive.
        position: u64,
    },
}

/// The contents of an initramfs.
#[derive(Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
    names: usize,
    /// Number of bytes that its files have when they are unpacked.
    pub unpacked_bytes: u64,
}

/// One name in an initramfs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// Type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// The contents of a file that was asked for, or the target of a symbolic link.
    pub contents: Option<Vec<u8>>,
}

const TYPE: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

impl Entry {
    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & TYPE == REGULAR
    }

    /// Whether it has a permission bit for execution.
    pub fn is_executable(&self) -> bool {
        self.mode & 0o111 != 0
    }

    fn is_link(&self) -> bool {
        self.mode & TYPE == LINK
    }
}

impl Archive {
    /// Reads an initramfs. Keeps the contents of the files for whose names `is_kept` is true: names have no `/` at
    /// their start.
    pub fn read(
        initramfs: &Initramfs,
        is_kept: &dyn Fn(&str) -> bool,
    ) -> Result<Self, ArchiveError> {
        let file = At { file: &initramfs.file, position: 0 };
        Self::unpack(BufReader::with_capacity(1 << 18, file), is_kept)
    }

    /// [`Archive::read`] of any bytes.
    pub(crate) fn unpack(
        mut packed: impl BufRead,
        is_kept: &dyn Fn(&str) -> bool,
    ) -> Result<Self, ArchiveError> {
        let mut archive = Self::default();
        loop {
            let start = skip_zeroes(&mut packed)?;
            if start.is_empty() {
                return Ok(archive);
            }
            let compression = Compression::of(&start);
            let mut all = Cursor::new(&start).chain(&mut packed);
            let Some(compression) = compression else {
                archive.read_archives(&mut all, is_kept, false)?;
                continue;
            };
            let reader = compression.unpack(all)?;
            let left = MOST_UNPACKED.saturating_sub(archive.unpacked_bytes);
            let mut reader = BufReader::with_capacity(1 << 16, Limited::new(reader, left));
            archive.read_archives(&mut reader, is_kept, true)?;
            if !compression.stops_at_its_end() {
                return Ok(archive);
            }
        }
    }

    /// Reads one archive, or all of them up to the end of `reader`.
    fn read_archives(
        &mut self,
        reader: &mut dyn BufRead,
        is_kept: &dyn Fn(&str) -> bool,
        to_the_end: bool,
    ) -> Result<(), ArchiveError> {
        let mut cpio = Cpio { reader, position: 0 };
        loop {
            self.read_archive(&mut cpio, is_kept)?;
            if !to_the_end || cpio.is_at_end()? {
                return Ok(());
            }
        }
    }

    /// Reads one archive up to its trailer, or to the end of the file.
    fn read_archive(
        &mut self,
        cpio: &mut Cpio<'_>,
        is_kept: &dyn Fn(&str) -> bool,
    ) -> Result<(), ArchiveError> {
        // A file with several names has its contents behind one of them, usually the last.
        let mut linked: BTreeMap<[u32; 3], Vec<String>> = BTreeMap::new();
        while let Some(header) = cpio.header()? {
            if header.name == "TRAILER!!!" {
                return Ok(());
            }
            self.names += header.name.len();
            if self.names > MOST_NAMES {
                return Err(cpio.damaged(format!("names of more than {MOST_NAMES} bytes")));
            }
            let mut entry = Entry { mode: header.mode, size: header.size, contents: None };
            let others = match entry.is_file() && header.links > 1 {
                true => linked.entry(header.inode).or_default(),
                false => &mut Vec::new(),
            };
            let is_kept = is_kept(&header.name) || others.iter().any(|name| is_kept(name));
            entry.contents = cpio.contents(&header, is_kept || entry.is_link())?;
            self.unpacked_bytes = self.unpacked_bytes.saturating_add(entry.size);
            if self.unpacked_bytes > MOST_UNPACKED {
                return Err(cpio.damaged(format!("files of more than {MOST_UNPACKED} bytes")));
            }
            others.push(header.name.clone());
            if others.len() > 1 && entry.size == 0 {
                let first = self.entries.get(&others[0]).cloned();
                entry = first.unwrap_or(entry);
            } else {
                for other in &others[..others.len() - 1] {
                    self.entries.insert(other.clone(), entry.clone());
                }
            }
            self.entries.insert(header.name, entry);
        }
        Ok(())
    }

    /// All names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Returns what `path` leads to, and its name, after symbolic links. `None` if it leads nowhere.
    pub fn find(&self, path: &str) -> Option<(String, &Entry)> {
        let mut done = String::new();
        let mut left: Vec<String> = components(path).rev().collect();
        let mut links = 0;
        while let Some(next) = left.pop() {
            if next == ".." {
                done.truncate(done.rfind('/').unwrap_or(0));
                continue;
            }
            let name = match done.is_empty() {
                true => next,
                false => format!("{done}/{next}"),
            };
            match self.entries.get(&name) {
                Some(entry) if entry.is_link() => {
                    links += 1;
                    let target = String::from_utf8_lossy(entry.contents.as_deref()?);
                    if links > MOST_LINKS {
                        return None;
                    }
                    if target.starts_with('/') {
                        done.clear();
                    }
                    left.extend(components(&target).rev());
                }
                _ => done = name,
            }
        }
        let entry = self.entries.get(&done)?;
        Some((done, entry))
    }
}

/// The parts of a path, without empty ones and `.`.
fn components(path: &str) -> impl DoubleEndedIterator<Item = String> {
    path.split('/').filter(|part| !matches!(*part, "" | ".")).map(str::to_owned)
}

/// Skips zeroes, and returns the first bytes that follow: as many as tell an archive from a compression.
fn skip_zeroes(reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(Vec::new());
        }
        let zeroes = buffer.iter().take_while(|byte| **byte == 0).count();
        let all = zeroes == buffer.len();
        reader.consume(zeroes);
        if !all {
            let mut start = Vec::new();
            reader.take(Compression::MAGIC_BYTES as u64).read_to_end(&mut start)?;
            return Ok(start);
        }
    }
}

/// The header of one file, decoded.
struct Header {
    inode: [u32; 3],
    mode: u32,
    links: u32,
    size: u64,
    checksum: Option<u32>,
    name: String,
}

/// A reader of archives.
struct Cpio<'a> {
    reader: &'a mut dyn BufRead,
    position: u64,
}

impl Cpio<'_> {
    fn damaged(&self, problem: impl Into<String>) -> ArchiveError {
        ArchiveError::Damaged { problem: problem.into(), position: self.position }
    }

    /// Skips zeroes. Returns whether nothing else follows.
    fn is_at_end(&mut self) -> io::Result<bool> {
        loop {
            let buffer = self.reader.fill_buf()?;
            let zeroes = buffer.iter().take_while(|byte| **byte == 0).count();
            let (is_empty, all) = (buffer.is_empty(), zeroes == buffer.len());
            self.reader.consume(zeroes);
            self.position += zeroes as u64;
            if is_empty || !all {
                return Ok(is_empty);
            }
        }
    }

    /// Reads exactly `bytes` bytes.
    fn read(&mut self, bytes: u64) -> Result<Vec<u8>, ArchiveError> {
        let mut read = Vec::new();
        self.reader.take(bytes).read_to_end(&mut read)?;
        self.position += read.len() as u64;
        match read.len() as u64 == bytes {
            true => Ok(read),
            false => Err(self.damaged("it ends in the middle of a file")),
        }
    }

    /// Skips up to the next multiple of 4 bytes after `length` bytes.
    fn align(&mut self, length: u64) -> Result<(), ArchiveError> {
        self.read(length.next_multiple_of(4) - length).map(drop)
    }

    /// Reads the next header; `None` at the end.
    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        const LENGTH: u64 = 110;
        if self.reader.fill_buf()?.is_empty() {
            return Ok(None);
        }
        let bytes = self.read(LENGTH)?;
        let checked = match &bytes[..6] {
            b"070701" => false,
            b"070702" => true,
            b"070707" => {
                return Err(
                    self.damaged("an archive in the old format; make it with `cpio -H newc`")
                );
            }
            other => {
                let text = other.escape_ascii();
                return Err(self.damaged(format!("`{text}` where a file's header should begin")));
            }
        };
        let mut fields = [0; 13];
        for (field, digits) in fields.iter_mut().zip(bytes[6..].chunks(8)) {
            let digits = std::str::from_utf8(digits).ok().filter(|d| !d.contains(['+', '-']));
            let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
            *field = number.ok_or_else(|| self.damaged("a header without its numbers"))?;
        }
        let [inode, mode, _, _, links, _, size, major, minor, _, _, name_size, checksum] = fields;
        let name_size = u64::from(name_size);
        if !(1..=LONGEST_NAME).contains(&name_size) {
            return Err(self.damaged(format!("a name of {name_size} bytes")));
        }
        let name = self.read(name_size)?;
        let Some((0, name)) = name.split_last() else {
            return Err(self.damaged("a name without its end"));
        };
        let name = components(&String::from_utf8_lossy(name)).collect::<Vec<_>>().join("/");
        self.align(LENGTH + name_size)?;
        let checksum = checked.then_some(checksum);
        let inode = [inode, major, minor];
        Ok(Some(Header { inode, mode, links, size: size.into(), checksum, name }))
    }

    /// Reads the contents of a file. Returns them if they are to be kept and not too long for that.
    fn contents(
        &mut self,
        header: &Header,
        is_kept: bool,
    ) -> Result<Option<Vec<u8>>, ArchiveError> {
        let size = header.size;
        let is_link = header.mode & TYPE == LINK;
        if is_link && size >= LONGEST_NAME {
            return Err(self.damaged(format!("`{}` is a link of {size} bytes", header.name)));
        }
        let mut kept = (is_kept && size <= MOST_KEPT).then(Vec::new);
        let (mut left, mut sum) = (size, 0_u32);
        while left > 0 {
            let piece = self.read(left.min(1 << 16))?;
            left -= piece.len() as u64;
            sum = piece.iter().fold(sum, |sum, byte| sum.wrapping_add(u32::from(*byte)));
            if let Some(kept) = &mut kept {
                kept.extend_from_slice(&piece);
            }
        }
        self.align(size)?;
        match header.checksum {
            Some(expected) if header.mode & TYPE == REGULAR && expected != sum => {
                Err(self.damaged(format!("`{}` has another checksum than it says", header.name)))
            }
            _ => Ok(kept),
        }
    }
}

/// A reader of a file that leaves the file's own position alone.
pub(crate) struct At<'a> {
    pub(crate) file: &'a std::fs::File,
    pub(crate) position: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
#[path = "archive_tests.rs"]
mod tests;
