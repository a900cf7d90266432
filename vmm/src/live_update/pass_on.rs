//! A live update of a host that cannot reach the pool in which its VMs are: it has nothing to pause and
//! nothing to preserve. It enters a kernel whose host perhaps can, and hands it the ticket that it was
//! given itself. Nothing in the pool is touched.

use std::convert::Infallible;

use luo::Ticket;

use super::Step;
use super::UpdateError;
use super::next_kernel::{self, NextKernel};

/// Enters the next kernel with the same ticket. Returns only if it does not; `announce` is called
/// immediately before the jump.
pub fn run(
    ticket: Ticket,
    next: &NextKernel,
    stop_before: Option<Step>,
    announce: impl FnOnce(),
) -> Result<Infallible, UpdateError> {
    let before = |step| match stop_before {
        Some(stop) if stop == step => Err(UpdateError::Stopped(step)),
        _ => Ok(()),
    };
    before(Step::Load)?;
    let image = next_kernel::load(next, Some(ticket))?;
    // No VM is in reach, so there is nothing to be done in the steps between.
    for step in [Step::PreserveRam, Step::Pause, Step::Save, Step::PreserveState, Step::Sync] {
        before(step)?;
    }
    rustix::fs::sync();
    before(Step::Jump)?;
    announce();
    Err(UpdateError::Jump(kexec::jump(image)))
}
