//! Recognizes the image formats of other hypervisors by their magic numbers.
//!
//! Perennial supports raw images only. If an image of another format were used as raw, the guest would see a
//! header instead of a partition table, and the first write would destroy the image. So such an image is
//! refused, unless its options say `image_type=raw`: a guest may itself have written such a magic number
//! onto its disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that are read at the start of an image.
const HEAD: usize = 512;
/// Length of the footer of a VHD, which is at the end of the image.
const FOOTER: u64 = 512;

/// A format: name, offset of the magic number in bytes, magic number.
type Magic = (&'static str, usize, &'static [u8]);

/// The formats, from their specifications.
const MAGICS: [Magic; 9] = [
    ("qcow2", 0, b"QFI\xfb"),
    ("QED", 0, b"QED\0"),
    ("VMDK", 0, b"KDMV"),
    // The format of ESX, and a VMDK that is a text with the names of other files.
    ("VMDK", 0, b"COWD"),
    ("VMDK", 0, b"# Disk DescriptorFile"),
    ("VHDX", 0, b"vhdxfile"),
    // A dynamic VHD has a copy of its footer at the start.
    ("VHD", 0, VHD),
    ("VDI", 64, b"\x7f\x10\xda\xbe"),
    ("Parallels", 0, b"WithoutFreeSpace"),
];
const VHD: &[u8] = b"conectix";

/// Returns the name of the format of an image of `bytes` bytes. `None` for a raw image. LUKS counts as raw,
/// because the guest itself writes it onto its disk.
pub(super) fn recognize(file: &File, bytes: u64) -> io::Result<Option<&'static str>> {
    let mut head = Vec::from([0; HEAD]);
    head.truncate(usize::try_from(bytes).unwrap_or(HEAD));
    file.read_exact_at(&mut head, 0)?;
    let has = |magic: &Magic| head.get(magic.1..).is_some_and(|rest| rest.starts_with(magic.2));
    if let Some((name, _, _)) = MAGICS.iter().find(|magic| has(magic)) {
        return Ok(Some(name));
    }
    // A fixed VHD has its footer at the end only.
    let mut footer = [0; VHD.len()];
    if let Some(at) = bytes.checked_sub(FOOTER) {
        file.read_exact_at(&mut footer, at)?;
    }
    Ok((footer == *VHD).then_some("VHD"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recognized(at: u64, bytes: &[u8], size: u64) -> Option<&'static str> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, at).unwrap();
        file.set_len(size).unwrap();
        recognize(&file, size).unwrap()
    }

    #[test]
    fn every_format_is_recognized_by_its_magic_number_in_its_place() {
        for (name, at, magic) in MAGICS {
            assert_eq!(recognized(at as u64, magic, 1 << 20), Some(name));
            assert_eq!(recognized(at as u64 + 512, magic, 1 << 20), None, "{name}");
            let mut almost = magic.to_vec();
            *almost.last_mut().unwrap() ^= 0x20;
            assert_eq!(recognized(at as u64, &almost, 1 << 20), None, "{name}");
        }
        assert_eq!(recognized((1 << 20) - FOOTER, VHD, 1 << 20), Some("VHD"));
        assert_eq!(recognized((1 << 20) - FOOTER - 512, VHD, 1 << 20), None);
    }

    #[test]
    fn what_a_guest_puts_onto_its_disk_is_raw() {
        assert_eq!(recognized(0, &[], 1 << 20), None);
        assert_eq!(recognized(0, b"LUKS\xba\xbe", 1 << 20), None);
        assert_eq!(recognized(510, b"\x55\xaa", 1 << 20), None, "a boot sector");
        assert_eq!(recognized(512, b"EFI PART", 1 << 20), None, "a partition table");
        assert_eq!(recognized(0, &[], 512), None, "the smallest disk");
    }

    #[test]
    fn an_image_that_cannot_be_read_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        recognize(&file, 4096).unwrap_err();
    }
}
