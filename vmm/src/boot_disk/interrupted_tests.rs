//! Disks as an upgrade of the guest's kernel leaves them when the guest is cut off from power in the middle of it.

use std::convert::Infallible;
use std::fs;
use std::io::{Read, Seek};
use std::path::Path;

use super::tests::{ext4, fat, file, search_with, tool, write};
use super::*;

/// An archive with nothing but its trailer.
fn archive() -> Vec<u8> {
    let mut bytes = b"070701".to_vec();
    let numbers = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 11, 0];
    numbers.iter().for_each(|number| bytes.extend(format!("{number:08X}").bytes()));
    bytes.extend(b"TRAILER!!!\0");
    bytes.resize(512, 0);
    bytes
}

/// A configuration as `grub-mkconfig` writes it, with the newest kernel first.
fn config(versions: &[&str]) -> String {
    let entry = |title: &str, version: &str, more: &str| {
        format!(
            "menuentry '{title}' {{\n\tlinux\t/boot/vmlinuz-{version} root=/dev/vda1 ro {more}\n\
             \tinitrd\t/boot/initrd.img-{version}\n}}\n"
        )
    };
    let others = versions.iter().map(|version| {
        let recovery = format!("{version} (recovery mode)");
        entry(version, version, "quiet") + &entry(&recovery, version, "single")
    });
    format!(
        "if [ -s $prefix/grubenv ]; then\nload_env\nfi\nset default=0\n{}\
         submenu 'Advanced options' {{\n{}}}\n\
         menuentry 'Memory test' {{\n\tlinux\t/boot/memtest86+x64.bin\n}}\n",
        entry("Debian", versions[0], "quiet"),
        others.collect::<String>(),
    )
}

/// The files of a guest that has just upgraded from kernel 6.1 to 6.2.
fn upgraded(root: &Path) {
    let archive = archive();
    write(
        root,
        &[
            ("boot/grub/grub.cfg", config(&["6.2", "6.1"]).as_bytes()),
            ("boot/vmlinuz-6.2", b"kernel 6.2"),
            ("boot/initrd.img-6.2", &archive),
            ("boot/vmlinuz-6.1", b"kernel 6.1"),
            ("boot/initrd.img-6.1", &archive),
            ("boot/memtest86+x64.bin", b"kernel of memtest"),
        ],
    );
}

/// What a loader of kernels says of a file that does not begin as those of these tests do.
fn load(boot: &mut Boot) -> Result<(), LoadError<Infallible>> {
    let mut start = Vec::new();
    boot.kernel.by_ref().take(6).read_to_end(&mut start).unwrap();
    boot.kernel.rewind().unwrap();
    match start == b"kernel" {
        true => Ok(()),
        false => Err(LoadError::Damaged("the kernel is damaged".to_owned())),
    }
}

/// The command line that the disk boots and the warnings.
fn boots(image: &[u8]) -> (String, Vec<String>) {
    let found = search_with(file(image), load).unwrap_or_else(|error| panic!("{error}"));
    assert!(found.warnings.iter().all(|warning| !warning.contains('\n')));
    (found.cmdline, found.warnings)
}

fn refused(image: &[u8]) -> String {
    search_with(file(image), load).err().expect("nothing to boot").to_string()
}

#[test]
fn an_upgrade_that_ended_boots_the_new_kernel_without_a_warning() {
    let (cmdline, warnings) = boots(&ext4(&[], upgraded));
    assert_eq!(cmdline, "BOOT_IMAGE=/boot/vmlinuz-6.2 root=/dev/vda1 ro quiet");
    assert!(warnings.is_empty(), "{warnings:?}");
}

#[test]
fn the_kernel_before_is_booted_if_a_file_of_the_new_one_is_missing_or_damaged() {
    let (kernel, initramfs) = ("boot/vmlinuz-6.2", "boot/initrd.img-6.2");
    let cases: [(&str, Option<&[u8]>, &str); 7] = [
        (kernel, None, "there is no file /boot/vmlinuz-6.2"),
        (kernel, Some(b""), "the kernel is damaged"),
        (kernel, Some(&[0; 4096]), "the kernel is damaged"),
        (initramfs, None, "there is no file /boot/initrd.img-6.2"),
        (initramfs, Some(b""), "/boot/initrd.img-6.2 cannot be used: it is empty"),
        (
            initramfs,
            Some(&[0; 4096]),
            "/boot/initrd.img-6.2 cannot be used: it has 4096 bytes, and",
        ),
        (initramfs, Some(&archive()[..100]), "cannot be used: it is cut off: its 100 bytes end"),
    ];
    for (path, contents, reason) in cases {
        let image = ext4(&[], |root| {
            upgraded(root);
            match contents {
                Some(contents) => fs::write(root.join(path), contents).unwrap(),
                None => fs::remove_file(root.join(path)).unwrap(),
            }
        });
        let (cmdline, warnings) = boots(&image);
        assert_eq!(cmdline, "BOOT_IMAGE=/boot/vmlinuz-6.1 root=/dev/vda1 ro quiet", "{reason}");
        // Once, although four entries have these files.
        let [warning] = warnings.as_slice() else { panic!("{reason}: {warnings:?}") };
        let entry = "`Debian` of /boot/grub/grub.cfg on the whole disk: ";
        assert!(warning.starts_with(entry) && warning.contains(reason), "{warning}");
    }
}

#[test]
fn a_file_whose_blocks_cannot_be_read_is_damaged() {
    let options = ["-O", "^extents,^flex_bg,^metadata_csum,^64bit,^has_journal"];
    let mut image = ext4(&options, upgraded);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    fs::write(&path, &image).unwrap();
    // Beyond the end of the file system.
    let request = "sif /boot/initrd.img-6.2 block[0] 0x7ffffff";
    let done = tool("debugfs").args(["-w", "-R", request]).arg(&path).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    image.copy_from_slice(&fs::read(&path).unwrap());
    let (cmdline, warnings) = boots(&image);
    assert!(cmdline.contains("vmlinuz-6.1"), "{cmdline}");
    assert!(warnings[0].contains("initrd.img-6.2"), "{warnings:?}");
}

#[test]
fn nothing_is_booted_in_place_of_a_system_that_is_none() {
    let image = ext4(&[], |root| {
        upgraded(root);
        for version in ["6.2", "6.1"] {
            fs::write(root.join(format!("boot/initrd.img-{version}")), b"").unwrap();
        }
    });
    let error = refused(&image);
    for part in ["/boot/initrd.img-6.2 cannot be used", "/boot/initrd.img-6.1 cannot be used"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(error.contains("`Memory test`") && error.contains("it has no initramfs"), "{error}");
    // Before the configuration says so: a kernel without an initramfs may be meant to have none.
    let cfg = "menuentry a { linux /k }\nmenuentry b { linux /l }\n";
    let both = |root: &Path| {
        write(root, &[("grub/grub.cfg", cfg.as_bytes()), ("k", b""), ("l", b"kernel")]);
    };
    assert_eq!(boots(&ext4(&[], both)).0, "BOOT_IMAGE=/l");
}

#[test]
fn a_configuration_that_was_being_replaced_is_read_from_its_next_version_or_up_to_the_cut() {
    let (old, new) = (config(&["6.1"]), config(&["6.2", "6.1"]));
    let in_half = &new[..new.find("'6.1'").unwrap()];
    let cases: [(Option<&str>, Option<&str>, &str, usize); 7] = [
        // grub-mkconfig was writing the new one.
        (Some(&old), Some(""), "6.1", 0),
        (Some(&old), Some(in_half), "6.1", 0),
        // It was copying it.
        (Some(""), Some(&new), "6.2", 1),
        (Some(in_half), Some(&new), "6.2", 1),
        (None, Some(&new), "6.2", 0),
        // The new one is gone already, or was never complete.
        (Some(in_half), None, "6.2", 1),
        (Some(in_half), Some(in_half), "6.2", 2),
    ];
    for (index, (current, next, booted, count)) in cases.into_iter().enumerate() {
        let image = ext4(&[], |root| {
            upgraded(root);
            fs::remove_file(root.join("boot/grub/grub.cfg")).unwrap();
            for (name, text) in [("grub.cfg", current), ("grub.cfg.new", next)] {
                let path = root.join("boot/grub").join(name);
                text.iter().for_each(|text| fs::write(&path, text).unwrap());
            }
        });
        let (cmdline, warnings) = boots(&image);
        assert!(cmdline.contains(&format!("vmlinuz-{booted} ")), "{index}: {cmdline}");
        assert_eq!(warnings.len(), count, "{index}: {warnings:?}");
        assert!(warnings.iter().all(|warning| warning.contains("/boot/grub/grub.cfg")));
    }
    let nothing = ext4(&[], |root| {
        upgraded(root);
        write(root, &[("boot/grub/grub.cfg", b""), ("boot/grub/grub.cfg.new", b"set a=b\n")]);
    });
    let error = refused(&nothing);
    assert!(error.contains("/boot/grub/grub.cfg.new on the whole disk: it has no menu"), "{error}");
}

#[test]
fn an_entry_for_the_next_boot_that_is_damaged_is_cleared_and_the_default_is_booted() {
    let head = "if [ \"${next_entry}\" ]; then\nset default=\"${next_entry}\"\nset next_entry=\n\
                save_env next_entry\nfi\n";
    let mut block = b"# GRUB Environment Block\nnext_entry=1>2\n".to_vec();
    block.resize(1024, b'#');
    let image = ext4(&[], |root| {
        upgraded(root);
        let cfg = config(&["6.2", "6.1"]).replace("set default=0\n", head);
        write(root, &[("boot/grub/grub.cfg", cfg.as_bytes()), ("boot/grub/grubenv", &block)]);
        fs::write(root.join("boot/initrd.img-6.1"), b"").unwrap();
    });
    let disk = file(&image);
    for count in [1, 0] {
        let found = search_with(disk.try_clone().unwrap(), load).unwrap();
        assert!(found.cmdline.contains("vmlinuz-6.2 "), "{}", found.cmdline);
        assert_eq!(found.warnings.len(), count, "{:?}", found.warnings);
        assert!(!found.origin.contains("for this boot only"), "{}", found.origin);
    }
}

#[test]
fn a_boot_loader_entry_that_is_damaged_gives_way_to_the_one_before() {
    let archive = archive();
    let new = "title new\nlinux /6.2/linux\ninitrd /6.2/initrd\n";
    let old = "title old\nlinux /6.1/linux\ninitrd /6.1/initrd\noptions old\n";
    let boots_with = |entry: &str, kernel: &[u8], initramfs: &[u8]| {
        boots(&fat(&[
            ("loader/entries/d-6.2.conf", entry.as_bytes()),
            ("loader/entries/d-6.1.conf", old.as_bytes()),
            ("6.2/linux", kernel),
            ("6.2/initrd", initramfs),
            ("6.1/linux", b"kernel 6.1"),
            ("6.1/initrd", &archive),
        ]))
    };
    assert_eq!(boots_with(new, b"kernel", &archive), (String::new(), Vec::new()));
    for (entry, kernel, initramfs, reason) in [
        (
            "",
            &b"kernel"[..],
            &archive[..],
            "/loader/entries/d-6.2.conf on the whole disk: it is empty",
        ),
        (new, b"", &archive, "`new` of /loader/entries on the whole disk: the kernel is damaged"),
        (new, b"kernel", b"", "/6.2/initrd cannot be used: it is empty"),
        (&new.replace("/6.2/initrd", "/gone"), b"kernel", &archive, "there is no file /gone"),
    ] {
        let (cmdline, warnings) = boots_with(entry, kernel, initramfs);
        assert_eq!((cmdline.as_str(), warnings.len()), ("old", 1), "{warnings:?}");
        assert!(warnings[0].contains(reason), "{warnings:?}");
    }
}
