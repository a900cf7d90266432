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
        match index.checked_sub(rings.0.doorbells.len()) {
            // The thread waits edge-triggered: each ring wakes it once, whatever the eventfd's counter is. So
            // nothing reads the counter, which saves a system call for each doorbell.
            None => worker.on_doorbell(index, rings),
            Some(source) => {
                worker.on_source(source, rings);
                if events.event_set().contains(EventSet::ERROR) {
                    worker.on_source_error(source, rings);
                }
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let doorbells = (0u32..).zip(&self.rings.0.doorbells);
        let doorbells = doorbells
            .filter(|(queue, _)| self.worker.serves(*queue as usize))
            .map(|(queue, doorbell)| (queue, doorbell.as_raw_fd()));
        let sources = self.worker.sources();
        let first = self.rings.0.doorbells.len() as u32;
        let sources = (first..).zip(&sources).map(|(index, fd)| (index, fd.as_raw_fd()));
        let when = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (index, fd) in doorbells.chain(sources) {
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
