//! The host bridge at 00:00.0. Guests look for one before they trust configuration mechanism #1
//! (Linux: `pci_sanity_check` in arch/x86/pci/direct.c); it has no registers of its own.
//!
//! The host bridge has no state to save: a guest cannot change any of its bits.

use super::{ConfigSpace, PciFunction, PciIds};

/// The host bridge.
#[derive(Debug)]
pub struct HostBridge {
    space: ConfigSpace,
}

impl HostBridge {
    /// Returns a host bridge with the IDs of QEMU's generic one (1b36:0008, docs/specs/pci-ids.rst
    /// in QEMU), for which guests have no quirks.
    pub fn new() -> Self {
        let identity = PciIds {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: [0x06, 0x00, 0x00],
            subsystem: (0x1af4, 0x1100),
        };
        Self { space: ConfigSpace::new(identity) }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: u8, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    fn write_config(&mut self, offset: u8, data: &[u8]) {
        self.space.write(offset, data);
    }
}
