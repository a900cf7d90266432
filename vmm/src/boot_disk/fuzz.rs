//! Fuzz targets: the configuration files, and the whole search on any disk.
#![expect(clippy::unwrap_used, reason = "a panic is how a target says that it found something")]

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use perennial_fuzz::Script;
use rustix::fs::{MemfdFlags, memfd_create};

use super::grub::{self, Choice, GrubError, Volumes};
use super::{Boot, BootDiskError, Booted, LoadError, WITHIN, find, loader_spec};

/// Most bytes of an initramfs that the target reads: it may be as large as its file system claims.
const READ_MAX: u64 = 1 << 20;

/// Two file systems with a few files, whose contents are the fuzzer's.
struct Files<'a>([&'a str; 2]);

impl Volumes for Files<'_> {
    fn by_name(&self, name: &str) -> Option<usize> {
        ["hd0,gpt1", "hd0,gpt2"].iter().position(|known| *known == name)
    }

    fn name(&self, volume: usize) -> String {
        format!("hd0,gpt{}", volume + 1)
    }

    fn by_uuid(&self, uuid: &str) -> Option<usize> {
        ["11111111-2222-4333-8444-555555555555", "1234-ABCD"]
            .iter()
            .position(|known| *known == uuid)
    }

    fn by_label(&self, label: &str) -> Option<usize> {
        ["root", "esp"].iter().position(|known| *known == label)
    }

    fn by_file(&self, path: &str) -> Option<usize> {
        (path.len() < 20).then_some(path.len() % 2)
    }

    fn read(&self, volume: usize, _: &str) -> Option<Vec<u8>> {
        self.0.get(volume).map(|text| text.as_bytes().to_vec())
    }

    fn list(&self, _: usize, directory: &str) -> Vec<String> {
        if directory.len().is_multiple_of(2) { vec!["a.conf".to_owned()] } else { Vec::new() }
    }

    fn look(&self, volume: usize, path: &str) -> Option<Option<u64>> {
        (!path.is_empty()).then(|| self.0.get(volume).map(|text| text.len() as u64))
    }
}

/// Target `boot_config`: GRUB's configuration with its environment block, and boot loader entries with their
/// settings. The script has three long pieces: a configuration and the contents of two other files.
pub fn boot_config(input: &[u8]) {
    let mut script = Script::new(input);
    let mut text = || String::from_utf8_lossy(script.long_piece()).into_owned();
    let (config, first, second) = (text(), text(), text());
    let files = Files([&first, &second]);
    match grub::choose(&files, 0, "/boot/grub/grub.cfg", &config) {
        Ok(Choice { entries: all, skipped: _ }) => {
            assert!(!all.is_empty() && all[1..].iter().all(|chosen| !chosen.is_once));
            for chosen in all {
                for save in &chosen.saves {
                    assert!(save.new.as_ref().is_none_or(|new| new.len() == save.old.len()));
                }
                let places = chosen.initramfs.iter().chain([&chosen.kernel]);
                places.for_each(|place| assert!(place.volume < 2));
                assert!(chosen.cmdline.starts_with("BOOT_IMAGE="));
            }
        }
        Err(error) => assert_is_one_line(&error),
    }
    grub::beginnings(&config).for_each(|text| assert!(config.starts_with(text)));
    let entries = [("a.conf", &config), ("b+0-3.conf", &first)];
    let entries: Vec<_> = entries
        .iter()
        .filter_map(|(name, text)| loader_spec::Entry::parse(name, text).ok()?)
        .collect();
    let count = entries.len();
    assert_eq!(loader_spec::order(entries, &second).len(), count);
}

fn assert_is_one_line(error: &GrubError) {
    let text = error.to_string();
    assert!(!text.contains(['\n', '\0']) && text.len() < 2000, "{text}");
}

/// Target `boot_disk`: a disk with any contents. The script has the size of the disk in KiB (u16), and then
/// pieces of the disk: where each begins, in units of 512 bytes (u16), and its bytes (a long piece). All other bytes are
/// 0. A disk of 3 KiB more than a multiple of 4 KiB has sectors of 4096 bytes, others of 512.
pub fn boot_disk(input: &[u8]) {
    let disk = disk(input);
    let sector = match input.first() {
        Some(size) if size % 4 == 3 => 4096,
        _ => 512,
    };
    // Tells by the first byte whether a kernel is damaged, so that others are tried.
    let mut load = |mut boot: Boot| {
        let mut bytes = Vec::new();
        let _ = boot.kernel.by_ref().take(READ_MAX).read_to_end(&mut bytes);
        match bytes.first() {
            Some(b'x') => Err(LoadError::<()>::Damaged("it begins with x".to_owned())),
            _ => Ok(boot),
        }
    };
    match find(disk, sector, Instant::now() + WITHIN, &mut load) {
        Ok(Err(())) => {}
        Ok(Ok(Booted { loaded: Boot { initramfs, cmdline, .. }, origin, warnings })) => {
            assert!(!warnings.join("").contains('\n'), "{warnings:?}");
            let mut bytes = Vec::new();
            let _ = initramfs.map(|image| image.take(READ_MAX).read_to_end(&mut bytes));
            assert!(!origin.contains('\n') && cmdline.len() < 1 << 20, "{origin}");
        }
        Err(BootDiskError::Nothing { found }) => assert!(!found.contains('\n'), "{found}"),
        Err(BootDiskError::Late) => panic!("the search did not end in time"),
        Err(BootDiskError::Read(_)) => {}
        Err(error) => panic!("{error}"),
    }
}

/// The disk of a script.
fn disk(input: &[u8]) -> File {
    let mut script = Script::new(input);
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(u64::from(script.u16()) << 10).unwrap();
    while !script.is_at_end() {
        let sector = u64::from(script.u16());
        file.write_all_at(script.long_piece(), sector << 9).unwrap();
    }
    file
}
