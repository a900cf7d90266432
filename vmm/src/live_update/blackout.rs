//! The time that a blackout may take: one deadline for all VMs in each step, and a budget for all steps.
//!
//! A step waits for all VMs at the same time, so that a process that hangs costs its deadline once. Whoever
//! undoes a step asks all VMs to resume before it waits for anything.
//!
//! systemd stops a service in any case, so there is nothing to go back to: the budget then is what each step may take,
//! because what one VM has used up must not end another.

use std::time::{Duration, Instant};

use super::leaving::Leaving;
use super::{Step, UpdateError};
use crate::guests::answers::collect;
use crate::guests::conversation::{ANSWER_WITHIN, Conversation, ProcessError};
use crate::link::Reply;

/// A blackout that has begun.
pub(super) struct Blackout {
    began: Instant,
    budget: Duration,
    /// Whether the blackout can be ended by undoing everything.
    can_be_undone: bool,
}

impl Blackout {
    /// Begins a blackout that may take `budget`; if it cannot be undone, each step of it may.
    pub(super) fn begins(budget: Duration, can_be_undone: bool) -> Self {
        Self { began: Instant::now(), budget, can_be_undone }
    }

    /// How long the next step may take.
    pub(super) fn left(&self) -> Duration {
        match self.can_be_undone {
            true => self.budget.saturating_sub(self.began.elapsed()),
            false => self.budget,
        }
    }

    /// Errors if the budget is used up before `step`.
    pub(super) fn check(&self, step: Step) -> Result<(), UpdateError> {
        match self.can_be_undone && self.began.elapsed() > self.budget {
            true => Err(UpdateError::OverBudget { step, budget: self.budget }),
            false => Ok(()),
        }
    }

    /// Waits for the answers of those of `vms` that owe one, as [`collect_within`] does, until the deadline of the step
    /// or the end of the budget.
    pub(super) fn collect(
        &self,
        step: Step,
        vms: &mut [Leaving<'_>],
        answered: impl FnMut(&mut Leaving<'_>, Result<Reply, ProcessError>) -> Result<(), UpdateError>,
    ) -> Result<(), UpdateError> {
        collect_within(ANSWER_WITHIN.min(self.left()), step, vms, answered)
    }
}

/// Waits for the answers of those of `vms` that owe one, for `within` at most, all at the same time. Calls `answered`
/// with each VM and its answer, or why it will not answer. Errors at the first error that this returns, or names all VMs
/// that are late: whoever does without them need not find them out one by one.
pub(super) fn collect_within(
    within: Duration,
    step: Step,
    vms: &mut [Leaving<'_>],
    mut answered: impl FnMut(&mut Leaving<'_>, Result<Reply, ProcessError>) -> Result<(), UpdateError>,
) -> Result<(), UpdateError> {
    let mut asked: Vec<_> = vms.iter_mut().filter(|vm| vm.live.process.awaits()).collect();
    let lives: Vec<_> = asked.iter().map(|vm| vm.live).collect();
    let conversations: Vec<&Conversation> = lives.iter().map(|live| &*live.process).collect();
    let late = collect(&conversations, Instant::now() + within, |index, answer| {
        answered(asked[index], answer)
    })?;
    let request = match step {
        Step::Pause => "pause the guest",
        Step::Save => "save the guest's state",
        _ => "sync the guest's disks",
    };
    let source = ProcessError::Late { request, within };
    match late[..] {
        [] => Ok(()),
        [one] => Err(asked[one].process_error(step)(source)),
        _ => {
            let vms = late.iter().map(|index| asked[*index].machine.name.clone()).collect();
            Err(UpdateError::Late { step, vms, source })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blackout_that_can_be_undone_ends_with_its_budget_and_another_has_it_for_each_step() {
        let budget = Duration::from_secs(2);
        let blackout = |seconds, can_be_undone| {
            let began = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
            Blackout { began, ..Blackout::begins(budget, can_be_undone) }
        };
        assert!(blackout(1, true).check(Step::Jump).is_ok() && blackout(1, true).left() < budget);
        let error = blackout(3, true).check(Step::Jump).unwrap_err().to_string();
        assert!(error.contains("`jump`") && error.contains("2s"), "{error}");
        assert_eq!(blackout(3, true).left(), Duration::ZERO);
        assert!(blackout(3, false).check(Step::Jump).is_ok());
        assert_eq!(blackout(3, false).left(), budget);
    }
}
