//! The guest's physical address space and ports: the numbers that several parts of the VMM share.
//!
//! The guest sees these addresses. They must not change between builds, because a VM that one build
//! saved must find them unchanged when the next build restores it.
//!
//! ```text
//!  0x0000_0500  GDT, 0x6000 PVH start info, 0x7000 zero page, 0x9000 page tables, 0x2_0000 cmdline
//!  0x000a_0000  legacy VGA and ROM hole; ACPI tables at 0xe_0000, SMBIOS at 0xf_0000
//!  0x0010_0000  kernel ... initramfs at the top of low RAM
//!  0xc000_0000  PCI hole: 32-bit BARs, ECAM, then IOAPIC, LAPIC, KVM's own pages
//!  0x1_0000_0000 the rest of RAM
//! ```

use vm_memory::GuestAddress;

use super::e820::{Kind, Region};

/// Size of a page.
pub const PAGE_SIZE: u64 = 0x1000;

/// The GDT for the guest's first instructions; in low memory that Linux does not read as BIOS data.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// `struct hvm_start_info` of the PVH protocol (Linux `include/xen/interface/hvm/start_info.h`),
/// with its module list and memory map behind it.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// Linux's "zero page", `struct boot_params` (`Documentation/arch/x86/zero-page.rst`).
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// First of the [`BOOT_PAGE_TABLE_PAGES`] pages that map the first 4 GiB one to one.
pub const BOOT_PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// A PML4, a page-directory-pointer table, and four page directories of 2 MiB pages.
pub const BOOT_PAGE_TABLE_PAGES: u64 = 6;
/// The kernel's command line, NUL-terminated.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line, without its NUL. A bzImage says how much it takes (`cmdline_size`), which is
/// checked as well: 2047 bytes for Linux as it is released, more for some patched ones. A PVH kernel does not say.
pub const CMDLINE_MAX: usize = (64 << 10) - 1;
/// End of low memory and start of the legacy VGA window.
pub const LOW_MEMORY_END: u64 = 0xa_0000;
/// The RSDP, and behind it every other ACPI table (the area where ACPI 6.5, 5.2.5.1 has OSPM look).
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// End of the area for ACPI tables.
pub const ACPI_TABLES_END: GuestAddress = SMBIOS;
/// The entry point of the SMBIOS tables, and behind it the tables: where guests without EFI look for them
/// (DMTF DSP0134 3.6, 5.2.2).
pub const SMBIOS: GuestAddress = GuestAddress(0xf_0000);
/// End of the area for SMBIOS tables.
pub const SMBIOS_END: GuestAddress = GuestAddress(0x10_0000);
/// Load address of a kernel: `code32_start` of every bzImage.
pub const KERNEL: GuestAddress = GuestAddress(0x10_0000);

/// Highest end of low RAM, and start of the PCI hole.
pub const LOW_RAM_MAX: u64 = 0xc000_0000;
/// Start of the RAM above the PCI hole.
pub const HIGH_RAM_START: GuestAddress = GuestAddress(0x1_0000_0000);

/// Window of 32-bit BARs.
pub const PCI_BARS: GuestAddress = GuestAddress(0xc000_0000);
/// Size of the window of 32-bit BARs.
pub const PCI_BARS_SIZE: u64 = 0x2000_0000;
/// Reserved for PCI Express configuration space; nothing is there yet.
pub const PCI_ECAM: GuestAddress = GuestAddress(0xe000_0000);
/// Size of the ECAM reservation: 256 buses.
pub const PCI_ECAM_SIZE: u64 = 0x1000_0000;
/// The IOAPIC; KVM's own address (`IOAPIC_DEFAULT_BASE_ADDRESS`, `arch/x86/kvm/ioapic.h`).
pub const IOAPIC: u32 = 0xfec0_0000;
/// The LAPICs (`APIC_DEFAULT_PHYS_BASE`, Intel SDM 3A 12.4.1).
pub const LAPIC: u32 = 0xfee0_0000;
/// One page where Intel's KVM puts a page table for real mode (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages where Intel's KVM puts a task segment for real mode (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// Size of both of KVM's areas together.
pub const KVM_PAGES_SIZE: u64 = 4 * PAGE_SIZE;

/// Pins of the IOAPIC, and so the GSIs that are interrupt lines (`KVM_IOAPIC_NUM_PINS`).
pub const GSI_PINS: u32 = 24;
/// First GSI that is an MSI route.
pub const GSI_MSI_BASE: u32 = GSI_PINS;

/// COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Registers of a 16550.
pub const COM1_LEN: u16 = 8;
/// The interrupt line of COM1, edge triggered.
pub const COM1_IRQ: u32 = 4;
/// The real-time clock: index register and data register.
pub const RTC_PORT: u16 = 0x70;
/// Ports of the real-time clock.
pub const RTC_LEN: u16 = 2;
/// The interrupt line of the real-time clock, edge triggered.
pub const RTC_IRQ: u32 = 8;
/// The register of the real-time clock that has the century.
pub const RTC_CENTURY: u8 = 0x32;
/// PCI configuration mechanism #1: address at +0, data at +4 (PCI Local Bus 3.0, 3.2.2.3.2).
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Ports of the PCI configuration mechanism.
pub const PCI_CONFIG_LEN: u16 = 8;
/// The reset register that the FADT names; inside the PCI configuration ports, one byte wide.
pub const RESET_PORT: u16 = 0xcf9;
/// The value that the FADT says to write to the reset register.
pub const RESET_VALUE: u8 = 0x0e;
/// The keyboard controller's data port. Only the command to reset the processor is emulated.
pub const I8042_DATA_PORT: u16 = 0x60;
/// The keyboard controller's command port.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// The keyboard controller's command that pulses the reset line.
pub const I8042_RESET_COMMAND: u8 = 0xfe;
/// First port of the ACPI fixed hardware: the PM1 event block (4 bytes), the PM1 control block and the PM
/// timer (ACPI 6.5, 4.8.3).
pub const PM_PORT: u16 = 0x600;
/// Number of ports of the ACPI fixed hardware.
pub const PM_LEN: u16 = 16;
/// The PM1 control register, two bytes.
pub const PM1_CONTROL_PORT: u16 = PM_PORT + 4;
/// The PM timer, four bytes.
pub const PM_TIMER_PORT: u16 = PM_PORT + 8;
/// The interrupt of the ACPI fixed hardware (SCI): level triggered, active high, on the I/O APIC pin of the
/// same number.
pub const SCI_IRQ: u32 = 9;
/// SLP_TYP of S5, soft off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// The value that the guest writes to the sleep control register to power off: SLP_TYP in bits 2 to
/// 4, SLP_EN in bit 5.
pub const SLEEP_POWER_OFF: u8 = SLEEP_TYPE_S5 << 2 | 1 << 5;

/// Most vCPUs of one VM: xAPIC ids are bytes, and 0xff is the broadcast.
pub const VCPUS_MAX: u32 = 254;

/// Returns the ranges of `size` bytes of RAM: one below the PCI hole and, if that is too small, one
/// from 4 GiB on. A range's index is the number of its memory slot.
pub fn ram(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(LOW_RAM_MAX);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((HIGH_RAM_START, size - low));
    }
    ranges
}

/// Returns the most bytes of RAM of a guest whose physical addresses have `bits` bits, 33 to 63. The addresses of the PCI
/// hole are no RAM.
pub fn most_ram(bits: u32) -> u64 {
    (1 << bits) - (HIGH_RAM_START.0 - LOW_RAM_MAX)
}

/// Returns the guest's memory map for `ram_size` bytes of RAM, ordered by address.
///
/// Everything between 640 KiB and 1 MiB is reserved, with the ACPI tables in it.
pub fn memory_map(ram_size: u64) -> Vec<Region> {
    let mut map = Vec::new();
    let mut add = |start: u64, end: u64, kind| {
        if end > start {
            map.push(Region { start, size: end - start, kind });
        }
    };
    let low = ram_size.min(LOW_RAM_MAX);
    add(0, low.min(LOW_MEMORY_END), Kind::Ram);
    add(LOW_MEMORY_END, KERNEL.0, Kind::Reserved);
    add(KERNEL.0, low, Kind::Ram);
    add(PCI_ECAM.0, PCI_ECAM.0 + PCI_ECAM_SIZE, Kind::Reserved);
    add(KVM_IDENTITY_MAP, KVM_IDENTITY_MAP + KVM_PAGES_SIZE, Kind::Reserved);
    add(HIGH_RAM_START.0, HIGH_RAM_START.0 + (ram_size - low), Kind::Ram);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_splits_at_the_pci_hole_and_not_before() {
        assert_eq!(ram(GIB), [(GuestAddress(0), GIB)]);
        assert_eq!(ram(3 * GIB), [(GuestAddress(0), 3 * GIB)]);
        assert_eq!(
            ram(3 * GIB + PAGE_SIZE),
            [(GuestAddress(0), 3 * GIB), (GuestAddress(4 * GIB), PAGE_SIZE)]
        );
    }

    #[test]
    fn the_memory_map_is_ordered_disjoint_and_has_all_ram_but_the_legacy_hole() {
        for size in [2 << 20, 512 << 20, 3 * GIB, 3 * GIB + PAGE_SIZE, 100 * GIB] {
            let map = memory_map(size);
            let mut end = 0;
            for region in &map {
                assert!(region.start >= end && region.size > 0, "{region:x?} in {map:x?}");
                end = region.start + region.size;
            }
            let ram: u64 = map.iter().filter(|r| r.kind == Kind::Ram).map(|r| r.size).sum();
            assert_eq!(ram, size - (KERNEL.0 - LOW_MEMORY_END), "{size:#x}");
        }
    }

    #[test]
    fn boot_structures_do_not_overlap() {
        let areas = [
            (GDT.0, 0x100),
            (PVH_START_INFO.0, PAGE_SIZE),
            (ZERO_PAGE.0, PAGE_SIZE),
            (BOOT_PAGE_TABLES.0, BOOT_PAGE_TABLE_PAGES * PAGE_SIZE),
            (CMDLINE.0, CMDLINE_MAX as u64 + 1),
            (LOW_MEMORY_END, 0),
        ];
        assert!(areas.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
    }
}
