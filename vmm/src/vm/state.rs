//! The state document of a VM as one typed value: the complete state except RAM.

use crate::devices::catalog::DeviceState;
use crate::devices::pci::bus::PciBusStateV1;
use crate::kvm::platform::PlatformStateV1;
use crate::machine::{DeviceSpec, Machine, address_of, node_name};
use crate::state::{Node, Reader, Schema, StateError};
use crate::vcpu::VcpuStateV1;

/// The whole VM. `perennial,vm-v1`, the root of the document.
#[derive(Debug, Clone, PartialEq)]
pub struct VmStateV1 {
    /// The machine's description.
    pub machine: Machine,
    /// The parts of the architecture besides vCPUs.
    pub platform: PlatformStateV1,
    /// The vCPUs, in the order of their ids.
    pub vcpus: Vec<VcpuStateV1>,
    /// The devices.
    pub devices: DevicesStateV1,
}

/// The state of the devices. `perennial,devices-v1`.
#[derive(Debug, Clone, PartialEq)]
pub struct DevicesStateV1 {
    /// The PCI bus itself.
    pub pci: PciBusStateV1,
    /// The devices, in the order of the machine's description.
    pub devices: Vec<SavedDevice>,
}

/// The state of one device and its place in the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedDevice {
    /// Its port or its slot, as in the machine's description.
    pub address: u16,
    /// The state, whose variant is the kind of the device.
    pub state: DeviceState,
}

impl DevicesStateV1 {
    /// The nodes of the devices, in order.
    pub fn nodes(&self) -> Vec<String> {
        self.devices.iter().map(SavedDevice::node).collect()
    }
}

impl SavedDevice {
    fn node(&self) -> String {
        node_name(self.state.kind().name, self.address)
    }
}

impl Schema for DevicesStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,devices-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { pci, devices } = self;
        node.push(pci.to_node("pci@cf8"));
        for device in devices {
            node.push(device.state.to_node(&device.node()));
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let pci = reader.child("pci@cf8")?;
        let devices = reader
            .rest()
            .into_iter()
            .map(|node| {
                let state = DeviceState::read(node, reader.path())?;
                let address = address_of(node, state.kind(), reader.path())?;
                Ok(SavedDevice { address, state })
            })
            .collect::<Result<_, StateError>>()?;
        Ok(Self { pci, devices })
    }
}

impl Schema for VmStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,vm-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { machine, platform, vcpus, devices } = self;
        node.push(machine.to_node("machine"));
        node.push(platform.to_node("platform"));
        for (index, vcpu) in vcpus.iter().enumerate() {
            node.push(vcpu.to_node(&format!("cpu@{index:x}")));
        }
        node.push(devices.to_node("devices"));
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let machine: Machine = reader.child("machine")?;
        let platform = reader.child("platform")?;
        let vcpus: Vec<VcpuStateV1> = reader.sequence("cpu")?;
        if vcpus.len() as u64 != u64::from(machine.cpus) {
            let problem = format!("{} vCPUs, the machine has {}", vcpus.len(), machine.cpus);
            return Err(reader.invalid("cpu", problem));
        }
        if let Some((index, vcpu)) = (0..).zip(&vcpus).find(|(index, vcpu)| vcpu.id != *index) {
            return Err(reader.invalid("cpu", format!("cpu@{index:x} has id {}", vcpu.id)));
        }
        let devices: DevicesStateV1 = reader.child("devices")?;
        let wanted: Vec<String> = machine.devices.iter().map(DeviceSpec::node).collect();
        let found = devices.nodes();
        if found != wanted {
            let problem = format!("it has {found:?}, the machine has {wanted:?}");
            return Err(reader.invalid("devices", problem));
        }
        Ok(Self { machine, platform, vcpus, devices })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::serial::SerialStateV1;
    use crate::devices::virtio::block::VirtioBlkStateV4;
    use crate::devices::virtio::pci::BAR_SIZE;
    use crate::devices::virtio::{VirtioPciStateV2, VirtioState};
    use crate::machine::tests::{disk, sample as machine};
    use crate::state::contract::{contract_tests, refusal};

    impl DevicesStateV1 {
        /// The devices that the sample of a [`Machine`] has.
        pub(crate) fn sample() -> Self {
            let serial = DeviceState::Serial(SerialStateV1::sample());
            let first = VirtioState {
                device: VirtioBlkStateV4 { readonly: false, ..VirtioBlkStateV4::sample() },
                transport: VirtioPciStateV2::sample(),
            };
            let mut second = first.clone();
            second.transport.config.bar_base += BAR_SIZE;
            second.device.readonly = true;
            let devices = [(0x3f8, serial)].into_iter();
            let disks = [(1, first), (2, second)];
            let disks = disks.map(|(address, state)| (address, DeviceState::VirtioBlk(state)));
            let devices = devices.chain(disks);
            let devices = devices.map(|(address, state)| SavedDevice { address, state });
            Self { pci: PciBusStateV1::sample(), devices: devices.collect() }
        }
    }

    impl VmStateV1 {
        pub(crate) fn sample() -> Self {
            let machine = machine();
            Self {
                vcpus: (0..machine.cpus).map(VcpuStateV1::sample).collect(),
                machine,
                platform: PlatformStateV1::sample(),
                devices: DevicesStateV1::sample(),
            }
        }
    }

    mod devices {
        use super::*;

        contract_tests! {
            DevicesStateV1,
            sample: DevicesStateV1::sample,
            changes: [
                |s| s.pci.address += 4,
                |s| s.devices.swap(0, 1),
                |s| s.devices[2].address = 31,
                |s| s.devices.truncate(1),
                |s| s.devices.clear(),
            ],
            golden: "devices-v1",
        }
    }

    contract_tests! {
        VmStateV1,
        sample: VmStateV1::sample,
        changes: [
            |s| s.machine.boot = crate::machine::DiskBoot::default().into(),
            |s| s.platform.clock.clock_ns += 1,
            |s| s.vcpus[0].tsc_offset += 1,
            |s| s.vcpus[1].tsc_offset += 1,
            |s| s.devices.pci.address += 4,
        ],
        optional: ["/machine/boot:initramfs"],
        golden: "vm-v1",
    }

    #[test]
    fn parts_that_are_of_different_machines_are_refused() {
        let refused = |change| refusal(VmStateV1::sample(), change);
        assert!(refused(|s| s.machine.cpus = 3).contains("2 vCPUs, the machine has 3"));
        assert!(refused(|s| s.vcpus[1].id = 0).contains("cpu@1 has id 0"));
        let error = refused(|s| {
            let options = disk("/x", true);
            s.machine.devices.push(DeviceSpec { address: 3, options });
        });
        assert!(error.contains(r#""virtio-blk@2"], the machine has ["#), "{error}");
        assert!(error.contains(r#""virtio-blk@3"]"#), "{error}");
        assert!(refused(|s| s.devices.devices.swap(1, 2)).contains("the machine has"));
        assert!(refused(|s| s.devices.devices[1].address = 7).contains("virtio-blk@7"));
    }
}
