//! Root file systems of ext4 that were grown with their disk, and those with features that are not read.

use std::fs;

use super::tests::{DEBIAN_13, booted, debian, ext4, fat, file, gpt, refused, tool};

/// A file system that was grown to 64 MiB, with a kernel for which there was no room before.
fn grown(image: &[u8], kernel: &[u8]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let [path, new] = ["image", "kernel"].map(|name| directory.path().join(name));
    fs::write(&path, image).unwrap();
    fs::write(&new, kernel).unwrap();
    let new = format!("write {} boot/vmlinuz-6.1", new.display());
    let path = path.to_str().unwrap();
    for (name, arguments) in [
        ("resize2fs", vec![path, "64M"]),
        ("debugfs", vec!["-w", "-R", "rm boot/vmlinuz-6.1", path]),
        ("debugfs", vec!["-w", "-R", &new, path]),
        ("e2fsck", vec!["-fn", path]),
    ] {
        let done = tool(name).args(arguments).output().expect("a tool of the package e2fsprogs");
        assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
    }
    fs::read(path).unwrap()
}

#[test]
fn a_root_that_was_grown_with_its_disk_boots_what_is_on_it_then() {
    let kernel: String = (0..2_000_000).map(|number| format!("{number:06} ")).collect();
    for options in [&[][..], DEBIAN_13, &["-b", "1024"], &["-O", "^resize_inode,^64bit"]] {
        let image = grown(&ext4(options, debian), kernel.as_bytes());
        let esp = fat(&[("EFI/debian/grub.cfg", b"configfile /x")]);
        // The partition is the last one then, with the copy of the table behind it.
        let (found, initramfs, _) = booted(gpt(&[(15, &esp), (1, &image)]));
        assert!(found == kernel && initramfs == "initrd", "{options:?}");
    }
}

#[test]
fn features_of_ext4_that_are_not_read_are_named_and_in_the_manual() {
    let manual = include_str!("../../../docs/guests.md");
    for options in
        ["meta_bg,^resize_inode", "mmp", "ea_inode", "large_dir", "inline_data", "casefold"]
    {
        let error = refused(file(&ext4(&["-O", options], debian)));
        let feature = options.split(',').next().unwrap();
        assert!(error.contains(&format!("the feature `{feature}`")), "{error}");
        assert!(manual.contains(&format!("`{feature}`")), "{feature}");
    }
}
