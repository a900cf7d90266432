//! A guest of a few bytes that halts, for hosts with more VMs than an emulated machine can run Linux in: a PVH kernel
//! (ELF with a Xen note) in protected mode.

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Where the code is, and its entry.
const ENTRY: u32 = 0x10_0000;
/// `halt: cli; hlt; jmp halt`.
const CODE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfc];

/// Returns the kernel's image.
pub fn image() -> Vec<u8> {
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
    // PT_LOAD and PT_NOTE.
    for (kind, bytes) in [(1u32, &CODE[..]), (4, &note)] {
        let (entry, length) = (u64::from(ENTRY), bytes.len() as u64);
        image.extend(kind.to_le_bytes());
        image.extend(0u32.to_le_bytes());
        for word in [offset, entry, entry, length, length, 4] {
            image.extend(word.to_le_bytes());
        }
        offset += length;
    }
    image.extend(CODE);
    image.extend(note);
    image
}
