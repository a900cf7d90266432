//! The thread of one device, as a subscriber of its event loop: doorbells, then the device's own
//! sources.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{Error, EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::backend::Shared;
use super::rings::Rings;
use crate::devices::virtio::VirtioWorker;

/// What the thread of a virtio device runs.
pub struct Worker<W> {
    name: &'static str,
    rings: Rings,
    worker: W,
}

impl<W: VirtioWorker> Worker<W> {
    pub(super) fn new(name: &'static str, shared: Arc<Shared>, worker: W) -> Self {
        Self { name, rings: Rings(shared), worker }
    }
}

impl<W: VirtioWorker> MutEventSubscriber for Worker<W> {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let Self { name: _, rings, worker } = self;
        let index = events.data() as usize;
        match rings.0.doorbells.get(index) {
            Some(doorbell) => {
                // Empties the counter; that it was empty already does no harm.
                let _ = doorbell.read();
                worker.on_doorbell(index, rings);
            }
            None => worker.on_source(index - rings.0.doorbells.len(), rings),
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let doorbells = self.rings.0.doorbells.iter();
        let doorbells = doorbells.map(|doorbell| (doorbell.as_raw_fd(), EventSet::IN));
        let sources = self.worker.sources();
        let sources =
            sources.iter().map(|fd| (fd.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED));
        for (index, (fd, when)) in (0u32..).zip(doorbells.chain(sources)) {
            match ops.add(Events::with_data_raw(fd, index, when)) {
                Ok(()) => {}
                // A file that is always ready, as /dev/urandom is: there is nothing to wait for.
                Err(Error::Epoll(errno)) if errno.errno() == libc::EPERM => {}
                Err(error) => {
                    tracing::error!(%error, "{}: event source {index} is not watched", self.name);
                }
            }
        }
    }
}
