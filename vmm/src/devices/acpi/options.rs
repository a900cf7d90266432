//! `acpi = "on"`: every machine has the ACPI fixed hardware, and it has no options.

use serde::{Deserialize, Serialize};

use crate::state::{Node, Reader, Schema, StateError};

/// The ACPI fixed hardware, which has no options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AcpiOptions {
    /// As every machine has it.
    On,
}

impl AcpiOptions {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match text {
            "on" => Ok(Self::On),
            _ => Err("it can only be on, as it is without this key".to_owned()),
        }
    }
}

/// `perennial,acpi-options-v1`.
impl Schema for AcpiOptions {
    const COMPATIBLE: &'static [&'static str] = &["perennial,acpi-options-v1"];

    fn encode(&self, _node: &mut Node) {
        match self {
            Self::On => {}
        }
    }

    fn decode(_reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self::On)
    }
}

#[cfg(any(test, fuzzing))]
mod sample {
    use super::*;
    use crate::devices::acpi::{Acpi, AcpiStateV1};
    use crate::devices::kind::{Sample, SampleFiles};

    impl Sample for Acpi {
        fn options() -> AcpiOptions {
            AcpiOptions::On
        }

        fn files(_state: Option<&AcpiStateV1>) -> Option<SampleFiles> {
            Some(SampleFiles { opened: Vec::new(), peer: None })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    contract_tests! {
        AcpiOptions,
        sample: || AcpiOptions::On,
        changes: [],
        golden: "acpi-options-v1",
    }

    #[test]
    fn it_is_on_and_nothing_else() {
        assert_eq!(AcpiOptions::parse("on"), Ok(AcpiOptions::On));
        for wrong in ["", "off", "On"] {
            assert!(AcpiOptions::parse(wrong).unwrap_err().contains("on"), "{wrong}");
        }
    }
}
