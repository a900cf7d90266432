//! What a VM boots: a kernel in files of the host, or what is on its own first disk.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::state::{Node, Reader, Schema, StateError};

/// What a VM boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Boot {
    /// A kernel in files of the host.
    Kernel(KernelBoot),
    /// The kernel on the VM's first disk.
    Disk(DiskBoot),
}

/// The kernel that a VM boots, in files of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelBoot {
    /// Kernel image: bzImage or PVH ELF.
    pub kernel: PathBuf,
    /// Initramfs to boot with.
    pub initramfs: Option<PathBuf>,
    /// The guest kernel's command line.
    pub cmdline: String,
}

/// A boot from the VM's first disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskBoot {
    /// Text behind the command line that the disk has.
    pub cmdline: String,
}

impl Boot {
    /// The texts that must not have NUL bytes, with their names.
    pub(super) fn texts(&self) -> impl Iterator<Item = (&'static str, String)> {
        let path = |p: &PathBuf| p.to_string_lossy().into_owned();
        let (kernel, initramfs, cmdline) = match self {
            Self::Kernel(KernelBoot { kernel, initramfs, cmdline }) => {
                (Some(path(kernel)), initramfs.as_ref().map(path), cmdline)
            }
            Self::Disk(DiskBoot { cmdline }) => (None, None, cmdline),
        };
        let kernel = kernel.map(|text| ("kernel path", text));
        let initramfs = initramfs.map(|text| ("initramfs path", text));
        kernel.into_iter().chain(initramfs).chain([("command line", cmdline.clone())])
    }
}

impl From<KernelBoot> for Boot {
    fn from(boot: KernelBoot) -> Self {
        Self::Kernel(boot)
    }
}

impl From<DiskBoot> for Boot {
    fn from(boot: DiskBoot) -> Self {
        Self::Disk(boot)
    }
}

/// Written as the binding of the kind of boot.
impl Schema for Boot {
    const COMPATIBLE: &'static [&'static str] =
        &["perennial,disk-boot-v1", "perennial,kernel-boot-v1"];

    fn bindings(&self) -> &'static [&'static str] {
        match self {
            Self::Kernel(_) => KernelBoot::COMPATIBLE,
            Self::Disk(_) => DiskBoot::COMPATIBLE,
        }
    }

    fn encode(&self, node: &mut Node) {
        match self {
            Self::Kernel(boot) => boot.encode(node),
            Self::Disk(boot) => boot.encode(node),
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        match reader.is_compatible(DiskBoot::COMPATIBLE[0]) {
            true => DiskBoot::decode(reader).map(Self::Disk),
            false => KernelBoot::decode(reader).map(Self::Kernel),
        }
    }
}

/// `perennial,kernel-boot-v1`.
impl Schema for KernelBoot {
    const COMPATIBLE: &'static [&'static str] = &["perennial,kernel-boot-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { kernel, initramfs, cmdline } = self;
        node.put_str("kernel", &kernel.to_string_lossy());
        if let Some(initramfs) = initramfs {
            node.put_str("initramfs", &initramfs.to_string_lossy());
        }
        node.put_str("cmdline", cmdline);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self {
            kernel: reader.str("kernel")?.into(),
            initramfs: reader.optional_str("initramfs")?.map(PathBuf::from),
            cmdline: reader.str("cmdline")?,
        })
    }
}

/// `perennial,disk-boot-v1`.
impl Schema for DiskBoot {
    const COMPATIBLE: &'static [&'static str] = &["perennial,disk-boot-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { cmdline } = self;
        node.put_str("cmdline", cmdline);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self { cmdline: reader.str("cmdline")? })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    pub(crate) fn kernel() -> KernelBoot {
        KernelBoot {
            kernel: "/data/vmlinux".into(),
            initramfs: Some("/data/initramfs".into()),
            cmdline: "console=ttyS0".to_owned(),
        }
    }

    contract_tests! {
        KernelBoot,
        sample: kernel,
        changes: [|b| b.kernel.push("x"), |b| b.initramfs = None, |b| b.cmdline.clear()],
        optional: ["/:initramfs"],
        golden: "kernel-boot-v1",
    }

    mod disk_boot {
        use super::*;

        contract_tests! {
            DiskBoot,
            sample: || DiskBoot { cmdline: "console=ttyS0".to_owned() },
            changes: [|b| b.cmdline.clear()],
            golden: "disk-boot-v1",
        }
    }

    mod either {
        use super::*;

        contract_tests! {
            Boot,
            sample: || Boot::from(kernel()),
            changes: [|b| *b = DiskBoot { cmdline: "console=ttyS0".to_owned() }.into()],
            optional: ["/:initramfs"],
            golden: "kernel-boot-v1",
        }
    }
}
