//! The files of the next kernel and its initramfs, checked before anything is loaded.
//!
//! Only headers are read. A kernel that the running kernel would refuse (`bzImage64_probe` in
//! arch/x86/kernel/kexec-bzimage64.c) is refused here with an explanation. So is a truncated kernel, which
//! `kexec_file_load` does not notice. Offsets are from Documentation/arch/x86/boot.rst.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::compression::Compression;
use crate::mib;

/// The files to load.
#[derive(Debug)]
pub struct Image {
    /// The kernel.
    pub kernel: Kernel,
    /// The initramfs; `None` if the kernel has one built in.
    pub initramfs: Option<Initramfs>,
}

/// An open bzImage whose header was checked.
#[derive(Debug)]
pub struct Kernel {
    /// Path with which it was opened, for messages.
    pub path: PathBuf,
    /// The open file.
    pub(crate) file: File,
    /// Size of the file in bytes.
    pub size: u64,
    /// Contiguous memory in bytes that the kernel needs until it has unpacked itself.
    pub init_size: u64,
    /// Lowest physical address to load the kernel at.
    pub lowest_address: u64,
    /// Alignment of that memory in bytes, a power of two.
    pub alignment: u64,
    /// Longest command line that the kernel accepts, in bytes, without the NUL.
    pub command_line_size: u64,
    /// Offset and length in bytes of the compressed kernel in the file.
    pub payload: (u64, u64),
    /// Release and build, as `uname` will show them, if the header has them.
    pub release: Option<String>,
}

/// An open initramfs whose format was recognized.
#[derive(Debug)]
pub struct Initramfs {
    /// Path with which it was opened, for messages.
    pub path: PathBuf,
    /// The open file.
    pub(crate) file: File,
    /// Size of the file in bytes.
    pub size: u64,
    /// The format, such as `cpio` or `gzip`.
    pub format: &'static str,
}

/// Why a file cannot be the next kernel or its initramfs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file cannot be opened.
    #[error("cannot open {what} {}", path.display())]
    Open {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The path is not a regular file but, for example, a directory or a device.
    #[error("the {what} {} is not a regular file", path.display())]
    NotAFile {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The file is too short for a bzImage's header, or has another header.
    #[error("{} is not a bzImage: {reason}; give the file that a kernel build writes to arch/x86/boot/bzImage", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What is missing in the header.
        reason: String,
    },
    /// The file is a kernel that cannot be loaded by kexec on x86-64.
    #[error("{} cannot be loaded: {reason}; build it for x86-64, relocatable, as a bzImage", path.display())]
    Unloadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file ends before the kernel does.
    #[error("the kernel {} is truncated: its header says {expected} bytes, the file has {size}; copy it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The size in bytes that the header tells.
        expected: u64,
        /// The size of the file in bytes.
        size: u64,
    },
    /// The initramfs is empty.
    #[error("the initramfs {} is empty; build or copy it again", path.display())]
    EmptyInitramfs {
        /// The file.
        path: PathBuf,
    },
    /// The file does not begin as an initramfs in a known format.
    #[error("{} is not an initramfs: it begins with {magic:02x?}; give a cpio archive in the `newc` format, plain or compressed", path.display())]
    NotAnInitramfs {
        /// The file.
        path: PathBuf,
        /// The first bytes of the file.
        magic: Vec<u8>,
    },
}

impl Image {
    /// Opens and checks a kernel and its initramfs.
    pub fn open(kernel: &Path, initramfs: Option<&Path>) -> Result<Self, ImageError> {
        Ok(Self {
            kernel: Kernel::open(kernel)?,
            initramfs: initramfs.map(Initramfs::open).transpose()?,
        })
    }

    /// Returns a `kho_scratch=` parameter with which this image can be loaded, with a quarter to spare. It
    /// must be given to the running kernel, and takes effect at its next cold boot.
    pub fn scratch_parameter(&self) -> String {
        scratch_parameter(&self.kernel, self.initramfs.as_ref())
    }

    /// Describes the memory that the image needs, for messages.
    pub(crate) fn needs(&self) -> String {
        let kernel = format!("the kernel takes {} in one piece", mib(self.kernel.init_size));
        match &self.initramfs {
            Some(initramfs) => format!("{kernel} and the initramfs {}", mib(initramfs.size)),
            None => kernel,
        }
    }
}

/// [`Image::scratch_parameter`].
pub(crate) fn scratch_parameter(kernel: &Kernel, initramfs: Option<&Initramfs>) -> String {
    const STEP: u64 = 16 << 20;
    let initramfs = initramfs.map_or(0, |initramfs| initramfs.size);
    let needed = kernel.init_size + kernel.alignment + initramfs;
    let area = (needed + needed / 4).div_ceil(STEP) * STEP;
    format!("kho_scratch=16M,{}M,0", area >> 20)
}

/// The first bytes of a kernel's file, with the setup header at offset 0x1f1. Little-endian.
struct Header<'a>(&'a [u8]);

impl Header<'_> {
    const LENGTH: usize = 0x264;

    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[offset..offset + N]);
        bytes
    }
    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }
    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }
    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }

    /// Size in bytes of the real-mode part, which kexec skips: a boot sector and the setup sectors.
    fn setup_size(&self) -> u64 {
        let sectors = match self.0[0x1f1] {
            0 => 4,
            sectors => u64::from(sectors),
        };
        (sectors + 1) * 512
    }

    /// Returns why the file is not a bzImage; `None` if it is.
    fn foreign(&self) -> Option<&'static str> {
        if self.u16(0x1fe) != 0xaa55 {
            Some("it has no boot sector (0xaa55 at 0x1fe)")
        } else if &self.bytes(0x202) != b"HdrS" {
            Some("it has no setup header (`HdrS` at 0x202)")
        } else {
            None
        }
    }

    /// Returns why kexec would refuse the kernel; `None` if it would not.
    fn unloadable(&self) -> Option<String> {
        let (version, loadflags, xloadflags) = (self.u16(0x206), self.0[0x211], self.u16(0x236));
        let alignment = self.u32(0x230);
        if version < 0x020c {
            let (major, minor) = (version >> 8, version & 0xff);
            Some(format!("its boot protocol is {major}.{minor:02}, at least 2.12 is needed"))
        } else if loadflags & LOADED_HIGH == 0 {
            Some("it is a zImage for low memory".to_owned())
        } else if xloadflags & XLF_KERNEL_64 == 0 {
            Some("it has no 64-bit entry".to_owned())
        } else if xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G == 0 {
            Some("it cannot be loaded above 4 GiB".to_owned())
        } else if !alignment.is_power_of_two() {
            Some(format!("its alignment of {alignment:#x} is no power of two"))
        } else {
            None
        }
    }
}

const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 2;
/// Lowest physical address at which kexec loads a kernel (`MIN_KERNEL_LOAD_ADDR`).
const MIN_KERNEL_ADDRESS: u64 = 0x10_0000;

/// What tells a file from every other one, and from itself before a change: device, inode, size in bytes, and the
/// times of the last change of its contents and of anything, in seconds and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    file: (u64, u64),
    size: u64,
    changed: [(i64, i64); 2],
}

impl Identity {
    fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            file: (found.dev(), found.ino()),
            size: found.size(),
            changed: [(found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec())],
        })
    }
}

impl Kernel {
    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the identity of the open file.
    pub fn identity(&self) -> io::Result<Identity> {
        Identity::of(&self.file)
    }

    /// Opens the bzImage at `path` and checks it.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let (file, size) = open("kernel", path)?;
        let path = path.to_owned();
        let mut header = vec![0; Header::LENGTH];
        if size < header.len() as u64 {
            let reason = format!("{size} bytes are too few for a kernel");
            return Err(ImageError::NotAKernel { path, reason });
        }
        read("kernel", &path, &file, &mut header)?;
        let header = Header(&header);
        if let Some(reason) = header.foreign() {
            return Err(ImageError::NotAKernel { path, reason: reason.to_owned() });
        }
        if let Some(reason) = header.unloadable() {
            return Err(ImageError::Unloadable { path, reason });
        }
        let setup_size = header.setup_size();
        let payload = (setup_size + u64::from(header.u32(0x248)), u64::from(header.u32(0x24c)));
        // The header gives the size in units of 16 bytes.
        let expected = (setup_size + u64::from(header.u32(0x1f4)) * 16).max(payload.0 + payload.1);
        if size < expected {
            return Err(ImageError::Truncated { path, expected, size });
        }
        Ok(Self {
            init_size: u64::from(header.u32(0x260)),
            lowest_address: header.u64(0x258).max(MIN_KERNEL_ADDRESS),
            alignment: u64::from(header.u32(0x230)),
            command_line_size: u64::from(header.u32(0x238)),
            payload,
            release: release(&file, header.u16(0x20e), setup_size),
            path,
            file,
            size,
        })
    }
}

/// Reads the kernel's release. `offset` is the field of the setup header that points to it; the text is at
/// 0x200 plus `offset`. `None` if there is no printable text.
fn release(file: &File, offset: u16, setup_size: u64) -> Option<String> {
    const LONGEST: usize = 256;
    let start = u64::from(offset) + 0x200;
    if offset == 0 || start >= setup_size {
        return None;
    }
    let mut text = vec![0; LONGEST.min((setup_size - start) as usize)];
    file.read_exact_at(&mut text, start).ok()?;
    let end = text.iter().position(|byte| *byte == 0)?;
    let text = std::str::from_utf8(&text[..end]).ok()?;
    (!text.is_empty() && text.bytes().all(|byte| matches!(byte, b' '..=b'~')))
        .then(|| text.to_owned())
}

impl Initramfs {
    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the identity of the open file.
    pub fn identity(&self) -> io::Result<Identity> {
        Identity::of(&self.file)
    }

    /// The formats without compression: name and first bytes (init/initramfs.c).
    const PLAIN: [(&'static str, &'static [u8]); 2] =
        [("cpio", b"070701"), ("cpio with checksums", b"070702")];

    /// Each format's name and first bytes.
    fn formats() -> impl Iterator<Item = (&'static str, &'static [u8])> {
        let compressed = Compression::ALL.map(|(compression, magic)| (compression.name(), magic));
        Self::PLAIN.into_iter().chain(compressed)
    }

    /// Opens the initramfs at `path` and checks it.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let (file, size) = open("initramfs", path)?;
        let path = path.to_owned();
        if size == 0 {
            return Err(ImageError::EmptyInitramfs { path });
        }
        let mut magic = vec![0; size.min(6) as usize];
        read("initramfs", &path, &file, &mut magic)?;
        let known = Self::formats().find(|(_, start)| magic.starts_with(start));
        match known {
            Some((format, _)) => Ok(Self { path, file, size, format }),
            None => Err(ImageError::NotAnInitramfs { path, magic }),
        }
    }
}

/// Opens a regular file for reading. Returns it with its size in bytes.
fn open(what: &'static str, path: &Path) -> Result<(File, u64), ImageError> {
    let error = |source| ImageError::Open { what, path: path.to_owned(), source };
    // Opening a FIFO would otherwise wait for a program at its other end.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(error)?;
    let metadata = file.metadata().map_err(error)?;
    if !metadata.is_file() {
        return Err(ImageError::NotAFile { what, path: path.to_owned() });
    }
    Ok((file, metadata.len()))
}

fn read(what: &'static str, path: &Path, file: &File, into: &mut [u8]) -> Result<(), ImageError> {
    file.read_exact_at(into, 0).map_err(|source| ImageError::Read {
        what,
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use proptest::prelude::*;
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tempfile::TempDir;

    use super::*;

    /// The smallest kernel that passes: two setup sectors, and 64 bytes of payload at their end.
    pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 3 * 512];
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        };
        let paragraphs = (payload.len() as u32).div_ceil(16);
        put(0x1f1, &[2]);
        put(0x1f4, &paragraphs.to_le_bytes());
        put(0x1fe, &[0x55, 0xaa]);
        put(0x202, b"HdrS");
        put(0x206, &0x020f_u16.to_le_bytes());
        put(0x20e, &0x100_u16.to_le_bytes());
        put(0x211, &[LOADED_HIGH]);
        put(0x230, &0x20_0000_u32.to_le_bytes());
        put(0x236, &(XLF_KERNEL_64 | XLF_CAN_BE_LOADED_ABOVE_4G).to_le_bytes());
        put(0x238, &2047_u32.to_le_bytes());
        put(0x24c, &(payload.len() as u32).to_le_bytes());
        put(0x258, &0x100_0000_u64.to_le_bytes());
        put(0x260, &(15_u32 << 20).to_le_bytes());
        put(0x300, b"7.3.4-test (someone) #1\0");
        bytes.extend_from_slice(payload);
        bytes.resize(3 * 512 + paragraphs as usize * 16, 0);
        bytes
    }

    /// Writes `bytes` to a file of a new directory.
    pub(crate) fn file(bytes: &[u8]) -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    fn kernel(bytes: &[u8]) -> Result<Kernel, ImageError> {
        let (_dir, path) = file(bytes);
        Kernel::open(&path)
    }

    #[test]
    fn a_file_has_its_identity_until_it_is_written_or_replaced() {
        let bytes = bzimage(&[7; 64]);
        let (_dir, path) = file(&bytes);
        let identity = || Kernel::open(&path).unwrap().identity().unwrap();
        let first = identity();
        assert_eq!(identity(), first);
        // The same bytes, and a time of the contents as before: the file was changed all the same.
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        let rewrite = || {
            fs::write(&path, &bytes).unwrap();
            fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
            identity() != first
        };
        // The times of a file advance in steps of some milliseconds.
        assert!((0..100_000).any(|_| rewrite()));
        let second = identity();
        let other = path.with_extension("new");
        fs::write(&other, &bytes).unwrap();
        fs::rename(&other, &path).unwrap();
        assert_ne!(identity(), second);
    }

    fn patched(offset: usize, value: &[u8]) -> Result<Kernel, ImageError> {
        let mut bytes = bzimage(&[7; 64]);
        bytes[offset..offset + value.len()].copy_from_slice(value);
        kernel(&bytes)
    }

    #[test]
    fn the_fields_of_a_kernels_header_are_read() {
        let kernel = kernel(&bzimage(&[7; 60])).unwrap();
        assert_eq!(kernel.size, 3 * 512 + 64);
        assert_eq!((kernel.init_size, kernel.alignment), (15 << 20, 2 << 20));
        assert_eq!(kernel.lowest_address, 16 << 20);
        assert_eq!(kernel.command_line_size, 2047);
        assert_eq!(kernel.payload, (3 * 512, 60));
        assert_eq!(kernel.release.as_deref(), Some("7.3.4-test (someone) #1"));
    }

    #[test]
    fn no_setup_sectors_mean_four_as_in_the_oldest_kernels() {
        let mut bytes = bzimage(&[7; 64]);
        bytes[0x1f1] = 0;
        let error = kernel(&bytes).unwrap_err();
        assert!(matches!(error, ImageError::Truncated { expected: 2624, .. }), "{error}");
        bytes.resize(2624, 0);
        assert_eq!(kernel(&bytes).unwrap().payload, (5 * 512, 64));
    }

    #[test]
    fn a_kernel_that_prefers_the_first_mebibyte_is_loaded_above_it() {
        assert_eq!(patched(0x258, &[0; 8]).unwrap().lowest_address, 1 << 20);
    }

    #[test]
    fn a_kernel_cut_at_any_length_is_named_as_what_it_is() {
        let whole = bzimage(&[7; 64]);
        for length in 0..whole.len() {
            let error = kernel(&whole[..length]).unwrap_err();
            match error {
                ImageError::NotAKernel { .. } => assert!(length < Header::LENGTH, "{length}"),
                ImageError::Truncated { expected, size, .. } => {
                    assert!(length >= Header::LENGTH);
                    assert_eq!((expected, size), (whole.len() as u64, length as u64));
                }
                other => panic!("{length}: {other}"),
            }
        }
        assert!(kernel(&whole).is_ok());
        let signed = [whole, vec![1; 100]].concat();
        assert!(kernel(&signed).is_ok(), "a signature may follow");
    }

    #[test]
    fn a_file_that_is_no_kernel_says_what_it_lacks() {
        for (offset, value, lacks) in [(0x1fe, &b"\0"[..], "0xaa55"), (0x202, b"hdrs", "HdrS")] {
            match patched(offset, value).unwrap_err() {
                ImageError::NotAKernel { reason, .. } => {
                    assert!(reason.contains(lacks), "{reason}")
                }
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_kernel_that_kexec_would_refuse_says_why() {
        for (offset, value, why) in [
            (0x206, &[0x0b, 0x02][..], "2.11"),
            (0x211, &[0], "zImage"),
            (0x236, &[2, 0], "64-bit"),
            (0x236, &[1, 0], "above 4 GiB"),
            (0x230, &[3, 0, 0, 0], "power of two"),
            (0x230, &[0, 0, 0, 0], "power of two"),
        ] {
            match patched(offset, value).unwrap_err() {
                ImageError::Unloadable { reason, .. } => assert!(reason.contains(why), "{reason}"),
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_payload_past_the_end_is_a_truncated_kernel() {
        let error = patched(0x24c, &[0xff; 4]).unwrap_err();
        assert!(matches!(error, ImageError::Truncated { size: 1600, .. }), "{error}");
        let error = patched(0x1f4, &[0xff; 4]).unwrap_err();
        assert!(matches!(error, ImageError::Truncated { .. }), "{error}");
    }

    #[test]
    fn a_release_that_is_no_text_is_left_out() {
        assert_eq!(patched(0x20e, &[0, 0]).unwrap().release, None);
        assert_eq!(patched(0x20e, &[0xff, 0xff]).unwrap().release, None);
        assert_eq!(patched(0x300, &[0xff]).unwrap().release, None);
    }

    #[test]
    fn a_path_without_a_regular_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let absent = dir.path().join("absent");
        for error in [Kernel::open(&absent).unwrap_err(), Initramfs::open(&absent).unwrap_err()] {
            assert!(matches!(error, ImageError::Open { .. }), "{error}");
            assert!(error.to_string().contains("absent"), "{error}");
        }
        let fifo = dir.path().join("fifo");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
        for path in [dir.path(), &fifo] {
            let errors = [Kernel::open(path).unwrap_err(), Initramfs::open(path).unwrap_err()];
            for error in errors {
                assert!(matches!(error, ImageError::NotAFile { .. }), "{error}");
            }
        }
    }

    #[test]
    fn an_initramfs_is_known_by_how_it_begins() {
        for (format, magic) in Initramfs::formats() {
            let (_dir, path) = file(&[magic, b"rest"].concat());
            let found = Initramfs::open(&path).unwrap();
            assert_eq!((found.format, found.size), (format, magic.len() as u64 + 4));
            let (_dir, path) = file(&magic[..magic.len() - 1]);
            let error = Initramfs::open(&path).unwrap_err();
            assert!(matches!(error, ImageError::NotAnInitramfs { .. }), "{format}: {error}");
        }
        let (_dir, path) = file(b"");
        assert!(matches!(Initramfs::open(&path), Err(ImageError::EmptyInitramfs { .. })));
        let (_dir, path) = file(b"\x7fELF");
        let error = Initramfs::open(&path).unwrap_err().to_string();
        assert!(error.contains("7f, 45, 4c, 46"), "{error}");
    }

    #[test]
    fn the_proposed_scratch_area_has_room_for_the_image() {
        let (_dir, path) = file(&bzimage(&[7; 64]));
        let image = Image::open(&path, None).unwrap();
        assert_eq!(image.scratch_parameter(), "kho_scratch=16M,32M,0");
    }

    proptest! {
        #[test]
        fn any_header_is_taken_or_refused_without_a_panic(
            changes in prop::collection::vec((0x1f1_usize..0x264, any::<u8>()), 0..8)
        ) {
            let mut bytes = bzimage(&[7; 64]);
            for (offset, value) in changes {
                bytes[offset] = value;
            }
            let _ = kernel(&bytes);
        }
    }
}
