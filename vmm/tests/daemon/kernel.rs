//! Kernels of a few bytes, which a real KVM runs even where it only emulates: PVH, in protected mode.

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Where the code is, and its entry.
const ENTRY: u32 = 0x10_0000;

/// Where [`COUNTS`] counts, in guest-physical memory.
pub(crate) const COUNT: &str = "0x200000";

/// Counts in memory, for ever.
pub(crate) const COUNTS: &[u8] = &[
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // again: inc dword [0x200000]
    0xeb, 0xf8, // jmp again
];

/// Waits for an interrupt that never comes.
pub(crate) const HALTS: &[u8] = &[
    0xfa, // halt: cli
    0xf4, // hlt
    0xeb, 0xfc, // jmp halt
];

/// Counts in the same way, and has the time of its boot behind the count, which tells one boot from another.
pub(crate) const COUNTS_A_BOOT: &[u8] = &[
    0x0f, 0x31, // rdtsc
    0xa3, 0x04, 0x00, 0x20, 0x00, // mov [0x200004], eax
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // again: inc dword [0x200000]
    0xeb, 0xf8, // jmp again
];

/// Resets the machine through the keyboard controller.
pub(crate) const RESETS: &[u8] = &[
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xf4, // halt: hlt
    0xeb, 0xfd, // jmp halt
];

/// Returns an ELF image with a PVH entry note, whose code this is.
pub(crate) fn image(code: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());

    let mut image = vec![0; HEADER];
    image[..6].copy_from_slice(b"\x7fELF\x02\x01");
    image[18..20].copy_from_slice(&62u16.to_le_bytes());
    image[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
    image[54..56].copy_from_slice(&(PROGRAM_HEADER as u16).to_le_bytes());
    image[56..58].copy_from_slice(&2u16.to_le_bytes());
    let mut offset = (HEADER + 2 * PROGRAM_HEADER) as u64;
    for (kind, bytes) in [(PT_LOAD, code), (PT_NOTE, &note[..])] {
        let mut header = [0; PROGRAM_HEADER];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&offset.to_le_bytes());
        header[24..32].copy_from_slice(&u64::from(ENTRY).to_le_bytes());
        header[32..40].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        header[40..48].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        header[48..].copy_from_slice(&4u64.to_le_bytes());
        image.extend(header);
        offset += bytes.len() as u64;
    }
    image.extend(code);
    image.extend(note);
    image
}
