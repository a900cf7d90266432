//! The x86 parts of a machine besides its vCPUs: interrupt controllers, timer, clocks. KVM emulates
//! all of them. Another architecture has another platform with another binding.

use kvm_ioctls::VmFd;

use super::KvmError;
use super::clock::ClockStateV1;
use super::irqchip::IrqchipStateV1;
use super::pit::PitStateV1;
use crate::state::{Node, Reader, Schema, StateError};

/// State of the platform. Binding `perennial,platform-x86-v1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlatformStateV1 {
    /// The guest's clocks.
    pub clock: ClockStateV1,
    /// The PICs and the I/O APIC.
    pub irqchip: IrqchipStateV1,
    /// The 8254 timer.
    pub pit: PitStateV1,
}

impl PlatformStateV1 {
    /// Reads the timer and the interrupt controllers. Call while no vCPU runs.
    /// [`ClockStateV1::save`] reads the clock, at any point of the save.
    pub fn save_controllers(vm: &VmFd) -> Result<(PitStateV1, IrqchipStateV1), KvmError> {
        Ok((PitStateV1::save(vm)?, IrqchipStateV1::save(vm)?))
    }

    /// Sets all parts. Call when every vCPU has its state and none has run.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        let Self { clock, irqchip, pit } = self;
        // After the LAPICs, into which the I/O APIC may deliver interrupts.
        irqchip.restore(vm)?;
        pit.restore(vm)?;
        // After the TSC offsets, from which kvmclock is derived, and before any vCPU runs:
        // otherwise the guest would see its clock jump.
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
