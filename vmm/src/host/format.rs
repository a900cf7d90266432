//! Puts a file system on a device, by copying an image that was made elsewhere.
//!
//! A Perennial host has no mkfs, and after a cold boot the contents of a pool's memory are undefined. A
//! device with contents is overwritten only if nothing on it can be needed: it is memory that `memmap=`
//! reserved, and this kernel was not entered by a live update.
//!
//! ```text
//!   such memory               --> the image is copied, whatever the contents
//!   else: superblock of ext4  --> left alone: there may be VMs of the last kernel
//!         all zero            --> the image is copied
//!         anything else       --> refused
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::devices::files::open_at_once;

/// Bytes copied at a time, and bytes examined at either end of a device. The ends contain the
/// superblocks of all common file systems and the backup of a partition table.
const PIECE: usize = 1 << 20;
/// Alignment of memory and offsets for O_DIRECT. Without O_DIRECT, the page cache would hold a second
/// copy of a device that is itself memory.
const ALIGN: usize = 4096;
/// ext4's magic number and its offset in bytes (Linux `fs/ext4/ext4.h`).
const EXT4_MAGIC: [u8; 2] = [0x53, 0xef];
const EXT4_MAGIC_AT: usize = 1024 + 0x38;

/// A device cannot be formatted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The device, or the image, cannot be opened, read or written.
    #[error("cannot {attempt} {}", path.display())]
    Io {
        /// The step that failed.
        attempt: &'static str,
        /// The device or the image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The device holds data that is not known to be unneeded.
    #[error(
        "{} is neither empty nor has it an ext4 file system, and is not overwritten; if nothing on it \
         is needed, overwrite its first and last MiB with zeros, or, if it is memory that `memmap=` \
         reserved, cold boot the host",
        device.display()
    )]
    NotEmpty {
        /// The device.
        device: PathBuf,
    },
    /// The image does not fit.
    #[error(
        "{} has {image_bytes} bytes, {} has {device_bytes}: make a smaller image, or boot with a \
         larger `memmap=`",
        image.display(),
        device.display()
    )]
    TooLarge {
        /// The image.
        image: PathBuf,
        /// The image's size.
        image_bytes: u64,
        /// The device.
        device: PathBuf,
        /// The device's size.
        device_bytes: u64,
    },
    /// The image is not an ext4 file system.
    #[error("{} is no image of an ext4 file system", image.display())]
    NoImage {
        /// The image.
        image: PathBuf,
    },
}

/// Contents found at the ends of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Ext4,
    Nothing,
    Something,
}

/// What the caller knows about the contents of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// Nothing is known: the contents may be needed.
    Unknown,
    /// The contents are left over from before a cold boot, and cannot be needed.
    OfAnotherBoot,
}

/// Whether a device is memory that the kernel's command line turns into a device (`memmap=SIZE!START`).
/// Such a device is RAM and holds nothing that has to survive a power cut. `/proc` and `/sys` are read
/// below `root`.
pub fn is_reserved_memory(root: &Path, device: &Path) -> bool {
    let read = |path: &Path| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let Some(name) = device.file_name() else { return false };
    let namespace = Path::new("sys/class/block").join(name).join("device");
    // An address in hexadecimal and a size in decimal digits (Linux drivers/nvdimm/namespace_devs.c).
    let (start, size) = (read(&namespace.join("resource")), read(&namespace.join("size")));
    let start = start.trim().strip_prefix("0x").and_then(|s| u64::from_str_radix(s, 16).ok());
    match (start, size.trim().parse()) {
        (Some(start), Ok(size)) => kexec::reserves(&read(Path::new("proc/cmdline")), start, size),
        _ => false,
    }
}

/// Copies `image` onto `device`. Returns whether it was copied: with unknown contents, a device with ext4
/// is left alone. Errors if a device with unknown contents is neither empty nor ext4.
pub fn format(device: &Path, image: &Path, contents: Contents) -> Result<bool, FormatError> {
    let io = |attempt, path: &Path| {
        let path = path.to_owned();
        move |source| FormatError::Io { attempt, path, source }
    };
    let mut piece = Aligned::new();
    let mut target = open_direct(device, false).map_err(io("open", device))?;
    let device_bytes = target.seek(SeekFrom::End(0)).map_err(io("find the size of", device))?;
    if contents == Contents::Unknown {
        match look(&target, device_bytes, &mut piece).map_err(io("read", device))? {
            Found::Ext4 => return Ok(false),
            Found::Something => return Err(FormatError::NotEmpty { device: device.to_owned() }),
            Found::Nothing => {}
        }
    }
    let source = open_at_once(image, OpenOptions::new().read(true)).map_err(io("open", image))?;
    let image_bytes = source.metadata().map_err(io("find the size of", image))?.len();
    if image_bytes > device_bytes {
        let (image, device) = (image.to_owned(), device.to_owned());
        return Err(FormatError::TooLarge { image, image_bytes, device, device_bytes });
    }
    if look(&source, image_bytes, &mut piece).map_err(io("read", image))? != Found::Ext4 {
        return Err(FormatError::NoImage { image: image.to_owned() });
    }
    let target = open_direct(device, true).map_err(io("open", device))?;
    // The first piece has the superblock. It is zeroed first and copied last, so that an interrupted copy
    // is recognised neither as the new file system nor as the previous one.
    let nothing = piece.first(image_bytes.min(PIECE as u64) as usize);
    nothing.fill(0);
    target.write_all_at(nothing, 0).map_err(io("write", device))?;
    for number in (0..image_bytes.div_ceil(PIECE as u64)).rev() {
        let at = number * PIECE as u64;
        let buffer = piece.first((image_bytes - at).min(PIECE as u64) as usize);
        read_or_hole(&source, buffer, at).map_err(io("read", image))?;
        target.write_all_at(buffer, at).map_err(io("write", device))?;
    }
    target.sync_all().map_err(io("write", device))?;
    Ok(true)
}

/// Opens a file with O_DIRECT. For writing also with O_EXCL, with which a mounted device is busy. Falls
/// back to buffered I/O for the regular files of tests, whose file system may have no O_DIRECT.
fn open_direct(path: &Path, write: bool) -> io::Result<File> {
    let exclusive = if write { libc::O_EXCL } else { 0 };
    let open = |flags| OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
    match open(libc::O_DIRECT | exclusive) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open(exclusive),
        opened => opened,
    }
}

fn look(file: &File, bytes: u64, piece: &mut Aligned) -> io::Result<Found> {
    let length = bytes.min(PIECE as u64) as usize / ALIGN * ALIGN;
    let head = piece.first(length);
    file.read_exact_at(head, 0)?;
    if head.get(EXT4_MAGIC_AT..EXT4_MAGIC_AT + 2) == Some(&EXT4_MAGIC) {
        return Ok(Found::Ext4);
    }
    let mut empty = is_zero(head);
    let tail = piece.first(length);
    file.read_exact_at(tail, bytes / ALIGN as u64 * ALIGN as u64 - length as u64)?;
    empty &= is_zero(tail);
    Ok(if empty { Found::Nothing } else { Found::Something })
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Reads a piece of the image. A piece in a hole, as most of an image is, is zeroed without reading.
fn read_or_hole(source: &File, buffer: &mut [u8], at: u64) -> io::Result<()> {
    let end = at + buffer.len() as u64;
    match rustix::fs::seek(source, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) if data < end => source.read_exact_at(buffer, at),
        Ok(_) | Err(rustix::io::Errno::NXIO) => {
            buffer.fill(0);
            Ok(())
        }
        Err(errno) => Err(errno.into()),
    }
}

/// A buffer that is aligned for O_DIRECT.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new() -> Self {
        let bytes = vec![0; PIECE + ALIGN];
        let start = bytes.as_ptr().addr().next_multiple_of(ALIGN) - bytes.as_ptr().addr();
        Self { bytes, start }
    }

    fn first(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn files(device: &[u8], image: &[u8]) -> (tempfile::TempDir, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let (to, from) = (path("device"), path("image"));
        std::fs::write(&to, device).unwrap();
        std::fs::write(&from, image).unwrap();
        (directory, to, from)
    }

    fn image(bytes: usize) -> Vec<u8> {
        let mut image = vec![0; bytes];
        image[EXT4_MAGIC_AT..EXT4_MAGIC_AT + 2].copy_from_slice(&EXT4_MAGIC);
        image[bytes - 1] = 7;
        image
    }

    #[test]
    fn an_empty_device_gets_the_image_and_what_lies_behind_it_stays() {
        let (_directory, device, from) = files(&vec![0; 5 * MIB], &image(3 * MIB + 8192));
        assert!(format(&device, &from, Contents::Unknown).unwrap());
        let written = std::fs::read(&device).unwrap();
        assert!(written[..3 * MIB + 8192] == image(3 * MIB + 8192)[..]);
        assert!(is_zero(&written[3 * MIB + 8192..]));
        assert!(!format(&device, &from, Contents::Unknown).unwrap(), "now there is ext4 on it");
    }

    #[test]
    fn the_sparse_parts_of_an_image_are_zeros() {
        let (_directory, device, from) = files(&vec![0; 5 * MIB], &[]);
        let file = File::options().write(true).open(&from).unwrap();
        file.set_len(4 * MIB as u64).unwrap();
        file.write_all_at(&EXT4_MAGIC, EXT4_MAGIC_AT as u64).unwrap();
        assert!(format(&device, &from, Contents::Unknown).unwrap());
        assert_eq!(std::fs::read(&device).unwrap()[EXT4_MAGIC_AT], 0x53);
    }

    #[test]
    fn unknown_contents_of_a_device_are_never_overwritten() {
        for at in [0, MIB - 1, 5 * MIB - 1] {
            let mut used = vec![0; 5 * MIB];
            used[at] = 1;
            let (_directory, device, from) = files(&used, &image(3 * MIB));
            let error = format(&device, &from, Contents::Unknown).unwrap_err();
            assert!(error.to_string().contains("neither empty"), "{error}");
            assert!(std::fs::read(&device).unwrap() == used);
        }
    }

    #[test]
    fn an_image_that_does_not_fit_or_is_none_is_refused_with_both_sides() {
        let (_directory, device, from) = files(&vec![0; 2 * MIB], &image(3 * MIB));
        let error = format(&device, &from, Contents::Unknown).unwrap_err().to_string();
        assert!(error.contains("3145728") && error.contains("2097152"), "{error}");
        let (_directory, device, from) = files(&vec![0; 2 * MIB], &vec![0; MIB]);
        let error = format(&device, &from, Contents::Unknown).unwrap_err().to_string();
        assert!(error.contains("no image"), "{error}");
        let error =
            format(Path::new("/nowhere"), &from, Contents::Unknown).unwrap_err().to_string();
        assert!(error.contains("/nowhere"), "{error}");
    }

    #[test]
    fn contents_of_another_boot_are_overwritten() {
        for left in [image(5 * MIB), vec![0xa5; 5 * MIB]] {
            let (_directory, device, from) = files(&left, &image(3 * MIB));
            assert!(format(&device, &from, Contents::OfAnotherBoot).unwrap());
            let written = std::fs::read(&device).unwrap();
            assert!(written[..3 * MIB] == image(3 * MIB) && written[3 * MIB..] == left[3 * MIB..]);
        }
        // The image must still be ext4.
        let (_directory, device, from) = files(&image(2 * MIB), &vec![0; MIB]);
        format(&device, &from, Contents::OfAnotherBoot).unwrap_err();
        assert!(std::fs::read(&device).unwrap() == image(2 * MIB));
    }

    #[test]
    fn memory_that_this_kernel_reserved_is_told_from_every_other_device() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/cmdline", "quiet memmap=384M!1G\n");
        for (device, start, size) in [
            ("pmem0", "0x40000000\n", "402653184\n"),
            ("pmem1", "0x140000000\n", "402653184\n"),
            ("pmem2", "0x40000000\n", "402657280\n"),
            ("pmem3", "1073741824\n", "402653184\n"),
            ("pmem4", "0x40000000\n", "\n"),
        ] {
            write(&format!("sys/class/block/{device}/device/resource"), start);
            write(&format!("sys/class/block/{device}/device/size"), size);
        }
        write("sys/class/block/vda/device/vendor", "0x1af4\n");
        let reserved = |device: &str| is_reserved_memory(root.path(), Path::new(device));
        assert!(reserved("/dev/pmem0"));
        for other in ["/dev/pmem1", "/dev/pmem2", "/dev/pmem3", "/dev/pmem4", "/dev/vda", "/"] {
            assert!(!reserved(other), "{other}");
        }
    }
}
