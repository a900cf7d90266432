//! Unified kernel images: a kernel, an initramfs and a command line as sections of one EFI program
//! (UAPI group, "Unified Kernel Image"). The program itself, a stub for EFI, is not run, and signatures are not checked.

use std::io::{Read, Seek, SeekFrom};

use object::LittleEndian;
use object::pe::{IMAGE_FILE_MACHINE_AMD64, ImageDosHeader, ImageNtHeaders64};
use object::read::pe::ImageNtHeaders;

use super::file_system::{DiskFile, FileSystem, FileSystemError};

/// Most bytes in front of the sections: headers and the table of sections.
const HEADERS_MAX: u64 = 64 << 10;
/// Most bytes of a section with text.
const TEXT_MAX: u64 = 64 << 10;

/// A file is no unified kernel image that can be booted here.
#[derive(Debug, thiserror::Error)]
pub(super) enum UnifiedError {
    #[error(transparent)]
    FileSystem(#[from] FileSystemError),
    #[error("it cannot be read")]
    Read(#[from] std::io::Error),
    #[error("it is no EFI program for x86-64")]
    Foreign,
    #[error("it has no section `.linux`, so it is no unified kernel image")]
    NoKernel,
    #[error("its section `{0}` is not in the file")]
    Outside(&'static str),
}

/// What is in a unified kernel image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unified {
    pub(super) kernel: Section,
    /// The pieces of the initramfs, in order.
    pub(super) initramfs: Vec<Section>,
    pub(super) cmdline: String,
    /// The contents of `os-release`.
    pub(super) os_release: String,
}

/// Where in the file a section is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Section {
    pub(super) start: u64,
    pub(super) bytes: u64,
}

impl Unified {
    /// Reads the headers and texts of the image at `path`, which may have `most` bytes.
    pub(super) fn read(
        file_system: &FileSystem,
        path: &str,
        most: u64,
    ) -> Result<Self, UnifiedError> {
        let mut file = file_system.file(path, most)?;
        let mut head = Vec::new();
        Read::by_ref(&mut file).take(HEADERS_MAX).read_to_end(&mut head)?;
        let sections = sections(&head).ok_or(UnifiedError::Foreign)?;
        let find = |name: &'static str| {
            let Some(section) = sections.iter().find(|(found, _)| found == name.as_bytes()) else {
                return Ok(None);
            };
            let Section { start, bytes } = section.1;
            match start.checked_add(bytes).is_some_and(|end| end <= file.bytes) {
                true => Ok(Some(section.1)),
                false => Err(UnifiedError::Outside(name)),
            }
        };
        let kernel = find(".linux")?.ok_or(UnifiedError::NoKernel)?;
        let initramfs = [find(".ucode")?, find(".initrd")?].into_iter().flatten().collect();
        let (cmdline, os_release) = (find(".cmdline")?, find(".osrel")?);
        let mut text = |section| text(&mut file, section);
        let (cmdline, os_release) = (text(cmdline)?, text(os_release)?);
        let cmdline = cmdline.replace(['\r', '\n'], " ");
        Ok(Self { kernel, initramfs, cmdline, os_release })
    }
}

/// The names and places of the sections up to the second profile: what is booted if no profile is chosen. `None` if
/// this is no EFI program for x86-64.
fn sections(head: &[u8]) -> Option<Vec<(Vec<u8>, Section)>> {
    let mut offset = ImageDosHeader::parse(head).ok()?.nt_headers_offset().into();
    let (headers, _) = ImageNtHeaders64::parse(head, &mut offset).ok()?;
    if headers.file_header().machine.get(LittleEndian) != IMAGE_FILE_MACHINE_AMD64 {
        return None;
    }
    let table = headers.sections(head, offset).ok()?;
    let sections = table.iter().map(|section| {
        let (start, stored) = section.pe_file_range();
        // What is stored is filled up to a multiple of the alignment.
        let bytes = stored.min(section.virtual_size.get(LittleEndian));
        (section.raw_name().to_vec(), Section { start: start.into(), bytes: bytes.into() })
    });
    let mut profiles = 0;
    let first = sections.take_while(|(name, _)| {
        profiles += u32::from(name == b".profile");
        profiles < 2
    });
    Some(first.collect())
}

/// The text of a section, without zeroes and blanks at its end. Empty if there is no section.
fn text(file: &mut DiskFile, section: Option<Section>) -> Result<String, UnifiedError> {
    let Some(Section { start, bytes }) = section else { return Ok(String::new()) };
    let mut text = Vec::new();
    file.seek(SeekFrom::Start(start))?;
    file.take(bytes.min(TEXT_MAX)).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    Ok(text.trim_end_matches(['\0', ' ', '\t', '\r', '\n']).to_owned())
}
