//! The rings as the device's worker sees them: it takes requests, and completes them.
//!
//! ```text
//!   ring --take--> Request --complete--> ring, interrupt
//!                 in flight: a pause and a reset wait for it
//! ```
//!
//! Requests may be completed in any order, from any thread, long after they were taken.

use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use super::backend::Shared;
use crate::kvm::interrupts::pull;

/// A chain of descriptors that the driver made available. The ring knows its length only by
/// following it; it ends by itself after as many descriptors as the queue, or the indirect table,
/// has.
pub type Chain = DescriptorChain<Arc<GuestMemoryMmap>>;

/// Requests that [`Rings::serve`] executes before the thread looks at its other events.
const BATCH: usize = 256;

/// A request that was taken from a ring. It has to be completed: a pause waits for it.
#[derive(Debug)]
#[must_use = "a request that is never completed keeps its device from pausing"]
pub struct Request {
    pub(super) queue: usize,
    pub(super) chain: Chain,
}

impl Request {
    /// The descriptors.
    pub fn chain(&self) -> Chain {
        self.chain.clone()
    }
}

/// The rings of one device.
#[derive(Clone)]
pub struct Rings(pub(super) Arc<Shared>);

impl Rings {
    /// Guest RAM.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.0.memory
    }

    /// Takes the next request of queue `queue`. `None` if there is none, or if the device does not
    /// run; the doorbell rings when that may have changed.
    pub fn take(&self, queue: usize) -> Option<Request> {
        self.0.take(queue)
    }

    /// Gives a request back to the driver, with the number of bytes that were written into its chain,
    /// and interrupts the driver if it asked for that.
    pub fn complete(&self, request: Request, written: u32) {
        self.0.complete(request, written);
    }

    /// Executes the requests of queue `queue` one after the other: `execute` returns how many bytes it
    /// wrote into the chain. After some requests the thread's other events have their turn first.
    pub fn serve(&self, queue: usize, mut execute: impl FnMut(Chain) -> u32) {
        for _ in 0..BATCH {
            let Some(request) = self.take(queue) else { return };
            let written = execute(request.chain());
            self.complete(request, written);
        }
        self.look_again(queue);
    }

    /// Has the worker called for queue `queue` again, after its other events.
    pub fn look_again(&self, queue: usize) {
        if let Some(doorbell) = self.0.doorbells.get(queue) {
            pull(doorbell);
        }
    }
}
