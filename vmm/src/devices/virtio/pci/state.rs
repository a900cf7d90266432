//! The state of a virtio PCI function: the device's state together with the transport's registers and
//! rings.

use std::sync::Arc;

use virtio_queue::{Queue, QueueState, QueueT};

use super::backend::{Interrupt, NO_VECTOR, status};
use super::common::Selects;
use super::config_access::ConfigAccessStateV1;
use super::{PciResources, VirtioPci};
use crate::devices::pci::config_space::ConfigError;
use crate::devices::pci::msix::VectorsError;
use crate::devices::pci::{MsixStateV1, PciConfigStateV1};
use crate::devices::virtio::{VirtioDevice, features};
use crate::kvm::interrupts::InterruptError;
use crate::mutex::lock;
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// All bits of the device status that are defined (2.1).
const STATUS_BITS: u8 = status::ACKNOWLEDGE
    | status::DRIVER
    | status::DRIVER_OK
    | status::FEATURES_OK
    | status::NEEDS_RESET
    | status::FAILED;
/// All bits of the ISR status that are defined (4.1.4.5).
const ISR_BITS: u8 = 0b11;

/// A saved function cannot be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VirtioPciError {
    /// The interrupts or doorbells cannot be connected.
    #[error(transparent)]
    Wiring(#[from] InterruptError),
    /// The device behind the transport cannot be saved or restored.
    #[error(transparent)]
    Device(Box<dyn std::error::Error + Send + Sync>),
    /// The number of queues differs.
    #[error("the document has {saved} queues, this build's device has {here}")]
    Queues {
        /// In the document.
        saved: usize,
        /// Of this build.
        here: usize,
    },
    /// The negotiated features include some that this build does not offer. Holds their names.
    #[error("the guest uses features that this build does not offer: {0}")]
    Features(String),
    /// The device status is one that no driver can cause.
    #[error("device status {status:#x}: {problem}")]
    Status {
        /// The register.
        status: u8,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A queue is invalid.
    #[error("queue {index}: {problem}")]
    Queue {
        /// The index of the queue.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// The configuration space does not match.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The MSI-X table does not match.
    #[error(transparent)]
    Msix(#[from] VectorsError),
}

/// The state of a device, `S`, together with that of its transport. The binding is the device's own:
/// the transport is a child of the device's node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtioState<S> {
    /// The device behind the transport.
    pub device: S,
    /// The transport.
    pub transport: VirtioPciStateV2,
}

impl<S: Schema> Schema for VirtioState<S> {
    const COMPATIBLE: &'static [&'static str] = S::COMPATIBLE;

    fn bindings(&self) -> &'static [&'static str] {
        self.device.bindings()
    }

    fn encode(&self, node: &mut Node) {
        let Self { device, transport } = self;
        device.encode(node);
        node.push(transport.to_node("transport"));
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let device = S::decode(reader)?;
        Ok(Self { device, transport: reader.child("transport")? })
    }
}

/// The state of the transport. `perennial,virtio-pci-v2`. A function whose driver has not used the access through
/// the configuration space is written as `-v1`, which lacks it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtioPciStateV2 {
    /// Device status register.
    pub device_status: u8,
    /// The features that the driver wrote, negotiated or not.
    pub driver_features: u64,
    /// Configuration generation register.
    pub config_generation: u8,
    /// Device feature select, driver feature select and queue select registers.
    pub selects: [u32; 3],
    /// MSI-X vector of configuration changes; 0xffff means no vector.
    pub config_vector: u16,
    /// ISR status register.
    pub isr: u8,
    /// The queues, in order.
    pub queues: Vec<VirtioQueueStateV1>,
    /// The header of the configuration space.
    pub config: PciConfigStateV1,
    /// The interrupts.
    pub msix: MsixStateV1,
    /// The access through the configuration space.
    pub access: ConfigAccessStateV1,
}

/// The state of one queue. `perennial,virtio-queue-v1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioQueueStateV1 {
    /// The ring, as the crate `virtio-queue` represents it.
    pub ring: QueueState,
    /// MSI-X vector; 0xffff means no vector.
    pub vector: u16,
}

impl<D: VirtioDevice> Persist for VirtioPci<D>
where
    D::Error: Send + Sync,
{
    type State = VirtioState<D::State>;
    type Resources = (PciResources, D::Resources);
    type Error = VirtioPciError;

    fn save(&self) -> Result<Self::State, VirtioPciError> {
        // The slot is in the node's name; the offsets of capabilities are the same in every function.
        let Self {
            slot: _,
            config,
            msix_capability: _,
            access_capability,
            selects,
            device,
            shared,
        } = self;
        let Selects { device_feature, driver_feature, queue } = *selects;
        let device = device.save().map_err(|e| VirtioPciError::Device(e.into()))?;
        let (device_status, driver_features, config_generation, rings) = shared.enter().save();
        let Interrupt { msix, config_vector, queue_vectors, isr } = &*lock(&shared.interrupt);
        let queues = rings.into_iter().zip(queue_vectors);
        let transport = VirtioPciStateV2 {
            device_status,
            driver_features,
            config_generation,
            selects: [device_feature, driver_feature, queue.into()],
            config_vector: *config_vector,
            isr: *isr,
            queues: queues
                .map(|(ring, vector)| VirtioQueueStateV1 { ring, vector: *vector })
                .collect(),
            config: config.save(),
            msix: msix.save(),
            access: ConfigAccessStateV1::read(config, *access_capability),
        };
        Ok(VirtioState { device, transport })
    }

    fn restore(
        state: Self::State,
        (resources, device_resources): Self::Resources,
    ) -> Result<Self, VirtioPciError> {
        let VirtioState { device, transport } = state;
        let VirtioPciStateV2 {
            device_status,
            driver_features,
            config_generation,
            selects: [device_feature, driver_feature, queue_select],
            config_vector,
            isr,
            queues,
            config,
            msix,
            access,
        } = transport;
        let device = D::restore(device, device_resources)
            .map_err(|error| VirtioPciError::Device(error.into()))?;
        let mut function = VirtioPci::new(device, resources)?;
        // The header first: it holds the address at which the guest knows the BAR.
        function.config.restore(config)?;
        access.write(&mut function.config, function.access_capability);
        function.selects.device_feature = device_feature;
        function.selects.driver_feature = driver_feature;
        // Decoding has checked that the value fits the 16-bit register.
        function.selects.queue = queue_select as u16;
        let shared = Arc::clone(&function.shared);
        let mut backend = shared.enter();
        backend.paused = true;
        let here = backend.queues.len();
        if queues.len() != here {
            return Err(VirtioPciError::Queues { saved: queues.len(), here });
        }
        check_status(device_status)?;
        // Features that a driver wrote are unchecked until they are agreed upon.
        let agreed = match device_status & status::FEATURES_OK {
            0 => None,
            _ => Some(driver_features),
        };
        // A driver that has not agreed to any features yet may have read the offer.
        backend.offered |= function.device.features_that_stay() & agreed.unwrap_or(u64::MAX);
        check_features::<D>(agreed, backend.offered, device_status)?;
        for (index, saved) in queues.iter().enumerate() {
            let queue = restore_queue(saved, &backend.queues[index], agreed, &shared.memory)
                .map_err(|problem| VirtioPciError::Queue { index, problem })?;
            backend.queues[index] = queue;
        }
        backend.status = device_status;
        backend.driver_features = driver_features;
        backend.config_generation = config_generation;
        if let Some(features) = agreed {
            backend.apply_features();
            function.device.negotiated(features);
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

/// Errors if the status skips a step of the initialization sequence (3.1.1).
fn check_status(status: u8) -> Result<(), VirtioPciError> {
    let steps = [
        (status::DRIVER, status::ACKNOWLEDGE, "DRIVER without ACKNOWLEDGE"),
        (status::FEATURES_OK, status::DRIVER, "FEATURES_OK without DRIVER"),
        (status::DRIVER_OK, status::FEATURES_OK, "DRIVER_OK without FEATURES_OK"),
        (status::NEEDS_RESET, status::DRIVER_OK, "NEEDS_RESET without DRIVER_OK"),
    ];
    match steps.iter().find(|(bit, needs, _)| status & bit != 0 && status & needs == 0) {
        Some((_, _, problem)) => Err(VirtioPciError::Status { status, problem }),
        None => Ok(()),
    }
}

/// Errors if features were agreed upon that this build does not offer, or without `VERSION_1`.
fn check_features<D: VirtioDevice>(
    agreed: Option<u64>,
    offered: u64,
    status: u8,
) -> Result<(), VirtioPciError> {
    let Some(agreed) = agreed else { return Ok(()) };
    let unknown = agreed & !offered;
    if unknown != 0 {
        return Err(VirtioPciError::Features(features::names(unknown, D::FEATURES)));
    }
    match features::acceptable(agreed, offered) {
        true => Ok(()),
        false => Err(VirtioPciError::Status { status, problem: "FEATURES_OK without VERSION_1" }),
    }
}

/// Returns the saved ring. Errors if it does not match the device's queue or the agreed features, or
/// if it is enabled and not in guest RAM.
fn restore_queue(
    saved: &VirtioQueueStateV1,
    here: &Queue,
    agreed: Option<u64>,
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
    if ring.ready && agreed.is_none() {
        return Err("it is enabled, but no features are agreed upon".to_owned());
    }
    let event_idx = agreed.is_some_and(|features| features & features::RING_EVENT_IDX != 0);
    if ring.event_idx_enabled != event_idx {
        return Err(format!(
            "the document has it {} RING_EVENT_IDX, the agreed features say {}",
            with(ring.event_idx_enabled),
            with(event_idx)
        ));
    }
    let queue = Queue::try_from(*ring).map_err(|error| error.to_string())?;
    if queue.ready() && !queue.is_valid(memory) {
        return Err("its rings are not in guest RAM".to_owned());
    }
    Ok(queue)
}

fn with(present: bool) -> &'static str {
    if present { "with" } else { "without" }
}

impl Schema for VirtioPciStateV2 {
    const COMPATIBLE: &'static [&'static str] =
        &["perennial,virtio-pci-v2", "perennial,virtio-pci-v1"];

    fn bindings(&self) -> &'static [&'static str] {
        match self.access == ConfigAccessStateV1::default() {
            true => &Self::COMPATIBLE[1..],
            false => &Self::COMPATIBLE[..1],
        }
    }

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
            access,
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
        if *access != ConfigAccessStateV1::default() {
            node.push(access.to_node("config-access"));
        }
        for (index, queue) in queues.iter().enumerate() {
            node.push(queue.to_node(&format!("queue@{index:x}")));
        }
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
        let msix: MsixStateV1 = reader.child("msix")?;
        let vectors = (msix.table.len() / 2) as u16;
        let queues: Vec<VirtioQueueStateV1> = reader.sequence("queue")?;
        let config_vector = reader.narrow("config-vector")?;
        let missing = |vector: u16| vector != NO_VECTOR && vector >= vectors;
        let problem = |vector: u16| format!("vector {vector}, the function has {vectors}");
        if missing(config_vector) {
            return Err(reader.invalid("config-vector", problem(config_vector)));
        }
        if let Some(index) = queues.iter().position(|queue| missing(queue.vector)) {
            return Err(StateError::Invalid {
                path: format!("{}/queue@{index:x}", reader.path().trim_end_matches('/')),
                property: "vector".to_owned(),
                problem: problem(queues[index].vector),
            });
        }
        let isr = reader.narrow::<u8>("isr")?;
        if isr & !ISR_BITS != 0 {
            return Err(reader.invalid("isr", format!("{isr:#x} has bits that are not defined")));
        }
        Ok(Self {
            device_status,
            driver_features: reader.u64("driver-features")?,
            config_generation: reader.narrow("config-generation")?,
            selects,
            config_vector,
            isr,
            queues,
            config,
            msix,
            access: match reader.is_compatible(Self::COMPATIBLE[0]) {
                true => reader.child("config-access")?,
                false => ConfigAccessStateV1::default(),
            },
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
