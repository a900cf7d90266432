//! PCI as the guest sees it: one root bus, configured through ports 0xcf8..0xcff, whose functions
//! have type-0 configuration spaces and MSI-X.
//!
//! BARs are placed by the machine before the guest starts and stay there: a guest can size them,
//! and reads back the machine's address whatever it writes. So the address of a doorbell is a
//! constant of the VM, and nothing has to be moved when a guest, or a restore, rewrites a BAR.

pub mod bus;
pub mod config_space;
pub mod host_bridge;
pub mod msix;

pub use bus::PciBus;
pub use config_space::{ConfigSpace, Identity, PciConfigStateV1};
pub use host_bridge::HostBridge;
pub use msix::{Msix, MsixStateV1};

/// Functions on the bus: device numbers 0..32, function 0 of each.
pub const SLOTS: u8 = 32;

/// A function on the bus, as far as its configuration space goes.
///
/// The bus has checked that `offset + data.len() <= 256` and that the access stays within one
/// aligned 32-bit register.
pub trait PciFunction: Send {
    /// The guest reads its configuration space.
    fn read_config(&mut self, offset: u8, data: &mut [u8]);

    /// The guest writes its configuration space.
    fn write_config(&mut self, offset: u8, data: &[u8]);
}
