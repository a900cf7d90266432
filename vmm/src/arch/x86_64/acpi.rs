//! The ACPI tables of the machine: a PC with the ACPI fixed hardware, one PCI root bus, COM1 and an RTC.
//!
//! The platform is not hardware-reduced (ACPI 6.5, 4.1): on such a platform Linux uses neither the PM timer
//! nor the PIT and the PICs, so a guest without kvmclock could not measure time. There is no legacy mode to
//! leave: `SMI_CMD` is 0. The tables depend only on the number of vCPUs.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;

const OEM_ID: [u8; 6] = *b"PRNNL ";
const OEM_TABLE_ID: [u8; 8] = *b"PRNNLVM ";
const OEM_REVISION: u32 = 1;
/// Alignment of the tables in bytes, as firmware aligns them.
const ALIGNMENT: usize = 64;

/// The tables cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcpiError {
    /// The tables are larger than their area in the memory map.
    #[error("the ACPI tables need {needed} bytes, there is room for {room}")]
    TooLarge {
        /// Size of the tables in bytes.
        needed: usize,
        /// Size of the area in bytes.
        room: usize,
    },
    /// Guest memory cannot be written.
    #[error("cannot write them to guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Writes the tables of a machine with `cpus` vCPUs and returns the address of the RSDP.
pub fn write(memory: &GuestMemoryMmap, cpus: u32) -> Result<GuestAddress, AcpiError> {
    let bytes = tables(cpus);
    let room = (layout::ACPI_TABLES_END.0 - layout::ACPI_TABLES.0) as usize;
    if bytes.len() > room {
        return Err(AcpiError::TooLarge { needed: bytes.len(), room });
    }
    memory.write_slice(&bytes, layout::ACPI_TABLES)?;
    Ok(layout::ACPI_TABLES)
}

/// All tables, to be placed at [`layout::ACPI_TABLES`]. The RSDP comes first.
fn tables(cpus: u32) -> Vec<u8> {
    let mut image = Image { bytes: vec![0; Rsdp::len().next_multiple_of(ALIGNMENT)] };
    let dsdt = image.add(&dsdt());
    let facs = image.add(&bytes_of(&FACS::new()));
    let fadt = image.add(&bytes_of(&fadt(dsdt, facs)));
    let madt = image.add(&madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = image.add(&bytes_of(&xsdt));
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    image.bytes
}

struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table and returns its guest physical address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let offset = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(table);
        layout::ACPI_TABLES.0 + offset as u64
    }
}

#[derive(Default)]
struct Sink(Vec<u8>);

impl AmlSink for Sink {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut sink = Sink::default();
    aml.to_aml_bytes(&mut sink);
    sink.0
}

fn port(address: u16, bytes: u8, access: AccessSize) -> GAS {
    GAS::new(GasSpace::SystemIo, bytes * 8, 0, access, address.into())
}

fn fadt(dsdt: u64, facs: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        // Below 4 GiB. Some ACPI code looks only at the fields of 32 bits.
        .firmware_ctrl_32(facs as u32)
        .dsdt_64(dsdt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Set: the machine has no such button in its fixed hardware. It has a power button there.
        .flag(Flags::SlpButton)
        // Set: the RTC has no wake status in the fixed hardware.
        .flag(Flags::FixRtc);
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = (layout::SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(layout::PM_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(layout::PM_PORT, 4, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(layout::PM1_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(layout::PM1_CONTROL_PORT, 2, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(layout::PM_TIMER_PORT).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port(layout::PM_TIMER_PORT, 4, AccessSize::DwordAccess);
    // Latencies beyond these limits say: there is no C2 and no C3.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.reset_reg = port(layout::RESET_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.century = layout::RTC_CENTURY;
    // IAPC_BOOT_ARCH: no VGA (bit 2), and no 8042 (bit 1 is clear), but a CMOS RTC (bit 5 is clear). The port
    // that resets as an 8042 does is for kernels that do not read this table.
    fadt.iapc_boot_arch = (1 << 2).into();
    fadt.finalize()
}

/// MADT flags: the machine has two 8259s as well.
const PCAT_COMPAT: u32 = 1;
/// MPS INTI flags of an interrupt that is active high (bits 1..0) and level triggered (bits 3..2).
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

fn madt(cpus: u32) -> Vec<u8> {
    // The crate's `MADT` has neither flags nor interrupt source overrides.
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, layout::LAPIC);
    madt.write_u32(40, PCAT_COMPAT);
    for id in (0..cpus).filter_map(|id| u8::try_from(id).ok()) {
        madt.append_slice(&bytes_of(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    madt.append_slice(&bytes_of(&IoApic::new(0, layout::IOAPIC, 0)));
    // ISA interrupt 9, the SCI: to the pin of the same number, but not edge triggered as on the ISA bus. The
    // others, also the timer's interrupt 0, are as on the ISA bus.
    let [flags_low, flags_high] = ACTIVE_HIGH_LEVEL.to_le_bytes();
    let [sci, ..] = layout::SCI_IRQ.to_le_bytes();
    madt.append_slice(&[2, 10, 0, sci, sci, 0, 0, 0, flags_low, flags_high]);
    madt.as_slice().to_vec()
}

fn dsdt() -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&bytes_of(&root_bus()));
    table.append_slice(&bytes_of(&com1()));
    table.append_slice(&bytes_of(&rtc()));
    // The sleep types of S5 for PM1a and PM1b control (ACPI 6.5, 7.4.2).
    let s5 = Package::new(vec![&layout::SLEEP_TYPE_S5, &0u8, &0u8, &0u8]);
    table.append_slice(&bytes_of(&Name::new("_S5_".into(), &s5)));
    table.as_slice().to_vec()
}

fn root_bus() -> impl Aml {
    let bars = layout::PCI_BARS.0 as u32;
    let bars_end = bars + (layout::PCI_BARS_SIZE - 1) as u32;
    let config = layout::PCI_CONFIG_PORT;
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            &AddressSpace::new_bus_number(0u16, 0u16),
            &IO::new(config, config, 1, layout::PCI_CONFIG_LEN as u8),
            &AddressSpace::new_io(0u16, config - 1, None),
            &AddressSpace::new_io(config + layout::PCI_CONFIG_LEN, 0xffffu16, None),
            &AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                bars,
                bars_end,
                None,
            ),
        ]),
    );
    Raw(bytes_of(&Scope::new(
        "\\_SB_".into(),
        vec![&Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_ADR".into(), &0u8),
                &Name::new("_SEG".into(), &0u8),
                &Name::new("_UID".into(), &0u8),
                &resources,
            ],
        )],
    )))
}

fn com1() -> impl Aml {
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            // Consumer, edge, active high, exclusive.
            &Interrupt::new(true, true, false, false, layout::COM1_IRQ),
            &IO::new(layout::COM1_PORT, layout::COM1_PORT, 1, layout::COM1_LEN as u8),
        ]),
    );
    Raw(bytes_of(&Scope::new(
        "\\_SB_".into(),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_DDN".into(), &"COM1"),
                &resources,
            ],
        )],
    )))
}

fn rtc() -> impl Aml {
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            // Consumer, edge, active high, exclusive.
            &Interrupt::new(true, true, false, false, layout::RTC_IRQ),
            &IO::new(layout::RTC_PORT, layout::RTC_PORT, 1, layout::RTC_LEN as u8),
        ]),
    );
    let id = Name::new("_HID".into(), &EISAName::new("PNP0B00"));
    let device = Device::new(Path::new("RTC0"), vec![&id, &resources]);
    Raw(bytes_of(&Scope::new("\\_SB_".into(), vec![&device])))
}

/// AML bytes that were generated before.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn half(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Returns the table at a guest address, with the length in its length field.
    fn table(image: &[u8], address: u64) -> &[u8] {
        let at = (address - layout::ACPI_TABLES.0) as usize;
        let len = u32::from_le_bytes(image[at + 4..at + 8].try_into().unwrap()) as usize;
        &image[at..at + len]
    }

    #[test]
    fn every_table_is_found_from_the_rsdp_and_sums_to_zero() {
        let image = tables(3);
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!(sum(&image[..20]), 0);
        assert_eq!(sum(&image[..36]), 0);
        let xsdt = table(&image, word(&image, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let fadt = table(&image, word(xsdt, 36));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        let madt = table(&image, word(xsdt, 44));
        assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
        let dsdt = table(&image, word(fadt, 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        assert_eq!(u64::from(half(fadt, 40)), word(fadt, 140), "both fields lead to the DSDT");
        let facs = table(&image, half(fadt, 36).into());
        assert_eq!((&facs[..4], facs.len()), (&b"FACS"[..], 64));
        assert!(half(fadt, 36).is_multiple_of(64), "a FACS must be aligned to 64 bytes");
    }

    #[test]
    fn the_fadt_has_the_fixed_hardware_and_no_legacy_mode() {
        let image = tables(1);
        let fadt = table(&image, word(table(&image, word(&image, 24)), 36));
        assert_eq!(half(fadt, 112) & 1 << 20, 0, "it is not hardware-reduced");
        assert_eq!(half(fadt, 112) & 1 << 4, 0, "the power button is a fixed one");
        assert_eq!(half(fadt, 112) & 1 << 8, 0, "the timer has 24 bits");
        assert_eq!(half(fadt, 48), 0, "SMI_CMD");
        let blocks = [56, 64, 76].map(|at| half(fadt, at));
        assert_eq!(blocks, [0x600, 0x604, 0x608]);
        let extended = [148, 172, 208].map(|at| word(fadt, at + 4) as u32);
        assert_eq!(extended, blocks);
        assert_eq!([fadt[88], fadt[89], fadt[91], fadt[92]], [4, 2, 4, 0], "lengths");
        assert_eq!(fadt[46], 9, "the SCI");
    }

    #[test]
    fn the_madt_has_every_vcpu_and_the_io_apic() {
        let madt = madt(5);
        assert_eq!(madt[40] & 1, 1, "there are PICs");
        let mut entries = Vec::new();
        let mut rest = &madt[44..];
        while let [kind, len, ..] = rest {
            entries.push((*kind, rest[..usize::from(*len)].to_vec()));
            rest = &rest[usize::from(*len)..];
        }
        let apics: Vec<u8> = entries.iter().filter(|(k, _)| *k == 0).map(|(_, e)| e[3]).collect();
        assert_eq!(apics, [0, 1, 2, 3, 4]);
        assert_eq!(entries.iter().filter(|(k, _)| *k == 1).count(), 1);
        let overrides: Vec<&[u8]> =
            entries.iter().filter(|(k, _)| *k == 2).map(|(_, e)| &e[3..]).collect();
        assert_eq!(overrides, [[9, 9, 0, 0, 0, 0x0d, 0]], "the SCI is level triggered");
    }

    #[test]
    fn the_tables_of_the_largest_machine_fit_and_are_the_same_every_time() {
        let room = (layout::ACPI_TABLES_END.0 - layout::ACPI_TABLES.0) as usize;
        let image = tables(layout::VCPUS_MAX);
        assert!(image.len() <= room, "{} of {room}", image.len());
        assert_eq!(image, tables(layout::VCPUS_MAX));
    }
}
