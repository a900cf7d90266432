//! The event subscriber that a thread of one virtio device runs. Its events are the doorbells of its queues,
//! with the queues' numbers, and then the worker's own sources.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{Error, EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::backend::Shared;
use super::rings::Rings;
use crate::devices::virtio::VirtioWorker;

/// The event subscriber of a virtio device's thread.
pub struct Worker<W> {
    name: &'static str,
    rings: Rings,
    worker: W,
}

impl<W: VirtioWorker> Worker<W> {
    pub(super) fn new(name: &'static str, shared: Arc<Shared>, worker: W) -> Self {
        Self { name, rings: Rings(shared), worker }
    }

    /// The device's half.
    #[cfg(test)]
    pub(crate) fn worker(&self) -> &W {
        &self.worker
    }

    #[cfg(test)]
    pub(crate) fn rings(&self) -> &Rings {
        &self.rings
    }
}

impl<W: VirtioWorker> MutEventSubscriber for Worker<W> {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let Self { name: _, rings, worker } = self;
        let index = events.data() as usize;
        match rings.0.doorbells.get(index) {
            Some(doorbell) => {
                // Resets the eventfd's counter. The read fails if the counter is 0, which does no harm.
                let _ = doorbell.read();
                worker.on_doorbell(index, rings);
            }
            None => worker.on_source(index - rings.0.doorbells.len(), rings),
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let doorbells = (0u32..).zip(&self.rings.0.doorbells);
        let doorbells = doorbells
            .filter(|(queue, _)| self.worker.serves(*queue as usize))
            .map(|(queue, doorbell)| (queue, doorbell.as_raw_fd(), EventSet::IN));
        let sources = self.worker.sources();
        let first = self.rings.0.doorbells.len() as u32;
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let sources = (first..).zip(&sources).map(|(index, fd)| (index, fd.as_raw_fd(), edges));
        for (index, fd, when) in doorbells.chain(sources) {
            match ops.add(Events::with_data_raw(fd, index, when)) {
                Ok(()) => {}
                // epoll refuses files that are always ready, such as /dev/urandom, and they need no
                // watching.
                Err(Error::Epoll(errno)) if errno.errno() == libc::EPERM => {}
                Err(error) => {
                    tracing::error!(%error, "{}: cannot watch event source {index}; its events are lost", self.name);
                }
            }
        }
    }
}
