//! The protocol between a test and its machine over a virtio port: one JSON value a line.

use serde::{Deserialize, Serialize};

use crate::conformance::system::{Answer, Call, Direction, Fd, Letter, Next, Process};

/// The name of the virtio port.
pub(super) const PORT: &str = "conformance";
/// The kernel parameter that names the owner of the LUO.
pub(super) const ROLE: &str = "conformance";

/// A request to the machine.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    Spawn,
    Fork(Process),
    Kill(Process),
    Send(Fd),
    /// A process receives a sent fd; without a process the fd is lost.
    Receive(Letter, Option<Process>),
    Call(Process, Call),
    Direct(Direction),
    /// Answered by [`Say::Hello`] of the next kernel, if it works.
    Switch(Next),
}

/// A message of the machine.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Say {
    /// A kernel has started.
    Hello(Hello),
    /// The answer to a request, or an errno.
    Answer(Result<Answer, i32>),
    /// An error after which the machine serves no further request.
    Problem(String),
}

/// A kernel's description of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) release: String,
    /// Number of switches since the machine was reset.
    pub(super) generation: u64,
    /// Number of live updates that led to this kernel.
    pub(super) number: u64,
}
