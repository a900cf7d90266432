//! Another attempt to restore a preserved VM, beside the host's loop.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use luo::Orchestrator;

use super::{Arriving, IncomingError, Next, RestoredVm, begin};
use crate::arch::x86_64::tsc;
use crate::guests::confinement::Confinement;
use crate::guests::conversation::ANSWER_WITHIN;
use crate::guests::entry::VmEntry;
use crate::guests::held::Held;
use crate::link::MissingHints;
use crate::live_update::next_host::NextHost;
use crate::machine::VmName;

/// A preserved VM that is being restored again.
#[must_use = "it has the VM's memory: dropping it loses the VM, and `give_up` returns the VM"]
pub struct Restoring {
    vm: Box<Arriving>,
    deadline: Instant,
}

/// What has become of a VM that is being restored again.
pub enum RestoringNext {
    /// It still is.
    Waits(Restoring),
    /// It is live or lost, or preserved as before.
    Ended(Box<RestoredVm>),
}

/// Begins to restore a preserved VM, whose session was retrieved, by a process of `program` if that is not the running one.
/// If that fails, the VM stays preserved.
pub fn restore_again(
    luo: &dyn Orchestrator,
    (held, entry): (Held, VmEntry),
    confinement: &Arc<Confinement>,
    hints: MissingHints,
    program: Option<&NextHost>,
) -> Result<Restoring, Box<RestoredVm>> {
    let now = tsc::now();
    let vm = begin(luo, (held, entry), (now, now), confinement, hints, program)?;
    let deadline = vm.began + ANSWER_WITHIN;
    Ok(Restoring { vm: Box::new(vm), deadline })
}

impl Restoring {
    /// The VM's name.
    pub fn name(&self) -> &VmName {
        &self.vm.entry.machine.name
    }

    /// When the attempt has failed.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Goes on if the VM `is_ready`, or gives up after the deadline. Does not wait for the VM's process.
    pub fn go_on(self, is_ready: bool, confinement: &Arc<Confinement>) -> RestoringNext {
        let Self { vm, deadline } = self;
        let next = if is_ready { vm.go_on(confinement) } else { Next::Waits(*vm) };
        let vm = match next {
            Next::Live(vm) => return RestoringNext::Ended(Box::new(vm)),
            Next::Failed(vm, _) => return RestoringNext::Ended(vm),
            Next::Waits(vm) | Next::GoesOn(vm) => Self { vm: Box::new(vm), deadline },
        };
        if Instant::now() < deadline {
            return RestoringNext::Waits(vm);
        }
        let waits_for = vm.vm.waits_for().unwrap_or("its process resumes it");
        let error = IncomingError::TooLate { waits_for, within: ANSWER_WITHIN };
        RestoringNext::Ended(Box::new(vm.ends_with(error, confinement)))
    }

    /// Ends the attempt. The VM is preserved as before, or live if its guest was told to resume.
    pub fn give_up(self, confinement: &Arc<Confinement>) -> RestoredVm {
        self.ends_with(IncomingError::GivenUp, confinement)
    }

    fn ends_with(self, error: IncomingError, confinement: &Arc<Confinement>) -> RestoredVm {
        match self.vm.waits_for() {
            Some(_) => self.vm.fails(error, confinement).0,
            None => self.vm.runs_perhaps(confinement),
        }
    }
}

/// What becomes readable when the VM can go on.
impl AsFd for Restoring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.vm.as_fd()
    }
}
