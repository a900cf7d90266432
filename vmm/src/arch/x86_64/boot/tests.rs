use std::fs::File;
use std::io::Write;

use tempfile::tempfile;
use zerocopy::IntoBytes;

use super::*;

const MIB: u64 = 1 << 20;

/// A bzImage whose code is one page of zeroes, with these fields of the setup header.
fn bzimage(preferred: u64, init_size: u64, alignment: u64, relocatable: bool) -> File {
    let mut image = vec![0u8; 1024 + PAGE_SIZE as usize];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    // Offsets of boot.rst, "The Real-Mode Kernel Header".
    set(0x1f1, &[1]); // setup_sects
    set(0x1f4, (PAGE_SIZE as u32 / 16).as_bytes()); // syssize
    set(0x1fe, &0xaa55_u16.to_le_bytes()); // boot_flag
    set(0x201, &[0x66]); // the jump's length: the header ends at 0x268
    set(0x202, b"HdrS");
    set(0x206, &0x020f_u16.to_le_bytes()); // version
    set(0x211, &[1]); // loadflags: LOADED_HIGH
    set(0x214, (MIB as u32).as_bytes()); // code32_start
    set(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    set(0x230, (alignment as u32).as_bytes()); // kernel_alignment
    set(0x234, &[relocatable.into()]); // relocatable_kernel
    set(0x236, &XLF_KERNEL_64.to_le_bytes()); // xloadflags
    set(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    set(0x258, &preferred.to_le_bytes()); // pref_address
    set(0x260, (init_size as u32).as_bytes()); // init_size
    let mut file = tempfile().unwrap();
    file.write_all(&image).unwrap();
    file
}

fn initramfs(bytes: u64) -> File {
    let file = tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

/// Loads the image into a VM with `ram` bytes of RAM. Returns where the initramfs starts.
fn load_into(ram: u64, mut kernel: File, initramfs: Option<File>) -> Result<u64, BootError> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), ram as usize)]).unwrap();
    let rsdp = layout::ACPI_TABLES;
    load(
        &memory,
        ram,
        &mut kernel,
        initramfs.as_ref().map(|f| f.try_clone().unwrap()).as_mut(),
        "",
        rsdp,
    )?;
    let params: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    Ok(params.hdr.ramdisk_image.into())
}

/// Loads a kernel with a command line of `bytes` bytes. Returns the bytes in guest memory, up to the NUL byte.
fn cmdline_in_memory(mut kernel: File, bytes: usize) -> Result<usize, BootError> {
    let ram = 64 * MIB;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), ram as usize)]).unwrap();
    memory.write_slice(&[b'?'; 1 << 16], layout::CMDLINE).unwrap();
    let cmdline = "x".repeat(bytes);
    load(&memory, ram, &mut kernel, None, &cmdline, layout::ACPI_TABLES)?;
    let mut written = vec![0; bytes + 1];
    memory.read_slice(&mut written, layout::CMDLINE).unwrap();
    assert_eq!(written.iter().position(|byte| *byte != b'x'), Some(bytes));
    Ok(written.iter().position(|byte| *byte == 0).unwrap())
}

#[test]
fn a_command_line_that_the_kernel_would_cut_is_refused_with_both_lengths() {
    let bz = || bzimage(16 * MIB, 4 * MIB, 2 * MIB, true);
    let pvh = |notes: Vec<u8>| {
        let mut file = tempfile().unwrap();
        file.write_all(&elf::tests::kernel(&[(notes, 4)])).unwrap();
        file
    };
    let linux =
        || pvh([elf::tests::entry(), elf::tests::note(b"Linux\0", 0x100, &[0], 4)].concat());
    let other = || pvh(elf::tests::entry());
    let kernels: [(&dyn Fn() -> File, usize); 3] =
        [(&bz, 2047), (&linux, 2047), (&other, layout::CMDLINE_MAX)];
    for (kernel, most) in kernels {
        for bytes in [0, 2047, most] {
            assert_eq!(cmdline_in_memory(kernel(), bytes).unwrap(), bytes);
        }
        for bytes in [most + 1, layout::CMDLINE_MAX + 1] {
            let error = cmdline_in_memory(kernel(), bytes).unwrap_err().to_string();
            let named = [format!("has {bytes} bytes"), "make it shorter".to_owned()];
            assert!(named.iter().all(|part| error.contains(part)), "{error}");
        }
        let error = cmdline_in_memory(kernel(), most + 1).unwrap_err();
        assert!(
            matches!(error, BootError::CommandLine { most: said, .. } if said == most),
            "{error}"
        );
    }
}

#[test]
fn a_damaged_kernel_is_told_from_a_vm_that_is_too_small_for_it() {
    let whole = || bzimage(16 * MIB, 40 * MIB, 2 * MIB, true);
    let cut = |bytes| {
        let kernel = whole();
        kernel.set_len(bytes).unwrap();
        kernel
    };
    for bytes in [0, 0x100, 0x210, 600, 1024, 1024 + PAGE_SIZE - 1] {
        let error = load_into(64 * MIB, cut(bytes), None).unwrap_err();
        assert!(error.is_of_the_files(), "{bytes}: {error:?}");
    }
    let zeroes = load_into(64 * MIB, initramfs(MIB), None).unwrap_err();
    assert!(zeroes.is_of_the_files(), "{zeroes:?}");
    let empty = load_into(64 * MIB, whole(), Some(initramfs(0))).unwrap_err();
    assert!(matches!(empty, BootError::EmptyInitramfs) && empty.is_of_the_files(), "{empty:?}");
    let small = load_into(32 * MIB, whole(), None).unwrap_err();
    assert!(!small.is_of_the_files(), "{small:?}");
    let large = load_into(64 * MIB, whole(), Some(initramfs(20 * MIB))).unwrap_err();
    assert!(!large.is_of_the_files(), "{large:?}");
}

#[test]
fn an_initramfs_lies_behind_all_that_the_kernel_needs_to_unpack_itself() {
    // Loaded at 1 MiB, the kernel moves itself to 16 MiB and needs 40 MiB from there.
    let kernel = || bzimage(16 * MIB, 40 * MIB, 2 * MIB, true);
    let error = load_into(64 * MIB, kernel(), Some(initramfs(20 * MIB))).unwrap_err();
    let BootError::InitramfsTooLarge { bytes, room } = error else { panic!("{error:?}") };
    assert_eq!((bytes, room), (20 * MIB, 8 * MIB));
    assert_eq!(load_into(64 * MIB, kernel(), Some(initramfs(8 * MIB))).unwrap(), 56 * MIB);
}

#[test]
fn a_kernel_that_is_not_relocatable_runs_at_its_preferred_address() {
    let kernel = bzimage(16 * MIB, 4 * MIB, 64 * MIB, false);
    assert_eq!(load_into(64 * MIB, kernel, Some(initramfs(44 * MIB))).unwrap(), 20 * MIB);
    // A relocatable one moves to a multiple of its alignment.
    let kernel = bzimage(16 * MIB, 4 * MIB, 32 * MIB, true);
    let error = load_into(64 * MIB, kernel, Some(initramfs(44 * MIB))).unwrap_err();
    assert!(matches!(error, BootError::InitramfsTooLarge { room, .. } if room == 28 * MIB));
}

#[test]
fn a_kernel_that_has_no_room_to_unpack_itself_is_refused_with_both_sizes() {
    let error = load_into(32 * MIB, bzimage(16 * MIB, 40 * MIB, 2 * MIB, true), None).unwrap_err();
    assert!(
        matches!(error, BootError::KernelTooLarge { needed, found } if (needed, found) == (56 * MIB, 32 * MIB)),
        "{error:?}"
    );
    // Sizes that no memory has are no overflow.
    let error = load_into(32 * MIB, bzimage(u64::MAX, MIB, 2 * MIB, true), None).unwrap_err();
    assert!(matches!(error, BootError::KernelTooLarge { .. }), "{error:?}");
}
