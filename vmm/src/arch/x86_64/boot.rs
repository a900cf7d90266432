//! Loads a guest's kernel as its boot protocol asks: a bzImage by Linux's 64-bit protocol
//! (Documentation/arch/x86/boot.rst) or an ELF kernel by PVH (Xen's docs/misc/pvh.pandoc).
//!
//! Both get the command line, the initramfs, the memory map and the address of the ACPI tables.
//! Images come from the operator, not from the guest; but a truncated one must be named, not run.

mod elf;

use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, KernelLoader, KernelLoaderResult};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    ReadVolatile,
};

use super::layout::{self, PAGE_SIZE};

/// Offset of the setup header's magic in a bzImage, and the magic (boot.rst).
const HDRS_OFFSET: u64 = 0x202;
const HDRS: &[u8; 4] = b"HdrS";
const ELF: &[u8; 4] = b"\x7fELF";
/// The 64-bit entry point lies this far behind the start of the loaded kernel (boot.rst).
const ENTRY_64: u64 = 0x200;
/// `xloadflags`: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// `type_of_loader` for loaders without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `hvm_start_info.magic` and its version with a memory map.
const PVH_MAGIC: u32 = 0x336e_c578;
const PVH_VERSION: u32 = 1;
/// Where the parts of the PVH start information go within its page.
const PVH_MODULES: u64 = 0x100;
const PVH_MEMMAP: u64 = 0x200;
/// Most bytes of a command line that Linux takes on x86: `COMMAND_LINE_SIZE` without the NUL byte
/// (arch/x86/include/asm/setup.h). A PVH kernel does not say so, and Linux drops what is longer without a word.
const LINUX_CMDLINE_MAX: usize = 2047;
/// An ELF kernel does not say how high its initramfs may lie; Linux's limit of old is safe for all.
const PVH_INITRAMFS_MAX: u64 = 0x37ff_ffff;

/// A kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The file is neither kind.
    #[error("it is neither a bzImage (`HdrS` at 0x202) nor an ELF kernel (`\\x7fELF` at 0)")]
    Unknown,
    /// The image cannot be read.
    #[error("it cannot be read")]
    Read(#[source] std::io::Error),
    /// The image is shorter than it says.
    #[error("the bzImage has {found} bytes, its header says {expected}: it is truncated")]
    Truncated {
        /// Bytes in the file.
        found: u64,
        /// Bytes by its header.
        expected: u64,
    },
    /// The bzImage is for 32-bit machines only.
    #[error("the bzImage has no 64-bit entry point")]
    Not64Bit,
    /// The loader refuses it.
    #[error("it is damaged, or does not fit into the guest's RAM")]
    Load(#[source] linux_loader::loader::Error),
    /// The ELF kernel is damaged, or of a kind that cannot be booted.
    #[error("the ELF kernel cannot be loaded: {0}")]
    Elf(&'static str),
    /// An ELF file without the note that names the entry point.
    #[error("the ELF kernel has no PVH entry point; build it with CONFIG_PVH")]
    NoPvh,
    /// The command line is too long.
    #[error("the command line has {found} bytes, this kernel takes {most}: make it shorter")]
    CommandLine {
        /// Its length.
        found: usize,
        /// The most.
        most: usize,
    },
    /// The initramfs cannot be read.
    #[error("the initramfs cannot be read")]
    Initramfs(#[source] std::io::Error),
    /// The initramfs has no bytes.
    #[error("the initramfs is empty: make it again, or leave it out")]
    EmptyInitramfs,
    /// The initramfs does not fit between the kernel and the end of RAM.
    #[error(
        "the initramfs has {bytes} bytes, there is room for {room} behind the kernel: give the VM more memory"
    )]
    InitramfsTooLarge {
        /// Its size.
        bytes: u64,
        /// The room.
        room: u64,
    },
    /// The kernel does not fit where it will run.
    #[error(
        "the kernel needs the first {needed} bytes of RAM to unpack itself, the VM has {found}: give the VM more memory"
    )]
    KernelTooLarge {
        /// End of the memory that the kernel needs, in bytes from address 0.
        needed: u64,
        /// Low RAM of the VM, in bytes.
        found: u64,
    },
    /// Guest memory does not take what is written.
    #[error("cannot write to guest memory")]
    Memory(#[from] GuestMemoryError),
}

impl BootError {
    /// Whether the kernel or the initramfs is damaged or of a kind that cannot be booted, so that others may be.
    pub fn is_of_the_files(&self) -> bool {
        match self {
            Self::Unknown | Self::Read(_) | Self::Truncated { .. } | Self::Not64Bit => true,
            Self::Load(_) | Self::Elf(_) | Self::NoPvh => true,
            Self::Initramfs(_) | Self::EmptyInitramfs => true,
            Self::CommandLine { .. } | Self::InitramfsTooLarge { .. } => false,
            Self::KernelTooLarge { .. } | Self::Memory(_) => false,
        }
    }
}

/// Where and how the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The first instruction.
    pub rip: u64,
    /// The boot protocol.
    pub protocol: Protocol,
}

/// The state in which a boot protocol starts a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Long mode, RSI with the address of the zero page.
    Linux64,
    /// 32-bit protected mode without paging, EBX with the address of the start information.
    Pvh,
}

/// A kernel or an initramfs that can be read into guest memory.
pub trait Image: Read + ReadVolatile + Seek {}

impl<T: Read + ReadVolatile + Seek> Image for T {}

/// Loads the kernel, the initramfs, the command line and the memory map.
pub fn load<I: Image>(
    memory: &GuestMemoryMmap,
    ram_bytes: u64,
    kernel: &mut I,
    initramfs: Option<&mut I>,
    cmdline: &str,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    write_cmdline(memory, cmdline)?;
    let loader = Loader { memory, ram_bytes, rsdp };
    if has_magic(kernel, HDRS_OFFSET, HDRS)? {
        loader.load_bzimage(kernel, initramfs, cmdline)
    } else if has_magic(kernel, 0, ELF)? {
        loader.load_elf(kernel, initramfs, cmdline)
    } else {
        Err(BootError::Unknown)
    }
}

fn has_magic(file: &mut impl Image, offset: u64, magic: &[u8; 4]) -> Result<bool, BootError> {
    let mut bytes = Vec::with_capacity(magic.len());
    file.seek(SeekFrom::Start(offset)).map_err(BootError::Read)?;
    file.take(magic.len() as u64).read_to_end(&mut bytes).map_err(BootError::Read)?;
    Ok(bytes == magic)
}

/// Returns the end of the memory that a bzImage uses before it knows the memory map: `init_size` bytes
/// from its runtime start address (boot.rst, `init_size`). A relocatable kernel moves itself from where
/// it was loaded to the next multiple of its alignment, and never below its preferred address
/// (`arch/x86/boot/compressed/head_64.S`); other kernels run at their preferred address.
fn runtime_end(header: &setup_header, loaded: &KernelLoaderResult) -> u64 {
    // Fields of a packed struct: copied, not borrowed.
    let (preferred, init_size) = (header.pref_address, u64::from(header.init_size));
    let start = match header.relocatable_kernel {
        0 => preferred,
        _ => {
            let alignment = u64::from(header.kernel_alignment).max(1);
            let aligned = loaded.kernel_load.0.checked_next_multiple_of(alignment);
            aligned.unwrap_or(u64::MAX).max(preferred)
        }
    };
    start.saturating_add(init_size).max(loaded.kernel_end)
}

fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), BootError> {
    let (found, most) = (cmdline.len(), layout::CMDLINE_MAX);
    if found > most {
        return Err(BootError::CommandLine { found, most });
    }
    memory.write_slice(cmdline.as_bytes(), layout::CMDLINE)?;
    memory.write_obj(0u8, layout::CMDLINE.unchecked_add(found as u64))?;
    Ok(())
}

/// Loads kernels. Has what both protocols pass to a kernel.
struct Loader<'m> {
    memory: &'m GuestMemoryMmap,
    ram_bytes: u64,
    rsdp: GuestAddress,
}

/// An initramfs in guest memory.
#[derive(Debug, Clone, Copy)]
struct Initramfs {
    start: u64,
    bytes: u64,
}

impl Loader<'_> {
    fn load_bzimage<I: Image>(
        &self,
        kernel: &mut I,
        initramfs: Option<&mut I>,
        cmdline: &str,
    ) -> Result<Entry, BootError> {
        let found = kernel.seek(SeekFrom::End(0)).map_err(BootError::Read)?;
        let loaded = BzImage::load(self.memory, None, kernel, Some(layout::KERNEL));
        let header = loaded.as_ref().ok().and_then(|l| l.setup_header);
        if let Some(header) = header {
            // `syssize` counts paragraphs of protected-mode code behind the boot sector and setup.
            let setup = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
            let expected = (setup + 1) * 512 + u64::from(header.syssize) * 16;
            if found < expected {
                return Err(BootError::Truncated { found, expected });
            }
        }
        let loaded = loaded.map_err(BootError::Load)?;
        let mut header = header.ok_or(BootError::Unknown)?;
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(BootError::Not64Bit);
        }
        let most = header.cmdline_size as usize;
        if cmdline.len() > most {
            return Err(BootError::CommandLine { found: cmdline.len(), most });
        }
        let end = runtime_end(&header, &loaded);
        let found = self.ram_bytes.min(layout::LOW_RAM_MAX);
        if found < end {
            return Err(BootError::KernelTooLarge { needed: end, found });
        }
        let initramfs = self.load_initramfs(initramfs, end, header.initrd_addr_max.into())?;
        header.type_of_loader = LOADER_UNDEFINED;
        header.cmd_line_ptr = layout::CMDLINE.0 as u32;
        if let Some(Initramfs { start, bytes }) = initramfs {
            header.ramdisk_image = start as u32;
            header.ramdisk_size = bytes as u32;
        }
        let mut params = boot_params { hdr: header, ..Default::default() };
        params.acpi_rsdp_addr = self.rsdp.0;
        let map = layout::memory_map(self.ram_bytes);
        for (entry, region) in params.e820_table.iter_mut().zip(&map) {
            *entry = boot_e820_entry {
                addr: region.start,
                size: region.size,
                r#type: region.kind as u32,
            };
        }
        params.e820_entries = map.len() as u8;
        self.memory.write_obj(params, layout::ZERO_PAGE)?;
        Ok(Entry { rip: loaded.kernel_load.0 + ENTRY_64, protocol: Protocol::Linux64 })
    }

    fn load_elf<I: Image>(
        &self,
        kernel: &mut I,
        initramfs: Option<&mut I>,
        cmdline: &str,
    ) -> Result<Entry, BootError> {
        let elf::Loaded { entry, end, is_linux } = elf::load(self.memory, self.ram_bytes, kernel)?;
        if is_linux && cmdline.len() > LINUX_CMDLINE_MAX {
            let (found, most) = (cmdline.len(), LINUX_CMDLINE_MAX);
            return Err(BootError::CommandLine { found, most });
        }
        let initramfs = self.load_initramfs(initramfs, end, PVH_INITRAMFS_MAX)?;
        let base = layout::PVH_START_INFO;
        let (modules, memmap) = (base.0 + PVH_MODULES, base.0 + PVH_MEMMAP);
        let map = layout::memory_map(self.ram_bytes);
        for (index, region) in (0u64..).zip(&map) {
            let entry = hvm_memmap_table_entry {
                addr: region.start,
                size: region.size,
                type_: region.kind as u32,
                reserved: 0,
            };
            let offset = index * size_of::<hvm_memmap_table_entry>() as u64;
            self.memory.write_obj(entry, GuestAddress(memmap + offset))?;
        }
        if let Some(Initramfs { start, bytes }) = initramfs {
            let module = hvm_modlist_entry { paddr: start, size: bytes, ..Default::default() };
            self.memory.write_obj(module, GuestAddress(modules))?;
        }
        let info = hvm_start_info {
            magic: PVH_MAGIC,
            version: PVH_VERSION,
            cmdline_paddr: layout::CMDLINE.0,
            rsdp_paddr: self.rsdp.0,
            nr_modules: initramfs.is_some().into(),
            modlist_paddr: if initramfs.is_some() { modules } else { 0 },
            memmap_paddr: memmap,
            memmap_entries: map.len() as u32,
            ..Default::default()
        };
        self.memory.write_obj(info, base)?;
        Ok(Entry { rip: entry, protocol: Protocol::Pvh })
    }

    /// Reads the initramfs to the end of low RAM, or of what the kernel can reach (`highest`, the
    /// last address that it may have). The kernel ends at `kernel_end`.
    fn load_initramfs(
        &self,
        file: Option<&mut impl Image>,
        kernel_end: u64,
        highest: u64,
    ) -> Result<Option<Initramfs>, BootError> {
        let Some(file) = file else { return Ok(None) };
        let bytes = file.seek(SeekFrom::End(0)).map_err(BootError::Initramfs)?;
        file.rewind().map_err(BootError::Initramfs)?;
        if bytes == 0 {
            return Err(BootError::EmptyInitramfs);
        }
        let end = self.ram_bytes.min(layout::LOW_RAM_MAX).min(highest.saturating_add(1));
        let room = end.saturating_sub(kernel_end.next_multiple_of(PAGE_SIZE));
        let start = end.checked_sub(bytes).map(|start| start & !(PAGE_SIZE - 1));
        match start {
            Some(start) if start >= kernel_end => {
                let slice = self.memory.get_slice(GuestAddress(start), bytes as usize)?;
                file.read_exact_volatile(&mut slice.clone())
                    .map_err(|error| BootError::Initramfs(std::io::Error::other(error)))?;
                Ok(Some(Initramfs { start, bytes }))
            }
            _ => Err(BootError::InitramfsTooLarge { bytes, room }),
        }
    }
}

#[cfg(test)]
mod tests;
