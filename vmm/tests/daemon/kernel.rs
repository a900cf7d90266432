//! Kernels of a few bytes, which a real KVM runs even where it only emulates: PVH, in protected mode, and a bzImage.

pub(crate) use perennial_doubles::pvh::{HALTS, image};

/// Where [`COUNTS`] counts, in guest-physical memory.
pub(crate) const COUNT: &str = "0x200000";

/// Counts in memory, for ever.
pub(crate) const COUNTS: &[u8] = &[
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // again: inc dword [0x200000]
    0xeb, 0xf8, // jmp again
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

/// What a kernel does after its text.
#[derive(Clone, Copy)]
pub(crate) enum End {
    Halt,
    /// Resets the machine through the keyboard controller.
    Reset,
    /// Writes it again, without end.
    Again,
}

/// Returns a bzImage whose code writes `text` to the first serial port.
pub(crate) fn bzimage(text: &str, end: End) -> Vec<u8> {
    /// Bytes of the setup, and the offset of the 64-bit entry behind it (Linux, Documentation/arch/x86/boot.rst).
    const SETUP: usize = 2 * 512;
    const ENTRY_64: usize = 0x200;
    const CODE: [u8; 19] = [
        0x48, 0x8d, 0x35, 0x13, 0x00, 0x00,
        0x00, // start: lea rsi, [rip + 19], which is the text
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xac, // next: lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz end
        0xee, // out dx, al
        0xeb, 0xf8, // jmp next, and the end follows
    ];
    let end: [u8; 7] = match end {
        End::Halt => [0xf4, 0xeb, 0xfd, 0, 0, 0, 0], // hlt; jmp end
        End::Reset => [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd], // mov al, 0xfe; out 0x64, al; hlt
        End::Again => [0xeb, 0xeb, 0, 0, 0, 0, 0],   // jmp start
    };
    let mut payload = vec![0; ENTRY_64];
    payload.extend(CODE);
    payload.extend(end);
    payload.extend(text.bytes());
    payload.resize((payload.len() + 1).next_multiple_of(16), 0);
    let mut image = vec![0; SETUP];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1f1, &[1]); // setup_sects
    set(0x1f4, &(payload.len() as u32 / 16).to_le_bytes()); // syssize
    set(0x1fe, &[0x55, 0xaa]); // boot_flag
    set(0x201, &[0x66]); // the jump's length: the header ends at 0x268
    set(0x202, b"HdrS");
    set(0x206, &0x020f_u16.to_le_bytes()); // version
    set(0x211, &[1]); // loadflags: LOADED_HIGH
    set(0x214, &(1_u32 << 20).to_le_bytes()); // code32_start
    set(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    set(0x230, &(2_u32 << 20).to_le_bytes()); // kernel_alignment
    set(0x234, &[1]); // relocatable_kernel
    set(0x236, &3_u16.to_le_bytes()); // xloadflags: 64-bit, also above 4 GiB
    set(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    set(0x24c, &(payload.len() as u32).to_le_bytes()); // payload_length
    set(0x258, &(16_u64 << 20).to_le_bytes()); // pref_address
    set(0x260, &(1_u32 << 20).to_le_bytes()); // init_size
    image.extend(payload);
    image
}
