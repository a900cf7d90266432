//! The SMBIOS tables (DMTF DSP0134 3.6): an entry point and four structures, at the address where guests look
//! for them.

use uuid::Uuid;

use crate::arch::x86_64::layout;

/// Version of the specification by which the structures are written: 3.6.
const VERSION: [u8; 2] = [3, 6];
/// Length of the entry point (5.2.2), and where the structures follow it.
const ENTRY: usize = 24;
const STRUCTURES: usize = 32;
const MANUFACTURER: &str = "Perennial";
const PRODUCT: &str = "Perennial VM";
/// Length of the firmware's structure (7.1).
const FIRMWARE: usize = 26;
/// Firmware characteristics: none is listed.
const NOT_LISTED: u8 = 1 << 3;
/// Second byte of the extended firmware characteristics: the tables describe a virtual machine.
const VIRTUAL_MACHINE: u8 = 1 << 4;
/// Length of the system's structure (7.2).
const SYSTEM: usize = 27;
/// Reason for the last wake-up: the power switch.
const POWER_SWITCH: u8 = 6;
/// Length of the enclosure's structure (7.4).
const ENCLOSURE: usize = 22;
/// Kind of enclosure: other. State of the enclosure and its parts: safe. Security: none.
const OTHER: u8 = 1;
const SAFE: u8 = 3;
const NO_SECURITY: u8 = 3;

/// Returns entry point and structures, for [`layout::SMBIOS`].
pub(super) fn image(uuid: &Uuid, serial_number: &str) -> Vec<u8> {
    let structures = [
        firmware(),
        system(uuid, serial_number),
        enclosure(),
        // The end of the table.
        structure(127, 3, &[], &[]),
    ]
    .concat();
    let mut entry = Vec::from(*b"_SM3_");
    entry.extend([0, ENTRY as u8]);
    entry.extend(VERSION);
    // Revision of the specification's document, of the entry point, and a reserved byte.
    entry.extend([0, 1, 0]);
    // Far below 4 GiB.
    entry.extend((structures.len() as u32).to_le_bytes());
    entry.extend((layout::SMBIOS.0 + STRUCTURES as u64).to_le_bytes());
    let sum = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    entry[5] = sum.wrapping_neg();
    entry.resize(STRUCTURES, 0);
    entry.extend(structures);
    entry
}

/// A structure (6.1.2): a header, then `fields`, then the strings that the fields name by number, from 1 on.
fn structure(kind: u8, handle: u8, fields: &[u8], strings: &[&str]) -> Vec<u8> {
    let mut bytes = vec![kind, 4 + fields.len() as u8, handle, 0];
    bytes.extend(fields);
    for string in strings {
        bytes.extend(string.as_bytes());
        bytes.push(0);
    }
    // The end of the strings. Two bytes if there are none.
    bytes.resize(bytes.len() + if strings.is_empty() { 2 } else { 1 }, 0);
    bytes
}

fn firmware() -> Vec<u8> {
    // Offsets are those in the specification, which counts the header of 4 bytes.
    let mut fields = [0; FIRMWARE - 4];
    let mut put = |offset: usize, value| fields[offset - 4] = value;
    // Vendor, version, release date.
    put(0x04, 1);
    put(0x05, 2);
    put(0x08, 3);
    put(0x0a, NOT_LISTED);
    put(0x13, VIRTUAL_MACHINE);
    // Releases of the firmware and of an embedded controller: not told.
    (0x14..0x18).for_each(|offset| put(offset, 0xff));
    structure(0, 0, &fields, &[MANUFACTURER, "1", "01/01/2026"])
}

fn system(uuid: &Uuid, serial_number: &str) -> Vec<u8> {
    let mut fields = [0; SYSTEM - 4];
    // Manufacturer, product, and serial number if there is one. Version, SKU and family: none.
    (fields[0], fields[1]) = (1, 2);
    let mut strings = vec![MANUFACTURER, PRODUCT];
    if !serial_number.is_empty() {
        fields[3] = 3;
        strings.push(serial_number);
    }
    // The first three fields of a UUID are little-endian here (7.2.1).
    fields[4..20].copy_from_slice(&uuid.to_bytes_le());
    fields[20] = POWER_SWITCH;
    structure(1, 1, &fields, &strings)
}

fn enclosure() -> Vec<u8> {
    let mut fields = [0; ENCLOSURE - 4];
    (fields[0], fields[1]) = (1, OTHER);
    fields[5..8].fill(SAFE);
    fields[8] = NO_SECURITY;
    structure(3, 2, &fields, &[MANUFACTURER])
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: Uuid = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);

    /// Kind, fields with their header, and strings of each structure, read as a guest does.
    fn read(image: &[u8]) -> Vec<(u8, &[u8], Vec<&str>)> {
        let word = |at: usize, len: usize| {
            image[at..at + len].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
        };
        let start = (word(16, 8) - layout::SMBIOS.0) as usize;
        let mut rest = &image[start..start + word(12, 4) as usize];
        let mut found = Vec::new();
        while let [kind, len, ..] = *rest {
            let (fields, behind) = rest.split_at(len.into());
            let end = behind.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let strings = behind[..end].split(|byte| *byte == 0);
            let strings = strings.map(|s| std::str::from_utf8(s).unwrap());
            found.push((kind, fields, strings.filter(|s| !s.is_empty()).collect()));
            rest = &behind[end + 2..];
        }
        found
    }

    #[test]
    fn a_guest_finds_every_structure_from_the_entry_point() {
        let image = image(&UUID, "");
        assert_eq!(&image[..5], b"_SM3_");
        assert_eq!(image[..24].iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let kinds: Vec<u8> = read(&image).iter().map(|(kind, ..)| *kind).collect();
        assert_eq!(kinds, [0, 1, 3, 127]);
        let (_, firmware, strings) = &read(&image)[0];
        assert_eq!(strings, &["Perennial", "1", "01/01/2026"]);
        assert_eq!(firmware[0x13], VIRTUAL_MACHINE);
    }

    #[test]
    fn the_system_has_its_uuid_in_mixed_order_and_a_serial_number_if_it_is_given() {
        for serial in ["", "ds=nocloud;s=http://10.0.0.1/"] {
            let image = image(&UUID, serial);
            let (_, system, strings) = &read(&image)[1];
            assert_eq!(system.len(), 27);
            let uuid: [u8; 16] = system[8..24].try_into().unwrap();
            assert_eq!(
                uuid,
                [
                    0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc,
                    0xdd, 0xee, 0xff
                ]
            );
            let named = system[7].checked_sub(1).map(|number| strings[usize::from(number)]);
            assert_eq!(named.unwrap_or_default(), serial);
            assert_eq!(strings[usize::from(system[4]) - 1], "Perennial");
        }
    }

    #[test]
    fn the_largest_tables_fit_into_their_area() {
        let room = layout::SMBIOS_END.0 - layout::SMBIOS.0;
        let most = "x".repeat(super::super::options::SERIAL_MAX);
        assert!(image(&UUID, &most).len() as u64 <= room);
    }
}
