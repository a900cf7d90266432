//! The ACPI tables of the machine: a hardware-reduced platform with one PCI root bus and COM1.
//!
//! A hardware-reduced platform (ACPI 6.5, 4.1) has no SCI, no PM timer and no switch to a legacy mode. The
//! guest powers off by the sleep control register and resets by the reset register. The tables depend only
//! on the number of vCPUs.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
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
    let fadt = image.add(&bytes_of(&fadt(dsdt)));
    let madt = image.add(&bytes_of(&madt(cpus)));
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

fn port(address: u16) -> GAS {
    GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address.into())
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    // IAPC_BOOT_ARCH: no VGA (bit 2), no CMOS RTC (bit 5), and no 8042 (bit 1 is clear). The port that
    // resets as an 8042 does is for kernels that do not read this table.
    fadt.iapc_boot_arch = (1 << 2 | 1 << 5).into();
    fadt.finalize()
}

fn madt(cpus: u32) -> impl Aml {
    let controller = LocalInterruptController::Address(layout::LAPIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, controller);
    for id in (0..cpus).filter_map(|id| u8::try_from(id).ok()) {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt() -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&bytes_of(&root_bus()));
    table.append_slice(&bytes_of(&com1()));
    // What to write into the sleep control register for S5 (ACPI 6.5, 7.4.2).
    let s5 = Package::new(vec![&layout::SLEEP_TYPE_S5]);
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
    }

    #[test]
    fn the_madt_has_every_vcpu_and_the_io_apic() {
        let madt = bytes_of(&madt(5));
        let mut entries = Vec::new();
        let mut rest = &madt[44..];
        while let [kind, len, ..] = rest {
            entries.push((*kind, rest[..usize::from(*len)].to_vec()));
            rest = &rest[usize::from(*len)..];
        }
        let apics: Vec<u8> = entries.iter().filter(|(k, _)| *k == 0).map(|(_, e)| e[3]).collect();
        assert_eq!(apics, [0, 1, 2, 3, 4]);
        assert_eq!(entries.iter().filter(|(k, _)| *k == 1).count(), 1);
    }

    #[test]
    fn the_tables_of_the_largest_machine_fit_and_are_the_same_every_time() {
        let room = (layout::ACPI_TABLES_END.0 - layout::ACPI_TABLES.0) as usize;
        let image = tables(layout::VCPUS_MAX);
        assert!(image.len() <= room, "{} of {room}", image.len());
        assert_eq!(image, tables(layout::VCPUS_MAX));
    }
}
