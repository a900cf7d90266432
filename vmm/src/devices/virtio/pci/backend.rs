//! The half of a virtio function that touches guest memory: the device, its rings, the driver's
//! status; and the worker that runs it on the device thread.
//!
//! ```text
//!  vCPU thread:    registers --enter--> Backend        main thread: pause --enter--> Backend
//!  device thread:  doorbell --> Worker --enter--> Backend: one request --signal--> Interrupt
//! ```
//!
//! Whoever holds the backend may change it; nobody else touches guest memory. The worker lets go
//! after each request, and [`Turnstile`] sees to it that whoever waited is next: `pause` waits for
//! one request, never for a ring full of them. Locks are taken in the order registers, backend,
//! interrupt.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::pci::Msix;
use crate::devices::virtio::{VirtioDevice, features};
use crate::kvm::interrupts::pull;

/// The vector of whatever has none (4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Device status bits (2.1).
pub(super) mod status {
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    pub(crate) const DRIVER: u8 = 2;
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
    pub(crate) const FAILED: u8 = 128;
}

/// Requests that the worker executes before it looks after other devices.
const BATCH: usize = 256;

/// A mutex whose holder, when it lets go and comes back at once, queues behind whoever waited.
/// `std`'s mutex gives no such promise, and a busy worker would keep a pause waiting.
pub(super) struct Turnstile<T> {
    next: Mutex<()>,
    inside: Mutex<T>,
}

impl<T> Turnstile<T> {
    pub(super) fn new(value: T) -> Self {
        Self { next: Mutex::new(()), inside: Mutex::new(value) }
    }

    pub(super) fn enter(&self) -> MutexGuard<'_, T> {
        let _next = lock(&self.next);
        lock(&self.inside)
    }
}

/// Locks, also after a panic elsewhere: what these mutexes guard is consistent between requests.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the registers, the worker and the machine share of one function.
pub(super) struct Shared<D> {
    pub(super) backend: Turnstile<Backend<D>>,
    pub(super) interrupt: Mutex<Interrupt>,
    /// One for each queue.
    pub(super) doorbells: Vec<EventFd>,
}

impl<D: VirtioDevice> Shared<D> {
    /// Has the worker look at every queue.
    pub(super) fn kick_all(&self) {
        self.doorbells.iter().for_each(pull);
    }

    /// Executes what queue `index` holds, up to [`BATCH`] requests.
    pub(super) fn serve(&self, index: usize) {
        for _ in 0..BATCH {
            match self.backend.enter().serve_one(index, &self.interrupt) {
                Step::Served => {}
                Step::Stopped => return,
            }
        }
        if let Some(doorbell) = self.doorbells.get(index) {
            pull(doorbell);
        }
    }
}

/// The function's way to interrupt the driver.
pub(super) struct Interrupt {
    pub(super) msix: Msix,
    pub(super) config_vector: u16,
    pub(super) queue_vectors: Vec<u16>,
    /// ISR status register (4.1.4.5): bit 0 a queue, bit 1 the configuration.
    pub(super) isr: u8,
}

impl Interrupt {
    /// Nothing has a vector, nothing is pending: as after a device reset.
    pub(super) fn reset(&mut self) {
        self.config_vector = NO_VECTOR;
        self.queue_vectors.fill(NO_VECTOR);
        self.isr = 0;
        self.msix.forget_pending();
    }

    pub(super) fn signal_queue(&mut self, index: usize) {
        self.isr |= 1;
        if let Some(vector) = self.queue_vectors.get(index) {
            self.msix.signal(*vector);
        }
    }

    pub(super) fn signal_config(&mut self) {
        self.isr |= 2;
        self.msix.signal(self.config_vector);
    }
}

/// What became of an attempt to execute a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// One was executed; there may be more.
    Served,
    /// The queue is empty, or the device does not run.
    Stopped,
}

/// The device, its rings and its status.
pub(super) struct Backend<D> {
    pub(super) device: D,
    pub(super) queues: Vec<Queue>,
    pub(super) memory: GuestMemoryMmap,
    pub(super) status: u8,
    /// What the driver wrote as its features; agreed upon once FEATURES_OK is set.
    pub(super) driver_features: u64,
    /// Changes when the device changes its configuration.
    pub(super) config_generation: u8,
    pub(super) paused: bool,
    /// The guest has made a mistake that was reported. A hostile one would fill the host's log.
    pub(super) reported: bool,
}

impl<D: VirtioDevice> Backend<D> {
    /// A device after reset.
    pub(super) fn new(device: D, queues: Vec<Queue>, memory: GuestMemoryMmap) -> Self {
        Self {
            device,
            queues,
            memory,
            status: 0,
            driver_features: 0,
            config_generation: 0,
            paused: false,
            reported: false,
        }
    }

    /// Says what the guest did wrong, but only once aloud.
    fn report(&mut self, mistake: &str) {
        match std::mem::replace(&mut self.reported, true) {
            false => tracing::warn!("{}: {mistake}", D::NAME),
            true => tracing::debug!("{}: {mistake}", D::NAME),
        }
    }

    /// The features that the driver can choose from.
    pub(super) fn offered(&self) -> u64 {
        self.device.features() | features::TRANSPORT
    }

    /// The driver has said DRIVER_OK and the rings are sound.
    pub(super) fn active(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// The driver writes the device status (2.1, 3.1.1): bits are only added, in the order of the
    /// initialization sequence; zero resets, and is the caller's. Returns whether the device has
    /// just become active.
    ///
    /// ```text
    ///  0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK      FAILED at any time
    ///                                (if acceptable)               NEEDS_RESET by the device
    /// ```
    pub(super) fn set_status(&mut self, value: u8) -> bool {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        if self.status & !value & !NEEDS_RESET != 0 {
            tracing::debug!(from = self.status, to = value, "{}: status takes bits back", D::NAME);
            return false;
        }
        let was_active = self.active();
        for bit in [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, FAILED] {
            let needs = match bit {
                DRIVER => ACKNOWLEDGE,
                FEATURES_OK => DRIVER,
                DRIVER_OK => FEATURES_OK,
                _ => 0,
            };
            let new = value & known & bit & !self.status;
            if new == 0 || self.status & needs != needs {
                continue;
            }
            if bit == FEATURES_OK && !self.agree() {
                continue;
            }
            self.status |= bit;
        }
        !was_active && self.active()
    }

    /// Whether the driver's features can be agreed upon; if so, they are.
    fn agree(&mut self) -> bool {
        if !features::acceptable(self.driver_features, self.offered()) {
            let names = features::names(self.driver_features, D::FEATURES);
            self.report(&format!("the driver asks for unacceptable features: {names}"));
            return false;
        }
        self.apply_features();
        true
    }

    /// Tells the device and the rings what was agreed.
    pub(super) fn apply_features(&mut self) {
        let event_idx = self.driver_features & features::RING_EVENT_IDX != 0;
        self.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
        self.device.negotiated(self.driver_features);
    }

    /// Forgets the driver (2.4). No request is in flight: whoever calls this holds the backend.
    pub(super) fn reset(&mut self) {
        self.status = 0;
        self.driver_features = 0;
        self.queues.iter_mut().for_each(QueueT::reset);
        self.device.negotiated(0);
    }

    /// Executes the next request of queue `index`, if the device runs and there is one.
    pub(super) fn serve_one(&mut self, index: usize, interrupt: &Mutex<Interrupt>) -> Step {
        if self.paused || !self.active() {
            return Step::Stopped;
        }
        match self.try_serve_one(index, interrupt) {
            Ok(step) => step,
            Err(error) => {
                // The driver and the device disagree about the ring. Only a reset helps (2.1.2).
                self.report(&format!("queue {index} is corrupt: {error}"));
                self.status |= status::NEEDS_RESET;
                lock(interrupt).signal_config();
                Step::Stopped
            }
        }
    }

    fn try_serve_one(
        &mut self,
        index: usize,
        interrupt: &Mutex<Interrupt>,
    ) -> Result<Step, virtio_queue::Error> {
        let Self { device, queues, memory, .. } = self;
        let Some(queue) = queues.get_mut(index).filter(|queue| queue.ready()) else {
            return Ok(Step::Stopped);
        };
        let memory: &GuestMemoryMmap = memory;
        let Some(chain) = queue.iter(memory)?.next() else {
            // Asks for a doorbell at the next request, then looks once more for one that came
            // before the driver could see that.
            return match queue.enable_notification(memory)? {
                true => Ok(Step::Served),
                false => Ok(Step::Stopped),
            };
        };
        let head = chain.head_index();
        if head >= queue.size() {
            return Err(virtio_queue::Error::InvalidDescriptorIndex);
        }
        let written = device.serve(index, memory, chain);
        queue.add_used(memory, head, written)?;
        // After each request, not after each batch: the rule for `used_event` counts from the last
        // time that it was asked, and that count would not survive a pause.
        if queue.needs_notification(memory)? {
            lock(interrupt).signal_queue(index);
        }
        Ok(Step::Served)
    }
}

/// The function as the device thread sees it: one doorbell for each queue.
pub struct Worker<D> {
    shared: Arc<Shared<D>>,
}

impl<D: VirtioDevice> Worker<D> {
    pub(super) fn new(shared: Arc<Shared<D>>) -> Self {
        Self { shared }
    }
}

impl<D: VirtioDevice> MutEventSubscriber for Worker<D> {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let index = events.data() as usize;
        if let Some(doorbell) = self.shared.doorbells.get(index) {
            // Empties the counter; that it was empty already does no harm.
            let _ = doorbell.read();
            self.shared.serve(index);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (index, doorbell) in (0u32..).zip(&self.shared.doorbells) {
            let events = Events::with_data(doorbell, index, EventSet::IN);
            if let Err(error) = ops.add(events) {
                tracing::error!(%error, "{}: queue {index} will not be served", D::NAME);
            }
        }
    }
}
