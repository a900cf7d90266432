//! The live update, which replaces the host's kernel under running VMs, and the handover, which replaces
//! the host's program.
//!
//! Everything that happens in the blackout reads top to bottom in two files: [`outgoing`] ends with the
//! jump, [`incoming`] begins after it.

pub mod arrival;
mod blackout;
pub mod breakpoint;
pub mod carry;
pub mod file_systems;
mod holes;
mod in_flight;
pub mod incoming;
mod incoming_error;
pub mod index;
pub mod leaving;
pub mod manifest;
pub mod next_host;
pub mod next_kernel;
pub mod outgoing;
pub mod pass_on;
pub mod preflight;
pub mod process_end;
pub mod programs;
pub mod rehearsal;
mod syncing;
mod update_error;

pub use update_error::UpdateError;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::machine::VmName;
use crate::open_files;

/// The steps of a live update or a handover up to the jump, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Check and load the next kernel, or open and check the next host's program.
    Load,
    /// Create the sessions and preserve guest RAM. The guests still run.
    PreserveRam,
    /// Pause all vCPUs and drain the devices. The blackout begins.
    Pause,
    /// Save the state of every VM as its state document, and check it.
    Save,
    /// Preserve the state documents.
    PreserveState,
    /// Make the guests' writes durable. A handover skips this: the kernel and its page cache stay.
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

/// Progress of a live update or a handover: a step begins, or one VM has done it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The step. [`Step::Jump`] is announced immediately before the manifest is preserved.
    pub step: Step,
    /// The VM that has done the step; `None` if the step begins.
    pub vm: Option<&'a VmName>,
}

/// Who is told of the progress. Called in the blackout too, so it must not wait for anything.
pub type Observer<'a> = &'a dyn Fn(Progress<'_>);

/// Errors if the live update is to stop before `step`. Else tells `observer` that the step begins, and makes sure that the
/// step has the host's reserve of files.
fn begin(step: Step, stop_before: Option<Step>, observer: Observer<'_>) -> Result<(), UpdateError> {
    if stop_before == Some(step) {
        return Err(UpdateError::Stopped(step));
    }
    observer(Progress { step, vm: None });
    breakpoint::reach(&step.to_string(), None);
    open_files::all_files();
    Ok(())
}

/// What became of a guest after a live update that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs, and nothing is lost.
    Running,
    /// The guest does not run. Its memory and state are kept, and its restore can be tried again.
    Preserved,
    /// The guest cannot be continued.
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

/// Returns release and version of the running kernel (`uname -rv`).
pub fn kernel_name() -> String {
    let uname = rustix::system::uname();
    format!("{} {}", uname.release().to_string_lossy(), uname.version().to_string_lossy())
}
