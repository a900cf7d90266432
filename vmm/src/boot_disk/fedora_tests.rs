//! Boot loader entries that are written for GRUB, as on Fedora and RHEL.

use std::path::Path;

use super::tests::{booted, ext4, fat, file, gpt, search, write};

/// `grub.cfg` as Fedora and RHEL have it, as far as it bears on what is booted.
const BLSCFG: &[u8] = b"if [ -f ${config_directory}/grubenv ]; then\n  load_env -f ${config_directory}/grubenv\n\
    elif [ -s $prefix/grubenv ]; then\n  load_env\nfi\n\
    if [ \"${next_entry}\" ] ; then\n  set default=\"${next_entry}\"\n  set next_entry=\n  save_env next_entry\n\
    else\n  set default=\"${saved_entry}\"\nfi\n\
    search --no-floppy --fs-uuid --set=boot 11111111-2222-4333-8444-555555555555\n\
    if [ -z \"${kernelopts}\" ]; then\n  set kernelopts=\"root=/dev/vda2 ro \"\nfi\n\
    insmod blscfg\nblscfg\n";

/// A boot partition of RHEL with two kernels and these lines in GRUB's environment block.
fn rhel(root: &Path, environment: &str) {
    for version in ["5.14.0-9", "5.14.0-70"] {
        let entry = format!(
            "title Red Hat ({version})\nversion {version}\nlinux /vmlinuz-{version}\n\
             initrd /initramfs-{version}.img $tuned_initrd\noptions $kernelopts $tuned_params\n\
             id rhel-{version}\ngrub_users $grub_users\ngrub_arg --unrestricted\ngrub_class kernel\n"
        );
        write(
            root,
            &[
                (&format!("loader/entries/m-{version}.conf"), entry.as_bytes()),
                (&format!("vmlinuz-{version}"), version.as_bytes()),
                (&format!("initramfs-{version}.img"), b"initrd"),
            ],
        );
    }
    let mut block = format!("# GRUB Environment Block\n{environment}").into_bytes();
    block.resize(1024, b'#');
    write(root, &[("grub2/grubenv", &block), ("tuned.img", b"tuned")]);
}

#[test]
fn entries_that_are_written_for_grub_boot_with_its_variables_and_its_default() {
    let boot = |environment: &str| {
        let partition = ext4(&[], |root| {
            rhel(root, environment);
            write(root, &[("grub2/grub.cfg", BLSCFG)]);
        });
        booted(gpt(&[(1, &partition)]))
    };
    let (kernel, initramfs, cmdline) = boot("");
    assert_eq!((kernel.as_str(), initramfs.as_str()), ("5.14.0-70", "initrd"));
    assert_eq!(cmdline, "BOOT_IMAGE=(hd0,gpt1)/vmlinuz-5.14.0-70 root=/dev/vda2 ro");
    let (kernel, initramfs, cmdline) = boot(
        "saved_entry=m-5.14.0-9\nkernelopts=root=/dev/vda3 quiet\ntuned_params=isolcpus=1\n\
         tuned_initrd=/tuned.img\n",
    );
    assert_eq!((kernel.as_str(), initramfs.as_str()), ("5.14.0-9", "initrd\0\0tuned"));
    assert_eq!(cmdline, "BOOT_IMAGE=(hd0,gpt1)/vmlinuz-5.14.0-9 root=/dev/vda3 quiet isolcpus=1");
    let (kernel, ..) = boot("saved_entry=m-5.14.0-70\nnext_entry=m-5.14.0-9\n");
    assert_eq!(kernel, "5.14.0-9");
    let (kernel, ..) = boot("saved_entry=m-5.14.0-1\n");
    assert_eq!(kernel, "5.14.0-70");
}

#[test]
fn entries_that_are_written_for_grub_boot_without_its_configuration() {
    // Where it is on the ESP.
    let partition = ext4(&[], |root| rhel(root, "kernelopts=root=/dev/vda2 ro\n"));
    let (kernel, initramfs, cmdline) = booted(gpt(&[(1, &partition)]));
    assert_eq!((kernel.as_str(), initramfs.as_str()), ("5.14.0-70", "initrd"));
    assert_eq!(cmdline, "root=/dev/vda2 ro");
    // Other loaders take a dollar as it is.
    let plain = ("loader/entries/a.conf", &b"linux /k\noptions a=$b"[..]);
    assert_eq!(booted(file(&fat(&[plain, ("k", b"kernel")]))).2, "a=$b");
}

#[test]
fn an_entry_that_is_too_long_or_empty_is_left_out_with_its_name_and_the_others_boot() {
    let long = "a".repeat(800);
    let kernelopts = format!("kernelopts={long}\n");
    let several = "$kernelopts ".repeat(90);
    let entries: [(&str, String, &str); 3] = [
        ("m-9.0.conf", format!("linux /k\noptions {}\n", long.repeat(90)), "more than 64 KiB"),
        ("m-9.1.conf", format!("linux /k\ngrub_class k\noptions {several}\n"), "its variables"),
        ("m-9.2.conf", "\n".to_owned(), "it is empty"),
    ];
    for with_grub in [true, false] {
        let partition = ext4(&[], |root| {
            rhel(root, &kernelopts);
            if with_grub {
                write(root, &[("grub2/grub.cfg", BLSCFG)]);
            }
            for (name, text, _) in &entries {
                write(root, &[(&format!("loader/entries/{name}"), text.as_bytes())]);
            }
        });
        let found = search(gpt(&[(1, &partition)])).unwrap();
        assert!(found.cmdline.ends_with(&long), "{}", found.cmdline);
        assert_eq!(found.warnings.len(), 3, "{:?}", found.warnings);
        for (name, _, problem) in &entries {
            let says = |warning: &String| warning.contains(name) && warning.contains(problem);
            assert!(found.warnings.iter().any(says), "{name}: {:?}", found.warnings);
        }
    }
}
