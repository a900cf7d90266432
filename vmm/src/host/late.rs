//! VMs of the last host that are late: they are preserved, as they came, and meanwhile the host serves its clients and
//! the other VMs. A VM whose process becomes ready after all is live from then on.
//!
//! Before anything else is done with what the host holds of such a VM, its process ends: see
//! [`end_late`](Host::end_late).

use std::os::fd::AsFd;
use std::time::Instant;

use super::arrival::finish;
use super::{Host, find};
use crate::guests::answers::readable;
use crate::guests::{Guest, Life};
use crate::live_update::incoming::{LateNext, RestoredVm};
use crate::machine::VmName;

impl Host {
    /// Takes the VMs that are late on as far as they are ready now.
    pub(super) fn go_on_with_late(&mut self) {
        let fds: Vec<_> = self.late.iter().map(AsFd::as_fd).collect();
        if fds.is_empty() {
            return;
        }
        let ready = readable(&fds, Instant::now());
        for index in 0..self.late.len() {
            // One at a time, so that a defect in one costs no other.
            let late = self.late.remove(0);
            let name = late.name().clone();
            match late.go_on(ready.contains(&index), &self.confinement) {
                LateNext::Waits(late) => self.late.push(late),
                LateNext::Live(vm) => self.arrives_late(&name, *vm),
                LateNext::Failed(cause) => {
                    tracing::error!("VM `{name}` stays preserved: {}", cause.join(": "));
                    if let Ok(Guest { life: Life::Preserved { why, .. }, .. }) =
                        find(&mut self.vms, &name)
                    {
                        *why = cause;
                    }
                    self.update_report(&name);
                }
            }
        }
    }

    fn arrives_late(&mut self, name: &VmName, late: RestoredVm) {
        let Ok(vm) = find(&mut self.vms, name) else { return };
        let before = std::mem::replace(vm, late.vm);
        vm.follow(&self.config);
        tracing::info!("VM `{name}` is late and {}", vm.state());
        if let Life::Preserved { held, .. } = before.life {
            self.unfinished.extend(held.into_session().and_then(finish));
        }
        self.finish_the_rest();
        self.update_report(name);
    }

    /// Gives up the restores that are late, of this VM or of all: the VMs stay preserved.
    pub(super) fn end_late(&mut self, vm: Option<&VmName>) {
        self.late.retain(|late| vm.is_some_and(|vm| vm != late.name()));
    }

    /// Returns when the next VM that is late is given up.
    pub(super) fn late_until(&self) -> Option<Instant> {
        self.late.iter().map(|late| late.deadline()).min()
    }
}
