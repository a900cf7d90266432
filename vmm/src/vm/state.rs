//! The state document of a machine as one typed value: all there is to know of it but its RAM.

use super::board::BoardStateV1;
use crate::kvm::clock::ClockStateV1;
use crate::kvm::irqchip::IrqchipStateV1;
use crate::kvm::pit::PitStateV1;
use crate::machine::Machine;
use crate::state::{Node, Reader, Schema, StateError};
use crate::vcpu::VcpuStateV1;

/// The whole machine. `perennial,vm-v1`, the root of the document.
#[derive(Debug, Clone, PartialEq)]
pub struct MachineStateV1 {
    /// What it is.
    pub machine: Machine,
    /// Its clocks.
    pub clock: ClockStateV1,
    /// Its PICs and I/O APIC.
    pub irqchip: IrqchipStateV1,
    /// Its 8254.
    pub pit: PitStateV1,
    /// Its vCPUs, by their ids.
    pub vcpus: Vec<VcpuStateV1>,
    /// Its devices.
    pub devices: BoardStateV1,
}

impl Schema for MachineStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,vm-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { machine, clock, irqchip, pit, vcpus, devices } = self;
        node.push(machine.to_node("machine"));
        node.push(clock.to_node("clock"));
        node.push(irqchip.to_node("irqchip"));
        node.push(pit.to_node("pit"));
        for (index, vcpu) in vcpus.iter().enumerate() {
            node.push(vcpu.to_node(&format!("cpu@{index:x}")));
        }
        node.push(devices.to_node("devices"));
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let machine: Machine = reader.child("machine")?;
        let vcpus: Vec<VcpuStateV1> = reader.sequence("cpu")?;
        if vcpus.len() as u64 != u64::from(machine.cpus) {
            let problem = format!("{} vCPUs, the machine has {}", vcpus.len(), machine.cpus);
            return Err(reader.invalid("cpu", problem));
        }
        if let Some((index, vcpu)) = (0..).zip(&vcpus).find(|(index, vcpu)| vcpu.id != *index) {
            return Err(reader.invalid("cpu", format!("cpu@{index:x} has id {}", vcpu.id)));
        }
        let devices: BoardStateV1 = reader.child("devices")?;
        if devices.disks.len() != machine.disks.len() {
            let (found, wanted) = (devices.disks.len(), machine.disks.len());
            let problem = format!("{found} virtio-blk devices, the machine has {wanted} disks");
            return Err(reader.invalid("devices", problem));
        }
        Ok(Self {
            machine,
            clock: reader.child("clock")?,
            irqchip: reader.child("irqchip")?,
            pit: reader.child("pit")?,
            vcpus,
            devices,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Disk;
    use crate::machine::tests::sample as machine;
    use crate::state::contract::{contract_tests, refusal};

    impl MachineStateV1 {
        pub(crate) fn sample() -> Self {
            let machine = machine();
            Self {
                vcpus: (0..machine.cpus).map(VcpuStateV1::sample).collect(),
                machine,
                clock: ClockStateV1::sample(),
                irqchip: IrqchipStateV1::sample(),
                pit: PitStateV1::sample(),
                devices: BoardStateV1::sample(),
            }
        }
    }

    contract_tests! {
        MachineStateV1,
        sample: MachineStateV1::sample,
        changes: [
            |s| s.machine.cmdline.clear(),
            |s| s.clock.clock_ns += 1,
            |s| s.irqchip = IrqchipStateV1::other_sample(),
            |s| s.pit = PitStateV1::other_sample(),
            |s| s.vcpus[0].tsc_offset += 1,
            |s| s.vcpus[1].tsc_offset += 1,
            |s| s.devices.pci.address += 4,
        ],
        optional: ["/machine:initramfs"],
        golden: "vm-v1",
    }

    fn refused(change: fn(&mut MachineStateV1)) -> String {
        refusal(MachineStateV1::sample(), change)
    }

    #[test]
    fn parts_that_are_of_different_machines_are_refused() {
        assert!(refused(|s| s.machine.cpus = 3).contains("2 vCPUs, the machine has 3"));
        assert!(refused(|s| s.vcpus[1].id = 0).contains("cpu@1 has id 0"));
        let disk = |s: &mut MachineStateV1| {
            let path = "/x".into();
            s.machine.disks.push(Disk { path, readonly: true });
        };
        assert!(refused(disk).contains("2 virtio-blk devices, the machine has 3 disks"));
    }
}
