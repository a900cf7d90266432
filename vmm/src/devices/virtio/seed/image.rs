//! The disk of a seed: a FAT file system with the label `CIDATA`, made of the files of a directory.
//!
//! The same files make the same bytes, whenever and wherever: no time, no inode and no order of the directory
//! goes into the disk.

use std::fs;
use std::io::{self, Cursor, Write};
use std::path::Path;

/// The files that cloud-init reads (its documentation, "NoCloud"), and what takes the place of a missing one.
const FILES: [(&str, Option<&str>); 4] = [
    ("meta-data", Some("")),
    ("user-data", Some("#cloud-config\n")),
    ("vendor-data", None),
    ("network-config", None),
];
/// Most bytes of all files.
const CONTENTS_MAX: u64 = 4 << 20;
/// The disk is larger than its files by this, and a multiple of it.
const ROOM: usize = 256 << 10;
/// Most bytes of a disk.
pub(super) const BYTES_MAX: usize = CONTENTS_MAX as usize + 2 * ROOM;

/// The label, as FAT pads it. cloud-init accepts it in either case.
const LABEL: [u8; 11] = *b"CIDATA     ";

/// Makes the disk of the files in `directory`. Errors if there is any other file, or if the files are too large.
pub(super) fn of(directory: &Path) -> io::Result<Vec<u8>> {
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        if FILES.iter().all(|(known, _)| name != *known) {
            let known = FILES.map(|(known, _)| known).join(", ");
            let problem = format!("there is a file `{}`: there can be {known}", name.display());
            return Err(io::Error::other(problem));
        }
    }
    let mut files = Vec::new();
    for (name, default) in FILES {
        match read(&directory.join(name)) {
            Ok(contents) => files.push((name, contents)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                files.extend(default.map(|text| (name, text.as_bytes().to_vec())));
            }
            Err(error) => return Err(io::Error::new(error.kind(), format!("{name}: {error}"))),
        }
    }
    let bytes: u64 = files.iter().map(|(_, contents)| contents.len() as u64).sum();
    if bytes > CONTENTS_MAX {
        let problem = format!("its files have {bytes} bytes, there can be {CONTENTS_MAX}");
        return Err(io::Error::other(problem));
    }
    // The digest is of all files. cloud-init takes a machine with another id for a new one.
    let digest = files.iter().fold(0, |digest, (_, contents)| {
        let mut hasher = crc32fast::Hasher::new_with_initial(digest);
        hasher.update(contents);
        hasher.finalize()
    });
    add_instance_id(&mut files[0].1, digest);
    write(&files, bytes, digest)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    // Sizes are added up and checked when all are known; this only keeps one file from being read for nothing.
    if metadata.len() > CONTENTS_MAX {
        let problem = format!("it has {} bytes, there can be {CONTENTS_MAX}", metadata.len());
        return Err(io::Error::other(problem));
    }
    fs::read(path)
}

/// Adds an instance id to `meta-data` that has none: cloud-init does not work without.
fn add_instance_id(meta_data: &mut Vec<u8>, digest: u32) {
    let text = String::from_utf8_lossy(meta_data);
    let has_id = text.lines().any(|line| line.trim_start().starts_with("instance-id:"));
    // A `{` begins JSON, which YAML includes; a line cannot be added in front of that.
    if !has_id && !text.contains("instance-id") {
        let rest = std::mem::take(meta_data);
        meta_data.extend(format!("instance-id: iid-{digest:08x}\n").as_bytes());
        meta_data.extend(rest);
    }
}

fn write(files: &[(&str, Vec<u8>)], bytes: u64, digest: u32) -> io::Result<Vec<u8>> {
    let size = (bytes as usize + ROOM).next_multiple_of(ROOM);
    let mut disk = Cursor::new(vec![0; size]);
    let options = fatfs::FormatVolumeOptions::new().volume_label(LABEL).volume_id(digest);
    fatfs::format_volume(&mut disk, options)?;
    {
        let fat = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new())?;
        for (name, contents) in files {
            fat.root_dir().create_file(name)?.write_all(contents)?;
        }
        fat.unmount()?;
    }
    Ok(disk.into_inner())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use super::*;

    fn directory(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, contents) in files {
            fs::write(directory.path().join(name), contents).unwrap();
        }
        directory
    }

    fn file(disk: &[u8], name: &str) -> Option<String> {
        let options = fatfs::FsOptions::new();
        let fat = fatfs::FileSystem::new(Cursor::new(disk.to_vec()), options).unwrap();
        let mut text = String::new();
        let mut file = fat.root_dir().open_file(name).ok()?;
        file.read_to_string(&mut text).unwrap();
        Some(text)
    }

    fn refused(files: &[(&str, &[u8])]) -> String {
        of(directory(files).path()).unwrap_err().to_string()
    }

    #[test]
    fn the_disk_has_the_files_and_the_label() {
        let disk = of(directory(&[
            ("user-data", b"#cloud-config\npackages: [a]\n"),
            ("meta-data", b"local-hostname: web\n"),
            ("network-config", b"version: 2\n"),
        ])
        .path())
        .unwrap();
        let user_data = file(&disk, "user-data").unwrap();
        assert_eq!(user_data, "#cloud-config\npackages: [a]\n");
        let meta_data = file(&disk, "meta-data").unwrap();
        assert!(meta_data.starts_with("instance-id: iid-"), "{meta_data}");
        assert!(meta_data.ends_with("\nlocal-hostname: web\n"), "{meta_data}");
        assert_eq!(file(&disk, "network-config").as_deref(), Some("version: 2\n"));
        assert_eq!(file(&disk, "vendor-data"), None);
        let fat = fatfs::FileSystem::new(Cursor::new(disk), fatfs::FsOptions::new()).unwrap();
        assert_eq!(fat.read_volume_label_from_root_dir().unwrap().as_deref(), Some("CIDATA"));
    }

    #[test]
    fn the_same_files_make_the_same_disk_and_others_another() {
        let made = |files: &[(&str, &[u8])]| of(directory(files).path()).unwrap();
        let (user, meta) = (("user-data", &b"a"[..]), ("meta-data", &b"instance-id: x\n"[..]));
        assert_eq!(made(&[user, meta]), made(&[meta, user]));
        assert_ne!(made(&[user, meta]), made(&[("user-data", b"b"), meta]));
        assert_eq!(file(&made(&[user, meta]), "meta-data").as_deref(), Some("instance-id: x\n"));
        let empty = made(&[]);
        assert_eq!(file(&empty, "user-data").as_deref(), Some("#cloud-config\n"));
        // Another seed is another instance, so that cloud-init sets the machine up again.
        let id = |text: &[u8]| file(&made(&[("user-data", text)]), "meta-data").unwrap();
        assert_ne!(id(b"a"), id(b"b"));
    }

    #[test]
    fn what_cannot_be_a_seed_is_refused() {
        assert!(
            refused(&[("userdata", b"")]).contains("`userdata`: there can be meta-data, user-data")
        );
        let large = vec![b'#'; CONTENTS_MAX as usize];
        assert!(refused(&[("user-data", &large), ("meta-data", b"a")]).contains("4194305 bytes"));
        assert!(of(directory(&[("user-data", &large)]).path()).is_ok());
        assert!(
            refused(&[("user-data", &[&large[..], b"#"].concat())]).contains("user-data: it has")
        );
        let with_link = directory(&[]);
        symlink("/dev/zero", with_link.path().join("user-data")).unwrap();
        let error = of(with_link.path()).unwrap_err().to_string();
        assert!(error.contains("user-data: it is not a regular file"), "{error}");
    }
}
