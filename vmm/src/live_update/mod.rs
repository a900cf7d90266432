//! The live update: a new host kernel under running VMs. And the handover: a new host program.
//!
//! Everything that happens while the guests stand still reads top to bottom in two files:
//! [`outgoing`] ends in the jump, [`incoming`] begins after it.

pub mod file_systems;
pub mod incoming;
pub mod index;
pub mod manifest;
pub mod next_host;
pub mod next_kernel;
pub mod outgoing;
pub mod pass_on;
mod update_error;

pub use update_error::UpdateError;

use std::fmt;

use serde::{Deserialize, Serialize};

/// The steps of the transaction up to the point of no return, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Check and load the next kernel, or the next host's program.
    Load,
    /// Create the sessions and preserve guest RAM; the guests run.
    PreserveRam,
    /// Stop all vCPUs and drain the devices: the blackout begins.
    Pause,
    /// Save the state of every VM as its state document, and check it.
    Save,
    /// Preserve the state documents.
    PreserveState,
    /// Make the guests' writes durable; not in a handover, where no write is lost.
    Sync,
    /// Preserve the manifest and enter the next kernel, or the next host's program.
    Jump,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Load => "load",
            Self::PreserveRam => "preserve-ram",
            Self::Pause => "pause",
            Self::Save => "save",
            Self::PreserveState => "preserve-state",
            Self::Sync => "sync",
            Self::Jump => "jump",
        })
    }
}

/// What became of a guest when a live update did not go as planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It runs where it was, with nothing lost.
    Running,
    /// It does not run; its memory and state are kept, and its restore can be tried again.
    Preserved,
    /// It cannot be continued.
    Lost,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Preserved => "preserved",
            Self::Lost => "lost",
        })
    }
}

/// Release and version of the running kernel.
pub fn kernel_name() -> String {
    let uname = rustix::system::uname();
    format!("{} {}", uname.release().to_string_lossy(), uname.version().to_string_lossy())
}
