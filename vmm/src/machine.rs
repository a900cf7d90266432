//! The checked description of a VM, with all defaults filled in.
//!
//! The description is made from the configuration. Over a live update, the host's manifest and the
//! VM's state document carry it, so that a restore does not need the configuration.

mod boot;
pub mod claims;

pub use boot::{Boot, DiskBoot, KernelBoot};

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::arch::x86_64::cpuid::CpuModel;
use crate::devices::catalog::{DeviceOptions, KINDS, KindInfo};
use crate::devices::kind::Place;
use crate::state::{Node, Reader, Schema, StateError};

/// Most vCPUs of one VM. The limit is the largest number that was tested; xAPIC ids (8 bits, 255 is
/// broadcast) would allow more.
pub const MAX_CPUS: u32 = 64;
/// Least RAM of a VM, in bytes: with less, no kernel has room for itself and its tables.
pub const MIN_RAM: u64 = 32 << 20;
/// Most RAM of a VM, in bytes. Larger VMs were not tested. A processor with short physical addresses allows less, which
/// the configuration is checked for.
pub const MAX_RAM: u64 = 1 << 40;
/// RAM is a multiple of this many bytes, the size of a huge folio: a smaller rest would be mapped
/// with small pages.
pub const RAM_UNIT: u64 = 2 << 20;
/// First and last slot of the PCI bus for devices; slot 0 is the host bridge.
pub const SLOTS: RangeInclusive<u16> = 1..=31;

/// A description that is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// A name that cannot be part of a session's name.
    #[error(
        "VM name `{name}`: {problem}; a name has 1 to {} characters of a-z, A-Z, 0-9, `-`, `_` and `.`",
        VmName::MAX
    )]
    Name {
        /// The name as given.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// An amount of RAM that is out of range.
    #[error(
        "VM `{name}`: {bytes} bytes of RAM: it must be a multiple of 2 MiB from 32 MiB to 1 TiB{}",
        unit(*bytes)
    )]
    Ram {
        /// The VM.
        name: VmName,
        /// What was asked for.
        bytes: u64,
    },
    /// A number of vCPUs that is out of range.
    #[error("VM `{name}`: {cpus} vCPUs: there must be 1 to {MAX_CPUS}")]
    Cpus {
        /// The VM.
        name: VmName,
        /// What was asked for.
        cpus: u32,
    },
    /// Too many devices of a kind.
    #[error("VM `{name}`: {found} of `{key}`: there can be at most {most}")]
    TooMany {
        /// The VM.
        name: VmName,
        /// The kind's key in the configuration.
        key: &'static str,
        /// What was asked for.
        found: usize,
        /// What a machine can have.
        most: usize,
    },
    /// More devices than slots.
    #[error("VM `{name}`: {found} devices on the PCI bus, which has {} slots for them", SLOTS.count())]
    NoSlot {
        /// The VM.
        name: VmName,
        /// What was asked for.
        found: usize,
    },
    /// A device at an address that its kind cannot have, or that another device has.
    #[error("VM `{name}`: there cannot be a device `{node}`: {problem}")]
    Place {
        /// The VM.
        name: VmName,
        /// The device, as a node.
        node: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A VM without disks that boots from its disk.
    #[error("VM `{name}`: boot = \"disk\" needs a disk: add `disk = [\"path=FILE\"]`")]
    NoBootDisk {
        /// The VM.
        name: VmName,
    },
    /// A text with a NUL byte in it.
    #[error("VM `{name}`: its {what} contains a NUL byte")]
    Nul {
        /// The VM.
        name: VmName,
        /// Which text.
        what: &'static str,
    },
}

/// The end of the error about an amount of RAM whose unit was probably forgotten.
fn unit(bytes: u64) -> String {
    match bytes {
        1..0x10_0000 => format!("; with a unit that is size={bytes}M"),
        _ => String::new(),
    }
}

/// The name of a VM, which is part of its session's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

impl VmName {
    /// Longest name, in bytes: a session's name has at most 63, which include `perennial-vm-`.
    pub const MAX: usize = 50;

    /// Checks a name. Errors if it is empty, too long or has a character that is not allowed.
    pub fn new(name: &str) -> Result<Self, MachineError> {
        let error = |problem: String| {
            Err(MachineError::Name { name: name.escape_default().to_string(), problem })
        };
        if name.is_empty() {
            return error("it is empty".to_owned());
        }
        if name.len() > Self::MAX {
            return error(format!("it has {} characters", name.len()));
        }
        match name.chars().find(|c| !(c.is_ascii_alphanumeric() || "-_.".contains(*c))) {
            Some(c) => error(format!("`{}` is not allowed", c.escape_default())),
            None => Ok(Self(name.to_owned())),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for VmName {
    type Error = MachineError;
    fn try_from(name: String) -> Result<Self, MachineError> {
        Self::new(&name)
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

/// One device of a machine: its address and its options.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// Its port, its slot on the PCI bus, or the segment of its tables; which of them depends on its kind.
    pub address: u16,
    /// Its options, which also tell its kind.
    pub options: DeviceOptions,
}

impl DeviceSpec {
    /// Returns the name of the device's node in the state document, such as `virtio-blk@1`.
    pub fn node(&self) -> String {
        node_name(self.options.kind().name, self.address)
    }
}

/// Returns the name of a device's node.
pub fn node_name(kind: &str, address: u16) -> String {
    format!("{kind}@{address:x}")
}

/// The checked description of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Unique on the host.
    pub name: VmName,
    /// Guest RAM, in bytes.
    pub ram_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// The processor that its guest finds.
    pub cpu: CpuModel,
    /// What it boots.
    pub boot: Boot,
    /// Its devices.
    pub devices: Vec<DeviceSpec>,
}

impl Machine {
    /// Checks the limits that the types do not enforce: RAM, vCPUs, devices, NUL bytes.
    pub fn check(&self) -> Result<(), MachineError> {
        let name = || self.name.clone();
        if !(MIN_RAM..=MAX_RAM).contains(&self.ram_bytes)
            || !self.ram_bytes.is_multiple_of(RAM_UNIT)
        {
            return Err(MachineError::Ram { name: name(), bytes: self.ram_bytes });
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(MachineError::Cpus { name: name(), cpus: self.cpus });
        }
        self.check_devices()?;
        if matches!(self.boot, Boot::Disk(_)) && self.boot_disk().is_none() {
            return Err(MachineError::NoBootDisk { name: name() });
        }
        match self.boot.texts().find(|(_, text)| text.contains('\0')) {
            Some((what, _)) => Err(MachineError::Nul { name: name(), what }),
            None => Ok(()),
        }
    }

    /// Returns the disk from which the machine boots if its configuration says so, which is its first one, and
    /// the role of the file with its contents.
    pub fn boot_disk(&self) -> Option<(&DeviceSpec, &'static str)> {
        self.devices.iter().find_map(|spec| Some((spec, spec.options.kind().boots_from?)))
    }

    fn check_devices(&self) -> Result<(), MachineError> {
        let name = || self.name.clone();
        for kind in KINDS {
            let found = self.devices.iter().filter(|d| d.options.kind().name == kind.name).count();
            if found > kind.most {
                let (key, most) = (kind.key, kind.most);
                return Err(MachineError::TooMany { name: name(), key, found, most });
            }
        }
        let in_slots = self.devices.iter().filter(|d| d.options.kind().place == Place::Slot);
        let found = in_slots.clone().count();
        if found > SLOTS.count() {
            return Err(MachineError::NoSlot { name: name(), found });
        }
        let mut taken = BTreeSet::new();
        for device in &self.devices {
            let problem = match device.options.kind().place {
                Place::Port(at) | Place::Tables(at) if at != device.address => {
                    "its kind has another address"
                }
                Place::Slot if !SLOTS.contains(&device.address) => "the PCI bus has no such slot",
                Place::Slot if !taken.insert(device.address) => "another device has its slot",
                _ => continue,
            };
            return Err(MachineError::Place { name: name(), node: device.node(), problem });
        }
        Ok(())
    }
}

/// Assigns addresses to devices: kinds in the order of the catalog, devices of one kind in the
/// order of `wanted`.
pub fn place(wanted: Vec<DeviceOptions>) -> Vec<DeviceSpec> {
    let rank =
        |options: &DeviceOptions| KINDS.iter().position(|kind| kind.name == options.kind().name);
    let mut wanted = wanted;
    wanted.sort_by_key(rank);
    let mut slots = *SLOTS.start()..;
    let spec = |options: DeviceOptions| {
        let address = match options.kind().place {
            Place::Port(at) | Place::Tables(at) => at,
            Place::Slot => slots.next().unwrap_or(u16::MAX),
        };
        DeviceSpec { address, options }
    };
    wanted.into_iter().map(spec).collect()
}

/// `perennial,machine-v2`, with a processor, and v1, without one: see `docs/state-document.md`.
impl Schema for Machine {
    const COMPATIBLE: &'static [&'static str] = &["perennial,machine-v2", "perennial,machine-v1"];

    fn bindings(&self) -> &'static [&'static str] {
        match self.cpu {
            CpuModel::Host => &Self::COMPATIBLE[1..],
            _ => &Self::COMPATIBLE[..1],
        }
    }

    fn encode(&self, node: &mut Node) {
        let Self { name, ram_bytes, cpus, cpu, boot, devices } = self;
        node.put_str("vm-name", name.as_str());
        node.put_u64("ram-bytes", *ram_bytes);
        node.put_u32("cpus", *cpus);
        if *cpu != CpuModel::Host {
            node.put_str("cpu", cpu.name());
        }
        node.push(boot.to_node("boot"));
        for device in devices {
            node.push(device.options.to_node(&device.node()));
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        // The property is not called `name`, because device tree tools reserve that name.
        let text = reader.str("vm-name")?;
        let name = VmName::new(&text).map_err(|e| reader.invalid("vm-name", e.to_string()))?;
        let ram_bytes = reader.u64("ram-bytes")?;
        let cpus = reader.u32("cpus")?;
        let cpu = match reader.is_compatible(Self::COMPATIBLE[0]) {
            true => decode_cpu(reader)?,
            false => CpuModel::Host,
        };
        let boot = reader.child("boot")?;
        let devices = reader
            .rest()
            .into_iter()
            .map(|node| {
                let options = DeviceOptions::read(node, reader.path())?;
                let address = address_of(node, options.kind(), reader.path())?;
                Ok(DeviceSpec { address, options })
            })
            .collect::<Result<_, StateError>>()?;
        let machine = Self { name, ram_bytes, cpus, cpu, boot, devices };
        machine.check().map_err(|e| reader.invalid("vm-name", e.to_string()))?;
        Ok(machine)
    }
}

fn decode_cpu(reader: &mut Reader<'_>) -> Result<CpuModel, StateError> {
    let name = reader.str("cpu")?;
    CpuModel::from_name(&name).ok_or_else(|| {
        let known = CpuModel::ALL.map(CpuModel::name).join(", ");
        reader.invalid("cpu", format!("`{}` is none of {known}", name.escape_default()))
    })
}

/// Returns the unit address of a device's node. Errors if the node is not named for its kind.
pub fn address_of(node: &Node, kind: &KindInfo, parent: &str) -> Result<u16, StateError> {
    let address = node.name.split_once('@').and_then(|(name, address)| {
        let address = u16::from_str_radix(address, 16).ok()?;
        // Only one spelling is accepted: otherwise two nodes could have the same address.
        (name == kind.name && node.name == node_name(kind.name, address)).then_some(address)
    });
    address.ok_or_else(|| StateError::Invalid {
        path: format!("{}/{}", parent.trim_end_matches('/'), node.name),
        property: "compatible".to_owned(),
        problem: format!("a device of this kind is called `{}@ADDRESS`", kind.name),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::devices::serial::SerialOptions;
    use crate::devices::virtio::block::BlockOptions;
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;

    pub(crate) fn disk(path: &str, readonly: bool) -> DeviceOptions {
        DeviceOptions::VirtioBlk(BlockOptions {
            path: path.into(),
            readonly,
            ..BlockOptions::default()
        })
    }

    pub(crate) fn serial() -> DeviceOptions {
        DeviceOptions::Serial(SerialOptions::Port("web".to_owned()))
    }

    pub(crate) fn sample() -> Machine {
        Machine {
            name: VmName::new("web-1").unwrap(),
            ram_bytes: 64 << 20,
            cpus: 2,
            cpu: CpuModel::Host,
            boot: boot::tests::kernel().into(),
            devices: place(vec![disk("/data/a.img", false), disk("/dev/vdb", true), serial()]),
        }
    }

    contract_tests! {
        Machine,
        sample: sample,
        changes: [
            |m| m.name = VmName::new("web-2").unwrap(),
            |m| m.ram_bytes += RAM_UNIT,
            |m| m.cpus = 1,
            |m| m.cpu = CpuModel::V3,
            |m| m.boot = KernelBoot { kernel: "/x".into(), ..boot::tests::kernel() }.into(),
            |m| m.boot = KernelBoot { initramfs: None, ..boot::tests::kernel() }.into(),
            |m| m.boot = KernelBoot { cmdline: "x".into(), ..boot::tests::kernel() }.into(),
            |m| m.boot = DiskBoot { cmdline: "console=ttyS0".into() }.into(),
            |m| m.devices[1].address = 31,
            |m| m.devices[1].options = disk("/data/b.img", false),
            |m| m.devices.swap(1, 2),
            |m| m.devices.clear(),
        ],
        optional: ["/boot:initramfs"],
        golden: "machine-v1",
    }

    mod with_a_processor {
        use super::*;

        contract_tests! {
            Machine,
            sample: || Machine { cpu: CpuModel::V3, ..super::sample() },
            changes: [|m| m.cpu = CpuModel::Host, |m| m.cpu = CpuModel::V2],
            optional: ["/boot:initramfs"],
            golden: "machine-v2",
        }
    }

    #[test]
    fn devices_get_their_places_by_the_order_of_the_kinds_and_then_by_their_own() {
        let nodes: Vec<String> = sample().devices.iter().map(DeviceSpec::node).collect();
        assert_eq!(nodes, ["serial@3f8", "virtio-blk@1", "virtio-blk@2"]);
        assert_eq!(sample().devices[1].options, disk("/data/a.img", false));
    }

    fn refused_boot(boot: Boot) -> String {
        Machine { boot, ..sample() }.check().expect_err("refused").to_string()
    }

    #[test]
    fn a_machine_boots_from_its_first_disk() {
        let sample = sample();
        let (spec, role) = sample.boot_disk().unwrap();
        assert_eq!((spec.node().as_str(), role), ("virtio-blk@1", "image"));
    }

    #[test]
    fn a_machine_that_cannot_be_is_refused_with_both_sides() {
        let refused = |change: fn(&mut Machine)| {
            let mut machine = sample();
            change(&mut machine);
            machine.check().expect_err("refused").to_string()
        };
        assert!(refused(|m| m.ram_bytes = 0).contains("0 bytes"));
        assert!(refused(|m| m.ram_bytes += 4096).contains("multiple of 2 MiB"));
        assert!(refused(|m| m.ram_bytes = 2 << 40).contains("1 TiB"));
        assert!(refused(|m| m.cpus = 0).contains("0 vCPUs"));
        assert!(refused(|m| m.cpus = 65).contains("1 to 64"));
        let boot = |boot: KernelBoot| refused_boot(boot.into());
        assert!(
            boot(KernelBoot { cmdline: "\0".into(), ..boot::tests::kernel() })
                .contains("command line")
        );
        assert!(
            boot(KernelBoot { kernel: "\0".into(), ..boot::tests::kernel() })
                .contains("kernel path")
        );
        assert!(refused_boot(DiskBoot { cmdline: "\0".into() }.into()).contains("command line"));
        let no_disk = refused(|m| {
            m.boot = DiskBoot::default().into();
            m.devices = place(vec![serial()]);
        });
        assert!(no_disk.contains("needs a disk: add `disk = "), "{no_disk}");
        let disks = |m: &mut Machine, count| m.devices = place(vec![disk("/a", false); count]);
        let mut most = sample();
        disks(&mut most, 24);
        most.check().unwrap();
        assert!(refused(|m| m.devices = place(vec![disk("/a", false); 25])).contains("most 24"));
        assert!(refused(|m| m.devices = place(vec![serial(), serial()])).contains("`serial`"));
        assert!(refused(|m| m.devices[0].address = 1).contains("`serial@1`: its kind has another"));
        assert!(refused(|m| m.devices[2].address = 0).contains("no such slot"));
        assert!(
            refused(|m| m.devices[2].address = 32).contains("`virtio-blk@20`: the PCI bus has")
        );
        assert!(refused(|m| m.devices[2].address = 1).contains("another device has its slot"));
    }

    #[test]
    fn a_device_is_called_as_its_kind_is_and_in_one_way_only() {
        for (name, wrong) in
            [(0, "uart@3f8"), (1, "virtio-blk@01"), (1, "virtio-blk@A"), (1, "disk")]
        {
            let mut node = sample().to_node("machine");
            node.children[1 + name].name = wrong.to_owned();
            let error = read_node::<Machine>(&node, "/").unwrap_err().to_string();
            assert!(error.starts_with(&format!("/machine/{wrong}: ")), "{error}");
        }
    }

    #[test]
    fn a_name_must_fit_a_session() {
        assert!(VmName::new(&"a".repeat(50)).is_ok());
        for bad in ["", "a/b", "a b", "ä", "a\n", &"a".repeat(51)] {
            let error = VmName::new(bad).expect_err(bad).to_string();
            assert!(error.contains("1 to 50 characters"), "{error}");
        }
    }
}
