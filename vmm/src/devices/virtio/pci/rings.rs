//! The rings as the device's worker uses them: the worker takes requests and completes them.
//!
//! ```text
//!   ring --take--> Request --complete--> ring, interrupt
//!                 in flight: a pause and a reset wait for it
//! ```
//!
//! Requests may be completed in any order, from any thread, long after they were taken.

use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::backend::Shared;
use crate::kvm::interrupts::pull;

/// A chain of descriptors that the driver made available. Its length is known only by following it.
/// The iteration stops after as many descriptors as the queue or the indirect table has entries, so
/// a loop in the chain is harmless.
pub type Chain = DescriptorChain<Arc<GuestMemoryMmap>>;

/// Maximum number of requests that [`Rings::serve`] executes before the thread handles its other
/// events.
const BATCH: usize = 256;

/// A request that was taken from a ring. It must be completed, because a pause waits for it.
#[derive(Debug)]
#[must_use = "a request that is never completed keeps its device from pausing"]
pub struct Request {
    pub(super) queue: usize,
    pub(super) chain: Chain,
}

impl Request {
    /// Returns the chain of descriptors.
    pub fn chain(&self) -> Chain {
        self.chain.clone()
    }
}

/// The rings of one device.
#[derive(Clone)]
pub struct Rings(pub(super) Arc<Shared>);

impl Rings {
    /// Returns the guest's RAM.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.0.memory
    }

    /// Takes the next request of queue `queue`. Returns `None` if the queue is empty or the device is
    /// paused, being reset or not active; the doorbell rings when that may have changed.
    pub fn take(&self, queue: usize) -> Option<Request> {
        self.0.take(queue)
    }

    /// Returns a request to the driver, with the number of bytes `written` into its chain, and
    /// interrupts the driver if it asked for that.
    pub fn complete(&self, request: Request, written: u32) {
        self.0.complete(request, written);
    }

    /// Gives several requests of one queue back to the driver, which finds either none of them or all:
    /// what it is to read lies in the buffers of all of them.
    pub fn complete_together(&self, requests: Vec<(Request, u32)>) {
        self.0.complete_together(requests);
    }

    /// Puts requests back into their queue, from which they are taken again next time. They must be the
    /// last ones that were taken from the queue, in the order in which they were taken.
    pub fn give_back(&self, requests: Vec<Request>) {
        requests.into_iter().rev().for_each(|request| self.0.give_back(request));
    }

    /// Tells the driver that the device has changed its configuration.
    pub fn config_changed(&self) {
        self.0.config_changed();
    }

    /// Executes the requests of queue `queue` one after the other; `execute` returns the number of
    /// bytes that it wrote into the chain. After `BATCH` requests the thread handles its other events
    /// before it continues.
    pub fn serve(&self, queue: usize, mut execute: impl FnMut(Chain) -> u32) {
        for _ in 0..BATCH {
            let Some(request) = self.take(queue) else { return };
            let written = execute(request.chain());
            self.complete(request, written);
        }
        self.look_again(queue);
    }

    /// Returns the number of entries of queue `queue`, which its driver has chosen. 0 if there is no such queue.
    pub fn size(&self, queue: usize) -> usize {
        self.0.enter().queues.get(queue).map_or(0, |queue| queue.size().into())
    }

    /// Returns the number of entries of its queue's table that a request takes: one for each descriptor in the table, of
    /// which the last may stand for many in an indirect table (2.7.5.3).
    pub fn entries(&self, request: &Request) -> usize {
        let backend = self.0.enter();
        let Some(queue) = backend.queues.get(request.queue) else { return 0 };
        let (table, size) = (GuestAddress(queue.desc_table()), queue.size());
        let mut index = request.chain.head_index();
        // A loop in the chain takes no more entries than there are.
        for count in 1..=size.into() {
            let at = table.checked_add(u64::from(index) * size_of::<Descriptor>() as u64);
            let descriptor = at.and_then(|at| self.memory().read_obj::<Descriptor>(at).ok());
            match descriptor.filter(|descriptor| descriptor.has_next()).map(|d| d.next()) {
                Some(next) if next < size => index = next,
                _ => return count,
            }
        }
        size.into()
    }

    /// Returns the number of queues.
    pub fn count(&self) -> usize {
        self.0.doorbells.len()
    }

    /// Rings the doorbell of queue `queue`, so that the worker is called again after the thread's
    /// other events.
    pub fn look_again(&self, queue: usize) {
        if let Some(doorbell) = self.0.doorbells.get(queue) {
            pull(doorbell);
        }
    }
}
