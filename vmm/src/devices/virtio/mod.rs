//! Virtio 1.x devices ("Virtual I/O Device (VIRTIO) Version 1.2", OASIS) and their PCI transport.
//!
//! A device ([`VirtioDevice`]) knows what a request means; the transport ([`VirtioPci`]) knows
//! registers, rings and interrupts. Requests are executed one at a time on the device thread, and
//! a request that was taken from its ring is completed before the device pauses: so there is
//! nothing in flight to be saved, and what is still in the ring is found again after a restore.

pub mod block;
#[cfg(test)]
pub(crate) mod driver;
pub mod features;
pub mod pci;

pub use block::{Block, BlockError, Disk, VirtioBlkStateV1};
pub use pci::{PciResources, VirtioPci, VirtioPciStateV1, Worker};

use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use crate::state::Persist;

/// A chain of descriptors that the driver made available. The ring knows its length only by
/// following it; it ends by itself after as many descriptors as the queue, or the indirect table,
/// has.
pub type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap>;

/// A kind of virtio device. All calls are made by the transport, never two at a time.
pub trait VirtioDevice: Persist + Send + 'static {
    /// Name of the kind, and of the node in the state document: `virtio-blk`.
    const NAME: &'static str;
    /// Virtio device ID (specification, section 5). The PCI device ID is 0x1040 more.
    const ID: u16;
    /// PCI base class, subclass, programming interface.
    const CLASS: [u8; 3];
    /// Feature bits of the kind, 0..24 and 50..64, with their names.
    const FEATURES: features::Names;

    /// The feature bits that this device offers, without those of the transport.
    fn features(&self) -> u64;

    /// The size of each queue: a power of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// The driver reads the device configuration. Bytes that are not there read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes the device configuration.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver and the device have agreed on features; zero when the driver resets the device.
    fn negotiated(&mut self, features: u64);

    /// Executes one request of queue `queue`, completely, and returns the number of bytes that
    /// were written into the chain. Whatever the chain holds, it returns.
    fn serve(&mut self, queue: usize, memory: &GuestMemoryMmap, chain: Chain<'_>) -> u32;

    /// Makes durable what the driver wrote.
    fn sync(&mut self) -> std::io::Result<()>;
}
