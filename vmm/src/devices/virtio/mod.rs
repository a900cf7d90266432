//! Virtio 1.x devices ("Virtual I/O Device (VIRTIO) Version 1.2", OASIS) and their PCI transport.
//!
//! A device comes in two halves. [`VirtioDevice`] is what the driver finds in the registers: features
//! and configuration. [`VirtioWorker`] works on requests, on a thread of its own: it takes them from
//! the [`Rings`] and completes them when they are done, in whatever order. The transport
//! ([`VirtioPci`]) knows registers, rings and interrupts.
//!
//! A device pauses in two steps: the rings give out no more requests, then those that were given out
//! are waited for. So there is nothing in flight to be saved, and what is still in the rings is found
//! again after a restore.

pub mod block;
#[cfg(test)]
pub(crate) mod driver;
pub mod features;
pub mod pci;
pub mod rng;

pub use block::{Block, BlockError};
pub use pci::{
    Chain, PciResources, Request, Rings, VirtioPci, VirtioPciStateV1, VirtioState, Worker,
};

use std::os::fd::BorrowedFd;

use crate::state::Persist;

/// A kind of virtio device, as far as its registers go. All calls are made with the function's
/// registers locked, so none may wait for anything.
pub trait VirtioDevice: Persist + Send + 'static {
    /// Name of the kind, and of the node in the state document: `virtio-blk`.
    const NAME: &'static str;
    /// Virtio device ID (specification, section 5). The PCI device ID is 0x1040 more.
    const ID: u16;
    /// PCI base class, subclass, programming interface.
    const CLASS: [u8; 3];
    /// Feature bits of the kind, 0..24 and 50..64, with their names.
    const FEATURES: features::Names;

    /// The half that works on requests.
    type Worker: VirtioWorker;

    /// The feature bits that this device offers, without those of the transport. They never change.
    fn features(&self) -> u64;

    /// The size of each queue: a power of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// The driver reads the device configuration. Bytes that are not there read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes the device configuration.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver and the device have agreed on features; zero when the driver resets the device.
    /// Until such a reset is complete the worker may still hold requests of before.
    fn negotiated(&mut self, features: u64);

    /// The half that works on requests. Called once for each device.
    fn worker(&self) -> Self::Worker;

    /// Makes durable what the driver wrote. No request is in flight.
    fn sync(&mut self) -> std::io::Result<()>;
}

/// The half of a virtio device that works on requests. All calls are made on the device's thread,
/// which waits for nothing else: it may block, and then delays only its own device.
pub trait VirtioWorker: Send + 'static {
    /// What wakes the worker besides doorbells: a tap, a socket, a timer. Each is watched for input,
    /// edge-triggered, from the start of the thread to its end.
    fn sources(&self) -> Vec<BorrowedFd<'_>>;

    /// There may be requests in queue `queue`: the driver rang, or the device was resumed. Called
    /// without a reason as well.
    fn on_doorbell(&mut self, queue: usize, rings: &Rings);

    /// The source with this index in [`sources`](Self::sources) has input. It may arrive while the
    /// device is paused, when the rings give out nothing: then the next
    /// [`on_doorbell`](Self::on_doorbell) has to look at the source, too.
    fn on_source(&mut self, source: usize, rings: &Rings);
}
