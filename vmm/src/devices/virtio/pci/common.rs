//! The common configuration structure (4.1.4.3): how a driver negotiates features and sets up
//! queues. This module holds the registers that select others; the backend holds all other registers.

use virtio_queue::QueueT;

use super::backend::{Backend, Interrupt, NO_VECTOR, Shared, status};
use crate::kvm::interrupts::pull;
use crate::mutex::lock;

/// Length of the structure in bytes, up to the last field of a feature that is offered, `queue_reset`. The field in
/// front of it, `queue_notify_data`, belongs to a feature that is not offered and reads as 0.
pub(super) const LEN: usize = 0x3c;

/// The registers that select which feature word or queue other registers show.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Selects {
    pub(super) device_feature: u32,
    pub(super) driver_feature: u32,
    pub(super) queue: u16,
}

impl Selects {
    /// Handles a driver's read of `data.len()` bytes at `offset`, of any width.
    pub(super) fn read(&self, shared: &Shared, offset: usize, data: &mut [u8]) {
        let bytes = self.registers(&shared.enter(), &lock(&shared.interrupt));
        let end = offset.saturating_add(data.len());
        if let Some(source) = bytes.get(offset..end) {
            data.copy_from_slice(source);
        }
    }

    fn registers(&self, backend: &Backend, interrupt: &Interrupt) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        };
        put(0x00, &self.device_feature.to_le_bytes());
        put(0x04, &half(backend.offered, self.device_feature).to_le_bytes());
        put(0x08, &self.driver_feature.to_le_bytes());
        put(0x0c, &half(backend.driver_features, self.driver_feature).to_le_bytes());
        put(0x10, &interrupt.config_vector.to_le_bytes());
        put(0x12, &(backend.queues.len() as u16).to_le_bytes());
        put(0x14, &[backend.status, backend.config_generation]);
        put(0x16, &self.queue.to_le_bytes());
        let index = usize::from(self.queue);
        // A queue that does not exist has size 0 (4.1.5.1.3).
        if let Some(queue) = backend.queues.get(index) {
            put(0x18, &queue.size().to_le_bytes());
            put(0x1a, &interrupt.queue_vectors[index].to_le_bytes());
            put(0x1c, &u16::from(queue.ready()).to_le_bytes());
            put(0x1e, &self.queue.to_le_bytes());
            put(0x20, &queue.desc_table().to_le_bytes());
            put(0x28, &queue.avail_ring().to_le_bytes());
            put(0x30, &queue.used_ring().to_le_bytes());
            put(0x3a, &u16::from(backend.is_resetting(index)).to_le_bytes());
        }
        bytes
    }

    /// Handles a driver's write of `data` at `offset`. Writes that do not have the register's width
    /// are ignored, except that 64-bit registers take 64 bits as well as 32 (4.1.3.1). Calls
    /// `negotiated` with the features when they are agreed upon, and with zero when the driver resets
    /// the device.
    pub(super) fn write(
        &mut self,
        shared: &Shared,
        offset: usize,
        data: &[u8],
        negotiated: &mut dyn FnMut(u64),
    ) {
        match (offset, data) {
            (0x00, [_, _, _, _]) => self.device_feature = u32_of(data),
            (0x08, [_, _, _, _]) => self.driver_feature = u32_of(data),
            (0x0c, [_, _, _, _]) => self.write_driver_features(shared, u32_of(data)),
            (0x10, [_, _]) => {
                let mut interrupt = lock(&shared.interrupt);
                interrupt.config_vector = existing(&interrupt, u16_of(data));
            }
            (0x14, [0]) => {
                *self = Self::default();
                negotiated(0);
                shared.reset();
            }
            (0x14, [value]) => {
                let activated = shared.enter().set_status(*value, negotiated);
                if activated {
                    // A driver may have filled rings before it set DRIVER_OK.
                    shared.kick_all();
                }
            }
            (0x16, [_, _]) => self.queue = u16_of(data),
            (0x1a, [_, _]) => {
                let mut interrupt = lock(&shared.interrupt);
                let vector = existing(&interrupt, u16_of(data));
                if let Some(slot) = interrupt.queue_vectors.get_mut(usize::from(self.queue)) {
                    *slot = vector;
                }
            }
            (0x3a, [1, 0]) => shared.reset_queue(self.queue.into()),
            (0x18..0x38, _) => self.write_queue(shared, offset, data),
            _ => {}
        }
    }

    fn write_driver_features(&self, shared: &Shared, value: u32) {
        let mut backend = shared.enter();
        let features = backend.driver_features;
        // The driver cannot change features after FEATURES_OK (3.1.1, step 5).
        if backend.status & status::FEATURES_OK == 0 {
            backend.driver_features = match self.driver_feature {
                0 => features & !0xffff_ffff | u64::from(value),
                1 => features & 0xffff_ffff | u64::from(value) << 32,
                _ => features,
            };
        }
    }

    /// Writes a register of the selected queue. The registers are read-only once the queue is enabled.
    fn write_queue(&self, shared: &Shared, offset: usize, data: &[u8]) {
        let mut backend = shared.enter();
        let features_ok = backend.status & status::FEATURES_OK != 0;
        // Only a driver that has reset the queue enables it while the device runs.
        let is_late = backend.active();
        let Some(queue) = backend.queues.get_mut(usize::from(self.queue)) else { return };
        if queue.ready() {
            return;
        }
        match (offset, data) {
            (0x18, [_, _]) => queue.set_size(u16_of(data)),
            (0x1c, [1, 0]) if features_ok => {
                queue.set_ready(true);
                if !queue.is_valid(&*shared.memory) {
                    // The rings are not in RAM: the register reads back as 0.
                    queue.set_ready(false);
                } else if is_late {
                    // The driver may have filled the ring before, and what the worker waits for may have come.
                    pull(&shared.doorbells[usize::from(self.queue)]);
                }
            }
            (0x20, _) => write_address(data, |low, high| queue.set_desc_table_address(low, high)),
            (0x24, [_, _, _, _]) => queue.set_desc_table_address(None, Some(u32_of(data))),
            (0x28, _) => write_address(data, |low, high| queue.set_avail_ring_address(low, high)),
            (0x2c, [_, _, _, _]) => queue.set_avail_ring_address(None, Some(u32_of(data))),
            (0x30, _) => write_address(data, |low, high| queue.set_used_ring_address(low, high)),
            (0x34, [_, _, _, _]) => queue.set_used_ring_address(None, Some(u32_of(data))),
            _ => {}
        }
    }
}

/// Returns `vector` if the function has it, otherwise [`NO_VECTOR`]. The driver reads the register
/// back to see whether the vector was accepted (4.1.5.1.2).
fn existing(interrupt: &Interrupt, vector: u16) -> u16 {
    if vector < interrupt.msix.vectors() { vector } else { NO_VECTOR }
}

fn write_address(data: &[u8], set: impl FnOnce(Option<u32>, Option<u32>)) {
    match data.len() {
        4 => set(Some(u32_of(data)), None),
        8 => set(Some(u32_of(data)), Some(u32_of(&data[4..]))),
        _ => {}
    }
}

/// Returns bits 0..32 (`select` 0) or 32..64 (`select` 1) of `features`, and 0 for any other `select`:
/// higher feature bits are not supported.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn u16_of(data: &[u8]) -> u16 {
    data.iter().take(2).rev().fold(0, |value, byte| value << 8 | u16::from(*byte))
}

fn u32_of(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}
