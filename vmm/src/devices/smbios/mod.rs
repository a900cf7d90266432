//! The SMBIOS tables, by which a guest knows which VM it is: UUID and serial number, that the machine is
//! virtual, and who made it. Cloud-init reads them before anything else.
//!
//! The tables are written into guest RAM when the machine boots, and are the guest's from then on. So nothing is
//! saved: a live update leaves them where they are.

mod options;
mod tables;

pub use options::SmbiosOptions;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use uuid::Builder;
use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap};

use super::claims::Claim;
use super::files::{OpenError, Opened};
use super::kind::{Built, CommandLine, DeviceCalls, Kind, Place, Site};
use super::{Device, DeviceError};
use crate::arch::x86_64::layout;
use crate::random::random;
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// The real-mode segment of the tables.
const SEGMENT: u16 = (layout::SMBIOS.0 >> 4) as u16;

/// The tables.
#[derive(Debug)]
pub struct Smbios;

/// `perennial,smbios-v1`. Empty: the tables are in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmbiosStateV1;

impl Schema for SmbiosStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,smbios-v1"];

    fn encode(&self, _node: &mut Node) {
        let Self = self;
    }

    fn decode(_reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self)
    }
}

impl Smbios {
    /// Writes the tables of the VM called `name` into its RAM.
    pub fn write(
        memory: &GuestMemoryMmap,
        options: &SmbiosOptions,
        name: &str,
    ) -> Result<Self, GuestMemoryError> {
        let image = tables::image(&options.uuid(name), &options.serial_number);
        memory.write_slice(&image, layout::SMBIOS)?;
        Ok(Self)
    }
}

impl Device for Smbios {
    fn pause(&mut self) {}

    fn check_answers(&self, _now: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn drain(&mut self, _deadline: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&mut self) {}
}

impl Persist for Smbios {
    type State = SmbiosStateV1;
    type Resources = ();
    type Error = std::convert::Infallible;

    fn save(&self) -> Result<SmbiosStateV1, Self::Error> {
        let Self = self;
        Ok(SmbiosStateV1)
    }

    fn restore(state: SmbiosStateV1, (): ()) -> Result<Self, Self::Error> {
        let SmbiosStateV1 = state;
        Ok(Self)
    }
}

impl Kind for Smbios {
    /// As Cloud Hypervisor calls what its tables say.
    const KEY: &'static str = "platform";
    const COMMAND_LINE: Option<CommandLine> = Some(CommandLine {
        usage: "What the VM's tables say of it: uuid=UUID,serial_number=TEXT",
        default: None,
        is_path: false,
        foreign: &[
            ("num_pci_segments", ""),
            ("oem_strings", ""),
            ("iommu_segments", ""),
            ("tdx", ""),
        ],
        harmless: &[("num_pci_segments", &["1"]), ("tdx", &["off"])],
    });
    const NAME: &'static str = "smbios";
    const MOST: usize = 1;
    const PLACE: Place = Place::Tables(SEGMENT);
    /// Its tables are memory of the guest.
    const CALLS: DeviceCalls = DeviceCalls { build: &[], thread: &[], registers: &[] };

    type Options = SmbiosOptions;
    type State = SmbiosStateV1;

    fn parse(text: &str, _vcpus: u32) -> Result<SmbiosOptions, String> {
        SmbiosOptions::parse(text)
    }

    /// Every machine has a UUID, which follows from its name.
    fn unasked() -> Option<SmbiosOptions> {
        Some(SmbiosOptions::default())
    }

    fn make_unique(options: &mut SmbiosOptions) {
        let bytes = u128::from(random()) << 64 | u128::from(random());
        let random = Builder::from_random_bytes(bytes.to_ne_bytes());
        options.uuid.get_or_insert(random.into_uuid());
    }

    /// Guests know by their UUID that they are not each other, such as cloud-init.
    fn claims(options: &SmbiosOptions) -> Vec<Claim> {
        options.uuid.iter().map(|uuid| Claim::named("UUID", uuid.to_string())).collect()
    }

    fn open(_options: &SmbiosOptions) -> Result<Vec<Opened>, OpenError> {
        Ok(Vec::new())
    }

    fn build(
        options: &SmbiosOptions,
        site: &mut Site,
        state: Option<SmbiosStateV1>,
    ) -> Result<Built<SmbiosStateV1>, DeviceError> {
        let tables = match state {
            Some(state) => {
                let Ok(restored) = Self::restore(state, ());
                restored
            }
            None => Self::write(&site.memory, options, &site.machine)
                .map_err(|e| site.error("write its tables into guest RAM", e))?,
        };
        Ok(Built::without_thread(&site.node, Arc::new(Mutex::new(tables))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    contract_tests! {
        SmbiosStateV1,
        sample: || SmbiosStateV1,
        changes: [],
        golden: "smbios-v1",
    }

    #[test]
    fn the_tables_are_in_the_segment_where_guests_look_for_them() {
        let ram = [(layout::SMBIOS, 0x1000)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&ram).unwrap();
        Smbios::write(&memory, &SmbiosOptions::default(), "web").unwrap();
        let anchor: [u8; 5] = memory.read_obj(layout::SMBIOS).unwrap();
        assert_eq!(&anchor, b"_SM3_");
        assert_eq!(SEGMENT, 0xf000);
        let elsewhere = GuestMemoryMmap::<()>::from_ranges(&[(layout::KERNEL, 0x1000)]).unwrap();
        Smbios::write(&elsewhere, &SmbiosOptions::default(), "web").unwrap_err();
    }
}
