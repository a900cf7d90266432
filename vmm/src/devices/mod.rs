//! The devices that a VM's process emulates: one folder for each kind, listed in [`catalog`]. A device
//! never sees a session, a token or a memfd.

use std::time::Instant;

pub mod acpi;
pub mod alarm;
pub mod catalog;
pub mod claims;
pub mod files;
pub mod identity;
pub mod inherited;
pub mod interface;
pub mod kind;
pub mod needs;
pub mod network;
pub mod observed;
pub mod pci;
pub mod power;
pub mod rate_limit;
pub mod rtc;
pub mod serial;
pub mod smbios;
pub mod storage;
pub mod terminal;
pub mod virtio;

/// The life cycle that every device implements. Saving and restoring its state is separate:
/// [`Persist`](crate::state::Persist).
///
/// ```text
///   built --resume--> running --pause, drain--> paused --resume--> running
///   restored (paused) --resume--> running              paused: save, any number of times
/// ```
pub trait Device: Send {
    /// Stops the device from starting new work. Returns at once, so that all devices of a machine
    /// stop in parallel.
    fn pause(&mut self);

    /// Errors if the host has not answered for [`STALLED_AFTER`](storage::STALLED_AFTER) what the device waits for: a
    /// pause would wait for it in vain. Returns at once. What a [`Storage`](storage::Storage) says by itself is not
    /// repeated.
    fn check_answers(&self, now: Instant) -> Result<(), DeviceError>;

    /// Waits until the paused device has finished the work it had started. On return no request is
    /// in flight, the device neither reads nor writes guest memory until [`resume`](Self::resume),
    /// and every completed write has been handed to the host's kernel. Errors if the work is not
    /// finished by `deadline`; the device is then still paused.
    fn drain(&mut self, deadline: Instant) -> Result<(), DeviceError>;

    /// Starts the device, or continues after a pause. A restored device first looks at every queue
    /// for requests whose notification was lost in the switch, and raises every interrupt that may
    /// have been lost: a spurious interrupt does no harm, a lost one hangs the guest.
    fn resume(&mut self);
}

/// A failed operation of a device.
#[derive(Debug, thiserror::Error)]
#[error("{device}: cannot {attempt}")]
pub struct DeviceError {
    /// The device's node name in the state document.
    pub device: String,
    /// The attempted operation, a phrase that follows "cannot".
    pub attempt: &'static str,
    /// Why it failed.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}
