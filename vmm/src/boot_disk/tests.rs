use std::convert::Infallible;
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::Command;

use vm_memory::{ReadVolatile, VolatileSlice};

use super::file_system::FileSystem;
use super::search::TEXT_MAX;
use super::*;

pub(super) const MIB: u64 = 1 << 20;
const UUID: &str = "11111111-2222-4333-8444-555555555555";

/// A tool for file systems. Tools for root are not in the path of every user.
pub(super) fn tool(name: &str) -> Command {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(name);
    command.env("PATH", path);
    command
}

/// A file system of ext4 with the files that `fill` writes into a directory.
pub(super) fn ext4(options: &[&str], fill: impl FnOnce(&Path)) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let (root, image) = (directory.path().join("root"), directory.path().join("image"));
    fs::create_dir(&root).unwrap();
    fill(&root);
    let made = tool("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-U", UUID, "-L", "root", "-d"])
        .arg(&root)
        .args(options)
        .arg(&image)
        .arg("8M")
        .output()
        .expect("mke2fs, of the package e2fsprogs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    if options == DEBIAN_13 {
        let done = tool("tune2fs").args(["-U", UUID]).arg(&image).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    fs::read(image).unwrap()
}

/// The options of a file system as Debian 13 makes it. [`ext4`] then gives it the UUID, which its checksums do not
/// follow: they have a seed of their own.
pub(super) const DEBIAN_13: &[&str] =
    &["-O", "metadata_csum_seed,orphan_file", "-U", "99999999-2222-4333-8444-555555555555"];

/// A file system of FAT with these files.
pub(super) fn fat(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut image = io::Cursor::new(vec![0; 4 * MIB as usize]);
    let options = fatfs::FormatVolumeOptions::new().volume_id(0x1234_abcd);
    fatfs::format_volume(&mut image, options).unwrap();
    {
        let fat = fatfs::FileSystem::new(&mut image, fatfs::FsOptions::new()).unwrap();
        for (path, contents) in files {
            let names: Vec<&str> = path.split('/').collect();
            for end in 1..names.len() {
                fat.root_dir().create_dir(&names[..end].join("/")).unwrap();
            }
            fat.root_dir().create_file(path).unwrap().write_all(contents).unwrap();
        }
    }
    image.into_inner()
}

/// Writes the files into a directory.
pub(super) fn write(root: &Path, files: &[(&str, &[u8])]) {
    for (path, contents) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }
}

pub(super) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A disk with a GPT and these partitions, each at a multiple of 1 MiB, with the numbers that stand before them.
pub(super) fn gpt(partitions: &[(usize, &[u8])]) -> File {
    gpt_of(512, partitions)
}

/// The same with sectors of `sector` bytes.
pub(super) fn gpt_of(sector: u64, partitions: &[(usize, &[u8])]) -> File {
    let disk = file(&[]);
    let mut table = vec![0; 128 * 128];
    let mut next = MIB;
    for (number, contents) in partitions {
        disk.write_all_at(contents, next).unwrap();
        let entry = &mut table[(number - 1) * 128..];
        let (first, last) = (next / sector, (next + contents.len() as u64) / sector - 1);
        entry[..16].fill(7);
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
        next += (contents.len() as u64).next_multiple_of(MIB);
    }
    let last = (next + MIB) / sector - 1;
    disk.set_len((last + 1) * sector).unwrap();
    for (at, table_at) in [(1, 2), (last, last - table.len() as u64 / sector)] {
        let mut header = [0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&0x1_0000_u32.to_le_bytes());
        header[12..16].copy_from_slice(&92_u32.to_le_bytes());
        header[24..32].copy_from_slice(&at.to_le_bytes());
        header[72..80].copy_from_slice(&table_at.to_le_bytes());
        header[80..84].copy_from_slice(&128_u32.to_le_bytes());
        header[84..88].copy_from_slice(&128_u32.to_le_bytes());
        header[88..92].copy_from_slice(&crc32fast::hash(&table).to_le_bytes());
        let checksum = crc32fast::hash(&header);
        header[16..20].copy_from_slice(&checksum.to_le_bytes());
        disk.write_all_at(&header, at * sector).unwrap();
        disk.write_all_at(&table, table_at * sector).unwrap();
    }
    write_mbr(&disk, 0, &[mbr_entry(0xee, 1, u32::MAX)]);
    disk
}

pub(super) fn mbr_entry(kind: u8, first: u32, sectors: u32) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[4] = kind;
    entry[8..12].copy_from_slice(&first.to_le_bytes());
    entry[12..].copy_from_slice(&sectors.to_le_bytes());
    entry
}

pub(super) fn write_mbr(disk: &File, sector: u64, entries: &[[u8; 16]]) {
    write_mbr_at(disk, sector * 512, entries);
}

pub(super) fn write_mbr_at(disk: &File, start: u64, entries: &[[u8; 16]]) {
    for (index, entry) in (0..).zip(entries) {
        disk.write_all_at(entry, start + 446 + 16 * index).unwrap();
    }
    disk.write_all_at(&[0x55, 0xaa], start + 510).unwrap();
}

/// What a disk boots.
pub(super) struct Found {
    pub(super) kernel: Image,
    pub(super) initramfs: Option<Image>,
    pub(super) cmdline: String,
    pub(super) origin: String,
    pub(super) warnings: Vec<String>,
}

pub(super) fn search(disk: File) -> Result<Found, BootDiskError> {
    search_with(disk, |_| Ok::<_, LoadError<Infallible>>(()))
}

/// What a disk boots if `load` is content with its kernel.
pub(super) fn search_with(
    disk: File,
    load: impl Fn(&mut Boot) -> Result<(), LoadError<Infallible>>,
) -> Result<Found, BootDiskError> {
    search_sectors(disk, 512, load)
}

/// The same of a disk with sectors of `sector` bytes.
pub(super) fn search_sectors(
    disk: File,
    sector: u64,
    load: impl Fn(&mut Boot) -> Result<(), LoadError<Infallible>>,
) -> Result<Found, BootDiskError> {
    let mut load = |mut boot| load(&mut boot).map(|()| boot);
    let Ok(booted) = find(disk, sector, Instant::now() + WITHIN, &mut load)?;
    let Booted { loaded: Boot { kernel, initramfs, cmdline, origin: _ }, origin, warnings } =
        booted;
    Ok(Found { kernel, initramfs, cmdline, origin, warnings })
}

/// The kernel, the initramfs and the command line of a disk.
pub(super) fn booted(disk: File) -> (String, String, String) {
    let boot = search(disk).unwrap_or_else(|error| panic!("{error}"));
    let text = |image: Option<Image>| {
        let mut text = String::new();
        image.map(|mut image| image.read_to_string(&mut text).unwrap());
        text
    };
    (text(Some(boot.kernel)), text(boot.initramfs), boot.cmdline)
}

pub(super) fn refused(disk: File) -> String {
    let error = search(disk).err().expect("nothing to boot").to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

const GRUB_CFG: &[u8] = b"menuentry 'Debian' {\n\
    search --fs-uuid --set=root 11111111-2222-4333-8444-555555555555\n\
    linux /boot/vmlinuz root=/dev/vda1 ro\n initrd /boot/initrd }\n";

pub(super) fn debian(root: &Path) {
    write(
        root,
        &[
            ("boot/grub/grub.cfg", GRUB_CFG),
            ("boot/vmlinuz-6.1", b"kernel"),
            ("boot/initrd", b"initrd"),
        ],
    );
    // As the package does it, and as far as links go.
    symlink("vmlinuz-6.1", root.join("boot/vmlinuz")).unwrap();
}

pub(super) fn debian_boots(disk: File) {
    let (kernel, initramfs, cmdline) = booted(disk);
    assert_eq!((kernel.as_str(), initramfs.as_str()), ("kernel", "initrd"));
    assert_eq!(cmdline, "BOOT_IMAGE=/boot/vmlinuz root=/dev/vda1 ro");
}

#[test]
fn a_disk_as_debian_lays_it_out_boots_by_its_grub_configuration() {
    let (root, esp) = (ext4(&[], debian), fat(&[("EFI/debian/grub.cfg", b"configfile /x")]));
    debian_boots(gpt(&[(1, &root), (14, &[0; 4096]), (15, &esp)]));
    debian_boots(file(&root));
}

#[test]
fn any_kind_of_ext_is_read() {
    for options in [
        &["-b", "1024", "-O", "^has_journal"][..],
        &["-b", "4096", "-O", "^metadata_csum,^64bit"],
        &["-O", "^extents,^flex_bg,^metadata_csum,^64bit"],
        DEBIAN_13,
    ] {
        debian_boots(file(&ext4(options, debian)));
    }
}

/// Where `s_feature_ro_compat` and `s_checksum` are in the image (Linux fs/ext4/ext4.h).
const RO_COMPAT: usize = 1024 + 0x64;
const CHECKSUM: usize = 1024 + 0x3fc;

#[test]
fn a_file_system_that_was_mounted_with_an_orphan_file_is_read() {
    let mut image = ext4(DEBIAN_13, debian);
    // `EXT4_FEATURE_RO_COMPAT_ORPHAN_PRESENT`, which Linux sets while files are deleted that are open.
    let features = u32_at(&image, RO_COMPAT);
    image[RO_COMPAT..RO_COMPAT + 4].copy_from_slice(&(features | 0x1_0000).to_le_bytes());
    let checksum = crc32c(&image[1024..CHECKSUM]);
    image[CHECKSUM..CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
    debian_boots(file(&image));
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The checksum of ext4's metadata: Castagnoli's, without the last inversion.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
    bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

#[test]
fn boot_loader_entries_are_preferred_and_the_newest_is_booted() {
    let old = ("loader/entries/d-6.1.0-9.conf", &b"linux /old\n"[..]);
    let new = (
        "loader/entries/d-6.1.0-18.conf",
        &b"linux /d/Linux\ninitrd /d/a\ninitrd /d/b\noptions quiet ro"[..],
    );
    // More than one chunk of a file on FAT.
    let big = vec![b'x'; 3 << 20];
    let files = [old, new, ("old", b""), ("d/linux", &big), ("d/a", b"one"), ("d/b", b"two")];
    let disk = gpt(&[(1, &ext4(&[], debian)), (2, &fat(&files))]);
    let (kernel, initramfs, cmdline) = booted(disk);
    assert!(kernel.as_bytes() == big, "{} bytes", kernel.len());
    assert_eq!((initramfs.as_str(), cmdline.as_str()), ("one\0two", "quiet ro"));
    let settings = ("loader/loader.conf", &b"default d-6.1.0-9*"[..]);
    let (kernel, ..) = booted(file(&fat(&[old, new, settings, ("old", b"the old one")])));
    assert_eq!(kernel, "the old one");
}

#[test]
fn a_kernel_is_read_into_guest_memory_at_once() {
    let kernel: Vec<u8> = (0..300_000u32).map(|n| (n >> 3) as u8).collect();
    let disks = [
        ext4(&[], |root| {
            write(
                root,
                &[
                    ("boot/grub/grub.cfg", GRUB_CFG),
                    ("boot/vmlinuz", &kernel),
                    ("boot/initrd", b"initrd"),
                ],
            )
        }),
        fat(&[("loader/entries/a.conf", b"linux /k"), ("k", &kernel)]),
    ];
    for disk in disks {
        let mut image = search(file(&disk)).unwrap().kernel;
        let mut memory = vec![0; kernel.len() + 9];
        let count = image.read_volatile(&mut VolatileSlice::from(&mut memory[..])).unwrap();
        assert_eq!(count, kernel.len());
        assert!(memory[..count] == kernel, "the bytes differ");
        assert_eq!(image.read_volatile(&mut VolatileSlice::from(&mut memory[..])).unwrap(), 0);
    }
}

#[test]
fn a_separate_boot_partition_is_found_by_its_uuid() {
    let cfg =
        b"search --no-floppy --fs-uuid --set=root 1234-ABCD\nmenuentry t { linux /linux a=b }";
    let root = ext4(&[], |root| write(root, &[("boot/grub/grub.cfg", cfg)]));
    let disk = gpt(&[(1, &root), (2, &fat(&[("linux", b"kernel")]))]);
    assert_eq!(booted(disk), ("kernel".into(), String::new(), "BOOT_IMAGE=/linux a=b".into()));
}

#[test]
fn a_disk_with_nothing_to_boot_says_what_was_looked_for_and_what_there_is() {
    let nothing = refused(file(&[0; 8192]));
    assert!(nothing.contains("/loader/entries/*.conf") && nothing.contains("/boot/grub/grub.cfg"));
    assert!(nothing.contains("8192 bytes, no partition table; the whole disk"), "{nothing}");
    assert!(refused(file(&[])).contains("0 bytes"));
    let mut xfs = vec![0; MIB as usize];
    xfs[..4].copy_from_slice(b"XFSB");
    let text = refused(gpt(&[(1, &xfs), (15, &fat(&[]))]));
    assert!(text.contains("a GPT; partition 1 (1048576 bytes): it is XFS"), "{text}");
    assert!(text.contains("partition 15 (4194304 bytes): FAT"), "{text}");
    let cfg = b"menuentry t { linux /gone }";
    let text = refused(file(&ext4(&[], |root| write(root, &[("grub/grub.cfg", cfg)]))));
    assert!(text.contains("/grub/grub.cfg on the whole disk: there is no file /gone"), "{text}");
    let cfg = b"menuentry \"a\nb\" { chainloader +1 }";
    let text = refused(file(&ext4(&[], |root| write(root, &[("grub/grub.cfg", cfg)]))));
    assert!(text.contains("`a\\nb` has no `linux` command"), "{text}");
    let past = file(&[]);
    past.set_len(MIB).unwrap();
    write_mbr(&past, 0, &[mbr_entry(0x83, 100, u32::MAX)]);
    assert!(refused(past).contains("the partition is not on the disk"));
}

#[test]
fn links_that_lead_in_a_circle_or_nowhere_are_errors() {
    let with = |fill: fn(&Path)| {
        refused(file(&ext4(&[], |root| {
            write(root, &[("boot/grub/grub.cfg", GRUB_CFG)]);
            fill(root);
        })))
    };
    let circle = with(|root| symlink("vmlinuz", root.join("boot/vmlinuz")).unwrap());
    assert!(circle.contains("more than 40 symbolic links"), "{circle}");
    let nowhere = with(|root| symlink("/nowhere", root.join("boot/vmlinuz")).unwrap());
    assert!(nowhere.contains("no file /boot/vmlinuz"), "{nowhere}");
    let growing = with(|root| symlink("x/../vmlinuz/y", root.join("boot/vmlinuz")).unwrap());
    assert!(growing.contains("no file") || growing.contains("symbolic links"), "{growing}");
    let directory = with(|root| fs::create_dir(root.join("boot/vmlinuz")).unwrap());
    assert!(directory.contains("no file /boot/vmlinuz"), "{directory}");
}

#[test]
fn links_may_leave_their_directory_but_not_the_file_system() {
    debian_boots(file(&ext4(&[], |root| {
        debian(root);
        fs::remove_file(root.join("boot/vmlinuz")).unwrap();
        symlink("/../../boot/./grub/../vmlinuz-6.1", root.join("boot/vmlinuz")).unwrap();
    })));
}

/// A file system without checksums, so that its fields can be changed.
fn plain(fill: impl FnOnce(&Path)) -> Vec<u8> {
    ext4(&["-b", "1024", "-O", "^metadata_csum,^has_journal"], fill)
}

#[test]
fn a_superblock_that_claims_too_much_is_refused_before_it_is_believed() {
    let claim = |offset: usize, value: u32| {
        let mut image = plain(debian);
        image[1024 + offset..1024 + offset + 4].copy_from_slice(&value.to_le_bytes());
        refused(file(&image))
    };
    assert!(claim(0x4, u32::MAX).contains("larger than its partition"));
    assert!(claim(0x150, 1).contains("larger than its partition"));
    assert!(claim(0x18, 7).contains("larger than 64 KiB"));
    assert!(claim(0x20, 0).contains("block groups"));
}

/// Sets the size of the inode of `path`.
fn claim_size(image: &mut [u8], path: &str, bytes: u64) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("image");
    fs::write(&file, &image).unwrap();
    let request = format!("sif {path} size {bytes}");
    let done = tool("debugfs").args(["-w", "-R", &request]).arg(&file).output();
    assert!(done.expect("debugfs, of the package e2fsprogs").status.success());
    image.copy_from_slice(&fs::read(&file).unwrap());
}

#[test]
fn files_and_links_that_claim_to_be_huge_take_no_memory() {
    let mut image = plain(|root| {
        debian(root);
        fs::remove_file(root.join("boot/vmlinuz")).unwrap();
        symlink("v".repeat(100), root.join("boot/vmlinuz")).unwrap();
    });
    claim_size(&mut image, "/boot/vmlinuz", 1 << 41);
    assert!(refused(file(&image)).contains("4096 bytes"), "{}", refused(file(&image)));
    let mut image = plain(debian);
    claim_size(&mut image, "/boot/vmlinuz-6.1", 1 << 40);
    let text = refused(file(&image));
    assert!(
        text.contains("/boot/vmlinuz has 1099511627776 bytes, 268435456 can be read"),
        "{text}"
    );
    let mut image = plain(debian);
    claim_size(&mut image, "/boot/grub/grub.cfg", 1 << 40);
    assert!(refused(file(&image)).contains("grub.cfg has 1099511627776 bytes, 1048576 can be"));
    // The initramfs may be as large as the guest's RAM, which is checked by its length.
    let mut image = plain(debian);
    claim_size(&mut image, "/boot/initrd", 1 << 40);
    let mut initramfs = search(file(&image)).unwrap().initramfs.unwrap();
    assert_eq!(initramfs.seek(SeekFrom::End(0)).unwrap(), 1 << 40);
}

#[test]
fn a_panic_of_a_reader_and_a_search_without_end_are_errors() {
    let disk = || file(&ext4(&[], debian));
    let load = |boot: Boot| Ok::<_, LoadError<()>>(boot.origin);
    let origin = boot(disk(), load).unwrap().unwrap().loaded;
    assert_eq!(origin, "`Debian` of /boot/grub/grub.cfg on the whole disk");
    let error = boot::<(), ()>(disk(), |_| panic!("oh\nno")).unwrap_err();
    assert_eq!(error.to_string(), "its file systems confuse their reader, which says: oh no");
    let past = Instant::now() - Duration::from_secs(1);
    let late = find(disk(), 512, past, &mut |_| Ok::<_, LoadError<()>>(())).err().unwrap();
    assert!(matches!(late, BootDiskError::Late), "{late}");
}

/// A configuration with an entry for the next boot only, as `grub-mkconfig` writes it.
const ONCE_CFG: &[u8] =
    b"load_env\nif [ \"${next_entry}\" ]; then set default=\"${next_entry}\"\nset next_entry=\n\
    save_env next_entry\nfi\nmenuentry old { linux /boot/vmlinuz old }\n\
    menuentry new { linux /boot/vmlinuz new }\n";

fn environment(next: &str) -> Vec<u8> {
    let mut block = format!("# GRUB Environment Block\nnext_entry={next}\nkept=1\n").into_bytes();
    block.resize(1024, b'#');
    block
}

fn with_once(root: &Path) {
    write(
        root,
        &[
            ("boot/grub/grub.cfg", ONCE_CFG),
            // Another file with the same contents is left alone.
            ("boot/grub/before", &environment("new")),
            ("boot/grub/grubenv", &environment("new")),
            ("boot/vmlinuz", b"kernel"),
        ],
    );
}

#[test]
fn an_entry_for_the_next_boot_is_used_once_and_the_disk_is_otherwise_as_before() {
    let on_fat = fat(&[
        ("boot/grub/grub.cfg", ONCE_CFG),
        ("boot/grub/before", &environment("new")),
        ("boot/grub/grubenv", &environment("new")),
        ("boot/vmlinuz", b"kernel"),
    ]);
    for image in [
        ext4(&[], with_once),
        ext4(&["-b", "4096"], with_once),
        ext4(&["-O", "^extents,^flex_bg,^metadata_csum,^64bit"], with_once),
        on_fat,
    ] {
        let disk = gpt(&[(2, &image)]);
        let again = || disk.try_clone().unwrap();
        let before = everything(&disk);
        let boot = search(again()).unwrap();
        assert!(boot.cmdline.ends_with(" new") && boot.warnings.is_empty(), "{}", boot.cmdline);
        assert!(boot.origin.contains("chosen for this boot only"), "{}", boot.origin);
        let after = everything(&disk);
        let at = |index: usize| index as u64 / 1024;
        let changed: Vec<u64> =
            (0..after.len()).filter(|i| after[*i] != before[*i]).map(at).collect();
        // 1024 bytes at a multiple of 512.
        assert!(!changed.is_empty() && changed.last() <= changed.first().map(|c| c + 1).as_ref());
        let file_system = FileSystem::open(
            View::whole(again(), Instant::now() + WITHIN)
                .unwrap()
                .part(MIB, image.len() as u64)
                .unwrap(),
        )
        .unwrap();
        let contents = |path| file_system.contents(path, TEXT_MAX).unwrap();
        assert_eq!(contents("/boot/grub/before"), environment("new"));
        let mut cleared = environment("");
        cleared.resize(1024, b'#');
        assert_eq!(contents("/boot/grub/grubenv"), cleared);
        let boot = search(again()).unwrap();
        assert!(boot.cmdline.ends_with(" old"), "{}", boot.cmdline);
        assert!(everything(&disk) == after, "the second boot wrote");
    }
}

fn everything(disk: &File) -> Vec<u8> {
    let mut bytes = vec![0; disk.metadata().unwrap().len() as usize];
    disk.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn an_entry_for_the_next_boot_that_cannot_be_cleared_is_not_used() {
    let image = ext4(&[], with_once);
    let file = file(&image);
    // A disk with `readonly=on`.
    let disk = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)));
    let boot = search(disk.unwrap()).unwrap();
    assert!(boot.cmdline.ends_with(" old"), "{}", boot.cmdline);
    let [warning] = boot.warnings.as_slice() else { panic!("{:?}", boot.warnings) };
    assert!(warning.contains("grub-reboot") && warning.contains("cannot be written"), "{warning}");
    // The file's block is a hole, or has no room; the disk is not written.
    for block in [vec![0; 1024], b"# GRUB Environment Block\nnext_entry=new".to_vec()] {
        let disk = self::file(&ext4(&[], |root| {
            with_once(root);
            fs::write(root.join("boot/grub/grubenv"), &block).unwrap();
        }));
        let before = everything(&disk);
        assert!(search(disk.try_clone().unwrap()).unwrap().cmdline.ends_with(" old"));
        assert!(everything(&disk) == before);
    }
}

/// An EFI program for a machine with these sections.
fn efi(machine: u16, sections: &[(&str, &[u8])]) -> Vec<u8> {
    const ALIGNMENT: usize = 512;
    let mut head = vec![0; 64];
    head[..2].copy_from_slice(b"MZ");
    head[0x3c] = 64;
    head.extend(b"PE\0\0");
    head.extend(machine.to_le_bytes());
    head.extend((sections.len() as u16).to_le_bytes());
    head.extend([0; 12]);
    head.extend(240_u16.to_le_bytes());
    head.extend([0; 2]);
    let mut optional = vec![0; 240];
    optional[..2].copy_from_slice(&0x20b_u16.to_le_bytes());
    optional[108] = 16;
    head.extend(optional);
    let mut data = Vec::new();
    let start = (head.len() + 40 * sections.len()).next_multiple_of(ALIGNMENT);
    for (name, contents) in sections {
        let mut entry = [0; 40];
        entry[..name.len()].copy_from_slice(name.as_bytes());
        let stored = contents.len().next_multiple_of(ALIGNMENT);
        entry[8..12].copy_from_slice(&(contents.len() as u32).to_le_bytes());
        entry[16..20].copy_from_slice(&(stored as u32).to_le_bytes());
        entry[20..24].copy_from_slice(&((start + data.len()) as u32).to_le_bytes());
        head.extend(entry);
        data.extend_from_slice(contents);
        data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
    }
    head.resize(start, 0);
    head.extend(data);
    head
}

const X86_64: u16 = 0x8664;

fn unified(kernel: &[u8], version: &str) -> Vec<u8> {
    let os_release = format!("NAME=Debian\nID=debian\nVERSION_ID=\"{version}\"\n");
    let sections: &[(&str, &[u8])] = &[
        (".text", b"stub"),
        (".osrel", os_release.as_bytes()),
        (".cmdline", b"root=/dev/vda2 quiet\n\0"),
        (".ucode", b"one"),
        (".initrd", b"two"),
        (".linux", kernel),
        (".profile", b"ID=main"),
        (".profile", b"ID=other"),
        (".cmdline", b"another"),
    ];
    efi(X86_64, sections)
}

#[test]
fn the_newest_unified_kernel_image_is_booted() {
    let big = vec![b'k'; 300_000];
    let (old, new) = (unified(b"old", "9"), unified(&big, "12"));
    let (old, new) = (("EFI/Linux/old.efi", &old[..]), ("EFI/Linux/new+3.efi", &new[..]));
    let esp = fat(&[("EFI/BOOT/BOOTX64.EFI", b""), old, new]);
    let disk = gpt(&[(1, &esp), (2, &ext4(&[], debian))]);
    let boot = search(disk.try_clone().unwrap()).unwrap();
    assert_eq!(boot.origin, "`new` of /EFI/Linux/new+3.efi on partition 1");
    let (kernel, initramfs, cmdline) = booted(disk);
    assert!(kernel.as_bytes() == big, "{} bytes", kernel.len());
    assert_eq!((initramfs.as_str(), cmdline.as_str()), ("one\0two", "root=/dev/vda2 quiet"));
    let default = ("loader/loader.conf", &b"default old.efi"[..]);
    assert_eq!(booted(file(&fat(&[old, new, default]))).0, "old");
    let named = ("loader/entries/a.conf", &b"uki /EFI/Linux/old.efi\nsort-key a"[..]);
    let elsewhere = fat(&[("images/old.efi", old.1), named, old]);
    assert_eq!(booted(file(&elsewhere)).0, "old");
}

#[test]
fn a_unified_kernel_image_that_is_none_or_is_damaged_says_so() {
    let on = |image: &[u8]| refused(file(&fat(&[("EFI/Linux/a.efi", image)])));
    let stub = on(&efi(X86_64, &[(".text", b"stub")]));
    assert!(
        stub.contains("/EFI/Linux/a.efi on the whole disk: it has no section `.linux`"),
        "{stub}"
    );
    assert!(on(&efi(0xaa64, &[(".linux", b"k")])).contains("no EFI program for x86-64"));
    assert!(on(b"MZ").contains("no EFI program for x86-64"));
    assert!(on(b"").contains("no EFI program for x86-64"));
    let whole = efi(X86_64, &[(".linux", b"kernel")]);
    assert!(on(&whole[..whole.len() - 512]).contains("`.linux` is not in the file"));
    for end in (0..whole.len()).step_by(29) {
        // No prefix confuses the search.
        let _ = search(file(&fat(&[("EFI/Linux/a.efi", &whole[..end])])));
    }
}

/// File systems and containers that cannot be read, with the command that makes each in a file, its package, and what
/// it is called.
const FOREIGN: [(&str, &str, &str); 6] = [
    ("mkfs.xfs -q -f", "xfsprogs", "XFS"),
    ("mkfs.btrfs -q -f", "btrfs-progs", "Btrfs"),
    ("mkfs.f2fs -q -f", "f2fs-tools", "F2FS"),
    ("mkswap -q", "util-linux", "swap space"),
    (
        "cryptsetup luksFormat --batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /etc/passwd",
        "cryptsetup-bin",
        "encrypted (LUKS)",
    ),
    ("mkfs.ntfs -q -F -f", "ntfs-3g", "NTFS"),
];

#[test]
fn a_real_file_system_that_cannot_be_read_is_named_with_what_to_do() {
    for (command, package, name) in FOREIGN {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        File::create(&image).unwrap().set_len(320 * MIB).unwrap();
        let mut words = command.split(' ');
        let program = words.next().unwrap();
        let made = match tool(program).args(words).arg(&image).output() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                eprintln!("SKIPPED: {name}: {program} is not installed (Debian: {package})");
                continue;
            }
            other => other.unwrap(),
        };
        assert!(made.status.success(), "{command}: {made:?}");
        let disk = file(&[]);
        disk.set_len(400 * MIB).unwrap();
        write_mbr(&disk, 0, &[mbr_entry(0x83, 2048, (320 * MIB / 512) as u32)]);
        let mut at = MIB;
        let mut from = File::open(&image).unwrap();
        let mut piece = vec![0; MIB as usize];
        while let Ok(count @ 1..) = from.read(&mut piece) {
            if piece[..count].iter().any(|byte| *byte != 0) {
                disk.write_all_at(&piece[..count], at).unwrap();
            }
            at += count as u64;
        }
        let refused = refused(disk);
        let found = format!("partition 1 (335544320 bytes): it is {name}, which cannot be read");
        assert!(refused.contains(&found), "{refused}");
        assert!(refused.contains("Give the VM a `kernel`"), "{refused}");
    }
}

#[test]
fn a_volume_of_lvm_and_a_part_of_a_raid_are_named() {
    for (at, magic, name) in [
        (512, &b"LABELONE"[..], "an LVM volume"),
        (4096, b"\xfc\x4e\x2b\xa9", "a part of a RAID"),
        (0x8001, b"CD001", "an ISO 9660 image"),
    ] {
        let disk = file(&[]);
        disk.set_len(MIB).unwrap();
        disk.write_all_at(magic, at).unwrap();
        let text = refused(disk);
        assert!(text.contains(&format!("the whole disk (1048576 bytes): it is {name}")), "{text}");
    }
}
