//! The devices that a VM's process emulates: one folder for each kind, listed in [`catalog`]. A device
//! never sees a session, a token or a memfd.

use std::time::Instant;

pub mod catalog;
pub mod files;
pub mod identity;
pub mod kind;
pub mod pci;
pub mod power;
pub mod serial;
pub mod virtio;

/// What the machine asks of every device, whatever it is. Its state is another matter:
/// [`Persist`](crate::state::Persist).
///
/// ```text
///   built --resume--> running --pause, drain--> paused --resume--> running
///   restored (paused) --resume--> running              paused: save, sync, any number of times
/// ```
pub trait Device: Send {
    /// Has the device begin nothing new. Returns at once, so that all devices of a machine stop
    /// side by side.
    fn pause(&mut self);

    /// Waits until the paused device has finished what it had begun. On return no request is in
    /// flight, nothing of the device reads or writes guest memory until [`resume`](Self::resume),
    /// and every completed write has been handed to the host's kernel. Errors if that takes longer
    /// than until `deadline`; the device is then still paused.
    fn drain(&mut self, deadline: Instant) -> Result<(), DeviceError>;

    /// Makes what the guest wrote durable on the host's storage. Called while paused.
    fn sync(&mut self) -> Result<(), DeviceError>;

    /// Starts, or starts again. A restored device first looks at every queue for requests whose
    /// notification was lost in the switch, and raises every interrupt that may have been: a
    /// spurious one does no harm, a lost one hangs the guest.
    fn resume(&mut self);
}

/// A device could not do what the machine asked.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {attempt}")]
pub struct DeviceError {
    /// The device, as in the state document.
    pub device: String,
    /// What was attempted.
    pub attempt: &'static str,
    /// Why it failed.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}
