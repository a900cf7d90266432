//! The state of a virtio PCI function: the transport's registers and rings, and the device's own.

use std::sync::Arc;

use virtio_queue::{Queue, QueueState, QueueT};

use super::backend::{NO_VECTOR, lock, status};
use super::{BAR_SIZE, PciResources, VirtioPci};
use crate::devices::pci::config_space::ConfigError;
use crate::devices::pci::msix::VectorsError;
use crate::devices::pci::{MsixStateV1, PciConfigStateV1};
use crate::devices::virtio::{VirtioDevice, features};
use crate::kvm::interrupts::InterruptError;
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// Most queues of one function. A document with more is damaged.
const MAX_QUEUES: usize = 64;
/// All bits of the device status that are defined (2.1).
const STATUS_BITS: u8 = status::ACKNOWLEDGE
    | status::DRIVER
    | status::DRIVER_OK
    | status::FEATURES_OK
    | status::NEEDS_RESET
    | status::FAILED;

/// A saved function does not fit this one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VirtioPciError {
    /// Its interrupts or doorbells cannot be wired.
    #[error(transparent)]
    Wiring(#[from] InterruptError),
    /// The device behind it.
    #[error(transparent)]
    Device(Box<dyn std::error::Error + Send + Sync>),
    /// Another number of queues.
    #[error("the document has {saved} queues, this build's device has {here}")]
    Queues {
        /// In the document.
        saved: usize,
        /// Of this build.
        here: usize,
    },
    /// A feature that was negotiated and is not offered any more.
    #[error("the guest uses features that this build does not offer: {0}")]
    Features(String),
    /// A ring that cannot be.
    #[error("queue {index}: {problem}")]
    Queue {
        /// Which queue.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// The configuration space.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The MSI-X table.
    #[error(transparent)]
    Msix(#[from] VectorsError),
}

/// The state of a function with a device of state `S`. `perennial,virtio-pci-v1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtioPciStateV1<S> {
    /// Device status register.
    pub device_status: u8,
    /// What the driver wrote as its features.
    pub driver_features: u64,
    /// Configuration generation register.
    pub config_generation: u8,
    /// Device feature select, driver feature select and queue select registers.
    pub selects: [u32; 3],
    /// MSI-X vector of configuration changes; 0xffff is none.
    pub config_vector: u16,
    /// ISR status register.
    pub isr: u8,
    /// The queues, in order.
    pub queues: Vec<VirtioQueueStateV1>,
    /// The header of the configuration space.
    pub config: PciConfigStateV1,
    /// The interrupts.
    pub msix: MsixStateV1,
    /// The device behind the transport.
    pub device: S,
}

/// The state of one queue. `perennial,virtio-queue-v1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioQueueStateV1 {
    /// The ring as the library has it.
    pub ring: QueueState,
    /// MSI-X vector; 0xffff is none.
    pub vector: u16,
}

impl<D: VirtioDevice> Persist for VirtioPci<D>
where
    D::Error: Send + Sync,
{
    type State = VirtioPciStateV1<D::State>;
    type Resources = (PciResources, D::Resources);
    type Error = VirtioPciError;

    fn save(&self) -> Result<Self::State, VirtioPciError> {
        let backend = self.shared.backend.enter();
        let interrupt = lock(&self.shared.interrupt);
        let queues = backend.queues.iter().zip(&interrupt.queue_vectors);
        Ok(VirtioPciStateV1 {
            device_status: backend.status,
            driver_features: backend.driver_features,
            config_generation: backend.config_generation,
            selects: [
                self.selects.device_feature,
                self.selects.driver_feature,
                self.selects.queue.into(),
            ],
            config_vector: interrupt.config_vector,
            isr: interrupt.isr,
            queues: queues
                .map(|(queue, vector)| VirtioQueueStateV1 { ring: queue.state(), vector: *vector })
                .collect(),
            config: self.config.save(),
            msix: interrupt.msix.save(),
            device: backend.device.save().map_err(|e| VirtioPciError::Device(e.into()))?,
        })
    }

    fn restore(
        state: Self::State,
        (resources, device_resources): Self::Resources,
    ) -> Result<Self, VirtioPciError> {
        let VirtioPciStateV1 {
            device_status,
            driver_features,
            config_generation,
            selects: [device_feature, driver_feature, queue_select],
            config_vector,
            isr,
            queues,
            config,
            msix,
            device,
        } = state;
        let device = D::restore(device, device_resources)
            .map_err(|error| VirtioPciError::Device(error.into()))?;
        let mut function = VirtioPci::new(device, resources)?;
        // The header first: it says where the guest has its BAR.
        function.config.restore(config)?;
        function.selects.device_feature = device_feature;
        function.selects.driver_feature = driver_feature;
        // The register has 16 bits; decoding has checked that.
        function.selects.queue = queue_select as u16;
        let shared = Arc::clone(&function.shared);
        let mut backend = shared.backend.enter();
        backend.paused = true;
        let here = backend.queues.len();
        if queues.len() != here {
            return Err(VirtioPciError::Queues { saved: queues.len(), here });
        }
        let unknown = driver_features & !backend.offered();
        // Features that a driver wrote but that were never agreed upon may be anything.
        if unknown != 0 && device_status & status::FEATURES_OK != 0 {
            return Err(VirtioPciError::Features(features::names(unknown, D::FEATURES)));
        }
        for (index, saved) in queues.iter().enumerate() {
            let queue = restore_queue(saved, &backend.queues[index], &backend.memory)
                .map_err(|problem| VirtioPciError::Queue { index, problem })?;
            backend.queues[index] = queue;
        }
        backend.status = device_status;
        backend.driver_features = driver_features;
        backend.config_generation = config_generation;
        if device_status & status::FEATURES_OK != 0 {
            backend.apply_features();
        }
        drop(backend);
        let mut interrupt = lock(&shared.interrupt);
        interrupt.config_vector = config_vector;
        interrupt.queue_vectors = queues.iter().map(|queue| queue.vector).collect();
        interrupt.isr = isr;
        interrupt.msix.restore(msix)?;
        let control = interrupt.msix.control();
        drop(interrupt);
        function.config.set(usize::from(function.msix_capability) + 2, &control.to_le_bytes());
        Ok(function)
    }
}

/// The saved ring, if it is one that this device could have and lies in RAM.
fn restore_queue(
    saved: &VirtioQueueStateV1,
    here: &Queue,
    memory: &vm_memory::GuestMemoryMmap,
) -> Result<Queue, String> {
    let VirtioQueueStateV1 { ring, vector: _ } = saved;
    if ring.max_size != here.max_size() {
        return Err(format!(
            "the document has a queue of {}, this build's has {}",
            ring.max_size,
            here.max_size()
        ));
    }
    let queue = Queue::try_from(*ring).map_err(|error| error.to_string())?;
    if queue.ready() && !queue.is_valid(memory) {
        return Err("its rings are not in guest RAM".to_owned());
    }
    Ok(queue)
}

impl<S: Schema> Schema for VirtioPciStateV1<S> {
    const COMPATIBLE: &'static [&'static str] = &["perennial,virtio-pci-v1"];

    fn encode(&self, node: &mut Node) {
        let Self {
            device_status,
            driver_features,
            config_generation,
            selects: [device_feature, driver_feature, queue_select],
            config_vector,
            isr,
            queues,
            config,
            msix,
            device,
        } = self;
        node.put_u32("device-status", (*device_status).into());
        node.put_u64("driver-features", *driver_features);
        node.put_u32("config-generation", (*config_generation).into());
        node.put_u32("device-feature-select", *device_feature);
        node.put_u32("driver-feature-select", *driver_feature);
        node.put_u32("queue-select", *queue_select);
        node.put_u32("config-vector", (*config_vector).into());
        node.put_u32("isr", (*isr).into());
        node.push(config.to_node("pci-config"));
        node.push(msix.to_node("msix"));
        for (index, queue) in queues.iter().enumerate() {
            node.push(queue.to_node(&format!("queue@{index:x}")));
        }
        node.push(device.to_node("device"));
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let device_status = reader.narrow::<u8>("device-status")?;
        if device_status & !STATUS_BITS != 0 {
            let problem = format!("{device_status:#x} has bits that are not defined");
            return Err(reader.invalid("device-status", problem));
        }
        let selects = [
            reader.u32("device-feature-select")?,
            reader.u32("driver-feature-select")?,
            reader.narrow::<u16>("queue-select")?.into(),
        ];
        let config: PciConfigStateV1 = reader.child("pci-config")?;
        if !config.bar_base.is_multiple_of(BAR_SIZE) {
            let problem = format!("BAR 0 at {:#x} is not aligned", config.bar_base);
            return Err(reader.invalid("device-status", problem));
        }
        let msix: MsixStateV1 = reader.child("msix")?;
        let vectors = (msix.table.len() / 2) as u16;
        let queues: Vec<VirtioQueueStateV1> = reader.sequence("queue")?;
        let config_vector = reader.narrow("config-vector")?;
        let bad = std::iter::once(config_vector)
            .chain(queues.iter().map(|queue| queue.vector))
            .find(|vector| *vector != NO_VECTOR && *vector >= vectors);
        if let Some(vector) = bad {
            let problem = format!("vector {vector}, the function has {vectors}");
            return Err(reader.invalid("config-vector", problem));
        }
        if queues.len() > MAX_QUEUES {
            let problem = format!("{} queues, at most {MAX_QUEUES}", queues.len());
            return Err(reader.invalid("queue-select", problem));
        }
        Ok(Self {
            device_status,
            driver_features: reader.u64("driver-features")?,
            config_generation: reader.narrow("config-generation")?,
            selects,
            config_vector,
            isr: reader.narrow("isr")?,
            queues,
            config,
            msix,
            device: reader.child("device")?,
        })
    }
}

impl Schema for VirtioQueueStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,virtio-queue-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { ring, vector } = self;
        let QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = ring;
        node.put_u32("max-size", (*max_size).into());
        node.put_u32("size", (*size).into());
        node.put_bool("ready", *ready);
        node.put_bool("event-idx", *event_idx_enabled);
        node.put_u32("next-avail", (*next_avail).into());
        node.put_u32("next-used", (*next_used).into());
        node.put_u64("desc-table", *desc_table);
        node.put_u64("avail-ring", *avail_ring);
        node.put_u64("used-ring", *used_ring);
        node.put_u32("vector", (*vector).into());
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let ring = QueueState {
            max_size: reader.narrow("max-size")?,
            next_avail: reader.narrow("next-avail")?,
            next_used: reader.narrow("next-used")?,
            event_idx_enabled: reader.bool("event-idx")?,
            size: reader.narrow("size")?,
            ready: reader.bool("ready")?,
            desc_table: reader.u64("desc-table")?,
            avail_ring: reader.u64("avail-ring")?,
            used_ring: reader.u64("used-ring")?,
        };
        Ok(Self { ring, vector: reader.narrow("vector")? })
    }
}

#[cfg(test)]
mod tests;
