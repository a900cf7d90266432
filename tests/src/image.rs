//! Makes the machines' images: initramfs archives, ext4 disks, raw disks.
//!
//! This needs no privileges: archives are written entry by entry, device nodes included, and
//! `mke2fs -d` fills a file system from a directory.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cpio::newc::{self, ModeFileType};
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::kernels::Kernel;
use crate::{binaries, modules};

/// A writer for an initramfs: a cpio archive in the `newc` format, compressed with gzip.
///
/// (Linux, Documentation/driver-api/early-userspace/buffer-format.rst.)
#[derive(Debug)]
pub struct Initramfs {
    archive: GzEncoder<Vec<u8>>,
    entries: u32,
}

impl Initramfs {
    /// An archive with the directories and the console that every PID 1 needs.
    pub fn new() -> io::Result<Self> {
        // Fast compression: the kernel's decompression dominates, and hardly depends on the level.
        let archive = GzEncoder::new(Vec::new(), Compression::fast());
        let mut initramfs = Self { archive, entries: 0 };
        for directory in ["dev", "proc", "sys", "run", "tmp", "etc", "data"] {
            initramfs.directory(directory)?;
        }
        initramfs.character_device("dev/console", 5, 1)?;
        Ok(initramfs)
    }

    /// Adds a directory. Its parent must have been added before.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        let entry =
            newc::Builder::new(name).mode(0o755).set_mode_file_type(ModeFileType::Directory);
        self.append(entry, &[])
    }

    /// Adds a file with these permission bits.
    pub fn file(&mut self, name: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        let entry = newc::Builder::new(name).mode(mode).set_mode_file_type(ModeFileType::Regular);
        self.append(entry, contents)
    }

    /// Adds modules of a kernel, the list of them that [`crate::modules::load_all`] reads, and the list of what a
    /// distribution's kernel has built in.
    pub fn modules<'a>(
        &mut self,
        kernel: &Kernel,
        names: impl IntoIterator<Item = &'a String>,
    ) -> io::Result<()> {
        self.directory("lib")?;
        self.directory(modules::DIRECTORY)?;
        let mut order = String::new();
        for name in names {
            let contents = binaries::contents(&kernel.module(name))?;
            self.file(&format!("{}/{name}.ko", modules::DIRECTORY), 0o644, &contents)?;
            order += &format!("{name}\n");
        }
        self.file(&format!("{}/{}", modules::DIRECTORY, modules::ORDER), 0o644, order.as_bytes())?;
        if !kernel.built_in().exists() {
            return Ok(());
        }
        let directory = format!("{}/{}", modules::DIRECTORY, kernel.release);
        self.directory(&directory)?;
        let built_in = fs::read(kernel.built_in())?;
        self.file(&format!("{directory}/{}", modules::BUILT_IN), 0o644, &built_in)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, name: &str, target: &str) -> io::Result<()> {
        let entry = newc::Builder::new(name).mode(0o777).set_mode_file_type(ModeFileType::Symlink);
        self.append(entry, target.as_bytes())
    }

    /// Adds the contents of `directory` to the root of the archive, except the paths for which
    /// `is_left_out` is true, and everything below them.
    pub fn tree(
        &mut self,
        directory: &Path,
        is_left_out: &dyn Fn(&Path) -> bool,
    ) -> io::Result<()> {
        self.subtree(directory, directory, is_left_out)
    }

    fn subtree(
        &mut self,
        root: &Path,
        directory: &Path,
        is_left_out: &dyn Fn(&Path) -> bool,
    ) -> io::Result<()> {
        let mut paths: Vec<PathBuf> =
            fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
        // The order must not depend on the file system.
        paths.sort();
        for path in paths.iter().filter(|path| !is_left_out(path)) {
            let name = path.strip_prefix(root).map_err(io::Error::other)?;
            let name = name.to_str().ok_or_else(|| io::Error::other(path.display().to_string()))?;
            let metadata = path.symlink_metadata()?;
            if metadata.is_symlink() {
                self.symlink(name, &fs::read_link(path)?.to_string_lossy())?;
            } else if metadata.is_dir() {
                self.directory(name)?;
                self.subtree(root, path, is_left_out)?;
            } else {
                self.file(name, metadata.permissions().mode() & 0o7777, &fs::read(path)?)?;
            }
        }
        Ok(())
    }

    fn character_device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        let entry = newc::Builder::new(name)
            .mode(0o600)
            .rdev_major(major)
            .rdev_minor(minor)
            .set_mode_file_type(ModeFileType::Char);
        self.append(entry, &[])
    }

    fn append(&mut self, entry: newc::Builder, contents: &[u8]) -> io::Result<()> {
        let len = u32::try_from(contents.len()).map_err(io::Error::other)?;
        self.entries += 1;
        let mut writer = entry.ino(self.entries).nlink(1).write(&mut self.archive, len);
        writer.write_all(contents)?;
        writer.finish()?;
        Ok(())
    }

    /// Ends the archive and writes it to `path`.
    pub fn write(mut self, path: &Path) -> io::Result<()> {
        newc::trailer(&mut self.archive)?;
        fs::write(path, self.archive.finish()?)
    }
}

/// A directory tree that becomes an ext4 file system.
#[derive(Debug)]
pub struct Ext4 {
    staging: tempfile::TempDir,
}

impl Ext4 {
    /// An empty tree, assembled in a temporary directory inside `directory`.
    pub fn new(directory: &Path) -> io::Result<Self> {
        Ok(Self { staging: tempfile::tempdir_in(directory)? })
    }

    /// Returns the path of `name` in the tree, and creates its parent directories.
    pub fn path(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.staging.path().join(name.trim_start_matches('/'));
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(path)
    }

    /// Adds a copy of a file.
    pub fn copy(&self, name: &str, from: &Path) -> io::Result<()> {
        let copied = fs::copy(from, self.path(name)?);
        copied
            .map(drop)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", from.display())))
    }

    /// Adds an empty directory.
    pub fn directory(&self, name: &str) -> io::Result<()> {
        fs::create_dir_all(self.path(name)?)
    }

    /// Makes the file system, with at least `free` bytes beyond the size of the tree.
    pub fn write(self, image: &Path, free: u64) -> io::Result<()> {
        let size = (tree_size(self.staging.path())? * 5 / 4 + free + (16 << 20)) >> 20;
        let output = Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d"])
            .arg(self.staging.path())
            .arg(image)
            .arg(format!("{size}M"))
            .output()
            .map_err(|error| io::Error::new(error.kind(), format!("mke2fs: {error}")))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(io::Error::other(format!("mke2fs: {}: {}", output.status, said.trim())))
    }
}

fn tree_size(directory: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { tree_size(&entry.path())? } else { metadata.len() };
        bytes += 4096;
    }
    Ok(bytes)
}

/// Makes a raw disk of zeroes, `bytes` long, that takes no space until it is written.
pub fn raw_disk(path: &Path, bytes: u64) -> io::Result<()> {
    File::create(path)?.set_len(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::read::GzDecoder;
    use std::io::Read;

    #[test]
    fn an_initramfs_holds_what_was_put_into_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("initramfs");
        let mut initramfs = Initramfs::new().unwrap();
        initramfs.file("init", 0o755, b"program").unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("usr/bin")).unwrap();
        fs::create_dir_all(tree.join("usr/share/doc")).unwrap();
        fs::write(tree.join("usr/bin/tool"), b"tool").unwrap();
        fs::set_permissions(tree.join("usr/bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
        std::os::unix::fs::symlink("usr/bin", tree.join("bin")).unwrap();
        initramfs.tree(&tree, &|path| path.ends_with("doc")).unwrap();
        initramfs.write(&path).unwrap();

        let mut archive = Vec::new();
        GzDecoder::new(File::open(&path).unwrap()).read_to_end(&mut archive).unwrap();
        let mut rest = archive.as_slice();
        let mut found = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            let mut contents = Vec::new();
            reader.read_to_end(&mut contents).unwrap();
            found.push((entry.name().to_owned(), entry.mode(), contents));
            rest = reader.finish().unwrap();
        }
        assert!(found.contains(&("init".to_owned(), 0o100_755, b"program".to_vec())));
        assert!(found.contains(&("dev/console".to_owned(), 0o020_600, vec![])));
        assert!(found.contains(&("usr/bin/tool".to_owned(), 0o104_755, b"tool".to_vec())));
        assert!(found.contains(&("bin".to_owned(), 0o120_777, b"usr/bin".to_vec())));
        assert!(found.contains(&("usr/share".to_owned(), 0o040_755, vec![])));
        assert!(!found.iter().any(|entry| entry.0.contains("doc")));
        let position = |name: &str| found.iter().position(|entry| entry.0 == name).unwrap();
        assert!(position("dev") < position("dev/console"), "the directory comes first");
    }

    #[test]
    fn an_ext4_image_holds_the_tree_and_the_free_space() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("data.img");
        let tree = Ext4::new(directory.path()).unwrap();
        fs::write(tree.path("next/a/bzImage").unwrap(), vec![7; 100_000]).unwrap();
        tree.write(&image, 64 << 20).unwrap();
        assert!(fs::metadata(&image).unwrap().len() >= 64 << 20);
        let listing = Command::new("debugfs").args(["-R", "ls -l /next/a"]).arg(&image).output();
        if let Ok(listing) = listing {
            assert!(String::from_utf8_lossy(&listing.stdout).contains("100000 "));
        }
    }

    #[test]
    fn a_missing_source_is_an_error_that_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let tree = Ext4::new(directory.path()).unwrap();
        let error = tree.copy("a", Path::new("/nowhere/bzImage")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/bzImage"), "{error}");
    }
}
