//! The state of the ACPI fixed hardware.

use super::registers::{CONTROL, Contents, ENABLE, STATUS};
use crate::state::{Node, Reader, Schema, StateError};

/// `perennial,acpi-v1`: the registers by their names in the ACPI specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiStateV1 {
    /// The registers.
    pub contents: Contents,
}

impl Schema for AcpiStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,acpi-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { contents } = self;
        let Contents { status, enable, control, timer } = contents;
        node.put_u32("pm1-status", (*status).into());
        node.put_u32("pm1-enable", (*enable).into());
        node.put_u32("pm1-control", (*control).into());
        node.put_u64("pm-timer-ticks", *timer);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let contents = Contents {
            status: reader.narrow("pm1-status")?,
            enable: reader.narrow("pm1-enable")?,
            control: reader.narrow("pm1-control")?,
            timer: reader.u64("pm-timer-ticks")?,
        };
        for (name, value, known) in [
            ("pm1-status", contents.status, STATUS),
            ("pm1-enable", contents.enable, ENABLE),
            ("pm1-control", contents.control, CONTROL),
        ] {
            if value & !known != 0 {
                let problem = format!("{value:#06x} has bits besides {known:#06x}");
                return Err(reader.invalid(name, problem));
            }
        }
        Ok(Self { contents })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::{contract_tests, refusal};

    impl AcpiStateV1 {
        pub(crate) fn sample() -> Self {
            let (status, enable, control) = (0x0100, 0x0120, 0x1402);
            Self { contents: Contents { status, enable, control, timer: 0x12_3456_789a } }
        }
    }

    contract_tests! {
        AcpiStateV1,
        sample: AcpiStateV1::sample,
        changes: [
            |s| s.contents.status = 1,
            |s| s.contents.enable = 1,
            |s| s.contents.control = 0,
            |s| s.contents.timer += 1,
        ],
        golden: "acpi-v1",
    }

    #[test]
    fn bits_that_no_guest_can_have_set_are_refused_by_name() {
        for (change, property) in [
            ((|s| s.contents.status = 0x8000) as fn(&mut AcpiStateV1), "pm1-status"),
            (|s| s.contents.enable = 0x0200, "pm1-enable"),
            (|s| s.contents.control = 0x2000, "pm1-control"),
        ] {
            let error = refusal(AcpiStateV1::sample(), change);
            assert!(error.contains(&format!("`{property}`")), "{property}: {error}");
        }
    }
}
