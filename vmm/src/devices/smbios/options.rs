//! `platform = "uuid=...,serial_number=..."`: what the machine's tables say of it.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::options::Options;
use crate::state::{Node, Reader, Schema, StateError};

/// Longest serial number, in bytes.
pub(super) const SERIAL_MAX: usize = 255;
/// The namespace of the UUIDs that follow from the names of VMs (RFC 9562, 5.5).
const NAMESPACE: Uuid = Uuid::from_u128(0x9b3c_5a0e_4d61_4f1c_8a27_6f0d_52e1_b7c4);

/// What the machine's tables say of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmbiosOptions {
    /// The VM's UUID. `None`: the one that follows from its name.
    pub uuid: Option<Uuid>,
    /// The VM's serial number; empty if none. Cloud-init reads its settings there, such as
    /// `ds=nocloud;s=http://10.0.0.1/`.
    pub serial_number: String,
}

impl SmbiosOptions {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let options = Options::parse(text, &["uuid", "serial_number"])?;
        let uuid = options.get("uuid").map(|text| {
            Uuid::try_parse(text).map_err(|_| {
                format!(
                    "`{text}` is no UUID such as 6f1f2f5c-8a0e-4c39-9d0b-2f6b1c0de5a7; without `uuid` it \
                     follows from the VM's name"
                )
            })
        });
        let serial_number = options.get("serial_number").unwrap_or_default().to_owned();
        check_serial(&serial_number)?;
        Ok(Self { uuid: uuid.transpose()?, serial_number })
    }

    /// Returns the UUID of the VM called `name`: always the same for one name.
    pub(super) fn uuid(&self, name: &str) -> Uuid {
        self.uuid.unwrap_or_else(|| Uuid::new_v5(&NAMESPACE, name.as_bytes()))
    }
}

fn check_serial(text: &str) -> Result<(), String> {
    if text.len() > SERIAL_MAX {
        return Err(format!("serial_number has {} bytes, at most {SERIAL_MAX} fit", text.len()));
    }
    match text.chars().find(|c| !(c.is_ascii_graphic() || *c == ' ')) {
        Some(c) => {
            Err(format!("serial_number has `{}`, it is printable ASCII only", c.escape_default()))
        }
        None => Ok(()),
    }
}

/// `perennial,smbios-options-v1`.
impl Schema for SmbiosOptions {
    const COMPATIBLE: &'static [&'static str] = &["perennial,smbios-options-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { uuid, serial_number } = self;
        node.put_bytes("uuid", uuid.as_ref().map_or(&[][..], |uuid| uuid.as_bytes()));
        node.put_str("serial-number", serial_number);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let bytes = reader.bytes("uuid")?;
        let uuid = match bytes.is_empty() {
            true => None,
            false => Some(Uuid::from_slice(bytes).map_err(|_| {
                reader.invalid("uuid", format!("{} bytes, a UUID has 16", bytes.len()))
            })?),
        };
        let serial_number = reader.str("serial-number")?;
        check_serial(&serial_number).map_err(|problem| reader.invalid("serial-number", problem))?;
        Ok(Self { uuid, serial_number })
    }
}

#[cfg(any(test, fuzzing))]
mod sample {
    use super::*;
    use crate::devices::kind::{Sample, SampleFiles};
    use crate::devices::smbios::{Smbios, SmbiosStateV1};

    impl Sample for Smbios {
        fn options() -> SmbiosOptions {
            SmbiosOptions { uuid: Some(Uuid::from_u128(7)), serial_number: "7".to_owned() }
        }

        fn files(_state: Option<&SmbiosStateV1>) -> Option<SampleFiles> {
            Some(SampleFiles { opened: Vec::new(), peer: None })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::{contract_tests, refusal};

    fn sample() -> SmbiosOptions {
        let uuid = Some(Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff));
        SmbiosOptions { uuid, serial_number: "ds=nocloud".to_owned() }
    }

    contract_tests! {
        SmbiosOptions,
        sample: sample,
        changes: [|o| o.uuid = None, |o| o.uuid = Some(Uuid::nil()), |o| o.serial_number.clear()],
        golden: "smbios-options-v1",
    }

    #[test]
    fn a_platform_has_a_uuid_and_a_serial_number_or_not() {
        let uuid = "uuid=00112233-4455-6677-8899-aabbccddeeff";
        assert_eq!(SmbiosOptions::parse(&format!("{uuid},serial_number=ds=nocloud")), Ok(sample()));
        let plain = SmbiosOptions { serial_number: String::new(), ..sample() };
        assert_eq!(SmbiosOptions::parse(uuid), Ok(plain));
        let refused = |text: &str| SmbiosOptions::parse(text).expect_err(text);
        assert!(refused("uuid=7").contains("`7` is no UUID such as"));
        assert!(refused("serial_number=\u{e4}").contains("printable ASCII"));
        assert!(refused(&format!("serial_number={}", "x".repeat(256))).contains("256 bytes"));
        assert!(refused("colour=red").contains("`colour`"));
    }

    #[test]
    fn the_uuid_follows_from_the_name_and_never_changes() {
        let plain = SmbiosOptions::default();
        // A guest's licences and cloud-init know a machine by it: another one would be another machine.
        assert_eq!(plain.uuid("web").to_string(), "4b82b14c-b2d1-511a-8fd3-41fae68544bd");
        assert_ne!(plain.uuid("web-1"), plain.uuid("web"));
        assert_eq!(sample().uuid("web"), sample().uuid.unwrap());
    }

    #[test]
    fn values_that_no_configuration_gives_are_refused_by_name() {
        let error = refusal(sample(), |o| o.serial_number = "\n".to_owned());
        assert!(error.contains("`serial-number`"), "{error}");
        let mut node = SmbiosOptions::default().to_node("smbios@f000");
        node.properties.insert("uuid".to_owned(), vec![7; 15]);
        let error = crate::state::node::read_node::<SmbiosOptions>(&node, "/").unwrap_err();
        assert!(error.to_string().contains("15 bytes, a UUID has 16"), "{error}");
    }
}
