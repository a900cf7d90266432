//! The PCI transport of a virtio device (4.1): registers in one memory BAR, found through vendor
//! capabilities; doorbells as ioeventfds; interrupts as MSI-X.
//!
//! ```text
//!  BAR 0:  0x0000 common   0x1000 ISR   0x2000 device   0x3000 doorbells
//!          0x4000 MSI-X table           0x5000 pending bits
//! ```
//!
//! A function is built with its BAR in place and its doorbells registered. A restore builds the
//! function in the same way before it applies the saved state: a doorbell that rings early finds a
//! paused device and is handled when the device resumes.

mod backend;
mod common;
mod config_access;
mod place;
mod rings;
mod state;
#[cfg(test)]
mod tests;
mod used_ring;
mod worker;

pub use rings::{Chain, Request, Rings};
pub use worker::Worker;

pub use state::{VirtioPciError, VirtioPciStateV2, VirtioState};

use std::sync::Arc;
use std::time::Instant;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use self::backend::{Backend, Interrupt, NO_VECTOR, Shared, status};
use self::common::Selects;
use self::config_access::ConfigAccessStateV1;
use super::{VirtioDevice, features};
use crate::bus::BusDevice;
use crate::devices::network::NetworkPort;
use crate::devices::pci::{ConfigSpace, Msix, PciFunction, PciIds, msix};
use crate::devices::{Device, DeviceError};
use crate::kvm::interrupts::{Doorbells, InterruptError, Interrupts, event, pull};
use crate::mutex::lock;

/// Size of BAR 0, in bytes.
pub const BAR_SIZE: u32 = 0x8000;

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
/// Size of each of these regions, in bytes.
const REGION: u64 = 0x1000;
/// Bytes from one queue's doorbell to the next.
const NOTIFY_MULTIPLIER: u32 = 4;

/// PCI vendor ID of all virtio devices (4.1.2).
const VENDOR: u16 = 0x1af4;
/// PCI device ID of a virtio device, without its virtio device ID, which is added (4.1.2).
const DEVICE_BASE: u16 = 0x1040;
/// PCI capability ID of vendor-specific capabilities.
const VENDOR_CAPABILITY: u8 = 0x09;

/// The resources that the machine gives to a function.
pub struct PciResources {
    /// Device number on the bus, 1..32.
    pub slot: u8,
    /// Guest physical address of BAR 0, a multiple of [`BAR_SIZE`].
    pub bar: u32,
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    /// Interrupt lines.
    pub interrupts: Arc<dyn Interrupts>,
    /// Doorbells.
    pub doorbells: Arc<dyn Doorbells>,
}

/// A virtio device as a PCI function.
pub struct VirtioPci<D> {
    slot: u8,
    config: ConfigSpace,
    /// Offset of the MSI-X capability in the configuration space.
    msix_capability: u8,
    /// Offset of the capability for accesses through the configuration space.
    access_capability: u8,
    selects: Selects,
    device: D,
    shared: Arc<Shared>,
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// Creates a function in its reset state, not paused. Errors if the machine cannot supply its
    /// interrupt lines or doorbells.
    pub fn new(device: D, resources: PciResources) -> Result<Self, InterruptError> {
        let PciResources { slot, bar, memory, interrupts, doorbells } = resources;
        let queues: Vec<Queue> = device
            .queue_sizes()
            .iter()
            .map(|size| Queue::new(*size).expect("queue sizes are powers of two"))
            .collect();
        // One vector for each queue, one for changes of the configuration.
        let vectors = queues.len() as u16 + 1;
        let msix = Msix::new(vectors, interrupts)?;
        let events = (0..queues.len())
            .map(|index| {
                let doorbell = event("a doorbell")?;
                let offset = NOTIFY + index as u64 * u64::from(NOTIFY_MULTIPLIER);
                doorbells.watch(u64::from(bar) + offset, &doorbell)?;
                Ok(doorbell)
            })
            .collect::<Result<Vec<EventFd>, InterruptError>>()?;
        let (config, [msix_capability, access_capability]) = config_space::<D>(bar, &msix);
        let interrupt = Interrupt {
            msix,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues.len()],
            isr: 0,
        };
        let offered = device.features() | features::TRANSPORT;
        let backend = Backend::new(D::NAME, D::FEATURES, offered, queues);
        let shared = Arc::new(Shared::new(backend, interrupt, memory, events));
        let selects = Selects::default();
        Ok(Self { slot, config, msix_capability, access_capability, selects, device, shared })
    }

    /// Returns the event subscriber that the device's thread runs. Called once.
    pub fn worker(&self) -> Worker<D::Worker> {
        Worker::new(D::NAME, self.shared.clone(), self.device.worker())
    }

    /// Returns the event subscribers of the device's other threads. Called once.
    pub fn more_workers(&self) -> Vec<Worker<D::Worker>> {
        let workers = self.device.more_workers().into_iter();
        workers.map(|worker| Worker::new(D::NAME, self.shared.clone(), worker)).collect()
    }

    /// Returns the device's connection to a network, if it has one.
    pub fn network_port(&self) -> Option<Arc<dyn NetworkPort>> {
        self.device.network_port(Rings(self.shared.clone()))
    }

    /// Returns the number of queues.
    #[cfg(test)]
    pub(crate) fn queues(&self) -> u64 {
        self.shared.doorbells.len() as u64
    }

    fn node_name(&self) -> String {
        format!("{}@{:x}", D::NAME, self.slot)
    }

    fn error(
        &self,
        attempt: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> DeviceError {
        DeviceError { device: self.node_name(), attempt, source: source.into() }
    }

    fn guest_enabled_memory(&self) -> bool {
        self.config.memory_enabled()
    }
}

/// Returns a configuration space with header, virtio capabilities (4.1.4) and MSI-X capability, and
/// the offsets of the MSI-X capability and of that for accesses through the configuration space.
fn config_space<D: VirtioDevice>(bar: u32, msix: &Msix) -> (ConfigSpace, [u8; 2]) {
    let identity = PciIds {
        vendor: VENDOR,
        device: DEVICE_BASE + D::ID,
        // Non-transitional devices have revision 1 or higher (4.1.2.1).
        revision: 1,
        class: D::CLASS,
        subsystem: (VENDOR, DEVICE_BASE + D::ID),
    };
    let mut space = ConfigSpace::new(identity).with_memory_bar(bar, BAR_SIZE);
    let mut add = |kind: u8, offset: u64, length: u64, more: &[u8]| {
        let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        body.extend(more);
        let nothing = vec![0; body.len()];
        space.add_capability(VENDOR_CAPABILITY, &body, &nothing);
    };
    // cfg_type: 1 common, 2 notify, 3 ISR, 4 device.
    add(1, COMMON, common::LEN as u64, &[]);
    add(2, NOTIFY, REGION, &NOTIFY_MULTIPLIER.to_le_bytes());
    add(3, ISR, 4, &[]);
    add(4, DEVICE, REGION, &[]);
    // Control word, then table and pending bits as offsets in BAR 0 (PCI 3.0, 6.8.2).
    let mut body = msix.control().to_le_bytes().to_vec();
    body.extend((MSIX_TABLE as u32).to_le_bytes());
    body.extend((MSIX_PENDING as u32).to_le_bytes());
    let mut writable = vec![0; body.len()];
    writable[..2].copy_from_slice(&msix::CONTROL_WRITABLE.to_le_bytes());
    let msix = space.add_capability(msix::CAPABILITY, &body, &writable);
    let (body, writable) = config_access::capability();
    let access = space.add_capability(VENDOR_CAPABILITY, &body, &writable);
    (space, [msix, access])
}

impl<D: VirtioDevice> PciFunction for VirtioPci<D> {
    fn read_config(&mut self, offset: u8, data: &mut [u8]) {
        let at = self.access_capability;
        let access = ConfigAccessStateV1::read(&self.config, at);
        if ConfigAccessStateV1::is_touched(at, offset, data.len())
            && let Some((register, length)) = access.register()
        {
            let mut access = access;
            self.read_register(register, &mut access.data[..length]);
            access.write(&mut self.config, at);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u8, data: &[u8]) {
        self.config.write(offset, data);
        let at = self.access_capability;
        let access = ConfigAccessStateV1::read(&self.config, at);
        if ConfigAccessStateV1::is_touched(at, offset, data.len())
            && let Some((register, length)) = access.register()
        {
            self.write_register(register, &access.data[..length]);
        }
        let control = u16::from_le_bytes(self.config.get(usize::from(self.msix_capability) + 2));
        let mut interrupt = lock(&self.shared.interrupt);
        if control != interrupt.msix.control() {
            interrupt.msix.set_control(control);
        }
    }
}

impl<D: VirtioDevice> BusDevice for VirtioPci<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if self.guest_enabled_memory() {
            self.read_register(offset, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if self.guest_enabled_memory() {
            self.write_register(offset, data);
        }
    }
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// Handles a read of the BAR.
    fn read_register(&mut self, offset: u64, data: &mut [u8]) {
        match (offset & !(REGION - 1), offset & (REGION - 1)) {
            (COMMON, at) => self.selects.read(&self.shared, at as usize, data),
            (ISR, 0) => {
                // Reading acknowledges (4.1.4.5).
                let isr = std::mem::take(&mut lock(&self.shared.interrupt).isr);
                data.iter_mut().zip([isr, 0, 0, 0, 0, 0, 0, 0]).for_each(|(byte, is)| *byte = is);
            }
            (DEVICE, at) => self.device.read_config(at, data),
            (MSIX_TABLE, at) => lock(&self.shared.interrupt).msix.read_table(at, data),
            (MSIX_PENDING, at) => lock(&self.shared.interrupt).msix.read_pending(at, data),
            _ => data.fill(0),
        }
    }

    /// Handles a write to the BAR.
    fn write_register(&mut self, offset: u64, data: &[u8]) {
        match (offset & !(REGION - 1), offset & (REGION - 1)) {
            (COMMON, at) => {
                let Self { selects, device, shared, .. } = self;
                let mut negotiated = |features| device.negotiated(features);
                selects.write(shared, at as usize, data, &mut negotiated);
            }
            (DEVICE, at) => self.device.write_config(at, data),
            // KVM turns writes to doorbells into events; only writes that match no ioeventfd get here.
            (NOTIFY, at) => {
                let index = (at / u64::from(NOTIFY_MULTIPLIER)) as usize;
                if let Some(doorbell) = self.shared.doorbells.get(index) {
                    pull(doorbell);
                }
            }
            (MSIX_TABLE, at) => lock(&self.shared.interrupt).msix.write_table(at, data),
            _ => {}
        }
    }
}

impl<D: VirtioDevice> Device for VirtioPci<D> {
    fn pause(&mut self) {
        self.shared.enter().paused = true;
    }

    /// What a virtio device waits for is its storage, which says so by itself.
    fn check_answers(&self, _now: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn drain(&mut self, deadline: Instant) -> Result<(), DeviceError> {
        self.shared.drain(deadline).map_err(|count| {
            let busy = format!("{count} requests are still being executed");
            self.error("finish the requests of its guest", busy)
        })
    }

    fn resume(&mut self) {
        let config_changed = self.device.resumed();
        let (ready, needs_reset): (Vec<bool>, bool) = {
            let mut backend = self.shared.enter();
            backend.paused = false;
            if config_changed {
                backend.config_generation = backend.config_generation.wrapping_add(1);
            }
            let active = backend.active();
            let ready = backend.queues.iter().map(|queue| active && queue.ready()).collect();
            (ready, backend.status & status::NEEDS_RESET != 0)
        };
        // Repeats what may have been lost: doorbells that rang and interrupts that were sent while the
        // machine was paused or the kernel was replaced.
        let mut interrupt = lock(&self.shared.interrupt);
        interrupt.msix.deliver();
        for (index, _) in ready.iter().enumerate().filter(|(_, ready)| **ready) {
            interrupt.signal_queue(index);
        }
        if needs_reset || config_changed {
            interrupt.signal_config();
        }
        drop(interrupt);
        self.shared.kick_all();
    }
}
