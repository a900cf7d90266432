//! A live update of a host that cannot reach the pool with its VMs. The host has nothing to pause and
//! nothing to preserve. It passes its own ticket on to the next kernel, whose host may be able to reach
//! the pool, and leaves the pool untouched.

use std::convert::Infallible;
use std::time::Duration;

use luo::Ticket;

use super::Step;
use super::UpdateError;
use super::file_systems;
use super::next_kernel::{self, NextKernel};
use super::preflight::Surroundings;
use super::{Observer, begin};

/// How long the host's file systems may take to be synced.
const SYNC_WITHIN: Duration = Duration::from_secs(20);

/// Enters the next kernel with the same ticket. Returns only on an error; stopping before the step
/// `stop_before` is one too.
pub fn run(
    ticket: Ticket,
    next: &NextKernel,
    stop_before: Option<Step>,
    observer: Observer<'_>,
) -> Result<Infallible, UpdateError> {
    let before = |step| begin(step, stop_before, observer);
    before(Step::Load)?;
    let loaded = next_kernel::load(next, Some(ticket), &Surroundings::without_vms())?;
    // No VM is in reach, so these steps do nothing.
    for step in [Step::PreserveRam, Step::Pause, Step::Save, Step::PreserveState, Step::Sync] {
        before(step)?;
    }
    file_systems::sync_all(SYNC_WITHIN);
    before(Step::Jump)?;
    Err(UpdateError::Jump(kexec::jump(loaded.into_image())))
}
