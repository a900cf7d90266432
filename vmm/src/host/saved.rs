//! VMs whose process ended in an update or a handover that was undone, after the state of the guest was saved: nobody can
//! resume them, but they can be restored. So can one whose process ends later, but before it has read that it is to resume
//! the guest: the guest has not run since its state was saved.

use super::{Host, HostError, find};
use crate::causes::chain;
use crate::guests::Life;
use crate::guests::resuming::Resuming;
use crate::live_update::leaving::{Kept, Saved};
use crate::live_update::outgoing::Undone;
use crate::live_update::{Outcome, UpdateError};
use crate::machine::VmName;

impl Host {
    /// Restores the VMs that were saved. Returns why the update was undone; the error also names the VMs that stay
    /// preserved, and those that are lost.
    pub(super) fn restore_saved(&mut self, undone: Undone) -> UpdateError {
        let Undone { mut error, kept: Kept { saved, resuming } } = undone;
        self.note_resuming(resuming);
        let of = |vm: &Saved| (vm.entry.machine.name.clone(), vm.why.join(": "));
        let ended: Vec<_> = saved.iter().map(of).collect();
        // All of their processes end at the same time.
        saved.into_iter().for_each(|vm| self.keep(vm));
        for (name, ended) in ended {
            match self.restore_now(&name) {
                Ok(()) => tracing::warn!("VM `{name}` was restored, because it ended: {ended}"),
                Err(why) => error = not_restored(name, ended, &why, error),
            }
        }
        error
    }

    /// Notes the VMs that were told to resume their guests, and can be restored until they have read that.
    pub(super) fn note_resuming(&mut self, resuming: Vec<Saved>) {
        for Saved { held, entry, .. } in resuming {
            if let Ok(vm) = find(&mut self.vms, &entry.machine.name)
                && let Life::Live(live) = &mut vm.life
            {
                live.resuming = Some(Box::new(Resuming::of(&live.process, held, entry)));
            }
        }
    }

    /// Holds a VM that was saved as a preserved one. What is left of its process ends on a thread.
    pub(super) fn keep(&mut self, saved: Saved) {
        let Saved { held, entry, why } = saved;
        if let Ok(vm) = find(&mut self.vms, &entry.machine.name) {
            vm.end_with(Life::Preserved { held, entry: Some(Box::new(entry)), why });
        }
    }

    /// Begins to restore VM `index`, whose process has ended, if the process had not read that it was to resume the guest.
    /// Returns whether that is so.
    pub(super) fn restore_unresumed(&mut self, index: usize, why: &str) -> bool {
        let Life::Live(live) = &mut self.vms[index].life else { return false };
        let Some((held, entry)) = live.take_unresumed() else { return false };
        let name = entry.machine.name.clone();
        tracing::warn!("VM `{name}` is restored, because it ended before its guest ran on: {why}");
        self.keep(Saved { held, entry, why: vec![why.to_owned()] });
        self.restore_when_gone(&name);
        true
    }
}

/// The error of an update that was undone because of `source`, with a VM that was saved and could not be restored.
fn not_restored(vm: VmName, ended: String, why: &HostError, source: UpdateError) -> UpdateError {
    let (is_lost, why) = (why.outcome() == Some(Outcome::Lost), chain(why).join(": "));
    let source = Box::new(source);
    match is_lost {
        true => UpdateError::Lost { vm, ended, why, source },
        false => UpdateError::Preserved { vm, ended, why, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guests::GuestError;
    use crate::live_update::Step;

    #[test]
    fn a_vm_whose_process_dies_when_it_is_restored_is_lost_and_not_preserved() {
        let name: VmName = VmName::new("one").unwrap();
        let error = |why: GuestError| {
            let source = UpdateError::Stopped(Step::Jump);
            not_restored(name.clone(), "killed".to_owned(), &why.into(), source)
        };
        let why = || "why".to_owned();
        let kept = error(GuestError::StillPreserved { name: name.clone(), why: why() });
        assert_eq!(kept.outcome(), Outcome::Preserved);
        let lost = error(GuestError::Lost { name: name.clone(), why: why() });
        assert_eq!(lost.outcome(), Outcome::Lost);
        let said = lost.to_string();
        assert!(said.contains("`one` is lost") && said.contains("killed"), "{said}");
        assert!(said.contains("`boot`"), "{said}");
    }
}
