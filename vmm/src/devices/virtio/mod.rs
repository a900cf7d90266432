//! Virtio 1.x devices ("Virtual I/O Device (VIRTIO) Version 1.2", OASIS) and their PCI transport.
//!
//! A device has two halves. [`VirtioDevice`] handles what the driver sees in the registers: features
//! and configuration. [`VirtioWorker`] executes requests on a thread of its own: it takes them from the
//! [`Rings`] and completes them, in any order. A device may have several workers, each for some of its
//! queues. The transport ([`VirtioPci`]) handles registers, rings and interrupts.
//!
//! A device pauses in two steps: the rings stop giving out requests, then the device waits for the
//! requests that it has already taken. So no request in flight has to be saved, and a restored device
//! finds all other requests in the rings.

pub mod block;
#[cfg(test)]
pub(crate) mod driver;
pub mod features;
pub mod net;
pub mod pci;
pub mod rng;
pub mod seed;

pub use block::{Block, BlockError};
pub use pci::{
    Chain, PciResources, Request, Rings, VirtioPci, VirtioPciStateV2, VirtioState, Worker,
};

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::devices::network::NetworkPort;
use crate::devices::storage::Storage;
use crate::state::Persist;

/// The register side of a kind of virtio device. All calls are made with the function's registers
/// locked, so no method may block.
pub trait VirtioDevice: Persist + Send + 'static {
    /// Name of the kind and of its node in the state document, such as `virtio-blk`.
    const NAME: &'static str;
    /// Virtio device ID (specification, section 5). The PCI device ID is 0x1040 more.
    const ID: u16;
    /// PCI base class, subclass, programming interface.
    const CLASS: [u8; 3];
    /// Feature bits of the kind, 0..24 and 50..64, with their names.
    const FEATURES: features::Names;

    /// The half that executes requests.
    type Worker: VirtioWorker;

    /// The feature bits that this device offers, without those of the transport. They never change.
    fn features(&self) -> u64;

    /// The size of each queue: a power of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Handles a driver's read of the device configuration. Bytes that do not exist read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Handles a driver's write to the device configuration.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Takes the negotiated features; zero when the driver resets the device. Until such a reset is
    /// complete the worker may still hold requests from before the reset.
    fn negotiated(&mut self, features: u64);

    /// Features that the driver of a restored VM keeps also if [`features`](Self::features) does not offer them on this
    /// host.
    fn features_that_stay(&self) -> u64 {
        0
    }

    /// Called when the device is resumed. Returns whether its configuration changed while it was paused.
    fn resumed(&mut self) -> bool {
        false
    }

    /// Returns the half that executes requests. Called once for each device.
    fn worker(&self) -> Self::Worker;

    /// Returns further such halves, each for a thread of its own. Called once for each device.
    fn more_workers(&self) -> Vec<Self::Worker> {
        Vec::new()
    }

    /// Returns the device's connection to a network, if it has one. `rings` are those of the device.
    fn network_port(&self, _rings: Rings) -> Option<Arc<dyn NetworkPort>> {
        None
    }

    /// Returns the device's storage, if it has some whose state an operator must know.
    fn storage(&self) -> Option<Arc<dyn Storage>> {
        None
    }
}

/// The half of a virtio device that executes requests. All calls are made on the device's own thread,
/// so a method may block and then delays only its own device.
pub trait VirtioWorker: Send + 'static {
    /// Whether this worker serves queue `queue`. Each queue has exactly one worker that does.
    fn serves(&self, _queue: usize) -> bool {
        true
    }

    /// Returns the event sources of the worker besides doorbells: a tap, a socket, a timer. The
    /// thread watches each for input, edge-triggered, for its whole life.
    fn sources(&self) -> Vec<BorrowedFd<'_>>;

    /// Looks for requests in queue `queue`. Called when the driver rings the doorbell and when the
    /// device is resumed; may also be called when the queue is empty.
    fn on_doorbell(&mut self, queue: usize, rings: &Rings);

    /// Handles input on the source with this index in [`sources`](Self::sources). While the device is
    /// paused the rings give out no requests and the input cannot be used: so the next
    /// [`on_doorbell`](Self::on_doorbell) has to check the source as well.
    fn on_source(&mut self, source: usize, rings: &Rings);

    /// Handles an error that epoll reports of the source, after [`on_source`](Self::on_source).
    fn on_source_error(&mut self, _source: usize, _rings: &Rings) {}
}
