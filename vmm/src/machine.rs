//! What a VM is: its checked description, with nothing optional left to decide.
//!
//! The description comes from the configuration, travels in the host's manifest over a live update,
//! and stands in every state document, so that a restore needs no other file.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::state::{Node, Reader, Schema, StateError};

/// Most vCPUs of one VM. Bounded by xAPIC ids (8 bits, 255 is broadcast), and by what has been tried.
pub const MAX_CPUS: u32 = 64;
/// Least RAM of a VM, in bytes: below it no kernel finds room for itself and its tables.
pub const MIN_RAM: u64 = 32 << 20;
/// Most RAM of a VM, in bytes: 1 TiB stays below every CPU's physical address limit.
pub const MAX_RAM: u64 = 1 << 40;
/// RAM comes in units of huge folios, in bytes: a fragment of one would map with small pages.
pub const RAM_UNIT: u64 = 2 << 20;
/// Most disks of one VM: one PCI slot each, slot 0 is the host bridge.
pub const MAX_DISKS: usize = 24;

/// A description that no machine can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// A name that cannot name a session.
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
        "VM `{name}`: {bytes} bytes of RAM: it must be a multiple of 2 MiB from 32 MiB to 1 TiB"
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
    /// Too many disks.
    #[error("VM `{name}`: {disks} disks: there can be at most {MAX_DISKS}")]
    Disks {
        /// The VM.
        name: VmName,
        /// What was asked for.
        disks: usize,
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

/// The name of a VM, fit to be part of a session's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

impl VmName {
    /// Longest name, in bytes: a session's name has at most 63, and `perennial-vm-` stands before.
    pub const MAX: usize = 50;

    /// Checks a name.
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

/// One disk: a raw file or a block device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its path on the host.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub readonly: bool,
}

/// Where the serial console's output goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SerialOutput {
    /// Nowhere.
    Off,
    /// The host's own standard output.
    Tty,
    /// A file, appended to.
    File(PathBuf),
    /// A virtio-serial port of the host, by name.
    Port(String),
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
    /// Kernel image to boot: bzImage or PVH ELF.
    pub kernel: PathBuf,
    /// Initramfs to boot with.
    pub initramfs: Option<PathBuf>,
    /// The guest kernel's command line.
    pub cmdline: String,
    /// Disks in the order of their PCI slots.
    pub disks: Vec<Disk>,
    /// The serial console.
    pub serial: SerialOutput,
}

impl Machine {
    /// Checks what the types alone do not.
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
        if self.disks.len() > MAX_DISKS {
            return Err(MachineError::Disks { name: name(), disks: self.disks.len() });
        }
        match self.texts().find(|(_, text)| text.contains('\0')) {
            Some((what, _)) => Err(MachineError::Nul { name: name(), what }),
            None => Ok(()),
        }
    }

    fn texts(&self) -> impl Iterator<Item = (&'static str, String)> {
        let path = |p: &PathBuf| p.to_string_lossy().into_owned();
        let disks = self.disks.iter().map(move |d| ("disk path", path(&d.path)));
        let serial = match &self.serial {
            SerialOutput::Off | SerialOutput::Tty => None,
            SerialOutput::File(file) => Some(("serial output", path(file))),
            SerialOutput::Port(port) => Some(("serial output", port.clone())),
        };
        [("kernel path", path(&self.kernel)), ("command line", self.cmdline.clone())]
            .into_iter()
            .chain(self.initramfs.iter().map(move |p| ("initramfs path", path(p))))
            .chain(disks)
            .chain(serial)
    }
}

/// `perennial,machine-v1`: see `docs/state-document.md`.
impl Schema for Machine {
    const COMPATIBLE: &'static [&'static str] = &["perennial,machine-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { name, ram_bytes, cpus, kernel, initramfs, cmdline, disks, serial } = self;
        node.put_str("vm-name", name.as_str());
        node.put_u64("ram-bytes", *ram_bytes);
        node.put_u32("cpus", *cpus);
        node.put_str("kernel", &kernel.to_string_lossy());
        if let Some(initramfs) = initramfs {
            node.put_str("initramfs", &initramfs.to_string_lossy());
        }
        node.put_str("cmdline", cmdline);
        let (kind, argument) = match serial {
            SerialOutput::Off => ("off", String::new()),
            SerialOutput::Tty => ("tty", String::new()),
            SerialOutput::File(path) => ("file", path.to_string_lossy().into_owned()),
            SerialOutput::Port(port) => ("port", port.clone()),
        };
        node.put_strings("serial", &[kind, &argument]);
        for (index, disk) in disks.iter().enumerate() {
            node.push(disk.to_node(&format!("disk@{index:x}")));
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        // Not `name`, which device tree tools keep for themselves.
        let text = reader.str("vm-name")?;
        let name = VmName::new(&text).map_err(|e| reader.invalid("vm-name", e.to_string()))?;
        let ram_bytes = reader.u64("ram-bytes")?;
        let cpus = reader.u32("cpus")?;
        let kernel = reader.str("kernel")?.into();
        let initramfs = reader.optional_str("initramfs")?.map(PathBuf::from);
        let cmdline = reader.str("cmdline")?;
        let words = reader.strings("serial")?;
        let serial = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["off", ""] => SerialOutput::Off,
            ["tty", ""] => SerialOutput::Tty,
            ["file", path] => SerialOutput::File(path.into()),
            ["port", port] => SerialOutput::Port(port.to_owned()),
            _ => return Err(reader.invalid("serial", format!("{words:?} names no output"))),
        };
        let disks = reader.sequence("disk")?;
        let machine = Self { name, ram_bytes, cpus, kernel, initramfs, cmdline, disks, serial };
        machine.check().map_err(|e| reader.invalid("vm-name", e.to_string()))?;
        Ok(machine)
    }
}

/// `perennial,disk-v1`.
impl Schema for Disk {
    const COMPATIBLE: &'static [&'static str] = &["perennial,disk-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { path, readonly } = self;
        node.put_str("path", &path.to_string_lossy());
        node.put_bool("read-only", *readonly);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self { path: reader.str("path")?.into(), readonly: reader.bool("read-only")? })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    pub(crate) fn sample() -> Machine {
        Machine {
            name: VmName::new("web-1").unwrap(),
            ram_bytes: 64 << 20,
            cpus: 2,
            kernel: "/data/vmlinux".into(),
            initramfs: Some("/data/initramfs".into()),
            cmdline: "console=ttyS0".to_owned(),
            disks: vec![
                Disk { path: "/data/a.img".into(), readonly: false },
                Disk { path: "/dev/vdb".into(), readonly: true },
            ],
            serial: SerialOutput::Port("web".to_owned()),
        }
    }

    contract_tests! {
        Machine,
        sample: sample,
        changes: [
            |m| m.name = VmName::new("web-2").unwrap(),
            |m| m.ram_bytes += RAM_UNIT,
            |m| m.cpus = 1,
            |m| m.kernel.push("x"),
            |m| m.initramfs = None,
            |m| m.cmdline.clear(),
            |m| m.disks[0].path.push("x"),
            |m| m.disks.swap(0, 1),
            |m| m.disks.clear(),
            |m| m.serial = SerialOutput::Off,
            |m| m.serial = SerialOutput::Tty,
            |m| m.serial = SerialOutput::File("web".into()),
        ],
        optional: ["/:initramfs"],
        golden: "machine-v1",
    }

    mod disk {
        use super::*;

        contract_tests! {
            Disk,
            sample: || sample().disks[1].clone(),
            changes: [|d| d.path.push("x"), |d| d.readonly = false],
            golden: "disk-v1",
        }
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
        assert!(refused(|m| m.cmdline.push('\0')).contains("command line"));
        assert!(refused(|m| m.disks[1].path.push("\0")).contains("disk path"));
        assert!(refused(|m| m.serial = SerialOutput::File("\0".into())).contains("serial output"));
        assert!(refused(|m| m.serial = SerialOutput::Port("\0".into())).contains("serial output"));
        assert!(refused(|m| m.disks = vec![m.disks[0].clone(); 25]).contains("at most 24"));
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
