//! Whether an initramfs is whole, as far as its structure tells. One that was cut off, as by a power failure while it
//! was written, makes the guest's kernel panic, and the guest boot it again and again.
//!
//! An initramfs is a row of archives (`cpio -H newc`), each plain or compressed (Linux's
//! Documentation/driver-api/early-userspace/buffer-format.rst). Only gzip has to be unpacked to find its end; the
//! blocks of the other compressions have their lengths in front of them. What is not known here is taken for whole: the
//! guest's kernel may know it.

use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom};

use flate2::bufread::GzDecoder;

/// Bytes that are read at once.
const CHUNK: u64 = 64 << 10;
/// Most zeroes in a row, most files and blocks, and most bytes that are unpacked. What has more is taken for whole.
const ZEROES_MAX: u64 = 1 << 20;
const STEPS: u32 = 1 << 16;
const UNPACKED_MAX: u64 = 1 << 30;
/// Length of the header of a file in an archive, and of the longest name that Linux takes.
const CPIO_HEADER: u64 = 110;
const NAME_MAX: u64 = 4096;
const TRAILER: &[u8; 10] = b"TRAILER!!!";

/// An initramfs cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum InitramfsError {
    #[error("it is empty")]
    Empty,
    #[error("it has {0} bytes, and zeroes where an archive should begin")]
    Zeroes(u64),
    #[error("it is cut off: its {bytes} bytes end in the middle of {what}")]
    CutOff { bytes: u64, what: &'static str },
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    /// Not an error of the file: nothing more is looked at.
    #[error("it has more than is looked at")]
    Enough,
}

use InitramfsError as Error;

/// Errors if `file` is known not to be a whole initramfs.
pub(super) fn check(file: &mut (impl Read + Seek)) -> Result<(), Error> {
    let bytes = file.seek(SeekFrom::End(0))?;
    let mut walk = Walk { file, bytes, what: "an archive", steps: 0 };
    match walk.all() {
        Err(Error::Enough) => Ok(()),
        other => other,
    }
}

struct Walk<'f, F> {
    file: &'f mut F,
    bytes: u64,
    /// What is read, for errors.
    what: &'static str,
    steps: u32,
}

impl<F: Read + Seek> Walk<'_, F> {
    fn all(&mut self) -> Result<(), Error> {
        if self.bytes == 0 {
            return Err(Error::Empty);
        }
        let mut at = 0;
        while let Some(start) = self.skip_zeroes(at)? {
            at = match self.some(start)? {
                [b'0', b'7', b'0', b'7', b'0', b'1' | b'2'] => self.archive(start)?,
                [0x28, 0xb5, 0x2f, 0xfd, ..] => self.zstd(start)?,
                [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => self.skippable(start)?,
                [0x02, 0x21, 0x4c, 0x18, ..] => self.lz4(start)?,
                [0x1f, 0x8b, ..] => self.gzip(start)?,
                [0xfd, b'7', b'z', b'X', b'Z', 0] => return self.xz(),
                _ => return Ok(()),
            };
        }
        match at {
            0 => Err(Error::Zeroes(self.bytes)),
            _ => Ok(()),
        }
    }

    /// Counts a file or a block.
    fn step(&mut self) -> Result<(), Error> {
        self.steps += 1;
        if self.steps > STEPS { Err(Error::Enough) } else { Ok(()) }
    }

    fn cut_off(&self) -> Error {
        Error::CutOff { bytes: self.bytes, what: self.what }
    }

    /// The bytes at `at`, with zeroes in place of what is behind the end.
    fn some<const N: usize>(&mut self, at: u64) -> Result<[u8; N], Error> {
        let mut found = Vec::with_capacity(N);
        self.file.seek(SeekFrom::Start(at))?;
        Read::by_ref(&mut *self.file).take(N as u64).read_to_end(&mut found)?;
        let mut bytes = [0; N];
        bytes[..found.len()].copy_from_slice(&found);
        Ok(bytes)
    }

    /// The bytes at `at`. Errors if the file ends before.
    fn exactly<const N: usize>(&mut self, at: u64) -> Result<[u8; N], Error> {
        self.end(at, N as u64)?;
        self.some(at)
    }

    /// The end of `length` bytes at `at`. Errors if the file ends before.
    fn end(&self, at: u64, length: u64) -> Result<u64, Error> {
        at.checked_add(length).filter(|end| *end <= self.bytes).ok_or_else(|| self.cut_off())
    }

    /// Where the first byte from `at` on is that is not zero. `None` if there is none.
    fn skip_zeroes(&mut self, at: u64) -> Result<Option<u64>, Error> {
        self.step()?;
        self.file.seek(SeekFrom::Start(at))?;
        let (mut skipped, mut chunk) = (0, Vec::new());
        while skipped <= ZEROES_MAX {
            chunk.clear();
            // Few zeroes or none are between archives.
            let most = if skipped == 0 { 512 } else { CHUNK };
            Read::by_ref(&mut *self.file).take(most).read_to_end(&mut chunk)?;
            match chunk.iter().position(|byte| *byte != 0) {
                Some(offset) => return Ok(Some(at + skipped + offset as u64)),
                None if chunk.is_empty() => return Ok(None),
                None => skipped += chunk.len() as u64,
            }
        }
        Ok(None)
    }

    /// The end of an archive: behind its trailer, or behind its last file if it has none, which Linux takes.
    fn archive(&mut self, start: u64) -> Result<u64, Error> {
        self.what = "an archive";
        let mut at = start;
        while at < self.bytes {
            self.step()?;
            let header: [u8; CPIO_HEADER as usize] = self.exactly(at)?;
            let number = |digits: usize| {
                let digits = std::str::from_utf8(&header[digits..digits + 8]).ok()?;
                u64::from_str_radix(digits, 16).ok()
            };
            let (Some(size), Some(name), b"07070") = (number(54), number(94), &header[..5]) else {
                return Err(Error::Damaged("a file in its archive has no header"));
            };
            if !(1..=NAME_MAX).contains(&name) {
                return Err(Error::Damaged("a file in its archive has no name, or a long one"));
            }
            self.end(at, CPIO_HEADER + name)?;
            let is_trailer = self.some(at + CPIO_HEADER)? == *TRAILER;
            let data = start + (at - start + CPIO_HEADER + name).next_multiple_of(4);
            let end = self.end(data, size)?;
            at = start + (end - start).next_multiple_of(4);
            if is_trailer {
                break;
            }
        }
        Ok(at.min(self.bytes))
    }

    /// The end of a frame (RFC 8878, 3.1.1).
    fn zstd(&mut self, start: u64) -> Result<u64, Error> {
        self.what = "a frame of zstd";
        let [_, _, _, _, descriptor] = self.exactly(start)?;
        let is_single = descriptor & 0x20 != 0;
        let window = u64::from(!is_single);
        let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
        let content = [window ^ 1, 2, 4, 8][usize::from(descriptor >> 6)];
        let mut at = start + 5 + window + dictionary + content;
        loop {
            self.step()?;
            let [a, b, c] = self.exactly(at)?;
            let header = u32::from_le_bytes([a, b, c, 0]);
            if header == 0 {
                return Err(Error::Damaged("it has zeroes where a block of zstd should begin"));
            }
            let length = match (header >> 1) & 3 {
                // One byte, which is repeated.
                1 => 1,
                3 => return Err(Error::Damaged("a block of zstd has no type")),
                _ => u64::from(header >> 3),
            };
            at = self.end(at + 3, length)?;
            if header & 1 != 0 {
                let checksum = if descriptor & 4 != 0 { 4 } else { 0 };
                return self.end(at, checksum);
            }
        }
    }

    /// The end of a frame that zstd skips.
    fn skippable(&mut self, start: u64) -> Result<u64, Error> {
        self.what = "a frame of zstd";
        let [_, _, _, _, length @ ..]: [u8; 8] = self.exactly(start)?;
        self.end(start + 8, u32::from_le_bytes(length).into())
    }

    /// The end of a file of lz4 in the format that Linux takes (`lz4 -l`): blocks up to the end of the file, or to what
    /// begins another one.
    fn lz4(&mut self, start: u64) -> Result<u64, Error> {
        self.what = "a block of lz4";
        let mut at = start + 4;
        while at < self.bytes {
            self.step()?;
            let length = match self.exactly(at)? {
                [0, 0, 0, 0] | [0x02, 0x21, 0x4c, 0x18] => break,
                length => u32::from_le_bytes(length),
            };
            at = self.end(at + 4, length.into())?;
        }
        Ok(at)
    }

    /// The end of a file of gzip.
    fn gzip(&mut self, start: u64) -> Result<u64, Error> {
        self.what = "a file of gzip";
        self.file.seek(SeekFrom::Start(start))?;
        let packed = BufReader::with_capacity(CHUNK as usize, &mut *self.file);
        let mut unpacked = GzDecoder::new(packed);
        let mut left = UNPACKED_MAX;
        let mut chunk = vec![0; CHUNK as usize];
        loop {
            match unpacked.read(&mut chunk) {
                Ok(0) => return Ok(unpacked.into_inner().stream_position()?),
                Ok(count) => left = left.checked_sub(count as u64).ok_or(Error::Enough)?,
                Err(error) => {
                    return Err(match error.kind() {
                        ErrorKind::UnexpectedEof => self.cut_off(),
                        ErrorKind::InvalidInput | ErrorKind::InvalidData => {
                            Error::Damaged("its gzip cannot be unpacked")
                        }
                        _ => error.into(),
                    });
                }
            }
        }
    }

    /// Whether the file ends as one of xz does, or as an archive behind one. The lengths of xz are at its end.
    fn xz(&mut self) -> Result<(), Error> {
        self.what = "a file of xz";
        let end: [u8; 1024] = self.some(self.bytes.saturating_sub(1024))?;
        let last = end.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let has_trailer = end.windows(TRAILER.len()).any(|bytes| bytes == TRAILER);
        match end[..last].ends_with(b"YZ") || has_trailer {
            true => Ok(()),
            false => Err(self.cut_off()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    fn checked(bytes: &[u8]) -> Result<(), String> {
        check(&mut io::Cursor::new(bytes)).map_err(|error| error.to_string())
    }

    /// An archive as `cpio -H newc` writes it, with its last block filled with zeroes.
    fn archive() -> Vec<u8> {
        let file = |name: &str, contents: &[u8]| {
            let numbers = [1, 0o100_644, 0, 0, 1, 0, contents.len(), 0, 0, 0, 0, name.len() + 1, 0];
            let mut bytes = b"070701".to_vec();
            numbers.iter().for_each(|n| bytes.extend(format!("{n:08X}").bytes()));
            bytes.extend(name.bytes());
            bytes.push(0);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes.extend(contents);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        // Compressed to no less than a few blocks.
        let mut state = 1_u64;
        let random: Vec<u8> = (0..600_000)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        let files = [file("init", b"#!/bin/sh\n"), file("data", &random), file("TRAILER!!!", b"")];
        let mut bytes = files.concat();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    /// `input` as `command` compresses it. `None` if there is no such command.
    fn compressed(command: &[&str], input: &[u8]) -> Option<Vec<u8>> {
        let mut packer = Command::new(command[0]);
        let packer = packer.args(&command[1..]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let Ok(mut packer) = packer.spawn() else {
            eprintln!("SKIPPED: {} is not installed", command[0]);
            return None;
        };
        let mut stdin = packer.stdin.take().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || stdin.write_all(input).unwrap());
            Some(packer.wait_with_output().unwrap().stdout)
        })
    }

    #[test]
    fn an_archive_is_whole_with_any_compression_and_cut_off_anywhere_it_is_not() {
        let plain = archive();
        let packers: [&[&str]; 6] = [
            &["zstd", "-q", "-19", "-c"],
            &["zstd", "-q", "-1", "--no-check", "-c"],
            &["gzip", "-c"],
            &["lz4", "-q", "-l", "-c"],
            &["xz", "--check=crc32", "-c"],
            &["cat"],
        ];
        for command in packers {
            let Some(packed) = compressed(command, &plain) else { continue };
            checked(&packed).unwrap_or_else(|error| panic!("{command:?}: {error}"));
            // As Debian does it: microcode in an archive in front, which is not compressed.
            checked(&[&plain[..], &packed].concat()).unwrap();
            checked(&[&packed[..], &[0; 700], &plain].concat()).unwrap();
            for cut in 1..20 {
                let end = packed.len() * cut / 20;
                let error = checked(&packed[..end]).unwrap_err();
                assert!(error.contains("cut off") && error.contains(&end.to_string()), "{error}");
                // A file system that had given the file its length, and not yet all of its contents. Only what is
                // unpacked shows zeroes in the middle of a block.
                let mut holes = packed[..end].to_vec();
                holes.resize(packed.len(), 0);
                let is_seen = command[0] == "gzip" || (command[0] == "zstd" && cut < 15);
                assert!(!is_seen || checked(&holes).is_err(), "{command:?} {cut}");
            }
        }
    }

    #[test]
    fn a_file_without_contents_is_no_initramfs_and_what_is_not_known_may_be_one() {
        assert_eq!(checked(b"").unwrap_err(), "it is empty");
        let zeroes = "it has 70000 bytes, and zeroes where an archive should begin";
        assert_eq!(checked(&[0; 70_000]).unwrap_err(), zeroes);
        checked(b"initrd").unwrap();
        checked(b"BZh91AY&SY").unwrap();
    }

    #[test]
    fn a_structure_that_makes_no_sense_is_damaged() {
        let (mut no_header, mut long_name) = (archive(), archive());
        no_header[110 + 8 + 12..][..6].fill(b'x');
        assert!(checked(&no_header).unwrap_err().contains("has no header"));
        long_name[94..102].copy_from_slice(b"FFFFFFFF");
        assert!(checked(&long_name).unwrap_err().contains("a long one"));
        assert!(checked(&[0x28, 0xb5, 0x2f, 0xfd, 0, 0, 6, 0, 0]).unwrap_err().contains("no type"));
        let bomb = [&[0x02, 0x21, 0x4c, 0x18][..], &[0xff; 4]].concat();
        assert!(checked(&bomb).unwrap_err().contains("cut off"));
        assert!(checked(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 7, 7, 7]).is_err());
        assert!(checked(&[0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0]).is_err());
    }
}
