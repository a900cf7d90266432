//! One more archive behind an initramfs: the kernel unpacks all archives of its initramfs, each of them plain or
//! compressed (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

use std::io::{self, Write};

use cpio::newc::{self, Builder, ModeFileType};

/// Alignment of an archive within an initramfs. Linux needs 4; the bytes before it must be zero.
pub(super) const ALIGNMENT: u64 = 512;

/// A cpio archive in the `newc` format, without compression.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory. Its parent must have been added before.
    pub(super) fn directory(&mut self, name: &str) -> io::Result<()> {
        self.add(Builder::new(name).mode(0o700).set_mode_file_type(ModeFileType::Directory), &[])
    }

    /// Adds a file, which only root can read.
    pub(super) fn file(&mut self, name: &str, contents: &[u8]) -> io::Result<()> {
        let file = Builder::new(name).mode(0o600).set_mode_file_type(ModeFileType::Regular);
        self.add(file, contents)
    }

    /// Ends the archive and returns its bytes.
    pub(super) fn finish(self) -> io::Result<Vec<u8>> {
        newc::trailer(self.bytes)
    }

    fn add(&mut self, entry: Builder, contents: &[u8]) -> io::Result<()> {
        let size = u32::try_from(contents.len()).map_err(io::Error::other)?;
        // Files with the same number would be links to one file.
        self.entries += 1;
        let mut writer = entry.ino(self.entries).write(&mut self.bytes, size);
        writer.write_all(contents)?;
        writer.finish().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_what_was_added_to_it() {
        let mut archive = Archive::default();
        archive.directory("documents").unwrap();
        archive.file("documents/one", b"first").unwrap();
        archive.file("documents/two", b"").unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&archive.finish().unwrap()).unwrap();
        let initramfs = kexec::Initramfs::open(file.path()).unwrap();
        let archive = kexec::Archive::read(&initramfs, &|_| true).unwrap();
        let contents = |name: &str| archive.find(name).unwrap().1.contents.clone();
        assert_eq!(contents("/documents/one").as_deref(), Some(&b"first"[..]));
        assert_eq!(contents("/documents/two").as_deref(), Some(&b""[..]));
        assert!(!archive.find("/documents").unwrap().1.is_file());
    }
}
