//! Loads an ELF kernel to the addresses in its program headers, and finds its PVH entry point.
//!
//! The entry point is in a note of the owner `Xen` (xen/include/public/elfnote.h, `XEN_ELFNOTE_PHYS32_ENTRY`).
//! A kernel may have any number of notes in any number of segments, aligned to 4 or 8 bytes. `linux-loader`
//! does not find the one note everywhere: a later segment of notes makes it forget what it found. The image may be
//! the guest's own, so every number in it is checked.

use std::io::SeekFrom;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, Image};
use crate::arch::x86_64::layout;

/// Bytes of an ELF64 header and of a program header (System V ABI, chapters 4 and 5).
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// `e_machine` of x86-64.
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Most bytes of a segment of notes.
const NOTES_MAX: u64 = 1 << 20;
/// The note with the entry point: owner and type.
const OWNER: &[u8] = b"Xen\0";
const PHYS32_ENTRY: u32 = 18;
/// The owner of notes that every Linux has (Linux init/version.c, `BUILD_SALT`; since 4.19).
const LINUX: &[u8] = b"Linux\0";

/// A loaded kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Loaded {
    /// Physical address of the PVH entry point.
    pub(super) entry: u64,
    /// End of the kernel in guest memory.
    pub(super) end: u64,
    /// Whether its notes say that it is Linux.
    pub(super) is_linux: bool,
}

/// A program header, as far as it is needed.
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
    align: u64,
}

/// Loads the kernel in `image` into guest memory, of which the first `ram_bytes` bytes are RAM.
pub(super) fn load(
    memory: &GuestMemoryMmap,
    ram_bytes: u64,
    image: &mut impl Image,
) -> Result<Loaded, BootError> {
    let (mut entry, mut end, mut is_linux) = (None, 0, false);
    for segment in segments(image)? {
        match segment.kind {
            PT_LOAD => end = end.max(load_segment(memory, ram_bytes, image, &segment)?),
            PT_NOTE => {
                let notes = read_notes(image, &segment)?;
                entry = entry.or(notes.entry);
                is_linux |= notes.is_linux;
            }
            _ => {}
        }
    }
    let entry = entry.ok_or(BootError::NoPvh)?;
    match entry < end {
        true => Ok(Loaded { entry, end, is_linux }),
        false => Err(BootError::Elf("its PVH entry point is behind its end")),
    }
}

fn segments(image: &mut impl Image) -> Result<Vec<Segment>, BootError> {
    let mut header = [0; HEADER];
    read_at(image, 0, &mut header)?;
    // 64 bits, little-endian.
    if header[4..6] != [2, 1] || u16_at(&header, 18) != EM_X86_64 {
        return Err(BootError::Elf("it is not for x86-64"));
    }
    let (at, count) = (u64_at(&header, 32), usize::from(u16_at(&header, 56)));
    if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER {
        return Err(BootError::Elf("its program headers do not have 56 bytes"));
    }
    let mut headers = vec![0; count * PROGRAM_HEADER];
    read_at(image, at, &mut headers)?;
    let segment = |header: &[u8]| Segment {
        kind: u32_at(header, 0),
        offset: u64_at(header, 8),
        address: u64_at(header, 24),
        file_bytes: u64_at(header, 32),
        memory_bytes: u64_at(header, 40),
        align: u64_at(header, 48),
    };
    Ok(headers.chunks_exact(PROGRAM_HEADER).map(segment).collect())
}

/// Reads a segment into guest memory. Returns its end there. The rest of it is zero, as all new RAM.
fn load_segment(
    memory: &GuestMemoryMmap,
    ram_bytes: u64,
    image: &mut impl Image,
    segment: &Segment,
) -> Result<u64, BootError> {
    let Segment { offset, address, file_bytes, memory_bytes, .. } = *segment;
    if file_bytes > memory_bytes {
        return Err(BootError::Elf("a segment has more bytes in the file than in memory"));
    }
    if memory_bytes == 0 {
        return Ok(0);
    }
    if address < layout::KERNEL.0 {
        return Err(BootError::Elf(
            "a segment lies in the first MiB, where the boot protocol's data is",
        ));
    }
    let end = address.saturating_add(memory_bytes);
    let found = ram_bytes.min(layout::LOW_RAM_MAX);
    if end > found {
        return Err(BootError::KernelTooLarge { needed: end, found });
    }
    image.seek(SeekFrom::Start(offset)).map_err(BootError::Read)?;
    // At most the guest's low RAM, so it fits.
    memory.read_exact_volatile_from(GuestAddress(address), image, file_bytes as usize)?;
    Ok(end)
}

/// What a segment of notes says.
#[derive(Default)]
struct Notes {
    entry: Option<u64>,
    is_linux: bool,
}

/// Looks for the entry point and for Linux in a segment of notes.
fn read_notes(image: &mut impl Image, segment: &Segment) -> Result<Notes, BootError> {
    if segment.file_bytes > NOTES_MAX {
        return Err(BootError::Elf("its notes have more than 1 MiB"));
    }
    let mut notes = vec![0; segment.file_bytes as usize];
    read_at(image, segment.offset, &mut notes)?;
    // Notes are aligned to 4 bytes, whatever the ABI says, except in segments of 8.
    let align = if segment.align == 8 { 8 } else { 4 };
    let (mut at, mut found) = (0_usize, Notes::default());
    while let Some(note) = notes.get(at..).filter(|note| note.len() >= 12) {
        let (name_bytes, value_bytes) = (u32_at(note, 0) as usize, u32_at(note, 4) as usize);
        // 32-bit numbers: the sums do not overflow.
        let value_at = (12 + name_bytes).next_multiple_of(align);
        let owner = note.get(12..12 + name_bytes);
        found.is_linux |= owner == Some(LINUX);
        if found.entry.is_none() && u32_at(note, 8) == PHYS32_ENTRY && owner == Some(OWNER) {
            found.entry = match note.get(value_at..value_at + value_bytes) {
                Some(value) if value.len() >= 4 => Some(u32_at(value, 0).into()),
                _ => return Err(BootError::Elf("its PVH note has no address")),
            };
        }
        at += (value_at + value_bytes).next_multiple_of(align);
    }
    Ok(found)
}

fn read_at(image: &mut impl Image, at: u64, target: &mut [u8]) -> Result<(), BootError> {
    image.seek(SeekFrom::Start(at)).map_err(BootError::Read)?;
    image.read_exact(target).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            BootError::Elf("it ends in the middle: it is truncated")
        }
        _ => BootError::Read(error),
    })
}

/// The little-endian number at `at`; bytes beyond the end count as 0.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.iter_mut().zip(bytes.iter().skip(at)).for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(number)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u64_at(bytes, at) as u32
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u64_at(bytes, at) as u16
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    const MIB: u64 = 1 << 20;

    pub(in super::super) fn note(owner: &[u8], kind: u32, value: &[u8], align: usize) -> Vec<u8> {
        let mut note = Vec::new();
        note.extend((owner.len() as u32).to_le_bytes());
        note.extend((value.len() as u32).to_le_bytes());
        note.extend(kind.to_le_bytes());
        note.extend(owner);
        note.resize(note.len().next_multiple_of(align), 0);
        note.extend(value);
        note.resize(note.len().next_multiple_of(align), 0);
        note
    }

    pub(in super::super) fn entry() -> Vec<u8> {
        note(OWNER, PHYS32_ENTRY, &0x10_0008_u32.to_le_bytes(), 4)
    }

    /// A kernel of one page at 1 MiB, 3 pages in memory, with these segments of notes and their alignments.
    pub(in super::super) fn kernel(notes: &[(Vec<u8>, u64)]) -> Vec<u8> {
        let mut image = vec![0; HEADER];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        image[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
        image[54..56].copy_from_slice(&(PROGRAM_HEADER as u16).to_le_bytes());
        image[56..58].copy_from_slice(&(notes.len() as u16 + 1).to_le_bytes());
        let mut contents: Vec<u8> = Vec::new();
        let start = HEADER + PROGRAM_HEADER * (notes.len() + 1);
        let mut header = |kind: u32, bytes: &[u8], memory_bytes: u64, align: u64| {
            let mut header = [0; PROGRAM_HEADER];
            let offset = (start + contents.len()) as u64;
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..16].copy_from_slice(&offset.to_le_bytes());
            header[24..32].copy_from_slice(&MIB.to_le_bytes());
            header[32..40].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
            header[40..48].copy_from_slice(&memory_bytes.to_le_bytes());
            header[48..].copy_from_slice(&align.to_le_bytes());
            contents.extend(bytes);
            image.extend(header);
        };
        header(PT_LOAD, &[7; 4096], 3 * 4096, 4096);
        notes.iter().for_each(|(notes, align)| header(PT_NOTE, notes, 0, *align));
        image.extend(contents);
        image
    }

    fn load_into(ram: u64, image: &[u8]) -> Result<Loaded, BootError> {
        let mut file: File = tempfile::tempfile().unwrap();
        file.write_all(image).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), ram as usize)]).unwrap();
        let loaded = load(&memory, ram, &mut file)?;
        let mut bytes = [0; 2];
        memory.read_slice(&mut bytes, GuestAddress(MIB + 4095)).unwrap();
        assert_eq!(bytes, [7, 0]);
        Ok(loaded)
    }

    fn refused(image: &[u8]) -> String {
        load_into(4 * MIB, image).unwrap_err().to_string()
    }

    #[test]
    fn the_entry_point_is_found_wherever_its_note_is() {
        let found = Loaded { entry: 0x10_0008, end: MIB + 3 * 4096, is_linux: false };
        let other = |align| note(b"GNU\0", 5, &[1; 17], align);
        let many: Vec<u8> = (0..1000).flat_map(|_| other(4)).chain(entry()).collect();
        let wide = note(OWNER, PHYS32_ENTRY, &0x10_0008_u64.to_le_bytes(), 8);
        for notes in [
            vec![(entry(), 4)],
            vec![(many, 4)],
            vec![(other(4), 4), (entry(), 4)],
            vec![(entry(), 4), (other(4), 4), (other(8), 8)],
            vec![(other(8), 8), (entry(), 1)],
            vec![([other(8), wide].concat(), 8)],
            vec![(Vec::new(), 4), (note(b"", 18, &[], 4), 4), (entry(), 0)],
        ] {
            assert_eq!(load_into(4 * MIB, &kernel(&notes)).unwrap(), found);
        }
        let linux = note(LINUX, 18, &[1; 4], 4);
        for notes in [
            vec![(linux.clone(), 4), (entry(), 4)],
            vec![(entry(), 4), (linux.clone(), 4)],
            vec![([entry(), linux].concat(), 4)],
        ] {
            let loaded = load_into(4 * MIB, &kernel(&notes)).unwrap();
            assert_eq!(loaded, Loaded { is_linux: true, ..found });
        }
    }

    #[test]
    fn a_kernel_that_cannot_be_loaded_says_why() {
        let good = kernel(&[(entry(), 4)]);
        assert!(refused(&kernel(&[(note(b"GNU\0", 18, &[0; 4], 4), 4)])).contains("no PVH entry"));
        assert!(refused(&kernel(&[])).contains("no PVH entry"));
        let behind = note(OWNER, PHYS32_ENTRY, &u32::MAX.to_le_bytes(), 4);
        assert!(refused(&kernel(&[(behind, 4)])).contains("behind its end"));
        assert!(
            refused(&kernel(&[(note(OWNER, PHYS32_ENTRY, &[1], 4), 4)])).contains("no address")
        );
        let changed = |at: usize, bytes: &[u8]| {
            let mut image = good.clone();
            image[at..at + bytes.len()].copy_from_slice(bytes);
            refused(&image)
        };
        assert!(changed(4, &[1]).contains("not for x86-64"));
        assert!(changed(18, &[183]).contains("not for x86-64"));
        assert!(changed(54, &[32]).contains("56 bytes"));
        assert!(changed(56, &[0xff, 0xff]).contains("truncated"));
        assert!(
            changed(32, &[0xff; 8]).contains("truncated")
                || changed(32, &[0xff; 8]).contains("read")
        );
        // The first program header: its size in memory, its address, its size in the file.
        assert!(changed(HEADER + 40, &[0; 8]).contains("more bytes in the file"));
        assert!(changed(HEADER + 40, &[0xff; 8]).contains("the VM has 4194304"));
        assert!(changed(HEADER + 24, &[0; 8]).contains("first MiB"));
        assert!(changed(HEADER + PROGRAM_HEADER + 32, &[0xff; 8]).contains("more than 1 MiB"));
        for end in 0..good.len() {
            assert!(load_into(4 * MIB, &good[..end]).is_err(), "{end}");
        }
    }
}
