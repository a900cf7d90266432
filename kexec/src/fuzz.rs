//! Fuzz targets: functions that take any bytes and panic if one of the crate's guarantees is broken.
//!
//! Only tests and fuzzers use them. `kexec/fuzz` runs them under libFuzzer (`make fuzz`). Here each is a
//! test over its seeds (`kexec/fuzz/seeds`) and inputs derived from the seeds.
#![expect(clippy::unwrap_used, reason = "a panic is how a target says that it found something")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::archive::Archive;
use crate::compression::Limited;
use crate::{CommandLine, Compression, Contents, Image, Initramfs, Kernel, parameters};

/// Opens a file as the next kernel and as an initramfs. A kernel that is accepted lies completely within
/// the file, and searching it for versions does not panic.
pub fn image(input: &[u8]) {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(input, 0).unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let initramfs = Initramfs::open(&path);
    if let Ok(initramfs) = &initramfs {
        assert_eq!(initramfs.size, input.len() as u64);
    }
    let Ok(kernel) = Kernel::open(&path) else { return };
    let (start, length) = kernel.payload;
    assert!(start + length <= kernel.size);
    assert!(kernel.alignment.is_power_of_two());
    let _ = Contents::of(&kernel, &[]);
    let image = Image { kernel, initramfs: initramfs.ok() };
    let scratch = image.scratch_parameter();
    let again = CommandLine::new(&scratch).unwrap();
    assert!(again.as_str().starts_with("kho_scratch=16M,"));
}

/// Unpacks bytes in each compression. What comes out is bounded.
pub fn unpack(input: &[u8]) {
    const MOST: u64 = 1 << 22;
    let Some(compression) = Compression::of(input) else { return };
    let Ok(reader) = compression.unpack(input) else { return };
    let copied = std::io::copy(&mut Limited::new(reader, MOST), &mut std::io::sink());
    assert!(copied.is_err() || copied.is_ok_and(|bytes| bytes <= MOST));
}

/// Reads an initramfs. Each of its names leads to an entry or nowhere.
pub fn archive(input: &[u8]) {
    let Ok(archive) = Archive::unpack(input, &|name| name == "init") else { return };
    let names: Vec<String> = archive.names().map(str::to_owned).collect();
    for name in &names {
        if let Some((found, _)) = archive.find(name) {
            assert!(names.contains(&found));
        }
    }
}

/// Composes a command line. The operator's parameters stay, and all that a live update needs is on.
pub fn command_line(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let before: Vec<_> = parameters(&text).collect();
    let Ok(composed) = CommandLine::for_live_update(&text) else { return };
    assert!(composed.as_str().len() <= CommandLine::MAX_BYTES);
    for needed in ["kho", "liveupdate"] {
        assert_eq!(composed.switch(needed), Some(true));
    }
    let after: Vec<_> = parameters(composed.as_str()).collect();
    assert_eq!(after[..before.len()], before);
    assert_eq!(CommandLine::for_live_update(composed.as_str()), Ok(composed.clone()));
}

#[cfg(test)]
mod tests {
    use perennial_fuzz::replay;

    use super::*;

    fn seeds(target: &str) -> String {
        format!("{}/fuzz/seeds/{target}", env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn a_file_is_refused_or_is_a_whole_kernel() {
        replay(seeds("image"), image);
    }

    #[test]
    fn compressed_bytes_are_unpacked_or_refused() {
        replay(seeds("unpack"), unpack);
    }

    #[test]
    fn an_initramfs_is_refused_or_its_names_lead_somewhere() {
        replay(seeds("archive"), archive);
    }

    #[test]
    fn a_command_line_is_refused_or_keeps_what_is_preserved() {
        replay(seeds("command_line"), command_line);
    }
}
