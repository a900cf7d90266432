//! Kernels of a few bytes, which KVM runs even where the host's own CPU is emulated: PVH (an ELF file with a Xen note), in
//! protected mode.

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Where the code is, and its entry.
const ENTRY: u32 = 0x10_0000;

/// Waits for an interrupt that never comes.
pub const HALTS: &[u8] = &[
    0xfa, // halt: cli
    0xf4, // hlt
    0xeb, 0xfc, // jmp halt
];

/// Returns an ELF image with a PVH entry note, whose code this is.
pub fn image(code: &[u8]) -> Vec<u8> {
    let mut note: Vec<u8> = [4u32, 4, 18].into_iter().flat_map(u32::to_le_bytes).collect();
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
        let (entry, length) = (u64::from(ENTRY), bytes.len() as u64);
        image.extend(kind.to_le_bytes());
        image.extend(0u32.to_le_bytes());
        // Offset, virtual and physical address, size in the file and in memory, alignment.
        for word in [offset, entry, entry, length, length, 4] {
            image.extend(word.to_le_bytes());
        }
        offset += length;
    }
    image.extend(code);
    image.extend(note);
    image
}
