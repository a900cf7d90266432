//! What goes over the line between a test and its machine: one JSON value a line.

use serde::{Deserialize, Serialize};

use crate::conformance::system::{Answer, Call, Direction, Fd, Letter, Next, Process};

/// The name of the line.
pub(super) const PORT: &str = "conformance";
/// The word of the command line that says who has the LUO.
pub(super) const ROLE: &str = "conformance";

/// What the machine is asked.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    Spawn,
    Fork(Process),
    Kill(Process),
    Send(Fd),
    /// What was sent is received, or lost.
    Receive(Letter, Option<Process>),
    Call(Process, Call),
    Direct(Direction),
    /// Answered by [`Say::Hello`] of the next kernel, if it works.
    Switch(Next),
}

/// What the machine says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Say {
    /// A kernel is up.
    Hello(Hello),
    /// An answer, or an errno.
    Answer(Result<Answer, i32>),
    /// It cannot go on.
    Problem(String),
}

/// A kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) release: String,
    /// How many kernels there were since the machine was reset.
    pub(super) generation: u64,
    /// How many live updates led to it.
    pub(super) number: u64,
}
