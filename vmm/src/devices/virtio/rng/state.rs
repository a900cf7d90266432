//! The state of the entropy device, which consists only of the state of its transport.

use std::convert::Infallible;
use std::fs::File;

use super::Rng;
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// `perennial,virtio-rng-v1`. Empty: the device keeps no entropy; the host's source supplies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioRngStateV1;

impl Schema for VirtioRngStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,virtio-rng-v1"];

    fn encode(&self, _node: &mut Node) {
        let Self = self;
    }

    fn decode(_reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self)
    }
}

impl Persist for Rng {
    type State = VirtioRngStateV1;
    type Resources = File;
    type Error = Infallible;

    fn save(&self) -> Result<VirtioRngStateV1, Infallible> {
        // The source is a file that the host passes to `restore`.
        let Self { source: _ } = self;
        Ok(VirtioRngStateV1)
    }

    fn restore(state: VirtioRngStateV1, source: File) -> Result<Self, Infallible> {
        let VirtioRngStateV1 = state;
        Ok(Self::new(source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::{VirtioPciStateV2, VirtioState};
    use crate::state::contract::contract_tests;

    contract_tests! {
        VirtioState<VirtioRngStateV1>,
        sample: || VirtioState {
            device: VirtioRngStateV1,
            transport: VirtioPciStateV2::sample(),
        },
        changes: [|s| s.transport.isr += 1, |s| s.transport.queues.clear()],
        golden: "virtio-rng-v1",
    }
}
