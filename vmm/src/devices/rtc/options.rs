//! `rtc = "on"`: every machine has a real-time clock, and it has no options.

use serde::{Deserialize, Serialize};

use crate::state::{Node, Reader, Schema, StateError};

/// A real-time clock, which has no options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RtcOptions {
    /// As every machine has it.
    On,
}

impl RtcOptions {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match text {
            "on" => Ok(Self::On),
            _ => Err("it can only be on, as it is without this key".to_owned()),
        }
    }
}

/// `perennial,rtc-options-v1`.
impl Schema for RtcOptions {
    const COMPATIBLE: &'static [&'static str] = &["perennial,rtc-options-v1"];

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
    use crate::devices::kind::{Sample, SampleFiles};
    use crate::devices::rtc::{Rtc, RtcStateV1};

    impl Sample for Rtc {
        fn options() -> RtcOptions {
            RtcOptions::On
        }

        fn files(_state: Option<&RtcStateV1>) -> Option<SampleFiles> {
            Some(SampleFiles { opened: Vec::new(), peer: None })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    contract_tests! {
        RtcOptions,
        sample: || RtcOptions::On,
        changes: [],
        golden: "rtc-options-v1",
    }

    #[test]
    fn it_is_on_and_nothing_else() {
        assert_eq!(RtcOptions::parse("on"), Ok(RtcOptions::On));
        for wrong in ["", "off", "On"] {
            assert!(RtcOptions::parse(wrong).unwrap_err().contains("on"), "{wrong}");
        }
    }
}
