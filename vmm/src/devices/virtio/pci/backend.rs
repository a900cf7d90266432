//! The half of a virtio function that accesses guest memory: its rings, the driver's status, and the
//! requests in flight.
//!
//! ```text
//!  vCPU thread:    registers --enter--> Backend       main thread: pause --enter--> Backend
//!  device thread:  doorbell --take--> Backend, executes, --complete--> Backend --signal--> Interrupt
//! ```
//!
//! A lock protects the backend. No thread holds the lock while a request is executed: a slow request
//! delays neither a vCPU that accesses the registers nor [`Device::pause`](crate::devices::Device),
//! only the drain after it. Locks are taken in the order registers, backend, interrupt.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::rings::Request;
use super::used_ring;
use crate::devices::pci::Msix;
use crate::devices::virtio::features;
use crate::kvm::interrupts::pull;
use crate::mutex::lock;

/// The register value that means "no vector" (4.1.5.1.2).
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

/// A mutex that a thread cannot take again at once while another thread waits for it. `std`'s mutex
/// does not guarantee that, and a busy worker could keep a pause waiting.
struct Turnstile<T> {
    next: Mutex<()>,
    inside: Mutex<T>,
}

impl<T> Turnstile<T> {
    fn new(value: T) -> Self {
        Self { next: Mutex::new(()), inside: Mutex::new(value) }
    }

    fn enter(&self) -> MutexGuard<'_, T> {
        let _next = lock(&self.next);
        lock(&self.inside)
    }
}

/// The part of one function that the registers, the worker and the machine share.
pub(super) struct Shared {
    backend: Turnstile<Backend>,
    /// Notified when a request was completed and a thread waits for that.
    idle: Condvar,
    pub(super) interrupt: Mutex<Interrupt>,
    pub(super) memory: Arc<GuestMemoryMmap>,
    /// One doorbell for each queue.
    pub(super) doorbells: Vec<EventFd>,
}

impl Shared {
    pub(super) fn new(
        backend: Backend,
        interrupt: Interrupt,
        memory: GuestMemoryMmap,
        doorbells: Vec<EventFd>,
    ) -> Self {
        let (backend, interrupt) = (Turnstile::new(backend), Mutex::new(interrupt));
        Self { backend, idle: Condvar::new(), interrupt, memory: Arc::new(memory), doorbells }
    }

    pub(super) fn enter(&self) -> MutexGuard<'_, Backend> {
        self.backend.enter()
    }

    /// Rings all doorbells, so that the worker looks at every queue.
    pub(super) fn kick_all(&self) {
        self.doorbells.iter().for_each(pull);
    }

    /// Takes the next request of queue `index`. Returns `None` if the queue is empty or the device is
    /// not running.
    pub(super) fn take(&self, index: usize) -> Option<Request> {
        let mut backend = self.enter();
        match backend.try_take(index, &self.memory) {
            Ok(request) => request,
            Err(error) => {
                backend.needs_reset(&format!("queue {index} is corrupt: {error}"), self);
                None
            }
        }
    }

    /// Returns a request to the driver.
    pub(super) fn complete(&self, request: Request, written: u32) {
        let Request { queue: index, chain } = request;
        let mut backend = self.enter();
        let used = [(chain.head_index(), written)];
        let completed = backend.try_complete(index, &used, &self.memory);
        self.completed(backend, index, 1, completed);
    }

    /// Gives several requests of one queue back to the driver, all at once.
    pub(super) fn complete_together(&self, requests: Vec<(Request, u32)>) {
        let Some(index) = requests.first().map(|(request, _)| request.queue) else { return };
        let used: Vec<(u16, u32)> =
            requests.iter().map(|(request, len)| (request.chain.head_index(), *len)).collect();
        let mut backend = self.enter();
        let completed = backend.try_complete(index, &used, &self.memory);
        self.completed(backend, index, used.len(), completed);
    }

    /// Requests of queue `index` are not in flight any more. `interrupt` is whether the driver wants to
    /// be told.
    fn completed(
        &self,
        mut backend: MutexGuard<'_, Backend>,
        index: usize,
        count: usize,
        interrupt: Result<bool, virtio_queue::Error>,
    ) {
        match interrupt {
            // Asks after each request, not after each batch: the rule for `used_event` counts the
            // requests since the last time it was asked, and this count is not saved.
            Ok(true) => lock(&self.interrupt).signal_queue(index),
            Ok(false) => {}
            Err(error) => {
                backend.needs_reset(&format!("queue {index} is corrupt: {error}"), self);
            }
        }
        self.not_in_flight(&mut backend, index, count);
    }

    /// Puts the request that was taken last from its queue back there.
    pub(super) fn give_back(&self, request: Request) {
        let mut backend = self.enter();
        if let Some(queue) = backend.queues.get_mut(request.queue) {
            queue.set_next_avail(queue.next_avail().wrapping_sub(1));
        }
        self.not_in_flight(&mut backend, request.queue, 1);
    }

    fn not_in_flight(&self, backend: &mut Backend, index: usize, count: usize) {
        if let Some(in_flight) = backend.in_flight.get_mut(index) {
            *in_flight -= count;
        }
        self.finish_reset(backend);
        // `notify_all` is a system call even if no thread waits.
        if backend.draining > 0 {
            self.idle.notify_all();
        }
    }

    /// Tells the driver that the device has changed its configuration (2.5).
    pub(super) fn config_changed(&self) {
        let mut backend = self.enter();
        backend.config_generation = backend.config_generation.wrapping_add(1);
        lock(&self.interrupt).signal_config();
    }

    /// Waits until no request is in flight. Errors with the number of requests that are still in
    /// flight at `deadline`.
    pub(super) fn drain(&self, deadline: Instant) -> Result<(), usize> {
        let mut backend = self.enter();
        loop {
            match backend.requests_in_flight() {
                0 => return Ok(()),
                count => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(count);
                    }
                    backend.draining += 1;
                    let waited = self.idle.wait_timeout(backend, left);
                    backend = waited.unwrap_or_else(PoisonError::into_inner).0;
                    backend.draining -= 1;
                }
            }
        }
    }

    /// Handles a reset by the driver (2.4). The reset completes when no request is in flight. Until
    /// then the status reads as before; the driver polls it and keeps its buffers until it reads zero.
    pub(super) fn reset(&self) {
        let mut backend = self.enter();
        backend.resetting = true;
        self.finish_reset(&mut backend);
    }

    /// Handles a reset of one queue by the driver (2.6.1.1). The reset completes when no request of the queue is in
    /// flight. Until then the driver reads 1 from the queue's register and keeps its buffers. Does nothing if the
    /// driver has not negotiated `RING_RESET` or the queue does not exist.
    pub(super) fn reset_queue(&self, index: usize) {
        let mut backend = self.enter();
        let may_reset = backend.has_agreed_to(features::RING_RESET);
        if let Some(resetting) = backend.resetting_queues.get_mut(index).filter(|_| may_reset) {
            *resetting = true;
            self.finish_reset(&mut backend);
        }
    }

    /// Completes requested resets, of the device or of queues, for which no request is in flight.
    fn finish_reset(&self, backend: &mut Backend) {
        if backend.resetting && backend.requests_in_flight() == 0 {
            backend.forget_driver();
            lock(&self.interrupt).reset();
        }
        for index in 0..backend.queues.len() {
            if backend.resetting_queues[index] && backend.in_flight[index] == 0 {
                backend.forget_queue(index);
                lock(&self.interrupt).queue_vectors[index] = NO_VECTOR;
            }
        }
    }
}

/// The registers and vectors by which the function interrupts the driver.
pub(super) struct Interrupt {
    pub(super) msix: Msix,
    pub(super) config_vector: u16,
    pub(super) queue_vectors: Vec<u16>,
    /// ISR status register (4.1.4.5): bit 0 for queues, bit 1 for configuration changes.
    pub(super) isr: u8,
}

impl Interrupt {
    /// Resets to the state after a device reset: no vectors assigned, no interrupt pending.
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

/// The rings and the driver's status.
pub(super) struct Backend {
    /// The device's kind and the names of its features, for messages.
    name: &'static str,
    feature_names: features::Names,
    /// The features that the driver can choose from.
    pub(super) offered: u64,
    pub(super) queues: Vec<Queue>,
    /// For each queue, the number of requests that were taken and not completed.
    in_flight: Vec<usize>,
    /// Number of threads that wait until no request is in flight.
    draining: usize,
    pub(super) status: u8,
    /// The features that the driver wrote; agreed upon once FEATURES_OK is set.
    pub(super) driver_features: u64,
    /// Changes when the device changes its configuration.
    pub(super) config_generation: u8,
    pub(super) paused: bool,
    /// The driver has asked for a reset, which waits for the requests in flight.
    resetting: bool,
    /// For each queue, whether the driver has asked for its reset, which waits for the requests in flight.
    resetting_queues: Vec<bool>,
    /// Whether a mistake of the guest was already logged as a warning. Later mistakes are logged at
    /// debug level only: a hostile guest would otherwise fill the host's log.
    reported: bool,
}

impl Backend {
    /// Creates the backend of a device in its reset state.
    pub(super) fn new(
        name: &'static str,
        feature_names: features::Names,
        offered: u64,
        queues: Vec<Queue>,
    ) -> Self {
        Self {
            name,
            feature_names,
            offered,
            in_flight: vec![0; queues.len()],
            resetting_queues: vec![false; queues.len()],
            draining: 0,
            queues,
            status: 0,
            driver_features: 0,
            config_generation: 0,
            paused: false,
            resetting: false,
            reported: false,
        }
    }

    /// Logs a mistake of the guest: the first as a warning, later ones at debug level.
    fn report(&mut self, mistake: &str) {
        match std::mem::replace(&mut self.reported, true) {
            false => tracing::warn!("{}: {mistake}", self.name),
            true => tracing::debug!("{}: {mistake}", self.name),
        }
    }

    /// Sets NEEDS_RESET after the driver corrupted a ring: only a reset by the driver helps (2.1.2).
    fn needs_reset(&mut self, mistake: &str, shared: &Shared) {
        self.report(mistake);
        self.status |= status::NEEDS_RESET;
        lock(&shared.interrupt).signal_config();
    }

    /// Returns the number of requests that were taken and not completed.
    pub(super) fn requests_in_flight(&self) -> usize {
        self.in_flight.iter().sum()
    }

    /// Returns whether the driver has set DRIVER_OK and no ring is corrupt.
    pub(super) fn active(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// Handles a driver's write to the device status (2.1, 3.1.1). Bits are only added, in the order
    /// of the initialization sequence; the caller handles zero, which means reset. Returns whether
    /// this write made the device active. Calls `negotiated` with the features if this write agreed
    /// upon them.
    ///
    /// ```text
    ///  0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK      FAILED at any time
    ///                                (if acceptable)               NEEDS_RESET by the device
    /// ```
    pub(super) fn set_status(&mut self, value: u8, negotiated: &mut dyn FnMut(u64)) -> bool {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        if self.resetting || self.status & !value & !NEEDS_RESET != 0 {
            let (from, to) = (self.status, value);
            tracing::debug!(
                from,
                to,
                "{}: the driver's write to the device status is invalid and ignored",
                self.name
            );
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
            if bit == FEATURES_OK && !self.agree(negotiated) {
                continue;
            }
            self.status |= bit;
        }
        !was_active && self.active()
    }

    /// Agrees upon the driver's features if they are acceptable. Returns whether they are.
    fn agree(&mut self, negotiated: &mut dyn FnMut(u64)) -> bool {
        if !features::acceptable(self.driver_features, self.offered) {
            let names = features::names(self.driver_features, self.feature_names);
            self.report(&format!("the driver asks for unacceptable features: {names}"));
            return false;
        }
        self.apply_features();
        negotiated(self.driver_features);
        true
    }

    /// Returns whether `feature` was agreed upon.
    pub(super) fn has_agreed_to(&self, feature: u64) -> bool {
        self.status & status::FEATURES_OK != 0 && self.driver_features & feature != 0
    }

    /// Returns whether a reset of queue `index` waits for the requests in flight.
    pub(super) fn is_resetting(&self, index: usize) -> bool {
        self.resetting_queues.get(index).is_some_and(|resetting| *resetting)
    }

    /// Applies the agreed features to the rings.
    pub(super) fn apply_features(&mut self) {
        let event_idx = self.driver_features & features::RING_EVENT_IDX != 0;
        self.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
    }

    /// Returns device status, driver's features, configuration generation, and the rings. Called while
    /// the device is paused and drained.
    pub(super) fn save(&self) -> (u8, u64, u8, Vec<QueueState>) {
        let Self {
            // Determined by the device.
            name: _,
            feature_names: _,
            offered: _,
            queues,
            // All zero, because the device is drained; so no reset is waiting, either.
            in_flight: _,
            resetting: _,
            resetting_queues: _,
            // Nothing is in flight that a thread could wait for.
            draining: _,
            status,
            driver_features,
            config_generation,
            // A restored device starts paused.
            paused: _,
            // Not saved: at worst another mistake of the guest is logged as a warning.
            reported: _,
        } = self;
        let rings = queues.iter().map(Queue::state).collect();
        (*status, *driver_features, *config_generation, rings)
    }

    fn forget_driver(&mut self) {
        self.resetting = false;
        self.status = 0;
        self.driver_features = 0;
        self.queues.iter_mut().for_each(QueueT::reset);
        self.resetting_queues.fill(false);
    }

    /// Puts one queue into its state after a reset of the device, but with the agreed features.
    fn forget_queue(&mut self, index: usize) {
        self.resetting_queues[index] = false;
        self.queues[index].reset();
        self.apply_features();
    }

    fn try_take(
        &mut self,
        index: usize,
        memory: &Arc<GuestMemoryMmap>,
    ) -> Result<Option<Request>, virtio_queue::Error> {
        if self.paused || self.resetting || self.is_resetting(index) || !self.active() {
            return Ok(None);
        }
        let Some(queue) = self.queues.get_mut(index).filter(|queue| queue.ready()) else {
            return Ok(None);
        };
        let mut chain = queue.iter(memory.clone())?.next();
        // Asks the driver to ring the doorbell at its next request, then looks for a request that the
        // driver added before it could see that.
        if chain.is_none() && queue.enable_notification(&**memory)? {
            chain = queue.iter(memory.clone())?.next();
        }
        let Some(chain) = chain else { return Ok(None) };
        // A ring has room for as many requests as its size. A driver that makes more available has
        // overwritten requests that are still in flight, so the ring is corrupt.
        let head = chain.head_index();
        if head >= queue.size() || self.in_flight[index] >= usize::from(queue.size()) {
            return Err(virtio_queue::Error::InvalidDescriptorIndex);
        }
        self.in_flight[index] += 1;
        Ok(Some(Request { queue: index, chain }))
    }

    /// Puts requests into the used ring, where the driver finds all of them at once. Returns whether the
    /// driver wants to be interrupted.
    fn try_complete(
        &mut self,
        index: usize,
        used: &[(u16, u32)],
        memory: &GuestMemoryMmap,
    ) -> Result<bool, virtio_queue::Error> {
        let active = self.active();
        match self.queues.get_mut(index).filter(|_| active) {
            Some(queue) => used_ring::add(queue, used, memory),
            None => Ok(false),
        }
    }
}
