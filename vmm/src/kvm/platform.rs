//! What a machine has of x86 besides its vCPUs: interrupt controllers, timer, clocks. All of it is KVM's.
//! Another architecture has another platform, with a binding of its own.

use kvm_ioctls::VmFd;

use super::KvmError;
use super::clock::ClockStateV1;
use super::irqchip::IrqchipStateV1;
use super::pit::PitStateV1;
use crate::state::{Node, Reader, Schema, StateError};

/// The platform. `perennial,platform-x86-v1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlatformStateV1 {
    /// The guest's clocks.
    pub clock: ClockStateV1,
    /// The PICs and the I/O APIC.
    pub irqchip: IrqchipStateV1,
    /// The 8254.
    pub pit: PitStateV1,
}

impl PlatformStateV1 {
    /// Reads the controllers. No vCPU runs. The clock comes last, by [`ClockStateV1::save`]: what is
    /// saved after it costs the guest time that it does not see.
    pub fn save_controllers(vm: &VmFd) -> Result<(PitStateV1, IrqchipStateV1), KvmError> {
        Ok((PitStateV1::save(vm)?, IrqchipStateV1::save(vm)?))
    }

    /// Sets everything, when every vCPU has its state and none has run.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        let Self { clock, irqchip, pit } = self;
        // After the LAPICs: the I/O APIC may deliver into them.
        irqchip.restore(vm)?;
        pit.restore(vm)?;
        // After the TSC offsets, from which kvmclock is derived; before any vCPU runs, or the guest
        // would read a clock that jumps.
        clock.restore(vm)
    }
}

impl Schema for PlatformStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,platform-x86-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { clock, irqchip, pit } = self;
        node.push(clock.to_node("clock"));
        node.push(irqchip.to_node("irqchip"));
        node.push(pit.to_node("pit"));
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self {
            clock: reader.child("clock")?,
            irqchip: reader.child("irqchip")?,
            pit: reader.child("pit")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    impl PlatformStateV1 {
        pub(crate) fn sample() -> Self {
            Self {
                clock: ClockStateV1::sample(),
                irqchip: IrqchipStateV1::sample(),
                pit: PitStateV1::sample(),
            }
        }
    }

    contract_tests! {
        PlatformStateV1,
        sample: PlatformStateV1::sample,
        changes: [
            |s| s.clock.clock_ns += 1,
            |s| s.irqchip = IrqchipStateV1::other_sample(),
            |s| s.pit = PitStateV1::other_sample(),
        ],
        golden: "platform-x86-v1",
    }
}
