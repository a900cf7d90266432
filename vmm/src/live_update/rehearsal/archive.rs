//! One more archive behind an initramfs: the kernel unpacks all archives of its initramfs, each of them plain or
//! compressed (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

/// Alignment of an archive within an initramfs. Linux needs 4; the bytes before it must be zero.
pub(super) const ALIGNMENT: u64 = 512;

const FILE: u32 = 0o100_600;
const FOLDER: u32 = 0o040_700;

/// A cpio archive in the `newc` format, without compression.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    /// Adds a directory. Its parent must have been added before.
    pub(super) fn directory(&mut self, name: &str) {
        self.entry(name, FOLDER, &[]);
    }

    /// Adds a file, which only root can read.
    pub(super) fn file(&mut self, name: &str, contents: &[u8]) {
        self.entry(name, FILE, contents);
    }

    /// Ends the archive and returns its bytes.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.entries += 1;
        let (inode, size, name_size) = (self.entries, contents.len(), name.len() + 1);
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [inode, mode as usize, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(b"070701");
        self.bytes.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn an_archive_has_what_was_added_to_it() {
        let mut archive = Archive::default();
        archive.directory("documents");
        archive.file("documents/one", b"first");
        archive.file("documents/two", b"");
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&archive.finish()).unwrap();
        let initramfs = kexec::Initramfs::open(file.path()).unwrap();
        let archive = kexec::Archive::read(&initramfs, &|_| true).unwrap();
        let contents = |name: &str| archive.find(name).unwrap().1.contents.clone();
        assert_eq!(contents("/documents/one").as_deref(), Some(&b"first"[..]));
        assert_eq!(contents("/documents/two").as_deref(), Some(&b""[..]));
        assert!(!archive.find("/documents").unwrap().1.is_file());
    }
}
