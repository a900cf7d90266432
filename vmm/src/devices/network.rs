//! What the machine and the host know of a device that connects the guest to a network: whether its link is up.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The link of a network device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// Frames pass.
    Up,
    /// The operator has taken it down.
    Down,
    /// The interface of the host is gone. A restart of the VM or an update opens it again.
    Gone,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Gone => "gone",
        })
    }
}

/// The machine's handler for a change of a device's link. Called on any thread of the VM's process.
pub type OnLink = Arc<dyn Fn(Link) + Send + Sync>;

/// The connection of one device to its network. Any thread may call it.
pub trait NetworkPort: Send + Sync {
    /// Returns the state of the link.
    fn link(&self) -> Link;

    /// Takes the link up or down and tells the guest. The setting is part of the device's state. A link whose
    /// interface is gone stays so.
    fn set_link(&self, up: bool);
}
