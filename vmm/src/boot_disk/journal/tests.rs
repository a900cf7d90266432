use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;
use crate::boot_disk::tests::{DEBIAN_13, booted, debian, ext4, file, refused, tool};

/// A file system whose journal the tests write with `debugfs`.
struct Unclean {
    directory: TempDir,
    image: PathBuf,
    block_size: u64,
    transactions: Vec<String>,
}

impl Unclean {
    /// With the files of a guest, and blocks of this size.
    fn new(block_size: u64, options: &[&str]) -> Self {
        let size = block_size.to_string();
        let bytes = match options {
            DEBIAN_13 => ext4(DEBIAN_13, debian),
            options => ext4(&[&["-b", &size], options].concat(), debian),
        };
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        fs::write(&image, bytes).unwrap();
        Self { directory, image, block_size, transactions: Vec::new() }
    }

    /// The block in which a file of the file system begins.
    fn block_of(&self, path: &str) -> u64 {
        let request = format!("bmap {path} 0");
        let output = tool("debugfs").args(["-R", &request]).arg(&self.image).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    }

    /// Adds a transaction with a copy of a block, which begins with `contents`.
    fn log(self, block: u64, contents: &[u8]) -> Self {
        self.log_with("", block, contents)
    }

    fn log_with(mut self, options: &str, block: u64, contents: &[u8]) -> Self {
        let path = self.directory.path().join(format!("copy{}", self.transactions.len()));
        let mut bytes = contents.to_vec();
        bytes.resize(self.block_size as usize, 0);
        fs::write(&path, bytes).unwrap();
        self.transactions.push(format!("jw {options} -b {block} {}", path.display()));
        self
    }

    fn revoke(mut self, block: u64) -> Self {
        self.transactions.push(format!("jw -r {block}"));
        self
    }

    /// Writes the journal. `version` is that of its checksums: 0 for none.
    fn done(self, version: u32) -> Vec<u8> {
        let open = if version == 0 { "jo".to_owned() } else { format!("jo -c -v {version}") };
        let commands = format!("{open}\n{}\njc\n", self.transactions.join("\n"));
        let script = self.directory.path().join("commands");
        fs::write(&script, commands).unwrap();
        let output = tool("debugfs").arg("-w").arg("-f").arg(&script).arg(&self.image).output();
        let output = output.expect("debugfs, of the package e2fsprogs");
        assert!(output.status.success(), "{output:?}");
        fs::read(&self.image).unwrap()
    }
}

/// What a guest boots after the journal was replayed.
fn kernel(image: &[u8]) -> String {
    booted(file(image)).0
}

const KERNEL: &str = "/boot/vmlinuz-6.1";

/// All formats: with and without numbers of 64 bits, with each kind of checksum.
const FORMATS: [(u64, &[&str], u32); 7] = [
    (1024, DEBIAN_13, 3),
    (1024, &[], 3),
    (4096, &[], 3),
    (1024, &["-O", "^64bit"], 3),
    (1024, &[], 2),
    (2048, &["-O", "^metadata_csum,^64bit"], 0),
    (1024, &["-O", "^extents,^flex_bg,^metadata_csum,^64bit"], 0),
];

#[test]
fn a_block_is_what_the_last_transaction_that_ended_says() {
    for (block_size, options, version) in FORMATS {
        let new = || Unclean::new(block_size, options);
        let block = new().block_of(KERNEL);
        let image = new().log(block, b"second").log(block, b"third!").done(version);
        assert_eq!(kernel(&image), "third!", "{options:?} {version}");
        let image = new().log(block, b"second").log_with("-c", block, b"third!").done(version);
        assert_eq!(kernel(&image), "second", "{options:?} {version}");
    }
}

#[test]
fn a_revoked_block_is_what_the_disk_says() {
    for (block_size, options, version) in FORMATS {
        let new = || Unclean::new(block_size, options);
        let block = new().block_of(KERNEL);
        let image = new().log(block, b"stale!").log(9, b"").revoke(block).done(version);
        assert_eq!(kernel(&image), "kernel", "{options:?} {version}");
        let image = new().log(block, b"stale!").revoke(block).log(block, b"newest").done(version);
        assert_eq!(kernel(&image), "newest", "{options:?} {version}");
    }
}

#[test]
fn a_block_that_begins_like_one_of_the_journal_is_restored() {
    let unclean = Unclean::new(1024, &[]);
    let block = unclean.block_of(KERNEL);
    let image = unclean.log(block, &MAGIC_AND_MORE).done(3);
    let mut kernel = Vec::new();
    let mut boot = crate::boot_disk::tests::search(file(&image)).unwrap();
    io::Read::read_to_end(&mut boot.kernel, &mut kernel).unwrap();
    assert_eq!(kernel, MAGIC_AND_MORE);
}

const MAGIC_AND_MORE: [u8; 6] = [0xc0, 0x3b, 0x39, 0x98, 1, 2];

/// Where block `index` of the journal is in the image.
fn journal_block(image: &[u8], index: u64) -> usize {
    let mut view = view(image);
    let mut superblock = vec![0; SUPERBLOCK_LENGTH];
    view.read_exact_at(SUPERBLOCK, &mut superblock).unwrap();
    let size = block_size(&superblock).unwrap();
    let runs = inode::journal(&mut view, &superblock, size).unwrap();
    (runs.get(index).unwrap() * size) as usize
}

fn view(image: &[u8]) -> View {
    View::whole(file(image), Instant::now() + Duration::from_secs(60)).unwrap()
}

#[test]
fn a_journal_goes_on_at_its_beginning() {
    let unclean = Unclean::new(1024, &["-O", "^metadata_csum"]);
    let block = unclean.block_of(KERNEL);
    let mut image = unclean.log(block, b"second").log(block, b"third!").done(0);
    // Two transactions of a descriptor, a copy and a commit each, from block 1 on: they are moved so that the first
    // copy is in the ring's last block.
    let blocks: Vec<Vec<u8>> =
        (1..7).map(|index| image[journal_block(&image, index)..][..1024].to_vec()).collect();
    let length = be32(&image, journal_block(&image, 0) + 0x10);
    for (at, bytes) in [length - 2, length - 1, 1, 2, 3, 4].into_iter().zip(blocks) {
        let at = journal_block(&image, at.into());
        image[at..at + 1024].copy_from_slice(&bytes);
    }
    let start = journal_block(&image, 0) + 0x1c;
    image[start..start + 4].copy_from_slice(&(length - 2).to_be_bytes());
    assert_eq!(kernel(&image), "third!");
    let at = journal_block(&image, 5);
    image[at..at + 1024].fill(0);
    assert_eq!(kernel(&image), "third!");
}

fn be32(image: &[u8], at: usize) -> u32 {
    u32_at(image, at).swap_bytes()
}

#[test]
fn damage_ends_the_journal_or_is_an_error_and_never_a_wrong_block() {
    let unclean = Unclean::new(1024, &[]);
    let block = unclean.block_of(KERNEL);
    let image = unclean.log(block, b"second").log(block, b"third!").revoke(5000).done(3);
    let damaged = |index: u64, at: usize| {
        let mut image = image.clone();
        let block = journal_block(&image, index);
        image[block + at] ^= 1;
        image
    };
    assert_eq!(kernel(&image), "third!");
    // The descriptor, its magic, and the commit block of the second transaction.
    for (index, at) in [(4, 500), (4, 3), (4, 11), (6, 500), (6, 18)] {
        assert_eq!(kernel(&damaged(index, at)), "second", "{index} {at}");
    }
    assert_eq!(kernel(&damaged(1, 500)), "kernel");
    for (index, at, words) in [
        (0, 0x40, "superblock of its journal has a wrong checksum"),
        (0, 0, "no superblock"),
        (5, 500, "a block in its journal has a wrong checksum"),
        (7, 500, "revokes in its journal have a wrong checksum"),
    ] {
        let text = refused(file(&damaged(index, at)));
        assert!(text.contains(words) && text.contains("e2fsck"), "{index} {at}: {text}");
    }
}

#[test]
fn a_journal_of_fast_commits_is_refused_only_if_it_has_any() {
    let unclean = Unclean::new(1024, &["-O", "fast_commit,^metadata_csum"]);
    let block = unclean.block_of(KERNEL);
    let mut image = unclean.log(block, b"second").done(0);
    let head = journal_block(&image, 0);
    let incompat = be32(&image, head + 0x28) | 0x20;
    image[head + 0x28..][..4].copy_from_slice(&incompat.to_be_bytes());
    assert_eq!(kernel(&image), "second");
    // A head for the transaction behind the last one: tag, length, features, number.
    let fast = match be32(&image, head + 0x54) {
        0 => 256,
        blocks => blocks,
    };
    let at = journal_block(&image, (be32(&image, head + 0x10) - fast).into());
    let number = be32(&image, head + 0x18) + 1;
    image[at..at + 8].copy_from_slice(&[9, 0, 8, 0, 0, 0, 0, 0]);
    image[at + 8..at + 12].copy_from_slice(&number.to_le_bytes());
    assert!(refused(file(&image)).contains("fast commits"), "{}", refused(file(&image)));
}

#[test]
fn a_journal_elsewhere_or_without_bounds_is_refused() {
    let image = Unclean::new(1024, &["-O", "^metadata_csum"]).log(9, b"").done(0);
    let changed = |at: usize, bytes: &[u8]| {
        let mut image = image.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        refused(file(&image))
    };
    let head = journal_block(&image, 0);
    assert!(changed(1024 + 0xe0, &[0; 4]).contains("another device"));
    assert!(changed(head + 0x10, &[0xff; 4]).contains("longer than its file"));
    assert!(changed(head + 0x1c, &[0xff; 4]).contains("does not begin where it says"));
    assert!(changed(head + 0x14, &[0; 4]).contains("does not begin where it says"));
    assert!(changed(head + 0x28, &[1]).contains("features 0x1000000,"));
    assert!(changed(head + 0xc, &[0; 4]).contains("blocks of another size"));
    // The journal's inode, number 8, has a tree of extents that leads to itself.
    let mut view = view(&image);
    let mut superblock = vec![0; SUPERBLOCK_LENGTH];
    view.read_exact_at(SUPERBLOCK, &mut superblock).unwrap();
    let descriptors = 2048;
    let table = u32_at(&image, descriptors + 8) as usize * 1024;
    let root = table + 7 * 256 + 0x28;
    assert!(changed(root, &[0; 2]).contains("extents of its journal are damaged"));
    assert!(changed(root + 6, &[9]).contains("extents of its journal are damaged"));
    assert!(changed(root + 6, &[5]).contains("cannot be replayed"));
}

/// `e2fsck` replays as Linux does. Journals of random transactions make the same file system by it and here.
#[test]
fn e2fsck_replays_to_the_same_blocks() {
    const ROUNDS: u64 = 12;
    for round in 0..ROUNDS {
        let (block_size, options, version) = FORMATS[round as usize % FORMATS.len()];
        let mut unclean = Unclean::new(block_size, options);
        let mut seed = round + 1;
        let mut random = |below: u64| {
            // A linear congruential generator (Knuth's MMIX) repeats the same journals in each run.
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        // A few blocks that no metadata is in, so that each is logged and revoked several times.
        let first = unclean.block_of(KERNEL);
        for number in 0..60_u64 {
            let block = first + random(6);
            unclean = match random(3) {
                0 => unclean.revoke(block),
                _ => unclean.log(block, format!("{number} in {round}").as_bytes()),
            };
        }
        let image = unclean.done(version);
        let mut replayed = replay(view(&image)).unwrap();
        let (directory, by_e2fsck) = by_e2fsck(&image);
        for block in first..first + 6 {
            let (mut ours, mut theirs) =
                (vec![0; block_size as usize], vec![0; block_size as usize]);
            replayed.read_exact_at(block * block_size, &mut ours).unwrap();
            File::open(&by_e2fsck).unwrap().read_exact_at(&mut theirs, block * block_size).unwrap();
            assert!(ours == theirs, "round {round}, block {block}");
        }
        drop(directory);
    }
}

/// The image after `e2fsck` replayed its journal and did nothing else.
fn by_e2fsck(image: &[u8]) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path: &Path = directory.path();
    let path = path.join("image");
    fs::write(&path, image).unwrap();
    let mut e2fsck = tool("e2fsck");
    let output = e2fsck.args(["-y", "-E", "journal_only"]).arg(&path).output();
    let output = output.expect("e2fsck, of the package e2fsprogs");
    assert!(output.status.code() <= Some(1), "{output:?}");
    (directory, path)
}

#[test]
fn an_environment_block_in_the_journal_is_not_written() {
    let cfg = b"load_env\nif [ \"${next_entry}\" ]; then set default=1\nset next_entry=\nsave_env next_entry\nfi\n\
        menuentry old { linux /boot/vmlinuz old }\nmenuentry new { linux /boot/vmlinuz new }\n";
    let mut environment = b"# GRUB Environment Block\nnext_entry=1\n".to_vec();
    environment.resize(1024, b'#');
    let unclean = Unclean::new(1024, &[]);
    let bytes = ext4(&["-b", "1024"], |root| {
        debian(root);
        fs::write(root.join("boot/grub/grub.cfg"), cfg).unwrap();
        fs::write(root.join("boot/grub/grubenv"), &environment).unwrap();
    });
    fs::write(&unclean.image, bytes).unwrap();
    let block = unclean.block_of("/boot/grub/grubenv");
    let disk = file(&unclean.log(block, &environment).done(3));
    let boot = crate::boot_disk::tests::search(disk.try_clone().unwrap()).unwrap();
    assert!(boot.cmdline.ends_with("old"), "{}", boot.cmdline);
    assert!(boot.warnings[0].contains("in the journal"), "{:?}", boot.warnings);
}
