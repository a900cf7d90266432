use std::fs::File;
use std::io::Write;

use cpio::newc::{self, ModeFileType};
use flate2::Compression as Level;
use flate2::write::GzEncoder;

use super::*;

/// An archive with these files: name, mode and contents.
fn cpio(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (number, (name, mode, contents)) in files.iter().enumerate() {
        let kind = match mode & TYPE {
            LINK => ModeFileType::Symlink,
            0o040_000 => ModeFileType::Directory,
            _ => ModeFileType::Regular,
        };
        let entry = newc::Builder::new(name).ino(number as u32 + 1).nlink(1).mode(mode & 0o7777);
        let mut writer = entry.set_mode_file_type(kind).write(&mut archive, contents.len() as u32);
        writer.write_all(contents).unwrap();
        writer.finish().unwrap();
    }
    newc::trailer(&mut archive).unwrap();
    archive
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Level::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn read(bytes: &[u8]) -> Result<Archive, ArchiveError> {
    Archive::unpack(bytes, &|name| name == "init")
}

fn names(archive: &Archive) -> Vec<&str> {
    archive.names().collect()
}

fn one(name: &str) -> Vec<u8> {
    cpio(&[(name, 0o644, b"contents")])
}

#[test]
fn names_modes_and_asked_for_contents_are_read() {
    let archive =
        cpio(&[("./etc", 0o040_755, b""), ("/init", 0o755, b"program"), ("etc/a", 0o644, b"abc")]);
    let archive = read(&archive).unwrap();
    assert_eq!(names(&archive), ["etc", "etc/a", "init"]);
    let (_, init) = archive.find("/init").unwrap();
    assert!(init.is_file() && init.is_executable());
    assert_eq!((init.size, init.contents.as_deref()), (7, Some(&b"program"[..])));
    let (_, other) = archive.find("etc/a").unwrap();
    assert!(!other.is_executable() && other.contents.is_none() && other.size == 3);
    assert!(!archive.find("etc").unwrap().1.is_file());
    assert_eq!(archive.unpacked_bytes, 10);
}

#[test]
fn archives_follow_each_other_plain_or_compressed_with_zeroes_between() {
    let parts = [one("a"), vec![0; 512], gzip(&[one("b"), vec![0; 8], one("c")].concat())];
    let parts = [parts.concat(), vec![0; 5], one("d"), gzip(&one("e"))].concat();
    assert_eq!(names(&read(&parts).unwrap()), ["a", "b", "c", "d", "e"]);
    assert_eq!(names(&read(&[]).unwrap()), [""; 0]);
    assert_eq!(names(&read(&[0; 9]).unwrap()), [""; 0]);
}

#[test]
fn an_initramfs_of_each_compression_is_unpacked() {
    let seeds = format!("{}/fuzz/seeds/archive", env!("CARGO_MANIFEST_DIR"));
    let mut tried = 0;
    for seed in std::fs::read_dir(seeds).unwrap() {
        let path = seed.unwrap().path();
        let Ok(initramfs) = Initramfs::open(&path) else { continue };
        match Archive::read(&initramfs, &|_| false) {
            Ok(archive) => assert!(archive.find("/init").is_some(), "{}", path.display()),
            Err(error) => panic!("{}: {error}", path.display()),
        }
        tried += 1;
    }
    assert!(tried >= 8, "{tried}");
}

#[test]
fn a_later_file_replaces_an_earlier_one_of_its_name() {
    let both = [cpio(&[("init", 0o644, b"old")]), cpio(&[("init", 0o755, b"new")])].concat();
    let archive = read(&both).unwrap();
    assert_eq!(archive.find("init").unwrap().1.contents.as_deref(), Some(&b"new"[..]));
}

#[test]
fn paths_are_followed_through_links_as_the_kernel_would() {
    let archive = read(&cpio(&[
        ("init", LINK | 0o777, b"/sbin/init"),
        ("sbin", LINK | 0o777, b"usr/sbin"),
        ("usr/sbin/init", LINK | 0o777, b"../lib/./systemd"),
        ("usr/lib/systemd", 0o755, b"program"),
        ("loop", LINK | 0o777, b"loop"),
        ("out", LINK | 0o777, b"../../usr"),
        ("broken", LINK | 0o777, b"nothing"),
    ]));
    let archive = archive.unwrap();
    assert_eq!(archive.find("/init").unwrap().0, "usr/lib/systemd");
    assert_eq!(archive.find("out/lib/systemd").unwrap().0, "usr/lib/systemd");
    assert!(archive.find("loop").is_none() && archive.find("broken").is_none());
    assert!(archive.find("").is_none());
}

#[test]
fn all_names_of_a_file_have_its_contents() {
    let mut archive = Vec::new();
    for (name, contents) in [("bin/a", &b""[..]), ("init", b"program"), ("bin/b", b"")] {
        let entry = newc::Builder::new(name).ino(7).nlink(3).mode(0o755);
        let entry = entry.set_mode_file_type(ModeFileType::Regular);
        let mut writer = entry.write(&mut archive, contents.len() as u32);
        writer.write_all(contents).unwrap();
        writer.finish().unwrap();
    }
    newc::trailer(&mut archive).unwrap();
    let archive = read(&archive).unwrap();
    for name in ["bin/a", "bin/b", "init"] {
        assert_eq!(archive.find(name).unwrap().1.size, 7, "{name}");
    }
}

#[test]
fn cut_anywhere_within_a_file_it_is_damaged() {
    let whole = one("init");
    let end_of_file = 110 + 6 + 8;
    for length in 1..end_of_file {
        assert!(read(&whole[..length]).is_err(), "{length}");
    }
    assert!(read(&whole[..end_of_file]).is_ok(), "the trailer may be missing");
    let packed = gzip(&whole);
    for length in 7..packed.len() {
        assert!(read(&packed[..length]).is_err(), "{length}");
    }
}

#[test]
fn what_is_no_archive_says_where_and_why() {
    let changed = |at: usize, with: &[u8]| {
        let mut bytes = one("init");
        bytes[at..at + with.len()].copy_from_slice(with);
        read(&bytes).unwrap_err().to_string()
    };
    assert!(changed(0, b"070707").contains("newc"));
    assert!(changed(54, b"0000000x").contains("numbers"));
    assert!(changed(54, b"+0000001").contains("numbers"));
    assert!(changed(94, b"00000000").contains("a name of 0 bytes"));
    assert!(changed(94, b"ffffffff").contains("a name of 4294967295 bytes"));
    assert!(changed(114, b"x").contains("without its end"));
    assert!(changed(54, b"fffffff0").contains("ends in the middle"));
    assert!(changed(0, b"070702").contains("checksum"));
    let junk = [one("init"), b"junk and more".to_vec()].concat();
    let error = read(&junk).unwrap_err().to_string();
    assert!(error.contains("`junk a`") || error.contains("middle"), "{error}");
}

#[test]
fn an_archive_that_unpacks_to_too_much_is_refused() {
    // 1 GiB of zeroes, five times.
    let mut header = one("init");
    header[54..62].copy_from_slice(b"40000000");
    header.truncate(116);
    let mut encoder = GzEncoder::new(Vec::new(), Level::fast());
    encoder.write_all(&header).unwrap();
    std::io::copy(&mut std::io::repeat(0).take(64 << 20), &mut encoder).unwrap();
    let packed = encoder.finish().unwrap();
    // Cut in the middle of the file, which is long enough for this test.
    assert!(read(&packed).is_err());
}

#[test]
fn reading_leaves_the_files_position_alone() {
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), one("init")).unwrap();
    let initramfs = Initramfs::open(path.path()).unwrap();
    for _ in 0..2 {
        assert!(Archive::read(&initramfs, &|_| true).unwrap().find("init").is_some());
    }
    let _: &File = &initramfs.file;
}
