//! PCI as the guest sees it: one root bus, configured through ports 0xcf8..0xcff, whose functions
//! have type-0 configuration spaces and MSI-X.
//!
//! The machine places BARs before the guest starts, and they never move: a guest can size a BAR, but
//! otherwise reads back the machine's address whatever it wrote. So the address of a doorbell is
//! constant for a VM, and no mapping changes when a guest or a restore writes a BAR.

pub mod bus;
pub mod config_space;
pub mod host_bridge;
pub mod msix;

pub use bus::PciBus;
pub use config_space::{ConfigSpace, PciConfigStateV1, PciIds};
pub use host_bridge::HostBridge;
pub use msix::{Msix, MsixStateV1};

/// Number of slots on the bus: device numbers 0..32, function 0 of each.
pub const SLOTS: u8 = 32;

/// The configuration space of a function on the bus.
///
/// The bus has already checked that `offset + data.len() <= 256` and that the access stays within one
/// aligned 32-bit register.
pub trait PciFunction: Send {
    /// Handles a guest's read from the configuration space.
    fn read_config(&mut self, offset: u8, data: &mut [u8]);

    /// Handles a guest's write to the configuration space.
    fn write_config(&mut self, offset: u8, data: &[u8]);
}
