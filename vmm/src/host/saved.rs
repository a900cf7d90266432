//! VMs whose process ended in an update or a handover that was undone, after the state of the guest was saved: nobody can
//! resume them, but they can be restored.

use super::{Host, find};
use crate::causes::chain;
use crate::guests::Life;
use crate::live_update::UpdateError;
use crate::live_update::leaving::Saved;
use crate::live_update::outgoing::Undone;

impl Host {
    /// Restores the VMs that were saved. Returns why the update was undone; the error also names the VMs that stay
    /// preserved.
    pub(super) fn restore_saved(&mut self, undone: Undone) -> UpdateError {
        let Undone { mut error, saved } = undone;
        for vm in saved {
            let (name, ended) = (vm.entry.machine.name.clone(), vm.why.join(": "));
            self.keep(vm);
            match self.restore_now(&name) {
                Ok(()) => tracing::warn!("VM `{name}` was restored, because it ended: {ended}"),
                Err(why) => {
                    let (why, source) = (chain(&why).join(": "), Box::new(error));
                    error = UpdateError::Preserved { vm: name, ended, why, source };
                }
            }
        }
        error
    }

    /// Holds a VM that was saved as a preserved one.
    pub(super) fn keep(&mut self, saved: Saved) {
        let Saved { held, entry, why } = saved;
        if let Ok(vm) = find(&mut self.vms, &entry.machine.name) {
            vm.life = Life::Preserved { held, entry: Some(Box::new(entry)), why };
        }
    }
}
